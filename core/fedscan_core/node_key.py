"""A site's network identity: the key pair with which its node speaks to Flower, and signs its own requests to us.

ECDSA on NIST P-384, as Flower's node authentication wants it. The private key is made at the site and never leaves it.
Flower's signature covers a time only; ours covers the method, the path, the time and the body.
"""

import base64
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedscan_core.errors import SiteKeyError
from fedscan_core.files import sync_folder

SITE, TIME, SIGNATURE = "fedscan-site", "fedscan-time", "fedscan-signature"  # request headers
WINDOW_SECONDS = 300
_CONTEXT = b"fedscan request 1\0"


def create(path: Path) -> ec.EllipticCurvePrivateKey:
    """Makes a key pair and writes the private key (OpenSSH, 0600); an existing file is never replaced.

    Raises:
        SiteKeyError: the file exists.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SiteKeyError(f"{path} exists; it was left alone.", remedy="It is this site's network identity.") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    return key


def load(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key.

    Raises:
        SiteKeyError: it is missing, damaged, of another kind, or others can read it.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise SiteKeyError(f"Others can read {path}.", remedy=f"chmod 600 {path}")
        key = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise SiteKeyError(f"{path} cannot be read: {error.strerror}.", remedy="fedscan agent enrol") from None
    except ValueError:
        raise SiteKeyError(f"{path} holds no private key.", remedy="Restore it from a backup, or enrol anew.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SiteKeyError(f"{path} holds another kind of key.", remedy="Restore it from a backup, or enrol anew.")
    return key


def public_text(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> str:
    """The public half as one line of OpenSSH text, without a comment."""
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def fingerprint(public_key: str) -> str:
    """SHA256:... of an OpenSSH public key, as ssh-keygen -l prints it."""
    blob = base64.b64decode(public_key.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def sign_request(key: ec.EllipticCurvePrivateKey, site: str, method: str, path: str, body: bytes) -> dict[str, str]:
    """Headers that show who sends this request; good for WINDOW_SECONDS."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    signature = key.sign(_signed(site, time, method, path, body), ec.ECDSA(SHA256()))
    return {SITE: site, TIME: time, SIGNATURE: base64.b64encode(signature).decode()}


def verify_request(
    public_key: str, site: str, time: str, signature: str, method: str, path: str, body: bytes, now: datetime
) -> bool:
    """Whether the holder of this public key signed this request within WINDOW_SECONDS of `now`."""
    try:
        key = load_ssh_public_key(public_key.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        if abs((datetime.fromisoformat(time) - now).total_seconds()) > WINDOW_SECONDS:
            return False
        key.verify(
            base64.b64decode(signature, validate=True), _signed(site, time, method, path, body), ec.ECDSA(SHA256())
        )
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _signed(site: str, time: str, method: str, path: str, body: bytes) -> bytes:
    return _CONTEXT + "\n".join([site, time, method, path, hashlib.sha256(body).hexdigest()]).encode()
