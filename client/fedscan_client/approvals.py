"""Which runs asked this site, and what people here decided about them.

    SITE/runs.sqlite    one row for each run: its signed order, when it first came, and the last decision (0600)

A run without a decision is pending where the policy says `approval = "manual"`, and approved where it says
"auto-within-policy": a policy that changes counts at once, also for runs under way. A decision is in the audit log
before it holds. Once a revocation has returned, no release of that run is recorded any more, and only what is recorded
may leave: the recording of a release and a decision exclude each other (`releasing`).
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedscan_client import two_people
from fedscan_client.audit import log
from fedscan_client.site import Site
from fedscan_core import files
from fedscan_core import order as orders
from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.order import Order

FILE = "runs.sqlite"
MOST_PENDING = 200  # a coordinator that invents runs fills no disk
PENDING = "a person at this site has yet to approve it"
_WAIT = 30.0  # seconds for another process's transaction
_VERSION = 1
_TABLE = """CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,
    asked TEXT NOT NULL,
    came TEXT NOT NULL,
    decision TEXT NOT NULL DEFAULT '' CHECK (decision IN ('', 'approved', 'refused', 'revoked')),
    decided_by TEXT NOT NULL DEFAULT '',
    decided TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT ''
)"""

State = Literal["pending", "approved", "refused", "revoked", "expired"]


class Refused(Exception):
    """The hospital says no; `reason` may be shown to the researcher: it depends on no patient."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Asked:
    """A run as this site knows it.

    Attributes:
        order: what was asked, by whom.
        came: when, UTC.
        state: as of now.
        by, decided, reason: of the last decision; "" where none was taken. The researcher is told the reason.
    """

    order: Order
    came: str
    state: State
    by: str
    decided: str
    reason: str

    @property
    def run_id(self) -> str:
        """The run."""
        return self.order.run_id


# ----------------------------------------------------------------------------------------------------- the app's part


def note_request(here: Site, order: Order) -> Asked:
    """Keeps the run's order when it first comes; the run as it stands.

    Raises:
        Refused: another order came under this run's id before, it begins like another's, or too many runs wait.
        FolderError: the file cannot be used.
    """
    with _writing(here.folder) as db:
        known = _find(db, here, order.run_id)
        if known is None:
            asked = orders.to_text(order)
            if _mistakable(db, order.run_id):
                raise Refused("the run's id begins like another's here, so that people could decide on the wrong one")
            if here.policy.approval == "manual" and _pending(db) >= MOST_PENDING:
                raise Refused("too many runs wait for approval at this site")
            log.append(
                here.folder, "request", run_id=order.run_id, launcher=order.launcher, approval=here.policy.approval
            )
            values = (order.run_id, asked, _now())
            db.execute("INSERT INTO runs (run_id, asked, came) VALUES (?, ?, ?)", values)
            known = _find(db, here, order.run_id)
        assert known is not None
        if known.order != order:
            raise Refused("another order came under this run's id before: launch it as a new run")
        return known


def _mistakable(db: sqlite3.Connection, run_id: str) -> bool:
    """Whether one of the ids is the beginning of the other: people type beginnings (`get`)."""
    either = "substr(run_id, 1, length(?1)) = ?1 OR substr(?1, 1, length(run_id)) = run_id"
    return db.execute(f"SELECT 1 FROM runs WHERE {either}", (run_id,)).fetchone() is not None


def check(here: Site, order: Order) -> None:
    """Whether this run may go on here, exactly as ordered.

    Raises:
        Refused: it may not: it never asked, waits, was refused or revoked, or another order has this id.
        FolderError: the file cannot be used.
    """
    with _reading(here.folder) as db:
        _check(_find(db, here, order.run_id) if db else None, order)


@contextlib.contextmanager
def releasing(here: Site, order: Order) -> Iterator[None]:
    """Around the recording of a release: nobody decides meanwhile, and it happens only if the run may go on.

    Raises:
        Refused, FolderError: as `check`.
    """
    with _writing(here.folder) as db:
        _check(_find(db, here, order.run_id), order)
        yield


def _check(known: Asked | None, order: Order) -> None:
    if known is None or known.order != order:
        raise Refused("this site was not asked for this run")
    if known.state != "approved":
        raise Refused(told(known))


def told(known: Asked) -> str:
    """What the researcher is told of a run that does not go on here."""
    words = {"pending": PENDING, "refused": "this site refused the run", "revoked": "this site withdrew from the run"}
    said = words.get(known.state, "the order is no longer valid")
    return f"{said}: {known.reason}" if known.reason and known.state in ("refused", "revoked") else said


