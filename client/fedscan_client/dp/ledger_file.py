"""The file below a ledger: hash-chained rows in SQLite that can only be added, a lock, and a counter kept apart.

    ledger.sqlite     rows(seq, hash, body): body is canonical JSON and holds seq and the hash of the row before it;
                      the other columns are computed from it by SQLite. Triggers refuse UPDATE, DELETE and any row that
                      does not follow from the last one. migrations: how the tables came about
    ledger.counter    sequence number and hash of the last row that was acted on; may lie on another disk
    ledger.lock       held by an agent while it works on a request

Order of writes: the row is committed (write-ahead log, synchronous FULL: fsync), then the counter is replaced, and only
then does the call return. A crash in between leaves the ledger ahead of the counter, which is harmless. A counter ahead
of the ledger means that the ledger is an older copy: nothing is done with it.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedscan_client.dp import ledger_lock
from fedscan_core import files
from fedscan_core.errors import FolderError, RecordDamaged

Row = dict[str, Any]

START = "0" * 64  # what the first row follows
_WAIT = 30.0  # seconds for another process's transaction, each a few milliseconds

# Of what SQLite can say, these are no fault of the file.
_OF_THE_MACHINE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
_REFUSE = "BEGIN SELECT RAISE(ABORT, 'a ledger is only added to'); END"
# A released entry never changes: a change of the tables is a new entry, and old files are brought up by it.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE rows (
            seq INTEGER PRIMARY KEY,
            hash TEXT NOT NULL,
            body TEXT NOT NULL,
            prev_hash TEXT GENERATED ALWAYS AS (json_extract(body, '$.prev_hash')) VIRTUAL,
            utc TEXT GENERATED ALWAYS AS (json_extract(body, '$.utc')) VIRTUAL,
            state TEXT GENERATED ALWAYS AS (json_extract(body, '$.state')) VIRTUAL,
            run_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.run_id')) VIRTUAL,
            round INTEGER GENERATED ALWAYS AS (json_extract(body, '$.round')) VIRTUAL
        )""",
        "CREATE INDEX by_run ON rows(run_id, state)",
        "CREATE INDEX by_state ON rows(state, run_id)",
        "CREATE UNIQUE INDEX one_plan ON rows(run_id) WHERE state = 'admitted'",
        "CREATE UNIQUE INDEX one_answer ON rows(run_id, round, state) WHERE round IS NOT NULL",
        f"CREATE TRIGGER rows_stay BEFORE UPDATE ON rows {_REFUSE}",
        f"CREATE TRIGGER rows_remain BEFORE DELETE ON rows {_REFUSE}",
        f"""CREATE TRIGGER rows_follow BEFORE INSERT ON rows
            WHEN NEW.seq IS NOT (SELECT coalesce(max(seq), 0) + 1 FROM rows)
            OR json_extract(NEW.body, '$.prev_hash') IS NOT
                coalesce((SELECT hash FROM rows ORDER BY seq DESC LIMIT 1), '{START}')
            {_REFUSE}""",
    ),
)
_RECORD_OF_MIGRATIONS = (
    "CREATE TABLE migrations (version INTEGER PRIMARY KEY, utc TEXT, program TEXT, statements TEXT)",
    f"CREATE TRIGGER migrations_stay BEFORE UPDATE ON migrations {_REFUSE}",
    f"CREATE TRIGGER migrations_remain BEFORE DELETE ON migrations {_REFUSE}",
)


@dataclass(frozen=True)
class Book:
    """Where a site's ledger lies, and where the counter that notices an older copy of it."""

    ledger: Path
    counter: Path


# ------------------------------------------------------------------------------------------------------------ opening


