"""The executor's worker: kept from task to task, replaced when it is gone, ended when nobody needs it."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Message

from fedscan_client.node import executor, task, worker
from fedscan_core import wire


class Task:
    """What Flower answers: a task, or none where the token is ""."""

    def __init__(self, token):
        self.token, self.task, self.type = token, self, "flwr-clientapp"

    def HasField(self, name):
        return bool(self.token)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serves these tasks one after another, each the name of a thing that a task may do: the worker's pid in each."""
    out = tmp_path / "pids"

    def app(message, context):
        return Message(wire.reply_record(wire.Reply("north", "refused", str(os.getpid()))), reply_to=message)

    def run(token, kind, address, site, pipe):
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
        asked = Message(wire.reply_record(wire.Reply("north", "ok")), 7, "query")
        content: Any = worker.ask(pipe, asked, cast(Any, None))
        with out.open("a") as file:
            file.write(f"{wire.read_reply(content).reason}\n")
        if token == "leaves a word":
            pipe.send_bytes(b"x")  # the worker's answer to this is nobody's
        if token == "dies":
            os.kill(os.getpid(), signal.SIGKILL)

    real = worker.main
    monkeypatch.setattr(worker, "main", lambda pipe: real(pipe, app))
    monkeypatch.setattr(task, "main", run)
    monkeypatch.setattr(executor, "warm", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setattr(executor, "POLL_SECONDS", 0.01)
    started: list[Any] = []
    begin = worker.start

    def start(context):
        started.append(begin(context))
        return started[-1]

    monkeypatch.setattr(worker, "start", start)

    def serve(*steps):
        todo, stop = list(steps), threading.Event()

        class Client:
            def AcquireTask(self, request):
                if not todo:
                    stop.set()
                step = todo.pop(0) if todo else ""
                if callable(step):
                    step = step(int(out.read_text().split()[-1])) or ""
                return Task(step)

        executor.serve(Client(), tmp_path, "127.0.0.1:1", stop)
        pids = [int(line) for line in out.read_text().split()]
        assert not any(alive(pid) for pid in pids)  # nobody is left
        return pids

    return serve


def alive(pid):
    return Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]


def test_one_worker_for_all_tasks(served):
    first, *others = served("one", "", "two", "three")
    assert others == [first, first] and first != os.getpid()


def test_a_worker_that_died_is_replaced_before_the_next_task(served):
    def kill(pid):
        os.kill(pid, signal.SIGKILL)
        while alive(pid):
            time.sleep(0.01)
        return "two"

    first, second, third = served("one", kill, "three")
    assert first != second == third


@pytest.mark.parametrize("ends", ["dies", "leaves a word"])
def test_what_a_task_left_behind_reaches_no_other(served, ends):
    def once_it_was_read(pid):
        end = time.monotonic() + (5.0 if ends == "leaves a word" else 0.0)  # a worker that reads such a word ends
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.01)
        return "two"

    first, second = served(ends, once_it_was_read)
    assert first != second


def test_a_worker_that_nobody_needs_gives_its_memory_back(served, monkeypatch):
    monkeypatch.setattr(worker, "IDLE_SECONDS", 0.2)
    seen = []

    def look(pid):
        seen.append(alive(pid))
        time.sleep(0.3)

    first, second = served("one", look, "", look, "two")
    assert seen == [True, False] and first != second
