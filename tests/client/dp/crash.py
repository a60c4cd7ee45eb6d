"""Kills the training process again and again and tells what was left each time. Run by test_crash.py.

    python crash.py SITE_DIR RUN.json EVERY KILLS

Everything is imported once, here; children are forked and die by SIGKILL in the real app: at the k-th boundary (before
and after every commit, fsync, rename, removal and drawing of a key) of a fresh site, for every k there is (EVERY = 1),
or for each EVERY-th boundary of its kind; then KILLS times at a random moment of one site's long life. What a child did
is written down with single appending writes, which a SIGKILL cannot tear: "noise" before a key is drawn, "sent" once
the reply is the server's.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedscan_client import app, approvals, cohort, evaluate, site, train
from fedscan_client.audit import log
from fedscan_client.dp import ledger, ledger_file, noise
from fedscan_client.gate import egress
from fedscan_core import config, wire
from fedscan_core.order import Order
from fedscan_core.wire import Request
from fedscan_models import registry

Told = list[dict[str, Any]]
Boundary = Callable[[str], None]


def main() -> None:
    folder, run_json, every, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    run = config.from_server(run_json.read_text())
    model = {n: t.numpy() for n, t in registry.for_run(run).module.state_dict().items()}
    splits = {split: cohort.load_patients(site.load(folder), run, split) for split in ("train", run.evaluation.split)}
    cohort.load_patients = lambda site, run, split: splits[split]  # the children need not decode again
    asker = Asker(run, model)
    log.append(folder, "start")  # a site that has its log already, as a deployed one has
    boundaries = list[str]()
    for name in ("warm", "dry"):  # what happens once in a process only is no boundary of the children
        boundaries.clear()
        fresh = copy(folder, name)
        watch(boundaries.append)
        asker.first_rounds(fresh, Path(os.devnull))
        watch(lambda name: None)
    told: Told = []
    for number, name in chosen(boundaries, every):
        fresh = copy(folder, f"k{number}")
        seen = fresh / "seen"
        status = in_child(functools.partial(asker.first_rounds, fresh, seen), at=number)
        told.append(look(fresh, seen, "boundary", name, status))
        asker.first_rounds(fresh, seen)  # the server asks again
        told.append(look(fresh, seen, "again", name, None))
        shutil.rmtree(fresh)
    long, rng = copy(folder, "long"), random.Random(0)
    life = long / "seen"
    for number in range(kills):
        wait = functools.partial(some_lines_and_a_while, life, rng.randrange(1, 9), rng.uniform(0.0, 0.03))
        told.append(look(long, life, "random", str(number), in_child(lambda: asker.on_and_on(long, life), wait=wait)))
    print(json.dumps({"boundaries": boundaries, "told": told}))


class Asker:
    """The server: what it asks in which order."""

    def __init__(self, run: Any, model: Any) -> None:
        self.run, self.model, self.config = run, model, config.for_sites(run)

    def ask(self, here: site.Site, seen: Path, kind: str, run_id: str, round_: int = 0) -> str:
        note(seen, {"asked": kind, "run": run_id, "round": round_})
        handle = {"query": app._declare, "train": app._train, "evaluate": app._evaluate}[kind]
        model = None if kind == "query" else self.model
        with keys_noted(seen, run_id, round_):
            try:
                request = Request(Order(run_id, self.config), round_, model)
                reply = handle(here, request)
                with app._leaving(here, request, reply):
                    egress.answer(here, kind, request, reply)
            except Exception as error:  # as `app._answer` does
                note(seen, {"error": f"{type(error).__name__}: {error}", "run": run_id, "round": round_})
                return "failed"
        released = reply.update if reply.histogram is None else {"histogram": reply.histogram}
        if released is not None:
            note(seen, {"sent": wire.fingerprint(released), "run": run_id, "round": round_})
        return reply.status

    def first_rounds(self, folder: Path, seen: Path) -> None:
        """A new run on a new site: declare, a round, the same one again, another one."""
        here = site.load(folder)
        self.ask(here, seen, "query", "r0")
        for round_ in (1, 1, 2):
            self.ask(here, seen, "train", "r0", round_)

    def on_and_on(self, folder: Path, seen: Path) -> None:
        """Goes on where the ledger stands: the last round again, then the next ones, run after run, past their ends."""
        here = site.load(folder)
        booked = ledger.summary(here.book)["runs"] if here.ledger.exists() else {}
        number = max(0, len(booked) - 1)
        while True:
            run_id = f"r{number}"
            self.ask(here, seen, "query", run_id)
            rounds = booked.get(run_id, {"rounds": {}})["rounds"]
            for round_ in range(max(1, *rounds, 1), self.run.train.rounds + 2):
                self.ask(here, seen, "train", run_id, round_)
            self.ask(here, seen, "evaluate", run_id)
            number += 1


def note(seen: Path, record: dict[str, Any]) -> None:
    descriptor = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, json.dumps(record).encode() + b"\n")
    os.close(descriptor)


@contextlib.contextmanager
def keys_noted(seen: Path, run_id: str, round_: int) -> Any:
    """Writes down every key before it is drawn."""
    real = noise.SecretStream

    def stream() -> Any:
        note(seen, {"noise": True, "run": run_id, "round": round_})
        return real()

    for module in (train, evaluate):
        setattr(module, "SecretStream", stream)  # noqa: B010 - mypy
    try:
        yield
    finally:
        for module in (train, evaluate):
            setattr(module, "SecretStream", real)  # noqa: B010 - mypy


# ---------------------------------------------------------------------------------------------------------- boundaries

_REAL = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "urandom")}
_TRACED = {"BEGIN", "INSER", "COMMI"}
_CONNECT = {module: module._connect for module in (ledger_file, approvals)}


def chosen(boundaries: list[str], every: int) -> list[tuple[int, str]]:
    """Each `every`-th boundary of its kind, from the kind's first on, and its last: number and name."""
    kinds: dict[str, list[int]] = {}
    for number, name in enumerate(boundaries):
        kinds.setdefault(name, []).append(number)
    numbers = {number for kind in kinds.values() for number in (*kind[::every], kind[-1])}
    return [(number, boundaries[number]) for number in sorted(numbers)]


