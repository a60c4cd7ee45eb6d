"""A log collector: TLS on loopback, RFC 5425 frames, which it keeps."""

import datetime
import ipaddress
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Collector:
    """Keeps every frame it gets; `stall` makes it accept and read nothing."""

    def __init__(self, folder, *, stall=False):
        self.frames, self.problems, self.stall = [], [], stall
        self.ca, pair = _certificate(folder)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(pair)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                plain, _ = self._server.accept()
            except OSError:
                return
            if self.stall:
                self.held = plain
                continue
            try:
                with self._context.wrap_socket(plain, server_side=True) as channel:
                    data = b""
                    while more := channel.recv(65536):
                        data += more
            except OSError as error:
                self.problems.append(error)
                continue
            while data:
                length, _, rest = data.partition(b" ")
                self.frames.append(rest[: int(length)])
                data = rest[int(length) :]

    def close(self):
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(10)


def _certificate(folder):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "collector")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    text = made.public_bytes(serialization.Encoding.PEM)
    form = serialization.PrivateFormat.PKCS8
    (folder / "ca.pem").write_bytes(text)
    (folder / "pair.pem").write_bytes(
        text + key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
    return folder / "ca.pem", folder / "pair.pem"


@pytest.fixture
def collector(tmp_path):
    """A collector that works."""
    made = Collector(tmp_path / "collector")
    yield made
    made.close()


@pytest.fixture
def make_collector():
    """The class."""
    return Collector
