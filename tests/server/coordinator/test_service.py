import os
import socket
import subprocess
import sys
import threading

import pytest

from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.supervise import Child
from fedscan_server.coordinator import service, state, vault


def test_everything_is_private_and_nothing_else_is_made(coordinator, tmp_path):
    paths = [coordinator.folder, *coordinator.folder.rglob("*")]
    assert not [path for path in paths if path.stat().st_mode & 0o077]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert len(coordinator.control_secret) == 64 != coordinator.superexec_secret.read_text()
    assert coordinator.control_secret != coordinator.superexec_secret.read_text()


def test_what_is_there_is_left_alone(coordinator):
    before = coordinator.ca_pem
    with pytest.raises(FolderError, match="left alone"):
        service.init(coordinator.folder, "x", "localhost:1")
    assert state.load(coordinator.folder).ca_pem == before


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "state").mkdir()
    assert service.init(tmp_path / "state", "x", "localhost:1234").bind == ("0.0.0.0", 1234)


@pytest.mark.parametrize("address", ["localhost", "http://localhost:1", "localhost:0", "a b:1", ""])
def test_a_wrong_address_leaves_nothing_behind(tmp_path, address):
    with pytest.raises(ConfigError):
        service.init(tmp_path / "state", "x", address)
    assert not list(tmp_path.iterdir())


def test_our_processes_get_a_known_environment(coordinator, monkeypatch):
    for name, value in {"HTTPS_PROXY": "http://x", "FLWR_OIDC_ENABLED": "1", vault.KEY: "5a" * 32}.items():
        monkeypatch.setenv(name, value)
    env = service.environment(coordinator)
    assert not {"HTTPS_PROXY", "FLWR_OIDC_ENABLED", vault.KEY} & set(env)  # it does not encrypt
    assert (env["FLWR_TELEMETRY_ENABLED"], env["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert env["FEDSCAN_COORDINATOR"] == str(coordinator.folder)


def test_the_vaults_key_reaches_them_or_nothing_starts(tmp_path, monkeypatch):
    for name in (vault.KEY, vault.KEY_FILE):
        monkeypatch.delenv(name, raising=False)
    key = tmp_path / "vault.key"
    c = service.init(tmp_path / "state", "x", "localhost:1", "127.0.0.1:1", key_file=str(key))
    assert c.encrypt and key.stat().st_mode & 0o777 == 0o600
    assert service.environment(c)[vault.KEY_FILE] == str(key)
    monkeypatch.setenv(vault.KEY, "5a" * 32)
    assert service.environment(c)[vault.KEY] == "5a" * 32
    monkeypatch.delenv(vault.KEY)
    key.unlink()
    with pytest.raises(ConfigError):
        service.children(c)


def test_init_takes_a_key_that_is_there(tmp_path):
    vault.new_key(tmp_path / "vault.key")
    before = (tmp_path / "vault.key").read_text()
    service.init(tmp_path / "state", "x", "localhost:1", key_file=str(tmp_path / "vault.key"))
    assert (tmp_path / "vault.key").read_text() == before


def test_secrets_are_on_no_command_line(coordinator):
    words = [word for child in service.children(coordinator) for word in child.argv]
    assert coordinator.control_secret not in words and coordinator.superexec_secret.read_text() not in words
    assert "--allow-runtime-dependency-installation" not in words


def test_one_at_a_time_and_stop_ends_it(coordinator, monkeypatch):
    """In a process of its own, with sleepers for children."""
    code = f"""
import os, signal, sys, threading
from pathlib import Path
from fedscan_core.supervise import Child
from fedscan_server.coordinator import service, state
c = state.load(Path({str(coordinator.folder)!r}))
sleep = [sys.executable, "-c", "import time; time.sleep(99)"]
service.children = lambda c: [Child("one", sleep, os.environ, c.logs / "one.log")]
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
service.start(c, stop, lambda name, event: print(name, event, flush=True))
"""
    assert service.pid(coordinator) is None and not service.stop(coordinator)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout
    try:
        assert process.stdout.readline() == "one started\n"
        assert service.pid(coordinator) == process.pid
        with pytest.raises(FolderError, match=f"runs already \\(process {process.pid}\\)"):
            service.start(coordinator, threading.Event(), print)
        assert service.stop(coordinator)
        assert process.wait(5) == 0
        assert process.stdout.read() == "one stopped\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert service.pid(coordinator) is None


def test_a_killed_coordinator_leaves_no_lock(coordinator):
    code = f"""
import time
from pathlib import Path
from fedscan_server.coordinator import service, state
with service.lock(state.load(Path({str(coordinator.folder)!r}))):
    print("held", flush=True)
    time.sleep(99)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout
    try:
        assert process.stdout.readline() == "held\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert service.pid(coordinator) is None
    with service.lock(coordinator):
        assert service.pid(coordinator) == os.getpid()


def test_a_taken_port_is_said_before_anything_starts(coordinator, monkeypatch):
    started = []
    monkeypatch.setattr(service, "run", lambda *more: started.append(more))
    with socket.create_server(("127.0.0.1", coordinator.bind[1])), pytest.raises(ConfigError, match="listened on"):
        service.start(coordinator, threading.Event(), print)
    assert not started
    service.start(coordinator, threading.Event(), print)
    assert [child.name for child in started[0][0]] == ["superlink", "superexec", "edge"]
    assert all(isinstance(child, Child) for child in started[0][0])
