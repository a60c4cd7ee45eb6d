"""`fedscan agent start`, pause, resume, stop and status: one agent for a site, and nothing runs while it is paused."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedscan_client import connection as connections
from fedscan_client import door
from fedscan_client.connection import Connection
from fedscan_client.node import flower, publish, start, status
from fedscan_core import node_key
from fedscan_core.errors import ConfigError, FolderError, SiteKeyError, WireError
from fedscan_core.supervise import Child


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


@pytest.fixture
def site(tmp_path, make_site):
    """An enrolled site whose coordinator is not there."""
    folder = make_site(tmp_path / "north").folder
    made = Connection("https://localhost:1", "lab", None, "north", "2026-01-01T00:00:00+00:00")
    connections.save(folder, made)
    node_key.create(folder / connections.NODE_KEY)
    return folder


@pytest.fixture
def fake_children(monkeypatch):
    """Two processes that do nothing, in place of SuperNode and executor."""

    def children(here, connection, agent, given, keep=()):
        argv = ["/bin/sh", "-c", f"echo $$ >> {agent}/pids; exec sleep 60"]
        return tuple(Child(name, argv, {"PATH": os.environ["PATH"]}, agent / f"{name}.log") for name in ("a", "b"))

    monkeypatch.setattr(start, "children", children)
    monkeypatch.setattr(flower, "check", lambda: None)
    monkeypatch.setattr(publish, "publish", lambda folder: None)


def alive(site):
    """Which of the fake children run."""
    try:
        pids = [int(line) for line in (site / "agent" / "pids").read_text().split()]
    except FileNotFoundError:
        return []
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def served(site, script, lines=None):
    """Runs `start` here, in the main thread, while `script` runs beside it and then sets its stop event."""
    stop, problems = threading.Event(), []

    def work():
        try:
            script()
        except BaseException as problem:
            problems.append(problem)
        finally:
            stop.set()

    thread = threading.Thread(target=work)
    thread.start()
    start.start(site, stop, (lines if lines is not None else []).append)
    thread.join()
    if problems:
        raise problems[0]


def test_it_starts_pauses_resumes_and_stops(site, fake_children):
    lines: list[str] = []

    def script():
        wait_for(lambda: len(alive(site)) == 2)
        assert status.running(site) == os.getpid()
        assert status.report(site, ask=False)["state"] == "running"
        assert status.pause(site) and not status.pause(site)
        wait_for(lambda: not alive(site))
        assert status.report(site, ask=False)["state"] == "paused"
        time.sleep(1)
        assert not alive(site)
        assert status.resume(site) and not status.resume(site)
        wait_for(lambda: len(alive(site)) == 2)

    served(site, script, lines)
    assert not alive(site) and status.running(site) is None
    told = status.report(site, ask=False)
    assert told["state"] == "stopped" and told["parts"]["agent"]["what"] == "stopped"
    assert any("paused" in line for line in lines)


def test_a_site_that_is_paused_starts_paused(site, fake_children):
    status.pause(site)

    def script():
        wait_for(lambda: status.running(site) is not None)
        time.sleep(1.5)
        assert not alive(site)

    served(site, script)


def test_a_second_agent_is_refused_and_the_first_goes_on(site, fake_children):
    def script():
        wait_for(lambda: len(alive(site)) == 2)
        with pytest.raises(FolderError, match=f"process {os.getpid()}"):
            start.start(site, threading.Event(), print)
        assert len(alive(site)) == 2

    served(site, script)


def test_stop_ends_an_agent_of_another_process(site):
    code = "import sys, time, signal; from pathlib import Path; from fedscan_client.node import start\n"
    code += "signal.signal(15, lambda *_: sys.exit(0))\n"
    code += "with start.only_agent(Path(sys.argv[1])): print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(site)], stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None and agent.stdout.readline() == b"up\n"
        assert status.running(site) == agent.pid
        assert status.stop(site, 30)
        assert agent.wait(10) == 0
    assert not status.stop(site)


def test_a_stale_lock_file_is_no_agent(site):
    """After a power cut the file names a pid that may be anybody's by now: it is not killed."""
    (site / "agent").mkdir()
    (site / "agent" / "lock").write_text(f"{os.getpid()}\n")
    assert status.running(site) is None and not status.stop(site)


