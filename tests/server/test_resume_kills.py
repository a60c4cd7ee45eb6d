"""SIGKILL of the deployed ServerApp at every write: the resumed run ends with the very same model."""

import shutil

import pytest
from safetensors.numpy import load_file

from fedscan_server import tracking
from fedscan_server.app import run_rounds


def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("strategy", ["fedavgm", pytest.param("fedadam", marks=pytest.mark.slow)])
def test_a_run_killed_at_any_write_goes_on_to_the_same_model(pretend, memory_path, at_every_write, strategy):
    run = pretend.run_config(
        rounds=2, aggregation={"strategy": strategy}, train={"tail_average": 1.0}, evaluation={"private": True}
    )
    whole, folder = memory_path / "whole", memory_path / "run"

    def work(where):
        net = pretend.Network()
        watch = lambda progress: tracking.add_progress(where, progress)  # noqa: E731 - one line
        run_rounds(net, net.job(run, where, watch=watch))
        return net

    work(whole)
    expected, moments = load_file(whole / tracking.MODEL), 0
    for _ in at_every_write(lambda: work(folder)):
        moments += 1
        net = work(folder)  # goes on with whatever the killed one left
        assert same(load_file(folder / tracking.MODEL), expected)
        rounds = tracking.read_rounds(folder)
        assert [(r["round"], r["sites"], r["void"]) for r in rounds] == [(1, 3, False), (2, 3, False)]
        assert tracking.read_summary(folder)["bytes_up"] == tracking.read_summary(whole)["bytes_up"]
        assert len(net.asked) == len(set(net.asked))
        assert all(line["phase"] for line in tracking.read_progress(folder))
        shutil.rmtree(folder)
    assert moments > 20
