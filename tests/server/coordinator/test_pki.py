import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509

from fedscan_core.errors import ConfigError
from fedscan_server.coordinator import pki, service


def handshake(c, trusted: str, host: str = "localhost") -> None:
    """TLS between a server with the coordinator's certificate and a client that trusts `trusted` (PEM)."""
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(c.certificate, c.private_key)
    outside = ssl.create_default_context(cadata=trusted)
    outside.verify_flags |= ssl.VERIFY_X509_STRICT
    left, right = socket.socketpair()
    left.settimeout(5)
    right.settimeout(5)

    def serve():
        try:
            inside.wrap_socket(left, server_side=True).close()
        except OSError:
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        outside.wrap_socket(right, server_hostname=host).close()
    finally:
        right.close()
        thread.join()


def test_sites_that_trust_our_authority_connect_and_others_do_not(coordinator, tmp_path):
    handshake(coordinator, coordinator.ca_pem)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(coordinator, coordinator.ca_pem, "elsewhere.example.org")
    other = service.init(tmp_path / "other", "Other", "localhost:1", "127.0.0.1:1")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(coordinator, other.ca_pem)


def test_an_address_in_numbers_works_too(tmp_path):
    c = service.init(tmp_path / "state", "x", "127.0.0.1:8443", "127.0.0.1:1")
    handshake(c, c.ca_pem, "127.0.0.1")
    six = service.init(tmp_path / "six", "x", "[::1]:8443", "127.0.0.1:1")
    handshake(six, six.ca_pem, "::1")


def test_renewing_keeps_the_authority(coordinator):
    ca, before = coordinator.ca_pem, coordinator.certificate.read_bytes()
    until = pki.renew(coordinator)
    assert timedelta(days=390) < until - datetime.now(UTC) < timedelta(days=398)  # what clients accept at most
    assert coordinator.ca_pem == ca and coordinator.certificate.read_bytes() != before
    handshake(coordinator, ca)


def test_the_authority_signs_servers_only(coordinator):
    ca = x509.load_pem_x509_certificate(coordinator.ca_pem.encode())
    limits = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (limits.ca, limits.path_length) == (True, 0)
    server = x509.load_pem_x509_certificate(coordinator.certificate.read_bytes())
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value._usages == [
        x509.oid.ExtendedKeyUsageOID.SERVER_AUTH
    ]


def test_keys_are_private(coordinator):
    for path in (coordinator.folder / "pki").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_the_operators_own_certificate(coordinator, tmp_path):
    pki_of = coordinator.folder / "pki"
    own = service.init(
        tmp_path / "own",
        "Own",
        "localhost:8443",
        "127.0.0.1:1",
        own=(coordinator.certificate, coordinator.private_key, pki_of / "ca.crt"),
    )
    handshake(own, coordinator.ca_pem)
    assert own.ca_pem == coordinator.ca_pem and not (own.folder / "pki/ca.key").exists()
    with pytest.raises(ConfigError, match="comes from elsewhere"):
        pki.renew(own)
    pki.install(own, coordinator.certificate, coordinator.private_key, None)
    assert own.ca_pem == ""


def test_a_certificate_that_does_not_fit_is_refused_and_nothing_is_made(coordinator, tmp_path):
    other = service.init(tmp_path / "other", "Other", "other.example.org:1", "127.0.0.1:1")
    (tmp_path / "junk").write_text("junk")
    for certificate, key, ca, why in (
        (other.certificate, other.private_key, None, "not made for localhost"),
        (coordinator.certificate, other.private_key, None, "do not go together"),
        (tmp_path / "junk", tmp_path / "junk", None, "do not go together"),
        (coordinator.certificate, coordinator.private_key, tmp_path / "junk", "do not go together"),
        (tmp_path / "gone", coordinator.private_key, None, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=why):
            service.init(tmp_path / "new", "x", "localhost:1", "127.0.0.1:1", own=(certificate, key, ca))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["junk", "other", "state"]


def test_wildcards_cover_one_label(coordinator):
    class Fake:
        def __init__(self, *names):
            self.extensions = x509.Extensions(
                [x509.Extension(x509.SubjectAlternativeName.oid, False, x509.SubjectAlternativeName(names))]
            )

    wild: Any = Fake(x509.DNSName("*.example.org"))
    assert pki.covers(wild, "FedScan.example.org")
    assert not pki.covers(wild, "a.b.example.org") and not pki.covers(wild, "example.org")
    assert not pki.covers(wild, "10.0.0.1")
