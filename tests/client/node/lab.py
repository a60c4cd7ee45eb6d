"""A real coordinator on loopback for the node's tests: Flower's SuperLink with TLS and node authentication.

Its ServerApp is a toy under the name that the bundle gives (`toy/fedscan_server/deployed.py`). Loaded by path.
"""

import contextlib
import datetime
import hashlib
import ipaddress
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HERE = Path(__file__).resolve().parent
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(home: Path, **more: str) -> dict[str, str]:
    """For the coordinator's processes: the toy comes first on the path."""
    path = os.pathsep.join([str(HERE / "toy"), os.environ.get("PYTHONPATH", "")])
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **_QUIET, "PATH": binaries, "PYTHONPATH": path, "FLWR_HOME": str(home), **more}


@dataclass
class Link:
    """A running SuperLink."""

    folder: Path
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """As in a site's connection.toml."""
        return f"https://localhost:{self.port}"

    @property
    def ca(self) -> Path:
        """The certificate to trust."""
        return self.folder / "ca.crt"

    def log(self, name: str) -> str:
        """What a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start(self, name: str, argv: list[str], **more: str) -> subprocess.Popen[bytes]:
        """Starts one process of the coordinator."""
        with (self.folder / f"{name}.log").open("ab") as log:
            env = environment(self.folder / "home", TOY_OUT=str(self.folder / "toy.jsonl"), **more)
            process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        self.processes.append(process)
        return process

    def start_superlink(self) -> subprocess.Popen[bytes]:
        """Starts the SuperLink and waits until it answers."""
        argv = [str(Path(sys.executable).parent / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        argv += ["--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt"]
        argv += ["--enable-supernode-auth", "--isolation", "process", "--superexec-auth-secret-file", "secret"]
        process = self.start("superlink", [*argv, "--database", "state.db"])
        wait_for(lambda: self._healthy(), 40)
        return process

    def start_superexec(self) -> subprocess.Popen[bytes]:
        """Starts what runs ServerApps."""
        argv = [str(Path(sys.executable).parent / "flower-superexec"), "--runtime-api-address"]
        argv += [f"localhost:{self.port}", "--root-certificates", "ca.crt", "--superexec-auth-secret-file", "secret"]
        return self.start("superexec", argv)

    def _healthy(self) -> bool:
        import ssl

        context = ssl.create_default_context(cafile=str(self.ca))
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{self.address}/health", timeout=1, context=context).read()
            return True
        return False

    def control(self) -> Any:
        """Flower's client of the Control API, open to whoever is on this machine in this lab."""
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        guard = [RuntimeVersionHttpInterceptor(component_name="flwr")]
        return ControlHttpClient.from_server_address(f"localhost:{self.port}", False, self.ca.read_bytes(), guard)

    def register(self, key: ec.EllipticCurvePrivateKey, name: str) -> int:
        """Registers a site's key: its node id."""
        from flwr.proto.control_pb2 import RegisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        public = public_key_to_bytes(key.public_key())
        return int(self.control().RegisterNode(RegisterNodeRequest(public_key=public, name=name)).node_id)

    def online(self) -> set[int]:
        """Ids of the nodes that are there."""
        from flwr.proto.control_pb2 import ListNodesRequest

        return {
            node.node_id for node in self.control().ListNodes(ListNodesRequest()).nodes_info if node.status == "online"
        }

    def run(self, content: bytes, config: dict[str, Any]) -> int:
        """Starts a run of a bundle: Flower's run id."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        return int(
            self.control().StartRun(StartRunRequest(fab=fab, override_config=user_config_to_proto(config))).run_id
        )

    def status(self, run_id: int) -> str:
        """A run's status: "running", "finished:completed", ..."""
        from flwr.proto.control_pb2 import ListRunsRequest

        status = self.control().ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
        return f"{status.status}:{status.sub_status}".rstrip(":")

    def stop(self) -> None:
        """Ends everything."""
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
        for process in reversed(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


@contextlib.contextmanager
def superlink(folder: Path) -> Iterator[Link]:
    """A SuperLink with its SuperExec, ended with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    pki(folder)
    (folder / "secret").write_bytes(os.urandom(32))
    link = Link(folder, free_port())
    try:
        link.start_superlink()
        link.start_superexec()
        yield link
    finally:
        link.stop()


def wait_for(condition: Any, seconds: float) -> Any:
    """Waits until `condition()` is true and returns it; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
    return value


def pki(folder: Path) -> None:
    """A certificate authority (ca.crt) and a server certificate for localhost (server.crt, server.key)."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def build(name: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lab authority")])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
        made = made.serial_number(x509.random_serial_number())
        return made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(9))

    ca = build("lab authority", ca_key.public_key())
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    server = build("localhost", key.public_key()).add_extension(x509.SubjectAlternativeName(names), critical=False)
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "server.crt").write_bytes(server.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(private)
