"""The app and its ledger: what happens when a file of it, the gate or the process is another one than before."""

import contextlib
import dataclasses
import os
import shutil
import signal
import time

import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file, save_file

from fedscan.grid import InlineGrid
from fedscan_client import app
from fedscan_client.audit import log
from fedscan_client.dp import engine, ledger_file, ledger_lock
from fedscan_core import accounting, config, wire
from fedscan_core.order import Order
from fedscan_core.wire import Request
from fedscan_models import registry


def ask(here, kind, run, *, round_=0, model=None):
    grid = InlineGrid(app.make_app(here if callable(here) else lambda context: here), 1)
    record = wire.request_record(Request(Order("demo", config.for_sites(run)), round_, model))
    (reply,) = grid.send_and_receive([Message(record, next(iter(grid.get_node_ids())), kind)])
    return dataclasses.replace(wire.read_reply(reply.content), anchor="")


def weights(run):
    return {n: t.numpy() for n, t in registry.for_run(run).module.state_dict().items()}


def rows(here):
    with ledger_file.reading(here.book) as db:
        return ledger_file.find(db, "1 ORDER BY seq")


def released(here):
    return [row for row in log.read(here.folder) if row["event"] == "release"]


@pytest.fixture
def run(make_run):
    """Three private rounds and a private evaluation."""
    return make_run(evaluation={"private": True})


@pytest.fixture
def here(make_site, tmp_path, run):
    """A site that has declared for the run."""
    here = make_site(tmp_path / "north")
    assert ask(here, "query", run).status == "ok"
    return here


def test_an_answer_that_changed_on_disk_does_not_leave(here, run):
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "ok"
    (answer,) = (here.folder / "outbox").glob("*/*")
    other = {name: array + 1 for name, array in load_file(answer).items()}
    save_file(other, answer)
    assert ask(here, "train", run, round_=1, model=weights(run)) == wire.Reply("north", "failed")
    assert len(released(here)) == 1 and "not what was persisted" in (here.folder / "site.log").read_text()


def test_a_ledger_put_back_from_a_backup_trains_no_more(here, run, tmp_path):
    shutil.copy(here.ledger, tmp_path / "backup")
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "ok"
    for path in here.folder.glob("ledger.sqlite*"):
        path.unlink()
    shutil.copy(tmp_path / "backup", here.ledger)
    for kind, round_ in (("query", 0), ("train", 1), ("train", 2), ("evaluate", 0)):
        assert ask(here, kind, run, round_=round_, model=weights(run)) == wire.Reply("north", "failed")
    assert "older copy" in (here.folder / "site.log").read_text() and len(released(here)) == 1


def test_the_record_says_what_the_noise_was_measured_in(here, run):
    ask(here, "train", run, round_=1, model=weights(run))
    ask(here, "evaluate", run, model=weights(run))
    step, query = (row for row in rows(here) if row["state"] == "reserved")
    plan = accounting.plan_for(run, 20)
    written = {key: float(step[key]["decimal"]) for key in ("q", "sigma", "C", "divisor")}
    assert written == {
        "q": 1.0,
        "sigma": plan.noise_multiplier,
        "C": engine.sensitivity(run.privacy.clip),
        "divisor": 20.0,
    }
    assert (step["steps_reserved"], step["mechanism"]) == (run.train.local_steps, "poisson_gauss")
    assert (query["mechanism"], float.fromhex(query["sigma"]["hex"])) == ("gaussian", plan.evaluation_noise)


def test_the_hospital_chooses_the_gate_and_a_change_of_it_is_refused(make_site, make_run, tmp_path):
    run = make_run()
    here = make_site(tmp_path / "north", gate="rdp")
    assert ask(here, "query", run).status == "ok"
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "ok"
    assert rows(here)[0]["gate"] == "rdp" and rows(here)[0]["order"] >= 2
    other = here.model_copy(update={"policy": dataclasses.replace(here.policy, gate="sum")})
    assert ask(other, "query", run) == wire.Reply("north", "failed")


def test_a_second_agent_is_refused_and_says_so_at_the_site_only(here, run):
    """The deployed app takes the ledger for its process; another process meets it held."""
    context = Context(
        run_id=1, node_id=1, node_config={app.SITE_KEY: str(here.folder)}, state=RecordDict(), run_config={}
    )
    read, write = os.pipe()
    first = os.fork()
    if first == 0:
        with contextlib.suppress(BaseException):
            app._open_configured(context)
            os.write(write, b"x")
            time.sleep(60)
        os._exit(1)
    try:
        assert os.read(read, 1) == b"x"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger_lock, "_PATIENCE", 0.05)
            reply = ask(lambda _: app._open_configured(context), "train", run, round_=1, model=weights(run))
        assert reply == wire.Reply("unknown", "failed")
        assert ask(here, "train", run, round_=1, model=weights(run)) == wire.Reply("north", "failed")
        assert (here.folder / "site.log").read_text().count("Another agent") == 2
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert [row["state"] for row in rows(here)] == ["opened", "admitted"]
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "ok"
