"""Rounds through SuperNode, executor, task and worker: what stays in memory, what a kill or a withdrawal changes."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedscan_client.dp import ledger
from fedscan_client.dp.ledger_file import Book
from fedscan_client.intake import cache
from fedscan_core import config, wire
from fedscan_core.order import Order
from fedscan_models import registry

pytestmark = pytest.mark.deployed


@pytest.fixture
def ask(node, executor, make_run):
    """One message to the site: the Reply."""
    fake = sys.modules[type(node).__module__].FakeServer

    def ask(kind="train", run_id="open-1", round_=1, *, pull=False, **sections):
        """`pull`: do not wait for the reply; the run's id for `node.reply`."""
        run = make_run(**{"privacy": {"enabled": False}, "train": {"rounds": 9, "local_steps": 1}, **sections})
        model = {n: np.full_like(t.numpy(), 0.01) for n, t in registry.for_run(run).module.state_dict().items()}
        request = wire.Request(Order(run_id, config.for_sites(run)), round_, None if kind == "query" else model)
        said = fake(record=wire.request_record(request), message_type=kind)
        if pull:
            return node.pull(said)
        _, content = node.ask(said, 120)
        return wire.read_reply(content)

    return ask


def worker(executor):
    """The pid of the newest worker, as the site's own log tells it."""
    lines = [line for line in (executor / "executor.log").read_text().splitlines() if "a worker, process" in line]
    return int(lines[-1].split()[-1])


def alive(pid):
    return Path(f"/proc/{pid}").exists()


def same(reply, other):
    return all(np.array_equal(reply.update[name], other.update[name]) for name in reply.update)


def test_the_cohort_is_read_once_and_again_when_it_changes(ask, executor, one_more):
    """Without privacy a round's answer follows from cohort and model; the same round may be asked again and again."""
    assert ask("query", round_=0).status == "ok"
    full = ask()
    pid, away = worker(executor), executor / "away"
    assert full.status == "ok" and any(value.any() for value in full.update.values())
    patients = executor / "cache" / "patients"
    images = [path for path in patients.glob("*/*") if path.name != cache.INDEX]
    assert len(images) == 8
    away.mkdir()
    for number, path in enumerate(images):  # the index stays: as if nothing had changed
        path.rename(away / str(number))
    try:
        assert same(ask(), full) and worker(executor) == pid  # nothing was read
        kill(pid)
        none = ask()
        assert none.status == "ok" and not same(none, full) and worker(executor) != pid
    finally:
        for number, path in enumerate(images):
            (away / str(number)).rename(path)
    kill(worker(executor))
    assert same(ask(), full)
    pid = worker(executor)

    assert cache.destroy_patient(executor / "cache", sorted(cache.patients(executor / "cache"))[3])
    fewer = ask()
    more_than_that = one_more(executor, 41) and ask()
    assert worker(executor) == pid and not same(fewer, full) and not same(more_than_that, fewer)
    kill(pid)
    assert same(ask(), more_than_that)  # as a process that has never seen the others


def test_the_budget_can_be_raised_between_two_rounds(ask, executor):
    privacy = {"privacy": {"noise_multiplier": 1.0}}
    book = Book(executor / "ledger.sqlite", executor / "ledger.counter")
    assert ask("query", "private-1", 0, **privacy).status == "ok"
    assert ask("train", "private-1", 1, **privacy).status == "ok"
    pid = worker(executor)
    assert alive(pid)
    ledger.raise_budget(book, ledger.Budget(101.0, 1e-3), "Dr Example")
    toml = executor / "site.toml"
    toml.write_text(toml.read_text().replace("max_epsilon = 100.0", "max_epsilon = 101.0"))
    assert ask("train", "private-1", 2, **privacy).status == "ok" and worker(executor) == pid


@pytest.fixture
def stopped(ask, executor):
    """The worker, which will take no request before it is told to go on."""
    assert ask("query", round_=0).status == "ok"
    pid = worker(executor)
    within(lambda: below(parent(pid)) == [pid])  # the query's task has ended
    os.kill(pid, signal.SIGSTOP)
    yield pid
    if alive(pid):
        os.kill(pid, signal.SIGKILL)


def test_a_worker_killed_at_work_is_failed_and_the_next_one_works(ask, executor, node, stopped):
    run_id = ask(pull=True)
    within(lambda: len(below(parent(stopped))) == 2)
    os.kill(stopped, signal.SIGKILL)
    told = wire.read_reply(node.reply(run_id, 120)[1])
    assert (told.site, told.status, told.reason, told.update) == ("north", "failed", "", None)
    assert ask().status == "ok" and worker(executor) != stopped


def test_nobody_works_for_a_task_that_was_killed(ask, executor, stopped):
    """Nor does a later task hear that one's answer."""
    warm = parent(stopped)
    ask(pull=True)
    within(lambda: len(below(warm)) == 2)
    (task,) = set(below(warm)) - {stopped}
    os.kill(task, signal.SIGKILL)
    within(lambda: not alive(stopped))
    assert ask("query", round_=0).status == "ok" and worker(executor) != stopped


def kill(pid):
    """Kills a process and waits until it is gone: a busy machine takes its time."""
    os.kill(pid, signal.SIGKILL)
    within(lambda: not alive(pid))


def within(condition, seconds=60):
    """Waits until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def parent(pid):
    """The pid above a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def below(pid):
    """Pids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
