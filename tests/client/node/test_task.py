"""The work of a task is done in a child: whatever befalls it, the answer is the constant `failed`."""

import os
import resource
import signal
import sys
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedscan_client.dp import plans
from fedscan_client.node import task
from fedscan_core import wire


@pytest.fixture
def site(tmp_path, make_site):
    return make_site(tmp_path / "north").folder


@pytest.fixture
def message():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    asked = Message(RecordDict(), 7, "train")
    asked.metadata.__dict__["_run_id"] = 1
    asked.metadata.__dict__["_message_id"] = "m"
    return asked


def ask(app, message, site, known=b""):
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    return task.answer(app, message, context, site, known)


def is_failed(reply):
    told = wire.read_reply(reply.content)
    return (told.site, told.status, told.reason, told.plan, told.update, told.histogram) == (
        *("north", "failed", ""),
        *(None, None, None),
    ) and len(told.anchor) == 64


def test_a_reply_comes_back_whole(message, site):
    values = np.random.default_rng(0).random(300_000)  # more than a pipe holds

    def app(message, context):
        return Message(RecordDict({"a": ArrayRecord({"x": Array(values)})}), reply_to=message)

    reply, known = ask(app, message, site)
    np.testing.assert_array_equal(reply.content["a"]["x"].numpy(), values)
    assert reply.metadata.reply_to_message_id == "m" and known


def _raises(message, context):
    raise RuntimeError("canary-patient-007")


def _exits(message, context):
    sys.exit(0)


def _is_killed(message, context):
    os.kill(os.getpid(), signal.SIGKILL)


def _runs_out_of_memory(message, context):
    resource.setrlimit(resource.RLIMIT_AS, (2**20, 2**20))
    return bytearray(2**30)


def _crashes(message, context):
    import ctypes
    import faulthandler

    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def _answers_nothing(message, context):
    return None


def _leaves_without_a_word(message, context):
    os._exit(0)


@pytest.mark.parametrize(
    "app", [_raises, _exits, _is_killed, _runs_out_of_memory, _crashes, _answers_nothing, _leaves_without_a_word]
)
def test_whatever_happens_the_server_hears_failed(message, site, app, capfd):
    reply, known = ask(app, message, site, b"")
    assert not reply.has_error() and is_failed(reply)
    assert known == b""
    assert "canary" not in str(reply.content)
    assert "failed" in capfd.readouterr().err  # what went wrong is in the site's own log


def test_a_site_that_cannot_be_read_has_no_name(message, tmp_path):
    reply, _ = ask(_raises, message, tmp_path)
    assert wire.read_reply(reply.content) == wire.Reply("unknown", "failed")


def test_the_child_has_ended_when_the_answer_is_there(message, site):
    """Its ledger lock with it: a child that lives on would make the next task fail."""

    def app(message, context):
        from fedscan_client.dp import ledger_lock

        ledger_lock.hold(site / "ledger.sqlite")
        return Message(RecordDict(), reply_to=message)

    from fedscan_client.dp import ledger_lock

    ask(app, message, site)
    with ledger_lock.borrow(site / "ledger.sqlite"):  # nobody holds it, this process neither
        pass


def test_the_child_dies_with_its_task(message, site):
    """A task that is killed leaves nobody at work."""
    reading, writing = os.pipe()

    def app(message, context):
        os.write(writing, f"{os.getpid()}\n".encode())
        time.sleep(60)

    parent = os.fork()
    if parent == 0:
        try:
            ask(app, message, site)
        finally:
            os._exit(1)
    child = int(os.read(reading, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            with open(f"/proc/{child}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    break
        except FileNotFoundError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the work goes on without its task")


def test_plans_travel_to_the_next_task(message, site, monkeypatch):
    monkeypatch.setattr(plans, "_PLANS", {})

    def first(message, context):
        plans._PLANS["network"] = None
        return Message(RecordDict(), reply_to=message)

    def second(message, context):
        assert "network" in plans._PLANS
        return Message(RecordDict(), reply_to=message)

    _, known = ask(first, message, site)
    assert plans._PLANS == {}
    reply, _ = ask(second, message, site, known)
    assert not reply.content.config_records  # not the constant `failed`
