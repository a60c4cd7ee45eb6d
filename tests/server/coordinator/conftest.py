"""A coordinator in a temporary folder, and real Flower processes on loopback for those tests that need them."""

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedscan_core import node_key, order
from fedscan_server.coordinator import registry, service, state


def make(folder: Path, **more):
    return service.init(folder, "Test centre", "localhost:8443", f"127.0.0.1:{service.free_port()}", **more)


@pytest.fixture
def coordinator(tmp_path):
    return make(tmp_path / "state")


@pytest.fixture
def bare(memory_path):
    """A coordinator with settings and a registry only, in memory."""
    folder = memory_path / "state"
    folder.mkdir(mode=0o700)
    state.write_settings(folder, "Test centre", "localhost:8443", "127.0.0.1:8443", 8444)
    c = state.load(folder)
    registry.create(c)
    return c


@pytest.fixture(scope="session")
def site_key():
    """Makes a site's public key."""
    return lambda: node_key.public_text(ec.generate_private_key(ec.SECP384R1()))


@pytest.fixture(scope="session")
def person_key():
    """Makes a person's public key."""
    return lambda: order.public_text(Ed25519PrivateKey.generate())


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A coordinator whose SuperLink runs, without SuperExec: a run that is started waits."""
    c = make(tmp_path_factory.mktemp("live") / "state")
    with running(c, ("superlink",)):
        yield c


@pytest.fixture
def processes():
    """(running, supernode, wait_for): see below."""
    return running, supernode, wait_for


def wait_for(condition, seconds=40.0, pause=0.1):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(pause)
    raise AssertionError("it did not happen")


def healthy(port: int) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
        return True
    return False


@contextlib.contextmanager
def running(c, names=("superlink", "superexec")):
    """The coordinator's own command lines, without its supervisor."""
    processes = []
    try:
        for child in service.children(c):
            if child.name in names:
                with open(child.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
                    processes.append(
                        subprocess.Popen(
                            child.argv, env=child.env, stdout=log, stderr=log, start_new_session=True, umask=0o077
                        )
                    )
        wait_for(lambda: healthy(c.superlink_port) or processes[0].poll() is not None)
        assert processes[0].poll() is None, (c.logs / "superlink.log").read_text()
        yield processes
    finally:
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def tls_door(c):
    """TLS with the coordinator's own certificate, in front of its SuperLink, as the edge has it: yields the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(c.certificate, c.private_key)

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve(plain):
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(plain, server_side=True) as outer,
            socket.create_connection(("127.0.0.1", c.superlink_port)) as inner,
        ):
            back = threading.Thread(target=pump, args=(inner, outer), daemon=True)
            back.start()
            pump(outer, inner)
            back.join(5)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def supernode(c, key: Path, folder: Path):
    """A stock SuperNode with this private key, through TLS; yields the process and its log."""
    env = {**service.environment(c), "FLWR_HOME": str(folder / "home"), "HOME": str(folder)}
    log = folder / "supernode.log"
    with tls_door(c) as port, open(log, "ab") as file:
        argv = [
            *(str(Path(sys.executable).with_name("flower-supernode")), "--superlink", f"localhost:{port}"),
            *("--root-certificates", str(c.folder / "pki/ca.crt"), "--auth-supernode-private-key", str(key)),
            *("--host", "127.0.0.1", "--port", str(service.free_port()), "--isolation", "process"),
        ]
        process = subprocess.Popen(argv, env=env, stdout=file, stderr=file, start_new_session=True, cwd=folder)
        try:
            yield process, log
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
