"""A real PACS (Orthanc) in a network of its own, a collection to load it with, and certificates."""

import contextlib
import ctypes
import datetime
import fcntl
import ipaddress
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydicom import dcmread
from pydicom.uid import UID, RLELossless

PLUGINS = [Path("/usr/share/orthanc/plugins") / f"libOrthanc{name}.so" for name in ("DicomWeb", "Gdcm")]
CT = UID("1.2.840.10008.5.1.4.1.1.2")
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def network() -> Iterator[int | None]:
    """A network namespace that holds nothing but a loopback device, where this process may make one.

    Orthanc listens on every address, whatever its configuration says: in here nobody else can reach it.
    """
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK) != 0:
        os.close(home)
        yield None
        return
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        request = struct.pack("16sh", b"lo", 0x1 | 0x40)  # IFF_UP, IFF_RUNNING
        fcntl.ioctl(device, 0x8914, request)  # SIOCSIFFLAGS
    assert libc.setns(home, _NEW_NETWORK) == 0
    yield own
    os.close(own)
    os.close(home)


@contextlib.contextmanager
def inside(network: int | None) -> Iterator[None]:
    """This thread, and those it starts meanwhile, in the namespace."""
    if network is None:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        assert libc.setns(network, _NEW_NETWORK) == 0
        yield
    finally:
        assert libc.setns(home, _NEW_NETWORK) == 0
        os.close(home)


@dataclass
class Orthanc:
    """One Orthanc, its ports, and what a test does to it."""

    folder: Path
    http: int = field(default_factory=free_port)
    dicom: int = field(default_factory=free_port)
    agent: int = field(default_factory=free_port)  # where our own SCP listens: Orthanc must know
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}/dicom-web"

    def start(self) -> None:
        def peer(title: str, port: int, **may: bool) -> dict[str, Any]:
            allowed = {f"Allow{what}": may.get(what, False) for what in ("Find", "Move", "Get", "Store")}
            return {"AET": title, "Host": "127.0.0.1", "Port": port, "AllowEcho": True, **allowed}

        settings = {
            "Name": "TEST-PACS",
            "StorageDirectory": str(self.folder / "db"),
            "IndexDirectory": str(self.folder / "db"),
            "Plugins": [str(plugin) for plugin in PLUGINS],
            "HttpPort": self.http,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {"site": "site-pass"},
            "DicomAet": "PACS",
            "DicomPort": self.dicom,
            "DicomCheckCalledAet": True,
            **{f"DicomAlwaysAllow{what}": False for what in ("Echo", "Store", "Find", "Get", "Move")},
            "DicomModalities": {
                "loader": peer("LOADER", 1, Store=True),
                "agent": peer("FEDSCAN", self.agent, Find=True, Move=True, Get=True),
                "asker": peer("ASKER", 1, Find=True),
            },
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "OverwriteInstances": False,
            "SaveJobs": False,
            "UnknownSopClassAccepted": True,
            "HttpServerEnabled": True,
            "ConcurrentJobs": 2,
        }
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(settings))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(["Orthanc", str(path)], stdout=log, stderr=log)
        for _ in range(200):
            with contextlib.suppress(OSError):
                self.rest("/system")
                return
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.05)
        pytest.fail("Orthanc does not answer")

    def rest(self, path: str) -> Any:
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        url = f"http://127.0.0.1:{self.http}{path}"
        passwords.add_password(None, url, "site", "site-pass")
        quiet = urllib.request.ProxyHandler({})
        opener = urllib.request.build_opener(quiet, urllib.request.HTTPBasicAuthHandler(passwords))
        with opener.open(url, timeout=10) as answer:
            return json.loads(answer.read())

    def kill(self) -> None:
        """As a power cut would."""
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def load(self, folder: Path) -> int:
        """Sends every file below a folder; the number of instances there are then."""
        command = [
            "dcmsend",
            "--no-halt",
            "--no-uid-checks",
            "--decompress-never",
            "+sd",
            "+r",
            "-aet",
            "LOADER",
            "-aec",
            "PACS",
        ]
        subprocess.run([*command, "127.0.0.1", str(self.dicom), str(folder)], capture_output=True, timeout=300)
        return int(self.rest("/statistics")["CountInstances"])


