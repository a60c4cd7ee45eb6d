"""A real coordinator and stock SuperNodes through the edge: 30 and 300 MB both ways, and a site revoked meanwhile."""

import contextlib
import hashlib
import io
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.server.edge.conftest import PREFIX, enrolment, until

from fedscan_core import node_key
from fedscan_server.coordinator import control, service, sites
from fedscan_server.coordinator.state import Coordinator

PROJECT = """\
[project]
name = "edgetest"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "edgetest:server"
clientapp = "edgetest:client"
[tool.flwr.app.config]
nodes = 2
rounds = 20
megabytes = MEGABYTES
"""
CODE = """\
import os, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server, client = ServerApp(), ClientApp()
@client.train()
def train(message, context):
    model = message.content["m"]["w"].numpy()
    return Message(RecordDict({"m": ArrayRecord({"w": Array(model + 1)})}), reply_to=message)
@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < context.run_config["nodes"]:
        time.sleep(0.5)
    nodes = list(grid.get_node_ids())
    model = np.arange(context.run_config["megabytes"] * 2**18, dtype=np.float32)
    with open(os.environ["FEDSCAN_COORDINATOR"] + "/told", "a") as out:
        for number in range(context.run_config["rounds"]):
            content = RecordDict({"m": ArrayRecord({"w": Array(model)})})
            messages = [Message(content, dst_node_id=node, message_type="train", ttl=900) for node in nodes]
            replies = [r for r in grid.send_and_receive(messages, timeout=900) if not r.has_error()]
            right = sum(np.array_equal(r.content["m"]["w"].numpy(), model + 1) for r in replies)
            print(number, len(replies), right, file=out, flush=True)
"""


def bundle(megabytes: int) -> bytes:
    project = PROJECT.replace("MEGABYTES", str(megabytes))
    files = {"pyproject.toml": project.encode(), "edgetest/__init__.py": CODE.encode()}
    lines = [f"{name},{hashlib.sha256(data).hexdigest()},{8 * len(data)}" for name, data in files.items()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {**files, ".info/CONTENT": "\n".join(lines).encode()}.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Coordinator]:
    port = service.free_port()
    c = service.init(tmp_path / "state", "Testing centre", f"localhost:{port}", bind=f"127.0.0.1:{port}")
    stop = threading.Event()
    thread = threading.Thread(target=service.start, args=(c, stop, lambda name, event: None))
    thread.start()
    yield c
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


def supernode(c: Coordinator, name: str, folder: Path) -> "subprocess.Popen[bytes]":
    key = node_key.create(folder / f"{name}.key")
    body = enrolment(sites.invite(c, name, 1).token, name, key)
    ca, trust = str(c.folder / "pki" / "ca.crt"), ssl.create_default_context(cadata=c.ca_pem)
    assert httpx.post(f"{c.address}{PREFIX}/enrol", json=body, verify=trust, timeout=60).status_code == 200
    command = Path(sys.executable).with_name("flower-supernode")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(folder / name)}
    with open(folder / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            [
                *(command, "--superlink", c.address[8:], "--root-certificates", ca),
                *("--port", str(service.free_port()), "--auth-supernode-private-key", folder / f"{name}.key"),
            ],
            env={**os.environ, **quiet, "PATH": f"{command.parent}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@pytest.mark.parametrize(
    "megabytes", [pytest.param(30, marks=pytest.mark.deployed), pytest.param(300, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(2400)
def test_models_pass_and_a_revoked_site_ends(running: Coordinator, tmp_path: Path, megabytes: int) -> None:
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    c = running
    trust = ssl.create_default_context(cadata=c.ca_pem)
    until(lambda: _answers(c, trust), 60)
    nodes = {name: supernode(c, name, tmp_path) for name in ("north", "south")}
    try:
        until(lambda: len(control.online_nodes(c)) == 2, 60)
        content = bundle(megabytes)
        with control._client(c) as client:
            fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
            client.StartRun(StartRunRequest(fab=fab))
        told = c.folder / "told"
        until(lambda: " 2 2\n" in _read(told), 900)  # a busy machine may lose a round or two
        before = len(_read(told).splitlines())
        sites.revoke(c, "north")
        nodes["north"].wait(60)  # Flower's SuperNode ends itself after 401
        until(lambda: any(line.endswith(" 1 1") for line in _read(told).splitlines()[before:]), 900)
        assert nodes["south"].poll() is None, "the others go on"
    finally:
        for process in nodes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _answers(c: Coordinator, trust: ssl.SSLContext) -> bool:
    try:
        return httpx.get(f"{c.address}{PREFIX}/hello", verify=trust).status_code == 200 and _superlink(c)
    except httpx.HTTPError:
        return False


def _superlink(c: Coordinator) -> bool:
    from fedscan_core.errors import ConfigError

    try:
        control.online_nodes(c)
    except ConfigError:
        time.sleep(0.5)
        return False
    return True
