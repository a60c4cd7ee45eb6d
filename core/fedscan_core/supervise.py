"""Keeps a few processes running: starts them, starts them again with growing pauses, ends them together.

Used by the hospital's agent and by the coordinator, which each run Flower's own programs beside ours. A child ends with
its parent even if that is killed (Linux: PR_SET_PDEATHSIG), so that nothing goes on unwatched.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FIRST_PAUSE, LONGEST_PAUSE, HEALTHY_AFTER = 1.0, 60.0, 120.0  # seconds
_LOG_BYTES = 8 * 2**20  # then the log is moved to NAME.log.1


@dataclass(frozen=True)
class Child:
    """One process. `argv[0]` is a path or found on PATH; `env` is the whole environment; `log` takes both outputs."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = FIRST_PAUSE
    next_start: float = 0.0


def run(
    children: Sequence[Child],
    stop: threading.Event,
    tell: Callable[[str, str], None] = lambda name, event: None,
    *,
    grace: float = 20.0,
) -> None:
    """Runs all children until `stop` is set; then SIGTERM to each, in reverse order, and SIGKILL after `grace` seconds.

    A child that ended is started again after a pause: 1 s, doubled each time up to 60 s, and 1 s again once it ran for
    two minutes. `tell(name, event)` hears "started", "ended with code N", "stopped".
    """
    running = [_Running(child) for child in children]
    try:
        while not stop.is_set():
            for one in running:
                _look_after(one, tell)
            stop.wait(0.2)
    finally:
        _end(running, grace, tell)


def _look_after(one: _Running, tell: Callable[[str, str], None]) -> None:
    now = time.monotonic()
    if one.process is not None:
        code = one.process.poll()
        if code is None:
            return
        tell(one.child.name, f"ended with code {code}")
        if now - one.started >= HEALTHY_AFTER:
            one.pause = FIRST_PAUSE
        one.process, one.next_start = None, now + one.pause
        one.pause = min(2 * one.pause, LONGEST_PAUSE)
    if now >= one.next_start:
        try:
            one.process = _start(one.child)
        except OSError as error:
            tell(one.child.name, f"cannot start: {error.strerror}")
            one.next_start, one.pause = now + one.pause, min(2 * one.pause, LONGEST_PAUSE)
            return
        one.started = now
        tell(one.child.name, "started")


def _start(child: Child) -> subprocess.Popen[bytes]:
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if child.log.stat().st_size > _LOG_BYTES:
            os.replace(child.log, child.log.with_name(child.log.name + ".1"))
    descriptor = os.open(child.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            list(child.argv),
            env=dict(child.env),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,  # Ctrl-C in the terminal reaches the parent only, which ends them in order
            preexec_fn=_die_with_parent,
        )
    finally:
        os.close(descriptor)


_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(running: Sequence[_Running], grace: float, tell: Callable[[str, str], None]) -> None:
    give_up = time.monotonic() + grace
    for one in reversed(running):
        if one.process is None:
            continue
        _signal(one.process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(max(0.1, give_up - time.monotonic()))
        _signal(one.process, signal.SIGKILL)  # and what it left behind in its session
        one.process.wait()
        tell(one.child.name, "stopped")


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