def start_orthanc(folder: Path, network: int | None) -> Iterator[Orthanc]:
    missing = [name for name in ("Orthanc", "dcmsend") if not shutil.which(name)]
    missing += [str(plugin) for plugin in PLUGINS if not plugin.exists()]
    if missing:
        says = f"{', '.join(missing)} not installed: run scripts/install-test-tools"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(says)
    with inside(network):
        orthanc = Orthanc(folder)
        orthanc.start()
    try:
        yield orthanc
    finally:
        orthanc.kill()


@pytest.fixture
def another_orthanc(tmp_path_factory: pytest.TempPathFactory, network: int | None) -> Iterator[Orthanc]:
    """An empty one, in the test's network."""
    for orthanc in start_orthanc(tmp_path_factory.mktemp("another"), network):
        with inside(network):
            yield orthanc


@pytest.fixture(scope="session")
def _orthanc(
    tmp_path_factory: pytest.TempPathFactory, network: int | None, collection: Path
) -> Iterator[tuple[Orthanc, int]]:
    for orthanc in start_orthanc(tmp_path_factory.mktemp("orthanc"), network):
        with inside(network):
            stored = orthanc.load(collection)
        yield orthanc, stored


@pytest.fixture
def pacs(_orthanc: tuple[Orthanc, int], network: int | None, collection: Path) -> Iterator[Orthanc]:
    """Orthanc with the collection in it, running, in the test's network."""
    orthanc, stored = _orthanc
    assert stored == len(list(collection.iterdir()))
    with inside(network):
        if orthanc.process is None:
            orthanc.start()
        yield orthanc


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory, hospital: Path) -> Path:
    """A phantom hospital's radiographs and two CT series of 12 slices, one of them compressed; not to be changed."""
    folder = tmp_path_factory.mktemp("collection")
    files = [path for path in sorted((hospital / "dicom").rglob("*")) if path.is_file()][:6]
    for number, path in enumerate(files):
        shutil.copy(path, folder / f"cr{number}.dcm")
    rng = np.random.default_rng(3)
    for series in (1, 2):
        for slice_number in range(12):
            ds = dcmread(files[0])
            ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CT
            ds.Modality, ds.BodyPartExamined = "CT", ("CHEST", "HEAD")[series - 1]
            ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.99.7", f"1.2.99.7.{series}"
            ds.StudyDate, ds.PatientID = "20190704", "CANARY-CT-1"
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.99.7.{series}.{slice_number}")
            ds.Rows = ds.Columns = 32
            ds.PixelData = rng.integers(0, 4096, (32, 32), np.uint16).tobytes()
            if series == 2:
                ds.compress(RLELossless, generate_instance_uid=False)
            ds.save_as(folder / f"ct{series}-{slice_number}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture
def instances(collection: Path) -> dict[str, Path]:
    """SOP Instance UID -> file of the collection."""
    return {str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID): path for path in collection.iterdir()}


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> PEM: "ca", and "server" and "client" signed by it, "stranger" by itself; "<name>.key" is the key."""
    folder = tmp_path_factory.mktemp("certificates")
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server", "client", "stranger")}
    now = datetime.datetime.now(datetime.UTC)
    for name, key in keys.items():
        signer = name if name == "stranger" else "ca"
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]) for who in (name, signer))
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=2))
        builder = builder.add_extension(x509.BasicConstraints(ca=name == signer, path_length=None), critical=True)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        certificate = builder.sign(keys[signer], hashes.SHA256())
        (folder / name).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem, pkcs8, clear = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (folder / f"{name}.key").write_bytes(key.private_bytes(pem, pkcs8, clear))
    return lambda name: folder / name
