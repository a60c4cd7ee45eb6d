"""A coordinator whose edge answers over real TLS on loopback; behind it a SuperLink that only records."""

import asyncio
import base64
import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedscan_core import config, node_key, order, policy
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError
from fedscan_server.coordinator import control, people, service, sites
from fedscan_server.coordinator.control import RunStatus
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.edge import fleet, serve
from fedscan_server.edge.app import App
from fedscan_server.edge.context import Edge
from fedscan_server.edge.requestlog import RequestLog

PREFIX = "/fedscan/v1"


@dataclass
class Flower:
    """Stands for `coordinator.control`: what Flower was asked for, and what it says."""

    away: bool = False
    started: list[str] = field(default_factory=list)
    status: dict[int, RunStatus] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    online: set[int] = field(default_factory=set)

    def start_run(self, c: Coordinator, run_id: str) -> int:
        self._there()
        self.started.append(run_id)
        self.status[len(self.started)] = RunStatus("running")
        return len(self.started)

    def run_status(self, c: Coordinator, flower_run_id: int) -> RunStatus:
        self._there()
        return self.status[flower_run_id]

    def stop_run(self, c: Coordinator, flower_run_id: int) -> bool:
        self.stopped.append(flower_run_id)
        return True

    def register_node(self, c: Coordinator, public_key: str, name: str) -> int:
        self._there()
        return self.nodes.setdefault(name, 2**63 + len(self.nodes))

    def unregister_node(self, c: Coordinator, node_id: int) -> None:
        self.nodes = {name: known for name, known in self.nodes.items() if known != node_id}

    def online_nodes(self, c: Coordinator) -> set[int]:
        self._there()
        return self.online

    def _there(self) -> None:
        if self.away:
            raise ConfigError("Flower's SuperLink does not answer on 127.0.0.1:1.", remedy="fedscan server status")


@dataclass
class SuperLink:
    """What reached the SuperLink; `answer` is (status, headers, body)."""

    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    answer: tuple[int, dict[str, str], bytes] = (200, {"content-type": "application/protobuf"}, b"answer")
    connections: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.connections += 1
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message.get("more_body", False)
        path = scope["raw_path"].decode() + (f"?{scope['query_string'].decode()}" if scope["query_string"] else "")
        self.got.append((path, {name.decode(): value.decode() for name, value in scope["headers"]}, body))
        status, headers, answer = self.answer
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": answer})


@dataclass
class Site:
    """A site's keys and its client."""

    name: str
    key: ec.EllipticCurvePrivateKey
    http: httpx.Client

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> httpx.Response:
        signed = node_key.sign_request(self.key, self.name, method, PREFIX + path, body)
        return self.http.request(method, PREFIX + path, content=body, headers={**signed, **headers})

    def fleet(
        self, path: str, body: bytes = b"", shift: float = 0.0, more: dict[str, str] | None = None
    ) -> httpx.Response:
        return self.http.post(path, content=body, headers={**self.node_headers(shift), **(more or {})})

    def node_headers(self, shift: float = 0.0) -> dict[str, str]:
        """As Flower's SuperNode signs (supernode/node_auth_http_interceptor.py)."""
        pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        stamp = (datetime.now(UTC) + timedelta(seconds=shift)).isoformat()
        signature = self.key.sign(stamp.encode(), ec.ECDSA(SHA256()))
        return {
            "content-type": "application/protobuf",
            "flwr-public-key": base64.b64encode(pem).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }


@dataclass
class Live:
    """A running edge and all that stands around it."""

    c: Coordinator
    edge: Edge
    flower: Flower
    link: SuperLink
    http: httpx.Client
    trust: ssl.SSLContext

    def site(self, name: str = "north", allowed: policy.Policy | None = None) -> Site:
        key = ec.generate_private_key(ec.SECP384R1())
        body = enrolment(sites.invite(self.c, name, 1).token, name, key, allowed)
        answer = self.http.post(f"{PREFIX}/enrol", json=body)
        assert answer.status_code == 200, answer.text
        return Site(name, key, self.http)

    def person(self, name: str = "ada", role: str = "researcher") -> tuple[Ed25519PrivateKey, dict[str, str]]:
        key = Ed25519PrivateKey.generate()
        body = {"token": people.invite(self.c, name, role, 1).token, "public_key": order.public_text(key)}
        answer = self.http.post(f"{PREFIX}/login", json=body)
        assert answer.status_code == 200, answer.text
        return key, {"authorization": f"Bearer {answer.json()['token']}"}


def enrolment(
    token: str, name: str, key: ec.EllipticCurvePrivateKey, allowed: policy.Policy | None = None
) -> dict[str, Any]:
    public = policy.public(allowed or policy.Policy(max_epsilon=8.0, max_delta=1e-5), name, 100, (8.0, 1e-5))
    return {"token": token, "site": name, "public_key": node_key.public_text(key), "policy": public}


def submission(key: Ed25519PrivateKey, launcher: str = "ada", init: bytes = b"", **values: Any) -> dict[str, str]:
    """A run as a researcher sends it."""
    run = RunConfig.model_validate({"name": "demo", "aggregation": {"min_sites": 1}, **values})
    now = datetime.now(UTC).replace(microsecond=0)
    until = (now + timedelta(days=2)).isoformat()
    asked = order.Order(order.new_run_id(run.name), config.for_sites(run), launcher, now.isoformat(), until)
    signed = order.to_text(order.sign(asked, key))
    return {"order": signed, "run": config.to_toml(run), "init": base64.b64encode(init).decode()}


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    fake = Flower()
    for name in ("start_run", "run_status", "stop_run", "register_node", "unregister_node", "online_nodes"):
        monkeypatch.setattr(control, name, getattr(fake, name))
    return fake


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    port = service.free_port()
    return service.init(tmp_path / "state", "Testing centre", f"localhost:{port}", bind=f"127.0.0.1:{port}")


@pytest.fixture
def live(coordinator: Coordinator, flower: Flower) -> Iterator[Live]:
    c, link = coordinator, SuperLink()
    made: list[Edge] = []
    servers: list[uvicorn.Server] = []

    async def both() -> None:
        edge = Edge(c, fleet.client(c.superlink_port), RequestLog(c.logs))
        made.append(edge)
        plain = uvicorn.Config(link, port=c.superlink_port, lifespan="off", ws="none", log_level="critical")
        servers.extend([serve.server(App(edge), c), uvicorn.Server(plain)])
        await asyncio.gather(*(one.serve() for one in servers))
        await edge.link.aclose()

    thread = threading.Thread(target=lambda: asyncio.run(both()))
    thread.start()
    until(lambda: len(servers) == 2 and all(one.started for one in servers))
    trust = ssl.create_default_context(cadata=c.ca_pem)
    with httpx.Client(base_url=c.address, verify=trust, timeout=30.0, trust_env=False) as http:
        yield Live(c, made[0], flower, link, http, trust)
    for one in servers:
        one.should_exit = True
    thread.join(15)
    made[0].log.close()
    assert not thread.is_alive()


@pytest.fixture
def raw(live: Live) -> Callable[..., bytes]:
    """Sends bytes over TLS as they are and returns the answer, until the edge closes or `seconds` pass."""
    import socket

    def send(data: bytes, seconds: float = 5.0) -> bytes:
        with (
            socket.create_connection(live.c.bind, timeout=seconds) as plain,
            live.trust.wrap_socket(plain, server_hostname="localhost") as wire,
        ):
            wire.sendall(data)
            got = b""
            with contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLError):
                while piece := wire.recv(65536):
                    got += piece
            return got

    return send


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
