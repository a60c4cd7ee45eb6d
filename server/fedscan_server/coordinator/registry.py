"""The coordinator's own database, STATE/coordinator.sqlite: sites, people, invitations, anchors.

One short transaction a call, synced to disk. A token is stored as its SHA-256 only: a copy of the file opens nothing.
"""

import contextlib
import hashlib
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.files import sync_folder
from fedscan_core.invite import Invite, ca_fingerprint
from fedscan_server.coordinator.state import Coordinator

LONGEST_HOURS = 90 * 24.0

_TABLES = """
CREATE TABLE IF NOT EXISTS site (
    name TEXT PRIMARY KEY, public_key TEXT NOT NULL UNIQUE, node_id TEXT NOT NULL DEFAULT '', enrolled TEXT NOT NULL,
    policy TEXT NOT NULL, policy_utc TEXT NOT NULL, revoked TEXT NOT NULL DEFAULT '',
    last_seen TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS dead_key (public_key TEXT PRIMARY KEY, site TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS invitation (
    token TEXT PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, role TEXT NOT NULL, expires TEXT NOT NULL,
    used_by TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS person (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, public_key TEXT NOT NULL, token TEXT NOT NULL UNIQUE,
    added TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS anchor (
    id INTEGER PRIMARY KEY, site TEXT NOT NULL, utc TEXT NOT NULL, run_id TEXT NOT NULL, round INTEGER NOT NULL,
    anchor TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS anchor_site ON anchor (site, id);
"""


@contextlib.contextmanager
def open_(c: Coordinator) -> Iterator[sqlite3.Connection]:
    """One transaction, on disk when the block ends; undone if it raises. Rows can be read by name.

    Raises:
        FolderError: the database cannot be opened, is damaged, or stays locked for 10 s.
    """
    try:
        connection = sqlite3.connect(f"file:{_path(c)}?mode=rw", uri=True, timeout=10.0, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise FolderError(f"{c.database}: {error}.", remedy="fedscan server check; restore it from a backup.") from None


def create(c: Coordinator) -> None:
    """Makes the empty database (0600), or brings its tables up to date."""
    descriptor = os.open(c.database, os.O_RDWR | os.O_CREAT, 0o600)
    os.close(descriptor)
    with contextlib.closing(sqlite3.connect(c.database)) as connection:
        connection.executescript(_TABLES)
    sync_folder(c.folder)


def utc() -> str:
    """Now, ISO 8601 with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hashed(token: str) -> str:
    """How a token is stored; it has 256 random bits, so no slow hash is needed."""
    return hashlib.sha256(token.encode()).hexdigest()


def invite(c: Coordinator, kind: str, name: str, role: str, hours: float) -> Invite:
    """A new invitation; an unused earlier one for the same name stops working.

    Raises:
        ConfigError: a name that is none, or hours out of range.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"'{name}' is not a name for a {kind}.", remedy="1 to 64 letters, digits, dots, dashes and underscores."
        )
    if not 0 < hours <= LONGEST_HOURS:
        raise ConfigError(f"An invitation for {hours:g} hours.", remedy=f"Give up to {LONGEST_HOURS:g} hours.")
    token = secrets.token_urlsafe(32)
    expires = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
    with open_(c) as db:
        db.execute("DELETE FROM invitation WHERE kind = ? AND name = ? AND used_by = ''", (kind, name))
        db.execute("INSERT INTO invitation VALUES (?, ?, ?, ?, ?, '')", (hashed(token), kind, name, role, expires))
    ca = c.ca_pem
    return Invite(
        kind="site" if kind == "site" else "person",
        name=name,
        address=c.address,
        coordinator=c.name,
        token=token,
        expires=expires,
        ca=ca,
        ca_fingerprint=ca_fingerprint(ca) if ca else "",
    )


def invitation(db: sqlite3.Connection, kind: str, token: str) -> sqlite3.Row:
    """The invitation that this token belongs to, used or not.

    Raises:
        ConfigError: there is none of this kind, or it expired. One text for all: a guesser learns nothing.
    """
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM invitation WHERE token = ? AND kind = ?", (hashed(token), kind)
    ).fetchone()
    if row is None or datetime.fromisoformat(row["expires"]) < datetime.now(UTC):
        raise refused()
    return row


def refused() -> ConfigError:
    """What everybody hears whose invitation is not good."""
    return ConfigError(
        "This invitation is not valid: it was used, replaced by a newer one, or it expired.",
        remedy="Ask the coordinator for a new one.",
    )


def _path(c: Coordinator) -> str:
    return quote(str(c.database))