# --------------------------------------------------------------------------------------------------- the people's part


def every(here: Site) -> list[Asked]:
    """All runs that ever asked, the newest last; [] where none did."""
    with _reading(here.folder) as db:
        return _asked(db, here, "SELECT * FROM runs ORDER BY came, run_id") if db else []


def state(here: Site, run_id: str) -> State | None:
    """How a run stands here; None: it never asked."""
    with _reading(here.folder) as db:
        known = _find(db, here, run_id) if db else None
    return known.state if known else None


def get(here: Site, run_id: str) -> Asked:
    """The run of an id, or of its first letters.

    Raises:
        ConfigError: there is none, or several.
    """
    found = [asked for asked in every(here) if asked.run_id.startswith(run_id)]
    exact = [asked for asked in found if asked.run_id == run_id]
    if len(exact or found) != 1:
        said = f"Several runs begin with '{run_id}'." if found else f"No run '{run_id}' has asked this site."
        raise ConfigError(said, remedy="'fedscan agent runs SITE_DIR' lists them.")
    return (exact or found)[0]


def approve(here: Site, run_id: str, by: str) -> Asked:
    """Lets a run take part. It is charged to the ledger when the server next asks. Errors as `get`."""
    return _decide(here, run_id, "approved", by, "")


def refuse(here: Site, run_id: str, by: str, reason: str) -> Asked:
    """Says no to a run, with a reason that its researcher is told. Errors as `get`."""
    return _decide(here, run_id, "refused", by, reason)


def revoke(here: Site, run_id: str, by: str, reason: str = "") -> Asked:
    """Ends a run's part here, at any time: nothing more leaves. What was charged stays charged. Errors as `get`."""
    return _decide(here, run_id, "revoked", by, reason)


def _decide(here: Site, run_id: str, decision: State, by: str, reason: str) -> Asked:
    name, known, why = two_people.person(by), get(here, run_id), " ".join(reason.split())
    if not why.isprintable() or len(why) > 500:
        raise ConfigError("The reason is longer than 500 characters, or cannot be printed.", remedy="Say it shorter.")
    if decision == "approved" and known.state == "expired":
        raise ConfigError(f"The order of run {known.run_id} is no longer valid.", remedy="It must be launched anew.")
    with _writing(here.folder) as db:
        told = {"run_id": known.run_id, "decision": decision, "by": name, "login": two_people.login(), "reason": why}
        log.append(here.folder, "approval", **told)
        sql = "UPDATE runs SET decision = ?, decided_by = ?, decided = ?, reason = ? WHERE run_id = ?"
        db.execute(sql, (decision, name, _now(), why, known.run_id))
    return get(here, known.run_id)


# ---------------------------------------------------------------------------------------------------------------- rows


def _find(db: sqlite3.Connection, here: Site, run_id: str) -> Asked | None:
    return next(iter(_asked(db, here, "SELECT * FROM runs WHERE run_id = ?", run_id)), None)


def _asked(db: sqlite3.Connection, here: Site, sql: str, *values: str) -> list[Asked]:
    found = []
    for _, text, came, decision, by, decided, reason in db.execute(sql, values):
        order = orders.from_text(text)
        now: State = decision or ("pending" if here.policy.approval == "manual" else "approved")
        if now in ("pending", "approved") and orders.fault(order):
            now = "expired"
        found.append(Asked(order, came, now, by, decided, reason))
    return found


def _pending(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT count(*) FROM runs WHERE decision = ''").fetchone()[0])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------------------------------- file


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[sqlite3.Connection]:
    """One transaction; whole or not at all."""
    path = folder / FILE
    with _said_plainly(path):
        if not path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))  # SQLite's files beside it get the same mode
            files.sync_folder(folder)
        with contextlib.closing(_connect(path, "rw")) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            try:
                if _version(db, path) == 0:
                    db.execute(_TABLE)
                    db.execute(f"PRAGMA user_version = {_VERSION}")
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection | None]:
    path = folder / FILE
    if not path.exists():
        yield None
        return
    with _said_plainly(path), contextlib.closing(_connect(path, "ro")) as db:
        yield db if _version(db, path) else None


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_WAIT, isolation_level=None)


def _version(db: sqlite3.Connection, path: Path) -> int:
    there = int(db.execute("PRAGMA user_version").fetchone()[0])
    if there > _VERSION:
        raise FolderError(f"{path} was written by a newer version.", remedy="Install that version again.")
    return there


@contextlib.contextmanager
def _said_plainly(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise FolderError(f"{path} cannot be used: {error}.", remedy="Mend that; until then nothing leaves.") from None
