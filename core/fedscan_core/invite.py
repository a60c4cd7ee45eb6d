"""The one file that a coordinator hands to a hospital, or to a researcher: where to connect, whom to trust, once.

INVITE.toml: kind ("site" or "person"), name, address, coordinator, ca (PEM; "" = a public authority), ca_fingerprint,
token, expires. The token works once; read the fingerprint out over the phone.
"""

import dataclasses
import hashlib
import re
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError
from fedscan_core.files import write_atomic

_TEXT = "# Invitation to the fedscan federation of {coordinator}. It works once, until {expires}. Keep it secret.\n"
_ADDRESS = r"https://[^/\s:]+(:\d{1,5})?"


@dataclass(frozen=True)
class Invite:
    """An invitation; `address` is https://HOST[:PORT], `expires` ISO 8601 with a time zone."""

    kind: Literal["site", "person"]
    name: str
    address: str
    coordinator: str
    token: str
    expires: str
    ca: str = ""
    ca_fingerprint: str = ""


def write(path: Path, invite: Invite) -> None:
    """Writes the file, mode 0600."""
    write_atomic(
        path, (_TEXT.format(**dataclasses.asdict(invite)) + tomli_w.dumps(dataclasses.asdict(invite))).encode()
    )


def read(path: Path, kind: str, now: datetime | None = None) -> Invite:
    """Reads and checks an invitation.

    Raises:
        ConfigError: not an invitation of this kind, damaged, a fingerprint that is not the certificate's, or expired.
    """
    again = "Ask the coordinator for a new one."
    try:
        invite = Invite(**tomllib.loads(path.read_text(encoding="utf-8")))
        expires = datetime.fromisoformat(invite.expires)
        sound = all(isinstance(value, str) for value in dataclasses.asdict(invite).values()) and expires.tzinfo
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", remedy="Check the path.") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{path} is no invitation, or is damaged.", remedy=again) from None
    if not sound or not re.fullmatch(NAME_PATTERN, invite.name) or not re.fullmatch(_ADDRESS, invite.address):
        raise ConfigError(f"{path} is no invitation, or is damaged.", remedy=again)
    if invite.kind != kind:
        raise ConfigError(f"{path} invites a {invite.kind}, not a {kind}.", remedy=again)
    if invite.ca and ca_fingerprint(invite.ca) != invite.ca_fingerprint:
        raise ConfigError(f"{path}: the certificate is not the one of the fingerprint.", remedy=again)
    if expires < (now or datetime.now(UTC)):
        raise ConfigError(f"{path} expired on {invite.expires}.", remedy=again)
    return invite


def spelled(fingerprint: str) -> str:
    """A fingerprint in two lines of 16 bytes, each indented by two: fit for 80 columns and for the telephone."""
    half = len(fingerprint) // 2
    return f"  {fingerprint[:half].rstrip(':')}\n  {fingerprint[half:].lstrip(':')}"


def ca_fingerprint(pem: str) -> str:
    """SHA-256 of a PEM certificate's DER form, in pairs of hex digits, as browsers and openssl print it.

    Raises:
        ConfigError: not a certificate.
    """
    try:
        der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)
    except ValueError:
        raise ConfigError("The certificate in the invitation cannot be read.", remedy="Ask for a new one.") from None
    return hashlib.sha256(der).digest().hex(":").upper()
