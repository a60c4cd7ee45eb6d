"""A run's order: what is asked of the sites, by whom and until when, signed by the person who launched it.

The signature is the launcher's own (Ed25519, RFC 8032), made on the launcher's machine: a coordinator can neither
invent a run nor change one. A site whose policy names launchers with their public keys runs nobody else's orders.

An order without a signature is for simulation and for sites that leave it to the coordinator who may launch.
"""

import base64
import dataclasses
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from secrets import token_hex

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import WireError

_CONTEXT = b"fedscan order 1\0"
LONGEST = timedelta(days=180)  # a signed order does not live longer
LONGEST_TEXT = 256 * 1024  # characters: a run's description, not a store


@dataclass(frozen=True)
class Order:
    """What one run asks of every site.

    `config` is `config.for_sites` JSON. Times are UTC, ISO 8601 with seconds; `signature` is base64.
    """

    run_id: str
    config: str
    launcher: str = "simulation"
    issued: str = "2020-01-01T00:00:00+00:00"
    valid_until: str = "9999-12-31T00:00:00+00:00"
    signature: str = ""


def new_run_id(name: str) -> str:
    """A run's id: its name and 48 random bits; sites book their ledgers under it for ever."""
    return f"{name[:40]}-{token_hex(6)}"


def sign(order: Order, key: Ed25519PrivateKey) -> Order:
    """The order with its launcher's signature over all other fields."""
    return dataclasses.replace(order, signature=base64.b64encode(key.sign(_signed(order))).decode())


def signed_by(order: Order, public_key: str) -> bool:
    """Whether the signature is this key's; `public_key` is one line of OpenSSH text ("ssh-ed25519 AAAA...")."""
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        key = load_ssh_public_key(public_key.encode())
        if not isinstance(key, Ed25519PublicKey):
            return False
        key.verify(base64.b64decode(order.signature, validate=True), _signed(order))
    except (ValueError, InvalidSignature):
        return False
    return True


def public_text(key: Ed25519PrivateKey) -> str:
    """The public half as one line of OpenSSH text, without a comment."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def fault(order: Order, now: datetime | None = None) -> str | None:
    """Why this order is not to be followed now, or None; public values only. A site's clock may be 10 minutes slow."""
    now = now or datetime.now(UTC)
    issued, until = datetime.fromisoformat(order.issued), datetime.fromisoformat(order.valid_until)
    if issued > now + timedelta(minutes=10):
        return "the order is from the future"
    if until < now:
        return "the order is no longer valid"
    if order.signature and until - issued > LONGEST:
        return f"the order is valid for more than {LONGEST.days} days"
    return None


def to_text(order: Order) -> str:
    """Canonical JSON."""
    return json.dumps(dataclasses.asdict(order), sort_keys=True, separators=(",", ":"))


def from_text(text: str) -> Order:
    """Reads `to_text`.

    Raises:
        WireError: not exactly the fields of an order, each of its type and form; or too long.
    """
    names = {field.name for field in dataclasses.fields(Order)}
    try:
        if len(text) > LONGEST_TEXT:
            raise ValueError
        tree = json.loads(text)
        if set(tree) != names or any(not isinstance(value, str) for value in tree.values()):
            raise ValueError
        order = Order(**tree)
        for name in (order.run_id, order.launcher):  # they become parts of files' names and of what people read
            if not re.fullmatch(NAME_PATTERN, name):
                raise ValueError
        for time in (order.issued, order.valid_until):
            if datetime.fromisoformat(time).tzinfo is None:
                raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise WireError("The run's order is not one.", remedy="Install the same fedscan version.") from None
    return order


def _signed(order: Order) -> bytes:
    return _CONTEXT + to_text(dataclasses.replace(order, signature="")).encode()
