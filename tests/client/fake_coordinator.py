"""A small coordinator for tests: the site's door over real HTTPS on loopback, with an authority of its own."""

import contextlib
import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedscan_core import invite, node_key
from fedscan_core.invite import Invite

PREFIX = "/fedscan/v1"


@dataclass
class Fake:
    """What the coordinator holds; tests read and change it. `ahead`: its clock is so many seconds ahead of ours."""

    folder: Path
    address: str = ""
    ca_pem: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"once": "north"})
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    anchors: list[dict[str, Any]] = field(default_factory=list)
    ahead: float = 0.0
    hello: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None  # answers this and nothing else
    lose_reply: bool = False  # does what is asked, and breaks off
    calls: list[tuple[str, str]] = field(default_factory=list)
    bodies: bytes = b""  # all that was ever sent to it

    def invitation(self, path: Path, **changes: Any) -> Path:
        """Writes INVITE.toml for north."""
        expires = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
        mark = invite.ca_fingerprint(self.ca_pem)
        given: dict[str, Any] = {
            "kind": "site",
            "name": "north",
            "address": self.address,
            "coordinator": "centre",
            "token": "once",
        }
        given |= {"expires": expires, "ca": self.ca_pem, "ca_fingerprint": mark, **changes}
        invite.write(path, Invite(**given))
        return path

    def now(self) -> datetime:
        """Its clock."""
        return datetime.now(UTC) + timedelta(seconds=self.ahead)


def answer(fake: Fake, method: str, path: str, headers: Any, body: bytes) -> tuple[int, dict[str, Any]]:
    """The door of the seams, in memory."""
    fake.calls.append((method, path.removeprefix(PREFIX)))
    utc = fake.now().isoformat(timespec="milliseconds")
    if (method, path) == ("GET", f"{PREFIX}/hello"):
        from fedscan_core import wire

        told = {"coordinator": "centre", "version": "0.1.0", "flower": "1.41.0", "protocol": wire.PROTOCOL}
        return 200, {**told, "utc": utc, **fake.hello}
    tree = json.loads(body) if body else {}
    if (method, path) == ("POST", f"{PREFIX}/enrol"):
        before = fake.sites.get(tree["site"], {}).get("key")
        dead = tree["site"] in fake.revoked and before == tree["public_key"]
        if fake.tokens.get(tree["token"]) not in (tree["site"], tree["public_key"]) or dead:
            return 403, {"error": "The invitation was used or is unknown.", "remedy": "Ask for a new one."}
        fake.tokens[tree["token"]] = tree["public_key"]  # the same token and key again: the same answer
        fake.revoked.discard(tree["site"])
        fake.sites[tree["site"]] = {"key": tree["public_key"], "policy": tree["policy"]}
        launchers = {"anna": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPKbNvLDFVPEjSD8MBgzAZNvxC9y8ZEwYOyUWF8g1qf"}
        return 200, {"site": tree["site"], "coordinator": "centre", "node_id": "7", "launchers": launchers}
    name = headers.get(node_key.SITE) or ""
    known = fake.sites.get(name)
    signed = (headers.get(node_key.TIME) or "", headers.get(node_key.SIGNATURE) or "")
    if abs((datetime.fromisoformat(signed[0]) - fake.now()).total_seconds()) > node_key.WINDOW_SECONDS:
        return 401, {"error": "The request's time is off.", "utc": utc}
    if known is None:
        return 401, {"error": "This site is not enrolled.", "remedy": "Ask the coordinator."}
    if not node_key.verify_request(known["key"], name, *signed, method, path, body, fake.now()):
        return 401, {"error": "This site is not enrolled.", "remedy": "Ask the coordinator."}
    if name in fake.revoked:
        return 403, {"error": "This site was revoked.", "remedy": "Ask the coordinator."}
    if path == f"{PREFIX}/site":
        mark = node_key.fingerprint(known["key"])
        told = {"site": name, "enrolled": utc, "fingerprint": mark, "node_id": "7", "online": False, "last_seen": ""}
        return 200, {**told, "policy": known["policy"], "policy_utc": utc}
    if path == f"{PREFIX}/site/policy":
        known["policy"] = tree
    if path == f"{PREFIX}/site/anchor":
        fake.anchors.append({"utc": utc, "run_id": "", "round": 0, "anchor": tree["anchor"]})
    if path == f"{PREFIX}/site/anchors":
        return 200, {"anchors": fake.anchors}
    if path == f"{PREFIX}/site/retire":
        fake.revoked.add(name)
    return 200, {}


@contextlib.contextmanager
def coordinator(folder: Path, *, days: float = 30, host: str = "127.0.0.1") -> Iterator[Fake]:
    """Serves a `Fake`; its certificate is for `host` and ends in so many days."""
    folder.mkdir(parents=True, exist_ok=True)
    fake = Fake(folder)
    fake.ca_pem, pair = _certificates(folder, host, days)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 5

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            fake.bodies += body + str(self.headers).encode()
            status, told = answer(fake, self.command, self.path, self.headers, body)
            data = json.dumps(told).encode() if fake.raw is None else fake.raw
            if fake.lose_reply:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _any

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:  # a client that does not trust us
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        fake.address = f"https://127.0.0.1:{server.server_address[1]}"
        with _served(server):
            yield fake


@contextlib.contextmanager
def proxy(status: int = 200) -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that takes CONNECT, or refuses it with `status`: its URL, and what it was asked."""
    asked: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        timeout = 5

        def handle(self) -> None:
            line = self.rfile.readline().decode()
            while self.rfile.readline().strip():
                pass
            asked.append(line.strip())
            if status != 200:
                self.wfile.write(f"HTTP/1.1 {status} Not for you\r\ncontent-length: 0\r\n\r\n".encode())
                return
            host, _, port = line.split()[1].rpartition(":")
            with socket.create_connection((host, int(port)), timeout=5) as there:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=_pump, args=(there, self.connection), daemon=True)
                back.start()
                _pump(self.connection, there)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server, _served(server):
        yield f"http://127.0.0.1:{server.server_address[1]}", asked


@contextlib.contextmanager
def _served(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _certificates(folder: Path, host: str, days: float) -> tuple[str, Path]:
    """The authority's PEM, and a file with the server's certificate and key."""
    now = datetime.now(UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "centre")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])

    def build(subject: x509.Name, public: Any, end: datetime) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=60))
        return builder.not_valid_after(end)

    ca = build(ca_name, ca_key.public_key(), now + timedelta(days=3650))
    ca = ca.add_extension(x509.BasicConstraints(True, 0), True)
    ca = ca.add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False)
    try:
        alternative: x509.GeneralName = x509.IPAddress(ip_address(host))
    except ValueError:
        alternative = x509.DNSName(host)
    leaf = build(name, key.public_key(), now + timedelta(days=days))
    leaf = leaf.add_extension(x509.SubjectAlternativeName([alternative]), False)
    leaf = leaf.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False)
    pair = folder / "server.pem"
    pem = leaf.sign(ca_key, SHA256()).public_bytes(Encoding.PEM)
    pair.write_bytes(pem + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return ca.sign(ca_key, SHA256()).public_bytes(Encoding.PEM).decode(), pair
