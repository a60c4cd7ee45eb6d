"""The file below the quarantine: SITE/quarantine.sqlite, and sealing what no other eyes may read.

Mode 0600, write-ahead log, synchronous FULL: a transaction that returned is on disk, one that did not never happened.
Deleted rows are overwritten (secure_delete), also in the log. Sealing is AES-256-GCM with random 96-bit nonces (NIST SP
800-38D); `bound` says what and whose the text is, so that no sealed text can stand in for another.
"""

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedscan_core.errors import DataError, FolderError
from fedscan_core.files import sync_folder

NAME = "quarantine.sqlite"
_NONCE = 12
_WAIT = 30.0  # seconds for another process's transaction
_VERSION = 1
_TABLES = (
    # rectangles: JSON [[top, left, bottom, right], ...]; by: who decided; why: sealed
    """CREATE TABLE decisions (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL CHECK (kind IN ('released', 'blackout', 'rejected')),
        rectangles TEXT NOT NULL,
        decided_by TEXT NOT NULL,
        decided_at TEXT NOT NULL,
        why BLOB NOT NULL
    )""",
    # patient, series, instance, device: HMACs ('' where the file gives none); locator: sealed
    """CREATE TABLE instances (
        instance TEXT PRIMARY KEY,
        item TEXT NOT NULL,
        patient TEXT NOT NULL,
        series TEXT NOT NULL,
        reason TEXT NOT NULL,
        sop_class TEXT NOT NULL,
        modality TEXT NOT NULL,
        manufacturer TEXT NOT NULL,
        device TEXT NOT NULL,
        rows INTEGER NOT NULL,
        columns INTEGER NOT NULL,
        frames INTEGER NOT NULL,
        digest TEXT NOT NULL,
        first_seen TEXT NOT NULL,
        locator BLOB NOT NULL,
        decision INTEGER REFERENCES decisions(number)
    )""",
    "CREATE INDEX by_item ON instances(item)",
    "CREATE INDEX by_patient ON instances(patient)",
    "CREATE INDEX by_decision ON instances(decision)",
)


@contextmanager
def writing(folder: Path) -> Iterator[sqlite3.Connection]:
    """One transaction; what was done inside is on disk once this has ended, or not at all.

    Raises:
        FolderError: the file cannot be written, or is no quarantine of this version.
    """
    path = folder / NAME
    with _said_plainly(path):
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))  # SQLite's files beside it get the same mode
            sync_folder(folder)
        with closing(_connect(path, "rw")) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")
            db.execute("BEGIN IMMEDIATE")
            try:
                _migrate(db, path)
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


@contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection | None]:
    """The file as it is at this moment, None where there is none. Errors as `writing`."""
    path = folder / NAME
    if not path.exists():
        yield None
        return
    with _said_plainly(path), closing(_connect(path, "ro")) as db:
        db.execute("BEGIN")
        yield db if _version(db, path) else None  # empty: a first write that never ended


def wipe_log(folder: Path) -> None:
    """Empties the write-ahead log, so that removed rows are in no file any more.

    Raises:
        FolderError: another process reads for so long that the log cannot be emptied.
    """
    path = folder / NAME
    with _said_plainly(path), closing(_connect(path, "rw")) as db:
        if db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise FolderError(f"{path} is in use: removed rows may still be in its log.", remedy="Try again.")


def seal(key: bytes, text: str, bound: str) -> bytes:
    """Encrypts a text for one place.

    Args:
        key: the site's wrapping key, 32 bytes.
        text: what is sealed.
        bound: what and whose it is.
    """
    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, text.encode("utf-8", "surrogateescape"), _context(bound))


def unseal(key: bytes, blob: bytes, bound: str) -> str:
    """The text again.

    Raises:
        DataError: another key, or the text was changed or belongs elsewhere.
    """
    try:
        plain = AESGCM(key).decrypt(blob[:_NONCE], blob[_NONCE:], _context(bound))
    except (InvalidTag, ValueError):
        raise DataError(
            "A sealed entry of the quarantine was changed, or was written with another site key.",
            remedy=f"Check the site key; if it is right, remove {NAME}, ingest again, and decide again.",
        ) from None
    return plain.decode("utf-8", "surrogateescape")


def _context(bound: str) -> bytes:
    return b"fedscan quarantine 1\0" + bound.encode()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_WAIT, isolation_level=None)


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    if _version(db, path) == 0:
        for statement in _TABLES:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {_VERSION}")


def _version(db: sqlite3.Connection, path: Path) -> int:
    there = int(db.execute("PRAGMA user_version").fetchone()[0])
    if there > _VERSION:
        raise FolderError(f"{path} was written by a newer version.", remedy="Install that version again.")
    return there


@contextmanager
def _said_plainly(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise FolderError(
            f"{path} cannot be used: {error}.",
            remedy="Check the disk and the permissions; if the file is damaged, remove it and ingest again.",
        ) from None
