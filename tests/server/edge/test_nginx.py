"""server/deploy/nginx.conf as it stands, in front of a running edge: what it lets through, and whose address counts."""

import contextlib
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tests.server.edge.conftest import PREFIX, Live, Site, enrolment, until

from fedscan_core import auditlog
from fedscan_server.coordinator import service, sites
from fedscan_server.coordinator.state import Coordinator

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
CONF = Path(__file__).resolve().parents[3] / "server" / "deploy" / "nginx.conf"
HERE, ELSEWHERE = "127.0.0.1", "127.0.0.5"  # two peers that nginx can tell apart

pytestmark = [pytest.mark.deployed, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]


def filled_in(c: Coordinator, port: int, folder: Path) -> str:
    """The file with this machine's ports and paths in place of the example's."""
    text = re.sub(r"#.*", "", CONF.read_text())
    for old, new in {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen [::]:443 ssl;": "",  # not every machine has IPv6
        "https://127.0.0.1:8443": f"https://127.0.0.1:{c.bind[1]}",
        "fedscan.example.org": "localhost",
        "/etc/fedscan/chain.pem": str(c.certificate),
        "/etc/fedscan/server.pem": str(c.private_key),
        "/etc/fedscan/ca.pem": str(c.folder / "pki" / "ca.crt"),
        "/var/log/nginx/": f"{folder}/",
        "/run/nginx.pid": f"{folder}/pid",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    assert "/etc/" not in text and not re.search(r"\b8?443\b", text)
    scratch = [f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    return text.replace("http {", "\n".join(["http {", *scratch]), 1)


@pytest.fixture
def front(live: Live, tmp_path: Path) -> Iterator[str]:
    """The address of an nginx that passes on to `live`."""
    port = service.free_port()
    (tmp_path / "nginx.conf").write_text(filled_in(live.c, port, tmp_path))
    command = [str(NGINX), "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")]
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen([*command, "-g", "daemon off;"], stdout=out, stderr=out)

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "error.log").read_text()
        with contextlib.suppress(httpx.TransportError), peer(live, f"https://localhost:{port}") as http:
            return http.get(f"{PREFIX}/hello").status_code == 200
        return False

    try:
        until(answers, 20)
        yield f"https://localhost:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def peer(live: Live, address: str, host: str = HERE) -> httpx.Client:
    transport = httpx.HTTPTransport(verify=live.trust, local_address=host)
    return httpx.Client(base_url=address, transport=transport, timeout=30.0)


def seen_by_edge(live: Live, what: str) -> list[str]:
    """The addresses in the edge's own log of its requests of this kind."""
    live.edge.log.close()
    [file] = live.c.logs.glob("edge-*.jsonl")
    return [line["address"] for line in auditlog.read(file) if line["what"] == what]


def test_sites_and_people_pass_and_nothing_else_does(live: Live, front: str) -> None:
    with peer(live, front) as http:
        key = ec.generate_private_key(ec.SECP384R1())
        body = enrolment(sites.invite(live.c, "north", 1).token, "north", key)
        assert http.post(f"{PREFIX}/enrol", json=body).status_code == 200
        site = Site("north", key, http)
        assert site.ask("GET", "/site").json()["site"] == "north", "path, method and body are signed, and unchanged"
        _, token = live.person()
        assert http.get(f"{PREFIX}/runs", headers=token).json() == {"runs": []}

        chunk = bytes(6 * 2**20)  # more than Flower's pieces
        live.link.got.clear()
        assert site.fleet("/v1/fleet/push-object", chunk).content == b"answer"
        [(path, _, got)] = live.link.got
        assert (path, got) == ("/v1/fleet/push-object", chunk)

        live.link.got.clear()
        reached = live.link.connections
        for path in (
            *(
                "/",
                "/health",
                "/docs",
                "/openapi.json",
                "/fedscan",
                "/fedscan/",
                "/fedscan/v1",
                "/v1/fleet",
                "/fedscan/v2/hello",
            ),
            *("/v1/control/start-run", "/v1/control/list-nodes", "/v1/runtime/acquire-task", "/v1/serverappio/x"),
            *("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1/control/start-run"),
            *("/fedscan/v1/../../v1/control/start-run", "/v1/fleet/register-node", "/v1/fleet/unregister-node"),
            *("/v1/fleet/pull-messages/", "/v1/fleet/..%2fcontrol%2fstart-run"),
        ):
            assert _raw(live, front, "POST", path) == 404, path
        for method in ("GET", "PUT", "DELETE"):
            assert _raw(live, front, method, "/v1/fleet/pull-messages") in (403, 404), method
        assert live.link.got == [] and live.link.connections == reached, "nothing of it came to Flower"