@pytest.mark.parametrize("what", ["connection.toml", "node.key", "site.toml"])
def test_what_is_missing_is_said(site, what):
    (site / what).unlink()
    with pytest.raises((ConfigError, SiteKeyError)) as caught:
        start.start(site, threading.Event(), print)
    assert caught.value.remedy and status.running(site) is None and not (site / "agent" / "secret").exists()


def test_a_retired_site_does_not_start(site):
    """Not even where an interrupted retirement has left its keys."""
    (site / "retired").write_text("2026-01-01\n")
    with pytest.raises(FolderError, match="was retired") as caught:
        start.start(site, threading.Event(), print)
    assert "enrol" in caught.value.remedy and not (site / "agent").exists()


def test_the_children(site):
    from fedscan_client import site as sites

    here = sites.load(site)
    with start.only_agent(site) as agent:
        given = {"PATH": "/bin", "HTTPS_PROXY": "http://p:1", "PYTHONPATH": "/evil"}
        network, work = start.children(here, connections.load(site), agent, given)
        secret = agent / "secret"
        first = secret.read_bytes()
        start.children(here, connections.load(site), agent, given)
        assert len(first) == 32 and first != secret.read_bytes()  # anew for every start
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and stat.S_IMODE(agent.stat().st_mode) == 0o700
    words = list(network.argv)
    assert words[words.index("--superlink") + 1] == "localhost:1" and "--insecure" not in words
    assert words[words.index("--isolation") + 1] == "process" and words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--superexec-auth-secret-file") + 1] == str(secret)
    assert words[words.index("--auth-supernode-private-key") + 1] == str(site / "node.key")
    assert work.argv[-2] == f"127.0.0.1:{words[words.index('--port') + 1]}"
    for child in (network, work):
        assert "PYTHONPATH" not in child.env and list(child.argv[1:4]) == ["-P", "-s", "-m"]
        assert not any(first.hex() in word for word in child.argv)
    assert "HTTPS_PROXY" in network.env and "HTTPS_PROXY" not in work.env


def test_the_policy_is_published_again_until_it_is_heard(site, monkeypatch):
    tries, said, stop = [], [], threading.Event()

    def fails_twice(folder):
        tries.append(folder)
        if len(tries) < 3:
            raise WireError("the coordinator is not there")
        stop.set()

    monkeypatch.setattr(publish, "publish", fails_twice)
    monkeypatch.setattr(publish, "FIRST_RETRY", 0.01)
    publish.keep_published(site, stop, lambda part, what: said.append((part, what)))
    assert len(tries) == 3
    assert [what.partition(":")[0].partition(",")[0] for _, what in said] == [
        "not published",
        "not published",
        "published",
    ]


def test_status_asks_the_coordinator_and_survives_its_absence(site, monkeypatch):
    assert "localhost:1" in status.report(site)["seen_problem"]
    monkeypatch.setattr(door, "about", lambda folder: {"online": True, "last_seen": "2026-01-02"})
    assert status.report(site)["seen"] == {"online": True, "last_seen": "2026-01-02"}


def test_state_survives_a_full_disk(tmp_path, monkeypatch):
    lines: list[str] = []
    state = start.State(tmp_path / "state.json", lines.append)
    state.say("agent", "one")
    assert json.loads((tmp_path / "state.json").read_text())["agent"]["what"] == "one"

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(start, "write_atomic", full)
    state.say("agent", "two")
    assert len(lines) == 2


def test_the_agent_ends_its_children_when_it_is_killed(site, fake_children):
    """SIGKILL of the agent leaves nothing running: what nobody watches must not answer."""
    child = os.fork()
    if child == 0:
        try:
            start.start(site, threading.Event(), lambda line: None)
        finally:
            os._exit(1)
    wait_for(lambda: len(alive(site)) == 2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for(lambda: not alive(site))
    assert status.running(site) is None
