"""SIGKILL of the deployed ServerApp at every write: the resumed run ends with the very same model."""

import shutil
import threading

import pytest
from safetensors.numpy import load_file

from fedscan_core.errors import RunFailed
from fedscan_server import tracking
from fedscan_server.app import run_rounds


def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize(
    ("strategy", "every"),
    [("fedavgm", 5), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("fedavgm", "fedadam", "fedyogi"))],
)
def test_a_run_killed_at_any_write_goes_on_to_the_same_model(pretend, memory_path, at_every_write, strategy, every):
    """The fast one kills from round 2 on and looks at every fifth death; the slow ones leave nothing out."""
    run = pretend.run_config(
        rounds=2, aggregation={"strategy": strategy}, train={"tail_average": 1.0}, evaluation={"private": True}
    )
    whole, begun, folder = memory_path / "whole", memory_path / "begun", memory_path / "run"

    def work(where, **more):
        net = pretend.Network()
        watch = more.pop("watch", lambda progress: tracking.add_progress(where, progress))
        run_rounds(net, net.job(run, where, watch=watch, **more))
        return net

    work(whole)
    begun.mkdir()
    stop = threading.Event()
    if every > 1:
        with pytest.raises(RunFailed):
            work(begun, stop=stop, watch=lambda p: stop.set() if p.round == 1 and p.sites_done == 3 else None)
    shutil.copytree(begun, folder)
    expected, moments = load_file(whole / tracking.MODEL), 0
    for _ in at_every_write(lambda: work(folder)):
        moments += 1
        if moments % every == 0:
            net = work(folder)  # goes on with whatever the killed one left
            assert same(load_file(folder / tracking.MODEL), expected)
            rounds = tracking.read_rounds(folder)
            assert [(r["round"], r["sites"], r["void"]) for r in rounds] == [(1, 3, False), (2, 3, False)]
            assert tracking.read_summary(folder)["bytes_up"] == tracking.read_summary(whole)["bytes_up"]
            assert len(net.asked) == len(set(net.asked))
            assert all(line["phase"] for line in tracking.read_progress(folder))
        shutil.rmtree(folder)
        shutil.copytree(begun, folder)
    assert moments > 20
