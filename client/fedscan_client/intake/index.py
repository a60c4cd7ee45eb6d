"""What the intake has seen, on disk: a row for each object of the source, so that the next run reads only what is new.

    SITE/intake.sqlite    names are keyed HMACs, places (paths, which may hold names) are sealed with AES-256-GCM

Memory stays flat however many objects there are: rows are written as they are found and read back patient by patient.
Losing the file loses nothing but time. A place that does not open (the site key was rotated) counts as never seen.
"""

import contextlib
import hmac
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedscan_core.errors import DataError, FolderError

FILE = "intake.sqlite"
_NONCE = 12
_WAIT = 60.0  # seconds for another process's transaction
_EVERY = 500  # rows between two commits: what an interrupted run reads again
_SCHEMA = """
CREATE TABLE IF NOT EXISTS object (
    place BLOB PRIMARY KEY,
    stamp TEXT NOT NULL,
    locator BLOB NOT NULL,
    run INTEGER NOT NULL,
    reason TEXT NOT NULL,
    patient TEXT NOT NULL,
    study TEXT NOT NULL,
    series TEXT NOT NULL,
    instance TEXT NOT NULL,
    accession TEXT NOT NULL,
    review TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outcome (
    series TEXT PRIMARY KEY,
    patient TEXT NOT NULL,
    digest BLOB NOT NULL,
    told TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_patient ON object (patient, series, instance);
CREATE INDEX IF NOT EXISTS by_study ON object (study, patient);
CREATE INDEX IF NOT EXISTS by_series ON object (series, patient);
CREATE INDEX IF NOT EXISTS by_instance ON object (instance, patient);
CREATE INDEX IF NOT EXISTS by_accession ON object (accession, patient);
PRAGMA user_version = 1;
"""


@dataclass(frozen=True)
class Header:
    """Whose and which an object is: keyed HMACs, "" where the header does not say.

    `reason` is why the object cannot be used, "" where it can.

    `review` is why a person or a rule has to release it first, "" where nobody has to.
    """

    reason: str = ""
    patient: str = ""
    study: str = ""
    series: str = ""
    instance: str = ""
    accession: str = ""
    review: str = ""


@dataclass(frozen=True)
class Row:
    """One object. `locator` may hold names: in memory only."""

    locator: str
    stamp: str
    header: Header