def watch(boundary: Boundary) -> None:
    """Calls `boundary` before and after everything that changes what is on disk."""

    def around(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            boundary(f"before {name}")
            # SIGKILL loses nothing that was written: forcing it to the disk would only take most of the time.
            done = None if name == "fsync" else _REAL[name](*args, **kwargs)
            boundary(f"after {name}")
            return done

        return call

    def connect(module: Any, path: Path, mode: str) -> Any:
        db = _CONNECT[module](path, mode)
        if mode == "rw":
            db.set_trace_callback(lambda sql: boundary(f"before {sql.split('(')[0]}") if sql[:5] in _TRACED else None)
        return db

    for name in _REAL:
        setattr(os, name, around(name))
    for module in _CONNECT:
        vars(module)["_connect"] = functools.partial(connect, module)


def some_lines_and_a_while(seen: Path, lines: int, seconds: float) -> None:
    """Waits until the child has noted so many lines, then so long."""
    size = seen.stat().st_size if seen.exists() else 0
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if seen.exists() and seen.read_bytes()[size:].count(b"\n") >= lines:
            break
        time.sleep(0.001)
    time.sleep(seconds)


def in_child(work: Callable[[], None], *, at: int | None = None, wait: Callable[[], None] = lambda: None) -> int:
    """Forks, works and dies: at the boundary number `at`, or when `wait` returns. The child's wait status."""
    child = os.fork()
    if child == 0:
        count = 0

        def boundary(name: str) -> None:
            nonlocal count
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        try:
            watch(boundary)
            work()
        finally:
            os._exit(7)  # lived
    if at is None:
        wait()
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def copy(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(name)))


# -------------------------------------------------------------------------------------------------------- what is left


def look(folder: Path, seen: Path, how: str, where: str, status: int | None) -> dict[str, Any]:
    """Opens the ledger, which checks all of it, and tells what it, the record of releases and the child say."""
    here = site.load(folder)
    told: dict[str, Any] = {"how": how, "where": where, "status": status, "rows": [], "seen": [], "released": []}
    if seen.exists():
        told["seen"] = [json.loads(line) for line in seen.read_text().splitlines()]
    told["released"] = [row for row in log.read(folder) if row["event"] == "release"]
    if here.ledger.exists() or here.book.counter.exists():
        budget = ledger.Budget(here.policy.max_epsilon, here.policy.max_delta)
        ledger.open_ledger(here.book, budget, here.patients_declared)
        with ledger_file.reading(here.book) as db:
            told["rows"] = ledger_file.find(db, "1 ORDER BY seq")
    return told


if __name__ == "__main__":
    main()
