"""The work of a task is done by the worker: whatever befalls that, the answer is the constant `failed`."""

import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedscan_client import cohort
from fedscan_client import site as sites
from fedscan_client.dp import ledger_lock
from fedscan_client.intake import cache
from fedscan_client.node import task, worker
from fedscan_core import wire
from fedscan_core.errors import FolderError


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


@pytest.fixture
def ask(message, site):
    """One request to a worker with this app, which is made by the first: a task's reply."""
    pipes: dict[Any, Any] = {}
    workers: list[Any] = []

    def ask(app, site=site):
        if app not in pipes:
            ours, theirs = multiprocessing.Pipe()
            child = os.fork()
            if child == 0:
                for pipe in (ours, *pipes.values()):
                    pipe.close()
                worker.main(theirs, app)
            theirs.close()
            pipes[app] = ours
            workers.append(child)
        context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
        return task.answer(pipes[app], message, context, site)

    yield ask
    for pipe in pipes.values():
        pipe.close()
    for child in workers:  # a pipe that closes is the end of its worker
        end = time.monotonic() + 20
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            assert time.monotonic() < end, "the worker goes on without its executor"
            time.sleep(0.01)


def plain(message):
    """An answer that is not `failed`."""
    return Message(wire.reply_record(wire.Reply("north", "ok")), reply_to=message)


def is_failed(reply):
    told = wire.read_reply(reply.content)
    return (told.site, told.status, told.reason, told.plan, told.update, told.histogram) == (
        *("north", "failed", ""),
        *(None, None, None),
    ) and len(told.anchor) == 64


def test_a_reply_comes_back_whole(ask):
    values = np.random.default_rng(0).random(300_000)  # more than a pipe holds

    def app(message, context):
        return Message(RecordDict({"a": ArrayRecord({"x": Array(values)})}), reply_to=message)

    for _ in range(2):
        reply = ask(app)
        np.testing.assert_array_equal(reply.content["a"]["x"].numpy(), values)
        assert reply.metadata.reply_to_message_id == "m"


def test_what_one_request_made_is_there_for_the_next(ask):
    made = []

    def app(message, context):
        made.append(os.getpid())
        content = wire.reply_record(wire.Reply("north", "refused", f"{made}"))
        return Message(content, reply_to=message)

    first, second = (wire.read_reply(ask(app).content).reason for _ in range(2))
    pid = first.strip("[]")
    assert second == f"[{pid}, {pid}]" and pid != str(os.getpid()) and not made


def _raises(message, context):
    raise RuntimeError("canary-patient-007")


def _raises_after(message):
    raise RuntimeError("after it took the lock")


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
def test_whatever_happens_the_server_hears_failed(ask, app, capfd):
    reply = ask(app)
    assert not reply.has_error() and is_failed(reply)
    assert "canary" not in str(reply.content)
    assert "failed" in capfd.readouterr().err  # what went wrong is in the site's own log
    assert is_failed(ask(app))  # the worker has ended: nobody is asked any more


def test_a_worker_that_answered_failed_ends(ask):
    """Memory that ran out, or a CUDA error, would stay with it."""
    numbers = iter(range(9))

    def app(message, context):
        if next(numbers) == 1:
            return Message(wire.reply_record(wire.Reply("north", "failed")), reply_to=message)
        return plain(message)

    assert not is_failed(ask(app))
    assert wire.read_reply(ask(app).content) == wire.Reply("north", "failed")  # its own
    assert is_failed(ask(app))  # the task's, which has an anchor


def test_a_site_that_cannot_be_read_has_no_name(ask, tmp_path):
    reply = ask(_raises, tmp_path)
    assert wire.read_reply(reply.content) == wire.Reply("unknown", "failed")


def test_the_cohort_stays_in_memory_until_it_changes(ask, site, cached, one_more, make_run):
    """Withdrawn or taken in: it counts from the next request on."""
    loads = []
    real = cohort._load

    def app(message, context):
        def counted(*args):
            loads.append(1)
            return real(*args)

        cohort._load = counted
        ids = cohort.load_patients(sites.load(site), make_run(), "train").ids
        cohort._load = real
        told = f"{len(loads)} " + " ".join(str(int(name, 16)) for name in ids)
        return Message(wire.reply_record(wire.Reply("north", "refused", told)), reply_to=message)

    def told():
        return wire.read_reply(ask(app).content).reason

    cached(site)
    assert [told(), told()] == ["1 0 1 2 3 4 5 6 7"] * 2
    cache.destroy_patient(site / "cache", f"{3:032x}")
    assert [told(), told()] == ["2 0 1 2 4 5 6 7"] * 2
    one_more(site, 9)
    assert [told(), told()] == ["3 0 1 2 4 5 6 7 9"] * 2


@pytest.mark.parametrize("ends", [plain, _raises_after])
def test_the_ledger_is_held_during_a_request_only(ask, site, ends):
    """A person's `fedscan agent budget raise` is let in between two rounds."""
    begun, go = os.pipe(), os.pipe()

    def app(message, context):
        ledger_lock.hold(site / "ledger.sqlite")
        os.write(begun[1], b"x")
        os.read(go[0], 1)
        return ends(message)

    def look():
        os.read(begun[0], 1)
        try:
            with ledger_lock.borrow(site / "ledger.sqlite"):
                pass
        except FolderError as error:
            refused.append(str(error))
        os.write(go[1], b"x")

    refused: list[str] = []
    looking = threading.Thread(target=look)
    looking.start()
    assert is_failed(ask(app)) == (ends is not plain)
    looking.join()
    assert len(refused) == 1 and "Another agent" in refused[0]
    with ledger_lock.borrow(site / "ledger.sqlite"):  # at once: the answer comes after the lock is free
        pass
    if ends is plain:
        os.write(go[1], b"x")
        assert not is_failed(ask(app))  # and the worker gets it again


def test_the_worker_dies_with_its_parent(site):
    """An agent that is killed leaves nobody at work."""
    reading, writing = os.pipe()

    def app(message, context):
        os.write(writing, f"{os.getpid()}\n".encode())
        time.sleep(60)

    parent = os.fork()
    if parent == 0:
        try:
            ours, theirs = multiprocessing.Pipe()
            if os.fork() == 0:
                worker.main(theirs, app)
            ours.send_bytes(pickle.dumps((None, None)))
            time.sleep(60)
        finally:
            os._exit(1)
    child = int(os.read(reading, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    end = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < end, "the work goes on without its agent"
        time.sleep(0.02)


def alive(pid):
    """Whether a process runs (one that nobody has waited for does not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
