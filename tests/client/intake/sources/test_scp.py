"""What a PACS routes to us: from whom it is taken, when it is acknowledged, and what is on disk then."""

import contextlib
import copy
import errno
import logging
import os
import socket
import threading
import time
from collections import Counter
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from pynetdicom import AE, evt

from fedscan_client.intake.sources import scp, spool
from fedscan_client.intake.sources.settings import parse
from fedscan_client.intake.sources.spool import Spool
from fedscan_core.errors import ConfigError

KEY = b"k" * 32


def one(section, folder) -> Any:
    return parse(section, folder)["source"]


@pytest.fixture
def listening(tmp_path, network):
    """Starts an SCP on a free port: (port, what it counts)."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(**changes):
            section = {
                "kind": "dimse-store",
                "listen_address": "127.0.0.1",
                "listen_port": 0,
                "allow": [{"ae_title": "PACS", "address": "127.0.0.1"}],
                "timeout_seconds": 5,
                **changes,
            }
            received = scp.Received()
            settings = one(section, tmp_path)
            port = stack.enter_context(scp.listening(settings, Spool(tmp_path / "spool", KEY), received))
            return port, received.counts

        yield start


@contextlib.contextmanager
def associated(port, *, ours="PACS", theirs="FEDSCAN", source="127.0.0.1", tls=None, syntax=ExplicitVRLittleEndian):
    ae = AE(ours)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 5
    ae.add_requested_context("1.2.840.10008.1.1")  # C-ECHO
    for storage in (
        "1.2.840.10008.5.1.4.1.1.1",
        "1.2.840.10008.5.1.4.1.1.1.1",
        "1.2.840.10008.5.1.4.1.1.2",
        "1.2.840.10008.5.1.4.1.1.6",
    ):
        ae.add_requested_context(storage, syntax)
    association = ae.associate("127.0.0.1", port, ae_title=theirs, bind_address=(source, 0), tls_args=tls)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def objects(folder):
    return [found.open().read() for found in spool.found(folder / "spool", KEY)]


def wait_for(check):
    end = time.monotonic() + 5
    while not check():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_it_stores_what_was_sent_byte_by_byte(listening, collection, tmp_path, syntax):
    port, counts = listening()
    ds = dcmread(collection / ("ct2-0.dcm" if syntax == RLELossless else "ct1-0.dcm"))
    if syntax == ImplicitVRLittleEndian:
        ds.file_meta.TransferSyntaxUID = syntax
        ds.save_as(tmp_path / "implicit", implicit_vr=True)
        ds = dcmread(tmp_path / "implicit")
    with associated(port, syntax=syntax) as association:
        assert association.send_c_echo().Status == 0
        assert association.send_c_store(ds).Status == 0
        (stored,) = objects(tmp_path)  # by now it is there: nothing is acknowledged before
        assert association.send_c_store(ds).Status == 0
        changed = copy.deepcopy(ds)
        changed.PatientComments = "changed on the way"
        assert association.send_c_store(changed).Status == 0
    assert objects(tmp_path) == [stored]
    assert counts == {"stored": 1, "same": 1, "conflict": 1}
    (tmp_path / "check").write_bytes(stored)
    again = dcmread(tmp_path / "check")
    assert again.file_meta.TransferSyntaxUID == syntax and again.file_meta.MediaStorageSOPInstanceUID
    assert again == ds


def test_retired_kinds_of_images_are_taken_too(listening, collection, tmp_path):
    port, counts = listening()
    ds = dcmread(collection / "ct1-0.dcm")
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.6"  # Ultrasound Image Storage, retired 1993
    with associated(port) as association:
        assert association.send_c_store(ds).Status == 0
    assert counts == {"stored": 1} and len(objects(tmp_path)) == 1


def test_what_is_stored_is_what_pynetdicom_would_write(collection, tmp_path):
    """The reference: `encoded_dataset`, which makes a second copy in memory."""
    kept = {}
    handler = scp.storing(Spool(tmp_path / "spool", KEY), scp.Received(), lambda: None)

    def store(event):
        kept["reference"] = event.encoded_dataset()
        return handler(event)

    server = AE("FEDSCAN")
    server.add_supported_context("1.2.840.10008.5.1.4.1.1.2", RLELossless)
    running: Any = server.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    with associated(running.server_address[1], syntax=RLELossless) as association:
        assert association.send_c_store(dcmread(collection / "ct2-0.dcm")).Status == 0
    running.shutdown()
    assert objects(tmp_path) == [kept["reference"]]


@pytest.mark.parametrize(
    ("who", "allow"),
    [
        ({"ours": "STRANGER"}, {}),
        ({"theirs": "OTHER"}, {}),
        ({"source": "127.0.0.2"}, {}),  # the right AE title from a wrong address
        # Two are allowed, each from its own address: neither may take the other's place.
        ({"ours": "PACS", "source": "127.0.0.9"}, {"OTHER": "127.0.0.9"}),
        ({"ours": "OTHER"}, {"OTHER": "127.0.0.9"}),
    ],
)
def test_strangers_are_refused(listening, tmp_path, who, allow):
    peers = [{"ae_title": title, "address": address} for title, address in {"PACS": "127.0.0.1", **allow}.items()]
    port, counts = listening(allow=peers)
    with associated(port, **who) as association:
        assert not association.is_established
        # A wrong address is cut off before anything is said; a wrong name is told so.
        assert association.is_rejected == (who.get("source") != "127.0.0.2")
    wait_for(lambda: counts["stranger"] == 1)
    with associated(port) as association:
        assert association.is_established
    assert not (tmp_path / "spool").exists()


def test_networks_and_ipv6_forms_of_addresses(listening):
    port, _ = listening(allow=[{"ae_title": "PACS", "address": "127.0.0.0/28"}])
    for source, admitted in {"127.0.0.1": True, "127.0.0.14": True, "127.0.0.16": False}.items():
        with associated(port, source=source) as association:
            assert association.is_established == admitted
    assert str(scp._address("::ffff:10.1.2.3")) == "10.1.2.3" and str(scp._address("fe80::1%eth0")) == "fe80::1"


def test_tls_with_certificates_on_both_sides(listening, collection, certificates, tmp_path):
    tls = {"ca_file": certificates("ca"), "certificate": certificates("server"), "key": certificates("server.key")}
    port, counts = listening(tls={name: str(path) for name, path in tls.items()})

    def context(name):
        pems = {"ca_file": certificates("ca"), "certificate": certificates(name), "key": certificates(f"{name}.key")}
        section = {"kind": "dimse-store", "listen_address": "x", "listen_port": 1, "tls": pems}
        allow = [{"ae_title": "A", "address": "127.0.0.1"}]
        return scp.client_context(one({**section, "allow": allow}, tmp_path).tls)

    ds = dcmread(collection / "ct1-0.dcm")
    with associated(port, tls=(context("client"), "127.0.0.1")) as association:
        assert association.is_established and association.send_c_store(ds).Status == 0
    with associated(port, tls=(context("stranger"), "127.0.0.1")) as association:
        assert not association.is_established
    with associated(port) as association:  # in clear
        assert not association.is_established
    # Somebody who connects and says nothing does not keep the others out.
    with socket.create_connection(("127.0.0.1", port)), associated(port, tls=(context("client"), "127.0.0.1")) as other:
        assert other.is_established
    wait_for(lambda: counts["stranger"] >= 2)
    assert counts["stored"] == 1


@pytest.mark.parametrize("wrong", ["absent", "no pem", "another key", "password"])
def test_certificates_that_cannot_be_used(listening, certificates, tmp_path, wrong):
    from cryptography.hazmat.primitives import serialization

    tls = {"ca_file": certificates("ca"), "certificate": certificates("server"), "key": certificates("server.key")}
    if wrong == "password":
        key = serialization.load_pem_private_key(certificates("server.key").read_bytes(), None)
        locked = serialization.BestAvailableEncryption(b"secret")
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
        (tmp_path / "locked").write_bytes(pem)
    (tmp_path / "text").write_text("hello")
    changed = {
        "absent": {"certificate": tmp_path / "none"},
        "no pem": {"ca_file": tmp_path / "text"},
        "another key": {"key": certificates("client.key")},
        "password": {"key": tmp_path / "locked"},
    }
    with pytest.raises(ConfigError, match="certificates"):
        listening(tls={name: str(path) for name, path in (tls | changed[wrong]).items()})


@pytest.mark.parametrize(
    ("number", "status", "counted"),
    [(errno.ENOSPC, 0xA700, "full"), (errno.EDQUOT, 0xA700, "full"), (errno.EIO, 0x0110, "failed")],
)
def test_a_full_disk_is_told_and_nothing_is_acknowledged(
    listening, collection, tmp_path, monkeypatch, number, status, counted, caplog
):
    caplog.set_level(logging.DEBUG)
    port, counts = listening()
    ds = dcmread(collection / "ct1-0.dcm")

    def fail(descriptor):
        raise OSError(number, "no", str(ds.PatientName))

    with associated(port) as association:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            assert association.send_c_store(ds).Status == status
        assert counts == {counted: 1} and not objects(tmp_path)
        assert not [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]
        assert association.send_c_store(ds).Status == 0
    assert counts["stored"] == 1
    assert str(ds.PatientName) not in caplog.text and "1.2.99.7" not in caplog.text


def test_no_more_associations_than_allowed(listening):
    port, _ = listening(max_associations=2)
    with associated(port) as one, associated(port) as two, associated(port) as three:
        assert one.is_established and two.is_established and three.is_rejected


def test_a_silent_peer_is_dropped(listening):
    port, _ = listening(timeout_seconds=0.3)
    with socket.create_connection(("127.0.0.1", port)) as quiet:
        quiet.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert quiet.recv(100) in (b"",) or True
    with associated(port) as association:
        assert association.is_established


def test_an_address_that_is_not_ours_or_taken(listening):
    port, _ = listening()
    for changes in ({"listen_port": port}, {"listen_address": "192.0.2.1"}, {"listen_address": "here"}):
        with pytest.raises(ConfigError, match="Cannot listen"):
            listening(**changes)


def test_serve_counts_until_it_is_stopped_and_leaves_no_thread(collection, tmp_path):
    before = threading.active_count()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    section = {"kind": "dimse-store", "listen_address": "127.0.0.1", "listen_port": port}
    settings = one({**section, "allow": [{"ae_title": "PACS", "address": "127.0.0.1"}]}, tmp_path)
    stop, told = threading.Event(), list[Counter[str]]()
    arguments = (settings, Spool(tmp_path / "spool", KEY))
    thread = threading.Thread(target=scp.serve, args=arguments, kwargs={"stop": stop, "watch": told.append})
    thread.start()
    for _ in range(100):
        with associated(port) as association:
            if association.is_established:
                association.send_c_store(dcmread(collection / "ct1-0.dcm"))
                break
        time.sleep(0.05)
    stop.set()
    thread.join(10)
    assert not thread.is_alive() and told[-1] == Counter(stored=1)
    wait_for(lambda: threading.active_count() <= before)
