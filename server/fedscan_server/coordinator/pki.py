"""The coordinator's certificates: an authority of its own that signs one server certificate, or the operator's own.

ECDSA P-384, X.509 v3 (RFC 5280). Sites trust this authority and no other, so no public one can pose as the coordinator.
"""

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedscan_core.errors import ConfigError
from fedscan_core.files import write_atomic
from fedscan_server.coordinator.state import Coordinator

CA_DAYS, SERVER_DAYS = 3650, 397
_EARLY = timedelta(minutes=10)  # a site's clock may be slow


def create(c: Coordinator) -> None:
    """Makes pki/ca.key, ca.crt and, by `renew`, the server's pair."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"{c.name[:50]} fedscan CA")
    now = datetime.now(UTC)
    ca = (
        _builder(name, name, key.public_key(), now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=False, issue=True), critical=True)
        .sign(key, SHA384())
    )
    folder = c.folder / "pki"
    write_atomic(folder / "ca.key", _private_pem(key))
    write_atomic(folder / "ca.crt", ca.public_bytes(Encoding.PEM))
    renew(c)


def renew(c: Coordinator) -> datetime:
    """Makes a new server key and certificate for the address of coordinator.toml; returns its end. The authority stays.

    Raises:
        ConfigError: there is no authority of our own, since the operator brought a certificate.
    """
    folder = c.folder / "pki"
    try:
        ca_key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
        ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no ca.key: this coordinator's certificate comes from elsewhere.",
            remedy="fedscan server cert install CERTIFICATE KEY",
        ) from None
    except ValueError:
        raise ConfigError(f"{folder / 'ca.key'} is damaged.", remedy="Restore it from a backup.") from None
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / 'ca.key'} holds another kind of key.", remedy="Restore it from a backup.")
    key = ec.generate_private_key(ec.SECP384R1())
    cert = (
        _builder(_name(c.host[:64]), ca.subject, key.public_key(), datetime.now(UTC), SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_general_name(c.host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=True, issue=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, SHA384())
    )
    write_atomic(c.private_key, _private_pem(key))
    write_atomic(c.certificate, cert.public_bytes(Encoding.PEM))
    return cert.not_valid_after_utc


def install(c: Coordinator, certificate: Path, key: Path, ca: Path | None) -> None:
    """Takes over the operator's own certificate (with its chain), key and, unless a public one signed it, authority.

    Raises:
        ConfigError: a file that cannot be read, a key that is not the certificate's, or one not made for the address.
    """
    contents = []
    for path in (certificate, key, *([ca] if ca else [])):
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.", remedy="Check the path.") from None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=lambda: "")
        cert = x509.load_pem_x509_certificate(contents[0])
        if ca:
            x509.load_pem_x509_certificates(contents[2])
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{certificate} and {key} do not go together, or one is not PEM ({type(error).__name__}).",
            remedy="Give the server's certificate with its chain, and its key without a passphrase.",
        ) from None
    if not covers(cert, c.host):
        raise ConfigError(f"{certificate} is not made for {c.host}.", remedy="Check the address, or get another one.")
    folder = c.folder / "pki"
    for name in ("ca.key", "ca.crt"):
        (folder / name).unlink(missing_ok=True)
    write_atomic(c.private_key, contents[1])
    write_atomic(c.certificate, contents[0])
    if ca:
        write_atomic(folder / "ca.crt", contents[2])


def covers(certificate: x509.Certificate, host: str) -> bool:
    """Whether a certificate is made for this name or address (RFC 9525; one wildcard as the first label)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    own = _general_name(host)
    if isinstance(own, x509.IPAddress):
        return own.value in names.get_values_for_type(x509.IPAddress)
    dns = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
    return host.lower() in dns or f"*.{host.lower().partition('.')[2]}" in dns


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, sign: bool, issue: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=issue,
        crl_sign=issue,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
