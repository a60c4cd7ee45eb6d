"""A coordinator's edge in this process: real HTTPS with an authority of its own, the people's part of the API only.

Each test fills in what it answers; `seen` holds what was asked.
"""

import base64
import contextlib
import hashlib
import io
import ipaddress
import json
import socket
import ssl
import tarfile
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedscan_core import order, wire

TOKEN, BEARER = "one-time", "bearer-of-ada"


def certificates(folder, *, days=1):
    """(PEM of the authority, path of the server's certificate with its key), for 127.0.0.1."""
    now = datetime.now(UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def name(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def build(subject, public, until):
        made = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("trial CA")).public_key(public)
        made = made.serial_number(x509.random_serial_number())
        return made.not_valid_before(now - timedelta(days=9)).not_valid_after(until)

    basic = x509.BasicConstraints(ca=True, path_length=0)
    ca = build("trial CA", ca_key.public_key(), now + timedelta(days=9)).add_extension(basic, critical=True)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = build("edge", key.public_key(), now + timedelta(days=days)).add_extension(names, critical=False)
    path = folder / "edge.pem"
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(server.sign(ca_key, SHA256()).public_bytes(Encoding.PEM) + secret)
    return ca.sign(ca_key, SHA256()).public_bytes(Encoding.PEM).decode(), path


def tar(files):
    """An archive of these names and bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return out.getvalue()


class Edge:
    """`sites`, `runs`, `lines`, `archive` are what it answers; `fail` maps a path to (status, body) given once."""

    def __init__(self, ca, port):
        self.ca, self.address = ca, f"https://127.0.0.1:{port}"
        self.role, self.public_key, self.protocol, self.clock = "researcher", "", wire.PROTOCOL, timedelta(0)
        self.sites, self.runs, self.toml, self.summary = [], {}, {}, {}
        self.lines, self.states, self.archive, self.sha = [], ["finished"], b"", None
        self.seen, self.fail, self.orders, self.inits = [], {}, [], []
        self.drop_after_submit = False

    def answer(self, method, path, body, bearer):
        """(status, JSON tree)."""
        if path == "/hello":
            utc = (datetime.now(UTC) + self.clock).isoformat(timespec="milliseconds")
            return 200, {
                "coordinator": "Trial",
                "version": "0.1.0",
                "flower": "1.41.0",
                "protocol": self.protocol,
                "utc": utc,
            }
        if path == "/login":
            if body["token"] != TOKEN or self.public_key:
                return 403, {"error": "This invitation was used.", "remedy": "Ask for another."}
            self.public_key = body["public_key"]
            return 200, {"name": "ada", "role": self.role, "token": BEARER, "coordinator": "Trial"}
        if bearer != f"Bearer {BEARER}":
            return 401, {"error": "This login is not known."}
        if path == "/sites":
            return 200, {"sites": self.sites}
        if path == "/runs" and method == "POST":
            return self.submit(body)
        if path == "/runs":
            return 200, {"runs": list(self.runs.values())}
        run_id, _, rest = path.removeprefix("/runs/").partition("/")
        if run_id not in self.runs:
            return 404, {"error": f"There is no run {run_id}.", "remedy": ""}
        if method == "POST":
            self.runs[run_id]["state"] = {"stop": "stopped", "resume": "running"}[rest]
            return 200, {}
        if rest.startswith("progress"):
            after = int(rest.partition("after=")[2])
            lines = self.lines[after : after + 2]
            if not lines and len(self.states) > 1:
                self.states.pop(0)
            state = self.runs[run_id]["state"] = self.states[0]
            return 200, {"next": after + len(lines), "lines": lines, "state": state}
        summary = self.summary.get(run_id)
        told = {"summary": summary, "progress_lines": len(self.lines), "run": self.toml.get(run_id, "")}
        return 200, {**self.runs[run_id], **told}

    def submit(self, body):
        signed = order.from_text(body["order"])
        if not order.signed_by(signed, self.public_key):
            return 403, {"error": "Not your signature.", "remedy": ""}
        self.add(signed.run_id, launcher=signed.launcher)
        self.toml[signed.run_id] = body["run"]
        self.orders.append(signed)
        self.inits.append(base64.b64decode(body["init"]))
        return 200, {"run_id": signed.run_id}

    def add(self, run_id, **values):
        """A run that the coordinator knows."""
        known = {"run_id": run_id, "name": run_id.rpartition("-")[0] or run_id, "launcher": "ada", "state": "waiting"}
        self.runs[run_id] = known | {"reason": "", "submitted": "2026-02-03T04:05:06+00:00", "round": 0, "rounds": 3}
        self.runs[run_id] |= values


def _handler(edge_of):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words):
            pass

        def do_GET(self):
            self.respond("GET")

        def do_POST(self):
            self.respond("POST")

        def respond(self, method):
            edge = edge_of()
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            path = self.path.removeprefix("/fedscan/v1")
            edge.seen.append(f"{method} {path}")
            if path in edge.fail:
                status, raw = edge.fail.pop(path)
                if status is None:  # hang up
                    return self.hang_up()
                return self.reply(status, raw, {})
            if path.endswith("/archive"):
                sha = edge.sha or hashlib.sha256(edge.archive).hexdigest()
                return self.reply(200, edge.archive, {"fedscan-sha256": sha})
            status, tree = edge.answer(method, path, body, self.headers.get("authorization", ""))
            if edge.drop_after_submit and method == "POST" and path == "/runs":
                return self.hang_up()
            self.reply(status, json.dumps(tree).encode(), {})

        def hang_up(self):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def reply(self, status, data, headers):
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    return Handler


@contextlib.contextmanager
def serving(folder, *, days=1):
    """An edge that answers until the end of the block."""
    ca, path = certificates(folder, days=days)
    box: list[Edge] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(lambda: box[0]))
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    box.append(Edge(ca, server.server_address[1]))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield box[0]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
