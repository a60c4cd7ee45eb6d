"""Who was eligible for which run: SITE/eligible.sqlite. Never who was sampled, and nothing but keyed HMACs of patients.

A patient is told from it which runs and models their images may have gone into. "Eligible" is all that may be kept: the
privacy of a run rests on nobody knowing whom its coin tosses chose.

SQLite, write-ahead log, synchronous FULL: what a call recorded is on disk when it returns.
"""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from fedscan_core.errors import DataError, FolderError

FILE = "eligible.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS runs (number INTEGER PRIMARY KEY, run_id TEXT NOT NULL UNIQUE, model TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS patients (number INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS eligible (
    run INTEGER NOT NULL, patient INTEGER NOT NULL, since TEXT NOT NULL, PRIMARY KEY (run, patient)
) WITHOUT ROWID;
"""
_WAIT = 30.0  # seconds for another process's transaction


@dataclass(frozen=True)
class Run:
    """A run for which a patient was eligible, its model, and the first day of it."""

    run_id: str
    model: str
    since: date


def record(site_folder: Path, run_id: str, model: str, names: Iterable[str]) -> None:
    """Records that these patients are eligible for a run. Once for each run and patient; again changes nothing.

    Args:
        site_folder: the site's.
        run_id: the run, for ever.
        model: the network's name, for people.
        names: `deid.patient_name` of every patient of the cohort.

    Raises:
        DataError: a name is no keyed HMAC; nothing is recorded.
        FolderError: the file cannot be read or written.
    """
    blobs = {_blob(name) for name in names}
    since = datetime.now(UTC).date().isoformat()
    with _open(site_folder / FILE) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT OR IGNORE INTO runs (run_id, model) VALUES (?, ?)", (run_id, model))
        (run,) = db.execute("SELECT number FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        there = db.execute("SELECT name FROM eligible JOIN patients ON number = patient WHERE run = ?", (run,))
        new = [(blob,) for blob in sorted(blobs - {name for (name,) in there})]
        db.executemany("INSERT OR IGNORE INTO patients (name) VALUES (?)", new)
        db.executemany(
            "INSERT INTO eligible (run, patient, since) SELECT ?, number, ? FROM patients WHERE name = ?",
            ((run, since, *blob) for blob in new),
        )
        db.execute("COMMIT")


def runs_of(site_folder: Path, name: str) -> list[Run]:
    """The runs for which a patient was eligible, in the order in which they began.

    Raises:
        DataError: the name is no keyed HMAC.
        FolderError: the file cannot be read.
    """
    blob, path = _blob(name), site_folder / FILE
    if not path.exists():
        return []
    with _open(path) as db:
        rows = db.execute(
            "SELECT run_id, model, since FROM patients CROSS JOIN runs "
            "JOIN eligible ON run = runs.number AND patient = patients.number WHERE name = ? ORDER BY runs.number",
            (blob,),
        ).fetchall()
    return [Run(run_id, model, date.fromisoformat(since)) for run_id, model, since in rows]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with contextlib.closing(sqlite3.connect(path, timeout=_WAIT, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.executescript(_TABLES)
            yield db
    except (OSError, sqlite3.Error) as error:
        raise FolderError(
            f"{path} cannot be used ({error}).", remedy="Check the disk; if it is damaged, restore it from a backup."
        ) from None


def _blob(name: str) -> bytes:
    """A keyed HMAC as bytes; a hospital's own number must never get in here.

    Raises:
        DataError: it is none.
    """
    try:
        blob = bytes.fromhex(name)
    except ValueError:
        blob = b""
    if not 12 <= len(blob) <= 32 or blob.hex() != name:
        raise DataError(
            "A patient's name is not a keyed HMAC: it is not recorded.",
            remedy="Only patients of an encrypted cache are kept track of.",
        )
    return blob