class Index:
    """The open index of one run of the intake; use `opened`."""

    def __init__(self, db: sqlite3.Connection, wrapping: bytes) -> None:
        """Takes a connection whose schema is there, and the site's wrapping key."""
        self._db = db
        keys = HKDF(SHA256(), 64, salt=None, info=b"fedscan intake index 1").derive(wrapping)
        self._names, self._seal = keys[:32], AESGCM(keys[32:])
        self._pending = 0
        self.moved: set[str] = set()
        self.run = 1 + int(db.execute("SELECT coalesce(max(run), 0) FROM object").fetchone()[0])

    def seen(self, locator: str, stamp: str) -> bool:
        """Whether the same object, unchanged, has a row; then it is marked as still there."""
        place = self._place(locator)
        row = self._db.execute("SELECT stamp, locator, reason FROM object WHERE place = ?", (place,)).fetchone()
        # What could not be read is tried again: permissions and networks come back without a new stamp.
        if row is None or row[0] != stamp or row[2] == "unreadable" or self._opened(place, row[1]) is None:
            return False
        self._db.execute("UPDATE object SET run = ? WHERE place = ?", (self.run, place))
        self._tick()
        return True

    def knows(self, locator: str) -> bool:
        """Whether there is a row for an object, whatever has become of it since."""
        return self._db.execute("SELECT 1 FROM object WHERE place = ?", (self._place(locator),)).fetchone() is not None

    def put(self, locator: str, stamp: str, header: Header) -> None:
        """Writes or replaces the row of an object; whose it was before, if another's, is in `moved`."""
        place, sealed = self._sealed(locator)
        before = self._db.execute("SELECT patient FROM object WHERE place = ?", (place,)).fetchone()
        if before and before[0] not in ("", header.patient):
            self.moved.add(before[0])
        self._db.execute(
            "REPLACE INTO object VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (place, stamp, sealed, self.run, *astuple(header)),
        )
        self._tick()

    def sweep(self) -> None:
        """Drops the rows of objects that this run did not find."""
        self._db.execute("DELETE FROM object WHERE run <> ?", (self.run,))
        self._db.execute("DELETE FROM outcome WHERE series NOT IN (SELECT series FROM object)")
        self.commit()

    def forget(self, patient: str) -> None:
        """Drops a patient's rows, overwritten on disk."""
        for table in ("object", "outcome"):
            self._db.execute(f"DELETE FROM {table} WHERE patient = ?", (patient,))
        self.commit()

    def patients(self) -> list[str]:
        """Names of all patients, sorted."""
        return [row[0] for row in self._db.execute("SELECT DISTINCT patient FROM object WHERE reason = '' ORDER BY 1")]

    def series(self, patient: str) -> Iterator[tuple[str, list[Row]]]:
        """A patient's series, each with its objects in the order of their instances."""
        names = self._db.execute(
            "SELECT DISTINCT series FROM object WHERE patient = ? AND reason = '' ORDER BY 1", (patient,)
        ).fetchall()
        for (series,) in names:
            yield series, self._rows("patient = ? AND reason = '' AND series = ?", (patient, series))

    def outcome(self, series: str, digest: bytes) -> Any:
        """What came of a series when it was last read, if what went in had the same digest; else None."""
        row = self._db.execute("SELECT told FROM outcome WHERE series = ? AND digest = ?", (series, digest)).fetchone()
        return None if row is None else json.loads(row[0])

    def settle(self, series: str, patient: str, digest: bytes, told: Any) -> None:
        """Keeps what came of a series, as JSON."""
        text = json.dumps(told, sort_keys=True)
        self._db.execute("REPLACE INTO outcome VALUES (?, ?, ?, ?)", (series, patient, digest, text))
        self._tick()

    def rows_of(self, patient: str) -> list[Row]:
        """All of a patient's objects, also those that were set aside."""
        return self._rows("patient = ?", (patient,))

    def shared_accessions(self, patient: str) -> frozenset[str]:
        """Names of the patient's accession numbers that another patient has too: they say nothing of either."""
        query = (
            "SELECT DISTINCT a.accession FROM object a JOIN object b ON a.accession = b.accession "
            "WHERE a.patient = ? AND a.accession <> '' AND b.patient <> a.patient"
        )
        return frozenset(row[0] for row in self._db.execute(query, (patient,)))

    def clashing(self, patient: str) -> frozenset[str]:
        """Names of the patient's studies, series and instances that another patient claims too."""
        found: set[str] = set()
        for column in ("study", "series", "instance"):
            found.update(
                row[0]
                for row in self._db.execute(
                    f"SELECT DISTINCT a.{column} FROM object a JOIN object b ON a.{column} = b.{column} "
                    "WHERE a.patient = ? AND a.reason = '' AND b.reason = '' AND b.patient <> a.patient",
                    (patient,),
                )
            )
        return frozenset(found)

    def has(self, instance: str) -> bool:
        """Whether an instance is there."""
        return self._db.execute("SELECT 1 FROM object WHERE instance = ?", (instance,)).fetchone() is not None

    def count(self, what: str = "*") -> int:
        """How many objects, or distinct patients, studies, series or instances among the readable ones."""
        query = "SELECT count(*) FROM object"
        if what != "*":
            if what not in ("patient", "study", "series", "instance"):
                raise ValueError(what)
            query = f"SELECT count(DISTINCT {what}) FROM object WHERE reason = ''"
        return int(self._db.execute(query).fetchone()[0])

    def reasons(self) -> dict[str, int]:
        """How many objects were set aside for their header alone, by reason."""
        rows = self._db.execute("SELECT reason, count(*) FROM object WHERE reason <> '' GROUP BY reason ORDER BY 1")
        return {str(reason): int(count) for reason, count in rows}

    def damaged(self) -> Iterator[Row]:
        """The objects set aside for their header alone."""
        yield from self._rows("reason <> ''", ())

    def rekey(self, after: "Index", moved: Mapping[str, str]) -> None:
        """Moves every row to `after`, the same file under another wrapping key; see the function `rekey`."""
        changed = []
        for place, sealed in self._db.execute("SELECT place, locator FROM object"):
            ours, theirs = self._opened(place, sealed), after._opened(place, sealed)
            locator = theirs if ours is None else ours
            if locator is None:
                raise DataError("The intake's index is under neither key.", remedy=f"Remove {FILE} and ingest again.")
            if ours is not None or locator in moved:
                changed.append((*after._sealed(moved.get(locator, locator)), place))
        self._db.executemany("UPDATE object SET place = ?, locator = ? WHERE place = ?", changed)

    def _sealed(self, locator: str) -> tuple[bytes, bytes]:
        place, nonce = self._place(locator), secrets.token_bytes(_NONCE)
        return place, nonce + self._seal.encrypt(nonce, locator.encode("utf-8", "surrogateescape"), place)

    def _rows(self, where: str, values: tuple[str, ...]) -> list[Row]:
        rows: list[Row] = []
        for place, locator, stamp, *names in self._db.execute(
            "SELECT place, locator, stamp, reason, patient, study, series, instance, accession, review FROM object "
            f"WHERE {where}",
            values,
        ):
            text = self._opened(place, locator)
            if text is None:
                raise DataError("The intake's index was altered.", remedy=f"Remove {FILE} and ingest again.")
            rows.append(Row(text, stamp, Header(*names)))
        # Of several copies of an instance, the one that has to wait comes first; then an order that no key decides.
        return sorted(rows, key=lambda row: (row.header.instance, not row.header.review, _order(row.locator)))

    def _place(self, locator: str) -> bytes:
        return hmac.new(self._names, locator.encode("utf-8", "surrogateescape"), sha256).digest()[:16]

    def _opened(self, place: bytes, sealed: bytes) -> str | None:
        try:
            plain = self._seal.decrypt(sealed[:_NONCE], sealed[_NONCE:], place)
        except (InvalidTag, ValueError):
            return None
        return plain.decode("utf-8", "surrogateescape")

    def _tick(self) -> None:
        self._pending += 1
        if self._pending >= _EVERY:
            self.commit()

    def commit(self) -> None:
        """Puts what was done so far on disk, and lets others write."""
        self._db.commit()
        self._pending = 0