def test_a_revoked_site_is_refused_behind_it(live: Live, front: str) -> None:
    site = live.site()
    with peer(live, front) as http:
        site.http = http
        assert site.fleet("/v1/fleet/pull-messages").status_code == 200
        sites.revoke(live.c, site.name)
        live.edge.forget_roster()
        assert site.fleet("/v1/fleet/pull-messages").status_code == 401


def test_nobody_poses_as_another_address(live: Live, front: str) -> None:
    """The address that counts is the one that nginx saw, whatever the peer says of itself."""
    forged = {"x-forwarded-for": "192.0.2.1", "forwarded": "for=192.0.2.1", "x-real-ip": "192.0.2.1"}
    for host in (HERE, ELSEWHERE):
        with peer(live, front, host) as http:
            for headers in (forged, {}, {"x-forwarded-for": "192.0.2.1, 192.0.2.2"}):
                bad = {**headers, "authorization": "Bearer " + "A" * 43}
                assert http.get(f"{PREFIX}/runs", headers=bad).status_code == 401
    assert seen_by_edge(live, "GET /runs") == [HERE] * 3 + [ELSEWHERE] * 3


def test_a_guesser_behind_it_holds_nobody_else_up(live: Live, front: str) -> None:
    """Guesses from one address, each with another forged one: they are counted as one address's, and only as its."""
    with peer(live, front, ELSEWHERE) as http:
        answers = []
        for number in range(25):
            headers = {"x-forwarded-for": f"192.0.2.{number}", "authorization": "Bearer " + "A" * 43}
            answers.append(http.get(f"{PREFIX}/runs", headers=headers).status_code)
    assert answers == [401] * 20 + [429] * 5
    with peer(live, front, HERE) as http:
        assert http.get(f"{PREFIX}/runs", headers=live.person()[1]).status_code == 200


def test_the_token_doors_are_slowed_down(live: Live, front: str) -> None:
    guess = enrolment("A" * 43, "north", ec.generate_private_key(ec.SECP384R1()))
    with peer(live, front, ELSEWHERE) as http:
        answers = [http.post(f"{PREFIX}/enrol", json=guess).status_code for _ in range(12)]
    assert answers[:6] == [403] * 6 and 503 in answers[6:], answers
    with peer(live, front) as http:
        body = enrolment(sites.invite(live.c, "south", 1).token, "south", ec.generate_private_key(ec.SECP384R1()))
        assert http.post(f"{PREFIX}/enrol", json=body).status_code == 200


def test_its_log_has_no_token_and_no_query(live: Live, front: str, tmp_path: Path) -> None:
    _, token = live.person()
    with peer(live, front) as http:
        http.get(f"{PREFIX}/runs/none/progress?after=4711", headers=token)
    lines = (tmp_path / "fedscan.log").read_text().splitlines()
    assert any(re.search(r" GET /fedscan/v1/runs/none/progress 404 ", line) for line in lines)
    text = (tmp_path / "fedscan.log").read_text() + (tmp_path / "error.log").read_text()
    assert "4711" not in text and token["authorization"].split()[1] not in text


def _raw(live: Live, front: str, method: str, path: str) -> int:
    """The status of a request whose path is sent as it stands."""
    import socket

    host, port = "localhost", int(front.rpartition(":")[2])
    with (
        socket.create_connection((HERE, port), timeout=10) as plain,
        live.trust.wrap_socket(plain, server_hostname=host) as wire,
    ):
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        wire.sendall(head.encode())
        got = b""
        with contextlib.suppress(ssl.SSLError):
            while piece := wire.recv(65536):
                got += piece
    return int(got.split()[1])
