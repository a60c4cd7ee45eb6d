"""The registry of people: who may look, who may launch, who may look after the coordinator; bearer tokens, hashed."""

import secrets
import sqlite3
from dataclasses import dataclass
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from fedscan_core.errors import ConfigError
from fedscan_core.invite import Invite
from fedscan_server.coordinator import registry
from fedscan_server.coordinator.state import Coordinator

Role = Literal["viewer", "researcher", "operator"]
ROLES: tuple[Role, ...] = ("viewer", "researcher", "operator")  # each may all that the ones before may


@dataclass(frozen=True)
class Person:
    """Somebody who logged in with an invitation. `public_key` (OpenSSH, Ed25519) signs that person's orders."""

    name: str
    role: Role
    public_key: str

    def may(self, role: Role) -> bool:
        """Whether this person's role is at least that one."""
        return ROLES.index(self.role) >= ROLES.index(role)


def invite(c: Coordinator, name: str, role: str, hours: float) -> Invite:
    """A one-time invitation; for a person who is there, logging in with it replaces role, key and token.

    Raises:
        ConfigError: an unknown role, a name that is none, or hours out of range.
    """
    if role not in ROLES:
        raise ConfigError(f"There is no role '{role}'.", remedy=f"The roles are {', '.join(ROLES)}.")
    return registry.invite(c, "person", name, role, hours)


def redeem(c: Coordinator, token: str, public_key: str) -> tuple[Person, str]:
    """Takes up an invitation, once: (the person, the bearer token). The token is told now and never again.

    Raises:
        ConfigError: the invitation is not valid, the key is no Ed25519 key, or another person's.
    """
    public_key = _plain_key(public_key)
    bearer = secrets.token_urlsafe(32)
    with registry.open_(c) as db:
        invitation = registry.invitation(db, "person", token)
        if invitation["used_by"]:
            raise registry.refused()
        name = invitation["name"]
        if db.execute("SELECT 1 FROM person WHERE public_key = ? AND name <> ?", (public_key, name)).fetchone():
            raise ConfigError("This key is another person's.", remedy="Make your own: fedscan login makes one.")
        db.execute(
            "INSERT OR REPLACE INTO person VALUES (?, ?, ?, ?, ?)",
            (name, invitation["role"], public_key, registry.hashed(bearer), registry.utc()),
        )
        db.execute("UPDATE invitation SET used_by = ? WHERE token = ?", (public_key, invitation["token"]))
        return Person(name, invitation["role"], public_key), bearer


def authenticate(c: Coordinator, bearer_token: str) -> Person | None:
    """Whose token this is, or None. Looked up by its SHA-256, so timing tells nothing of a stored token."""
    with registry.open_(c) as db:
        row = db.execute("SELECT * FROM person WHERE token = ?", (registry.hashed(bearer_token),)).fetchone()
    return None if row is None else _person(row)


def every(c: Coordinator) -> list[Person]:
    """Everybody, by name."""
    with registry.open_(c) as db:
        return [_person(row) for row in db.execute("SELECT * FROM person ORDER BY name")]


def remove(c: Coordinator, name: str) -> None:
    """Takes the person's token and open invitations away, at once.

    Raises:
        ConfigError: there is nobody of that name.
    """
    with registry.open_(c) as db:
        gone = db.execute("DELETE FROM person WHERE name = ?", (name,)).rowcount
        gone += db.execute("DELETE FROM invitation WHERE kind = 'person' AND name = ?", (name,)).rowcount
    if not gone:
        raise ConfigError(f"There is nobody called '{name}'.", remedy="fedscan server person list")


def _person(row: sqlite3.Row) -> Person:
    return Person(row["name"], row["role"], row["public_key"])


def _plain_key(public_key: str) -> str:
    try:
        key = load_ssh_public_key(public_key.encode())
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError("The public key is no Ed25519 key.", remedy="fedscan login makes one.")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
