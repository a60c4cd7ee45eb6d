import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fedscan_core import supervise
from fedscan_core.supervise import Child


def child(tmp_path, code, name="one"):
    return Child(name, [sys.executable, "-c", code], os.environ, tmp_path / f"{name}.log")


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


@pytest.fixture
def heard(tmp_path):
    """Runs children in a thread; ends them with the test."""
    events, stop, threads = [], threading.Event(), []

    def go(*children, **more):
        thread = threading.Thread(
            target=supervise.run, args=(children, stop, lambda name, event: events.append((name, event))), kwargs=more
        )
        thread.start()
        threads.append(thread)
        return events, stop, thread

    yield go
    stop.set()
    for thread in threads:
        thread.join()


def test_a_child_that_ends_is_started_again_after_a_pause(tmp_path, heard, monkeypatch):
    monkeypatch.setattr(supervise, "FIRST_PAUSE", 0.1)
    code = "import time; print('here', flush=True)"
    events, _, _ = heard(child(tmp_path, code))
    wait_for(lambda: events.count(("one", "started")) >= 3)
    assert ("one", "ended with code 0") in events
    assert (tmp_path / "one.log").read_text().count("here") >= 2


def test_children_end_in_reverse_order_and_the_deaf_are_killed(tmp_path, heard):
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    polite = "import time; print('up', flush=True); time.sleep(99)"
    events, stop, thread = heard(child(tmp_path, deaf, "first"), child(tmp_path, polite, "second"), grace=1.0)
    for name in ("first", "second"):
        wait_for(
            lambda name=name: (
                "up" in (tmp_path / f"{name}.log").read_text() if (tmp_path / f"{name}.log").exists() else 0
            )
        )
    stop.set()
    thread.join()
    assert [event for event in events if event[1] == "stopped"] == [("second", "stopped"), ("first", "stopped")]


def test_a_program_that_is_not_there_is_said_and_tried_again(tmp_path, heard):
    events, _, _ = heard(Child("gone", [str(tmp_path / "no-such")], {}, tmp_path / "log"))
    wait_for(lambda: any("cannot start" in event for _, event in events))


def test_children_die_with_a_parent_that_is_killed(tmp_path):
    code = f"""
import sys, threading
from pathlib import Path
from fedscan_core.supervise import Child, run
sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
run([Child("one", [sys.executable, "-c", sleeper], {{}}, Path({str(tmp_path / "log")!r}))], threading.Event())
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    pid = wait_for(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().strip())
    parent.kill()
    parent.wait()

    def gone():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        return False

    try:
        wait_for(gone)
    finally:
        if not gone():
            os.kill(int(pid), signal.SIGKILL)


def test_a_large_log_is_moved_aside(tmp_path, heard, monkeypatch):
    monkeypatch.setattr(supervise, "_LOG_BYTES", 10)
    (tmp_path / "one.log").write_text("an old, long log\n")
    heard(child(tmp_path, "print('new', flush=True); import time; time.sleep(99)"))
    wait_for(lambda: (tmp_path / "one.log.1").exists())
    assert "old" in (tmp_path / "one.log.1").read_text()