def _order(locator: str) -> bytes:
    return sha256(locator.encode("utf-8", "surrogateescape")).digest()


@contextlib.contextmanager
def opened(folder: Path, wrapping: bytes, *, dry: bool = False) -> Iterator[Index]:
    """Opens SITE/intake.sqlite, made if need be (0600); with `dry` a copy in memory, and nothing is written.

    Whatever ends the body, the rows of the objects read so far are kept.

    Raises:
        DataError: the file is not an index.
        FolderError: it cannot be written, or another command holds it for long.
    """
    path = folder / FILE
    try:
        with contextlib.closing(_connect(path, dry)) as db:
            db.executescript(_SCHEMA)
            try:
                yield Index(db, wrapping)
            finally:
                db.commit()
    except sqlite3.OperationalError as error:  # locked, read-only, disk full: nothing is wrong with what is in it
        raise FolderError(
            f"The intake's index {path} cannot be used now ({error}).",
            remedy="Wait for another command that is at work, or check the folder's permissions and free space.",
        ) from None
    except sqlite3.DatabaseError as error:
        raise DataError(
            f"The intake's index {path} cannot be used ({error}).", remedy="Remove it and ingest again."
        ) from None


def rekey(folder: Path, old: bytes, new: bytes, moved: Mapping[str, str]) -> None:
    """Seals every place again under a new wrapping key, in one transaction; what is under it already stays.

    Args:
        folder: the site's.
        old: the wrapping key so far.
        new: the one from now on.
        moved: locators that have become others.

    Raises:
        DataError: the file is not an index, or holds something under neither key; nothing was changed.
    """
    if not (folder / FILE).exists():
        return
    with opened(folder, old) as before:
        before.rekey(Index(before._db, new), moved)


def _connect(path: Path, dry: bool) -> sqlite3.Connection:
    if dry:
        memory = sqlite3.connect(":memory:")
        if path.exists():
            # Opened as it is, where nobody is at work: reading a log in use would leave files behind.
            quiet = "" if path.with_name(f"{FILE}-wal").exists() else "&immutable=1"
            with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{quiet}", uri=True)) as db:
                db.backup(memory)
        return memory
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, timeout=_WAIT)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")  # a power cut loses rows, not the file
    db.execute("PRAGMA secure_delete = ON")
    return db