@contextlib.contextmanager
def writing(book: Book, *, create: bool = False) -> Iterator[sqlite3.Connection]:
    """One transaction: what is appended inside is on disk, and acknowledged by the counter, once this has ended.

    The last row and the row that the counter knows are checked, so the cost does not grow with the ledger; `check`
    looks at everything.

    Raises:
        RecordDamaged: there is no ledger (without `create`), it was changed, or it is older than the counter.
        FolderError: another agent holds it, or it cannot be written.
    """
    with ledger_lock.borrow(book.ledger), _said_plainly(book):
        _must_exist(book, create)
        with contextlib.closing(_connect(book.ledger, "rw")) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            try:
                _migrate(db, book)
                known = _counter(book)
                _check_counter(db, book, known)
                yield db
                now = head(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        if now != known and now[0] > 0:
            _acknowledge(book, now)


@contextlib.contextmanager
def reading(book: Book) -> Iterator[sqlite3.Connection]:
    """The ledger as it is at this moment, whole chain checked, also while an agent writes. Changes nothing.

    Raises:
        RecordDamaged: as `writing`, or any row was changed.
        FolderError: it cannot be read.
    """
    with _said_plainly(book):
        _must_exist(book, create=False)
        known = _counter(book)  # before the ledger: the agent may go on in between, and the ledger is written first
        with contextlib.closing(_connect(book.ledger, "ro")) as db:
            db.execute("BEGIN")
            if _refuse_newer(db, book) == 0:
                raise RecordDamaged(f"{book.ledger} holds nothing.", remedy="A run must be admitted first.")
            check(db)
            _check_counter(db, book, known)
            yield db


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_WAIT, isolation_level=None)


def _must_exist(book: Book, create: bool) -> None:
    if book.ledger.exists():
        return
    if book.counter.exists():
        raise RecordDamaged(
            f"{book.ledger} is gone, but {book.counter} says that there was one.",
            remedy="Restore the newest copy; until then nothing is released. A new ledger would forget what was spent.",
        )
    if not create:
        raise RecordDamaged(f"There is no ledger {book.ledger}.", remedy="A run must be admitted first.")
    book.ledger.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(book.ledger, os.O_WRONLY | os.O_CREAT, 0o600))  # SQLite's own files beside it get the same mode
    files.sync_folder(book.ledger.parent)


def _migrate(db: sqlite3.Connection, book: Book) -> None:
    """Brings the tables up to date inside the running transaction, and records with them how."""
    there = _refuse_newer(db, book)
    if there == 0:
        for statement in _RECORD_OF_MIGRATIONS:
            db.execute(statement)
    for number, statements in enumerate(MIGRATIONS[there:], start=there + 1):
        for statement in statements:
            db.execute(statement)
        text = ";\n".join(statements)
        db.execute("INSERT INTO migrations VALUES (?, ?, ?, ?)", (number, _utc(), _program(), text))
    if there < len(MIGRATIONS):
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _refuse_newer(db: sqlite3.Connection, book: Book) -> int:
    there = int(db.execute("PRAGMA user_version").fetchone()[0])
    if there > len(MIGRATIONS):
        raise RecordDamaged(
            f"{book.ledger} was written by a newer version (schema {there}; this one knows {len(MIGRATIONS)}).",
            remedy="Install that version again: an older one could misread what was spent.",
        )
    return there


# --------------------------------------------------------------------------------------------------------------- rows


def append(db: sqlite3.Connection, record: Row) -> None:
    """Adds one row after the last one; `seq`, `prev_hash` and `utc` are set here."""
    seq, before = head(db)
    body = {**record, "seq": seq + 1, "prev_hash": before, "utc": _utc()}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    db.execute("INSERT INTO rows(seq, hash, body) VALUES (?, ?, ?)", (seq + 1, _digest(text), text))


def head(db: sqlite3.Connection) -> tuple[int, str]:
    """Number and hash of the last row; (0, START) of an empty ledger."""
    last = db.execute("SELECT seq, hash FROM rows ORDER BY seq DESC LIMIT 1").fetchone()
    return (0, START) if last is None else (int(last[0]), str(last[1]))


def find(db: sqlite3.Connection, where: str, *values: object) -> list[Row]:
    """Rows for which an SQL condition holds, in order, each checked against its own hash."""
    found = db.execute(f"SELECT seq, hash, body FROM rows WHERE {where}", values)
    return [_sound(db, *row) for row in found]


def check(db: sqlite3.Connection) -> None:
    """Checks every row and that each follows from the one before it.

    Raises:
        RecordDamaged: a row was edited, removed or inserted.
    """
    before, expected = START, 1
    for seq, digest, body in db.execute("SELECT seq, hash, body FROM rows ORDER BY seq"):
        row = _sound(db, seq, digest, body)
        if (row["seq"], row["prev_hash"]) != (expected, before):
            raise _damaged(db, seq)
        before, expected = digest, expected + 1


def _sound(db: sqlite3.Connection, seq: int, digest: str, body: str) -> Row:
    """A row as it was written. The number is in the body too: a row cannot stand in another one's place."""
    try:
        row: Row = json.loads(body)
        if _digest(body) == digest and row["seq"] == seq:
            return row
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise _damaged(db, seq)


def _damaged(db: sqlite3.Connection, seq: int) -> RecordDamaged:
    path = db.execute("PRAGMA database_list").fetchone()[2]
    return RecordDamaged(
        f"{path}: row {seq} does not follow from the one before: the ledger was changed.",
        remedy="Restore the file from a backup; until then nothing is released.",
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _program() -> str:
    try:
        return f"fedscan {version('fedscan')}"
    except PackageNotFoundError:
        return "fedscan (source tree)"


# ------------------------------------------------------------------------------------------------------------ counter


def _counter(book: Book) -> tuple[int, str] | None:
    try:
        known = json.loads(book.counter.read_text(encoding="utf-8"))
        return int(known["seq"]), str(known["head"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise RecordDamaged(
            f"{book.counter} cannot be read.", remedy="Restore it; the ledger cannot be trusted without it."
        ) from None


def _check_counter(db: sqlite3.Connection, book: Book, known: tuple[int, str] | None) -> None:
    """The ledger holds the row that the counter knows; the last row is sound and follows from the one before."""
    seq, now = head(db)
    if known is None:
        if seq > 1:  # after the first row a crash may come before the counter's first entry; nothing is spent yet
            raise RecordDamaged(
                f"{book.counter} is missing: an older copy of the ledger could not be told from the newest.",
                remedy="Put it back. If it is lost, and you are certain that the ledger is the newest, its content is "
                f'{{"seq": {seq}, "head": "{now}"}}',
            )
    elif known[0] > 0 and not any(row[0] == known[1] for row in _hash_at(db, known[0])):
        raise RecordDamaged(
            f"{book.ledger} is not the ledger that {book.counter} knows: it ends with row {seq}, and row {known[0]} of "
            "the known one is not in it. It is an older copy, or another ledger.",
            remedy="Restore the newest copy, with its -wal file if there is one; until then nothing is released.",
        )
    last = find(db, "seq > ? ORDER BY seq", seq - 2)
    if last and last[-1]["prev_hash"] != (_digest_at(db, seq - 1) if seq > 1 else START):
        raise _damaged(db, seq)


def _hash_at(db: sqlite3.Connection, seq: int) -> list[tuple[str]]:
    return db.execute("SELECT hash FROM rows WHERE seq = ?", (seq,)).fetchall()


def _digest_at(db: sqlite3.Connection, seq: int) -> str | None:
    return next((row[0] for row in _hash_at(db, seq)), None)


def _acknowledge(book: Book, now: tuple[int, str]) -> None:
    files.write_atomic(book.counter, (json.dumps({"seq": now[0], "head": now[1]}) + "\n").encode())


# ------------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def _said_plainly(book: Book) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _OF_THE_MACHINE:
            raise FolderError(f"{book.ledger} cannot be used: {error}.", remedy="Mend that and try again.") from None
        raise RecordDamaged(
            f"{book.ledger} is damaged: {error}.", remedy="Restore it from a backup; until then nothing is released."
        ) from None
