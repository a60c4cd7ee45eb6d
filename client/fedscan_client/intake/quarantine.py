"""What waits for a person, and what a person decided: durable, and without an identifier.

    SITE/quarantine.sqlite    see `quarantine_file`
    SITE/audit/               one line for every decision, on disk before the decision holds

Guarantee: the file holds keyed HMACs, counts, sizes in pixels, days, words of closed lists and the name of who decided.
No free text of a header gets in. Locators and the reasons that people type are sealed under the site's wrapping key.
Pixels are never written. A decision counts for exactly those instances that were there when it was taken, with the
content they had; what comes later, or changes, waits again. Only reasons of `records.REVIEW` can be released; that is
asked again whenever a decision is used. Assumed: whoever can write the file is trusted; a row that was changed by hand
shows only in comparison with the audit log.

An item is all instances of one series that share reason, kind of object and size.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

from fedscan_client.audit import log
from fedscan_client.intake import blackout
from fedscan_client.intake.quarantine_file import NAME, reading, seal, unseal, wipe_log, writing
from fedscan_client.intake.records import REASONS, REVIEW, Rectangle, what_to_do
from fedscan_client.intake.traits import UNKNOWN, Traits
from fedscan_core.errors import DataError

_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # without those that look like another
_ID_LENGTH = 10
# What an item's instances share, as fields of `Item` and columns of the file.
_SHARED = ("reason", "patient", "series", "sop_class", "modality", "manufacturer", "device", "rows", "columns")

State = Literal["waiting", "released", "blackout", "rejected"]
Verdict = Literal["released", "blackout", "rejected"]


@dataclass(frozen=True)
class Found:
    """One instance to be set aside.

    Attributes:
        reason: a key of `records.REASONS`.
        patient, series, instance: HMACs; the first two are "" where the file gives none, and `instance` is then the
            HMAC of something else that is always the same, such as the locator.
        locator: where the source has it; may hold names: sealed at once.
        digest: of the content ("" where the caller has none): another one waits again.
        traits: see `traits.traits`.
    """

    reason: str
    patient: str
    series: str
    instance: str
    locator: str
    digest: str = ""
    traits: Traits = UNKNOWN


@dataclass(frozen=True)
class Item:
    """One line of the list.

    Attributes:
        id: short, made of HMACs.
        reason: a key of `records.REASONS`.
        patient, series: HMACs, "" where unknown.
        sop_class, modality, manufacturer, device, rows, columns: see `traits.traits`.
        frames: of the instance that has most.
        instances: how many there are; `waiting` of them have no decision.
        first_seen: day.
        decision: the last one, "" for none, with its `rectangles`, and `by` whom and `when` it was taken.
    """

    id: str
    reason: str
    patient: str
    series: str
    sop_class: str
    modality: str
    manufacturer: str
    device: str
    rows: int
    columns: int
    frames: int
    instances: int
    waiting: int
    first_seen: str
    decision: Verdict | Literal[""]
    rectangles: tuple[Rectangle, ...]
    by: str
    when: str

    @property
    def state(self) -> State:
        """The last decision if it covers all instances, else waiting."""
        return "waiting" if self.waiting or not self.decision else self.decision

    @property
    def releasable(self) -> bool:
        """Whether a person may let it in."""
        return self.reason in REVIEW


@dataclass(frozen=True)
class Known:
    """One instance's reason, what was decided (`rectangles` for a blackout), and the digest of what was looked at."""

    reason: str
    state: State
    rectangles: tuple[Rectangle, ...]
    digest: str

    def let_in(self, digest: str) -> tuple[Rectangle, ...] | None:
        """What a person decided on these very bytes: rectangles to black out before they are let in, () if as they are.

        None: nobody let them in. They wait, were rejected, are not what the person saw, or their reason is none that a
        person may overrule.
        """
        decided = self.state in ("released", "blackout") and self.reason in REVIEW
        return self.rectangles if decided and self.digest == digest else None


@dataclass(frozen=True)
class Held:
    """One instance of an item, with its locator in memory."""

    instance: str
    locator: str
    frames: int


# ------------------------------------------------------------------------------------------------------- the intake's


def put(folder: Path, key: bytes, found: Iterable[Found], *, today: date | None = None) -> int:
    """Sets instances aside, in one transaction; returns how many of them were not there as they are.

    An instance that is there with the same reason and content keeps its decision; with another one it waits again.

    Args:
        folder: the site's.
        key: the site's wrapping key.
        found: what was found.
        today: default the day it is.
    """
    day, changed = (today or date.today()).isoformat(), 0
    with writing(folder) as db:
        for it in found:
            if it.reason not in REASONS:
                raise ValueError(it.reason)
            item, row = _item_of(it), _row(db, it.instance)
            locator = seal(key, it.locator, f"locator {it.instance}")
            if row and (row["item"], row["digest"]) == (item, it.digest):
                try:
                    same = unseal(key, row["locator"], f"locator {it.instance}") == it.locator
                except DataError:
                    same = False
                if not same:  # the file was moved
                    db.execute("UPDATE instances SET locator = ? WHERE instance = ?", (locator, it.instance))
                continue
            values = {
                "item": item,
                **{name: getattr(it, name) for name in ("instance", "patient", "series", "reason", "digest")},
                **vars(it.traits),
                "first_seen": row["first_seen"] if row else day,
                "locator": locator,
            }
            marks = ", ".join(f":{name}" for name in values)
            db.execute(f"INSERT OR REPLACE INTO instances ({', '.join(values)}) VALUES ({marks})", values)
            changed += 1
    return changed


def states(folder: Path, series: str) -> dict[str, "Known"]:
    """What is known of a series' instances (HMACs), whatever was decided on them."""
    sql = (
        "SELECT instance, reason, coalesce(kind, 'waiting'), coalesce(rectangles, '[]'), digest FROM instances "
        "LEFT JOIN decisions ON number = decision WHERE series = ?"
    )
    with reading(folder) as db:
        rows = db.execute(sql, (series,)).fetchall() if db else []
    return {
        instance: Known(reason, state, _rectangles(sides), digest) for instance, reason, state, sides, digest in rows
    }


def instances(folder: Path) -> set[str]:
    """All instances that were set aside."""
    with reading(folder) as db:
        return {row[0] for row in db.execute("SELECT instance FROM instances")} if db else set()


def forget(folder: Path, instances: Iterable[str]) -> int:
    """Drops instances without a decision: their source is gone, or they were let in by other means.

    A decision stays, so that a source that was only out of reach asks nobody a second time.
    """
    if not (folder / NAME).exists():
        return 0
    with writing(folder) as db:
        done = (
            db.execute("DELETE FROM instances WHERE instance = ? AND decision IS NULL", (it,)).rowcount
            for it in instances
        )
        return sum(done)


def remove_patient(folder: Path, patient: str) -> int:
    """Removes everything kept of a patient (HMAC), decisions as well, from the file and its log; returns how many.

    Lines of the audit log stay: they name an item by a hash and nobody. A patient "" is nobody: nothing is removed.
    """
    if not patient or not (folder / NAME).exists():
        return 0
    with writing(folder) as db:
        gone = db.execute("DELETE FROM instances WHERE patient = ?", (patient,)).rowcount
        _drop_unused(db)
    wipe_log(folder)
    return gone


def rekey(folder: Path, old: bytes, new: bytes, moved: Mapping[str, str]) -> None:
    """Seals everything again under a new wrapping key, in one transaction; locators in `moved` become others.

    Raises:
        DataError: something was sealed under neither; nothing was changed.
    """
    if not (folder / NAME).exists():
        return

    def again(blob: bytes, bound: str) -> bytes:
        try:
            text = unseal(old, blob, bound)
        except DataError:  # by a rotation that was stopped
            text = unseal(new, blob, bound)
        return seal(new, moved.get(text, text) if bound.startswith("locator ") else text, bound)

    with writing(folder) as db:
        for instance, blob in db.execute("SELECT instance, locator FROM instances").fetchall():
            db.execute(
                "UPDATE instances SET locator = ? WHERE instance = ?", (again(blob, f"locator {instance}"), instance)
            )
        for number, blob in db.execute("SELECT number, why FROM decisions").fetchall():
            db.execute("UPDATE decisions SET why = ? WHERE number = ?", (again(blob, f"why {number}"), number))
    wipe_log(folder)


# ------------------------------------------------------------------------------------------------------- the person's


def items(folder: Path, *, reason: str = "", state: State | None = None) -> list[Item]:
    """What is in quarantine, oldest first; without locators, so without a key."""
    with reading(folder) as db:
        found = _items(db) if db else []
    return [it for it in found if reason in ("", it.reason) and state in (None, it.state)]


def get(folder: Path, id: str) -> Item:
    """The item of an id, or of its first letters.

    Raises:
        DataError: there is none, or several.
    """
    with reading(folder) as db:
        return _get(db, id)


def held(folder: Path, key: bytes, id: str) -> list[Held]:
    """The instances of an item, in the order of their locators; errors as `get`."""
    item = get(folder, id)
    with reading(folder) as db:
        sql = "SELECT instance, locator, frames FROM instances WHERE item = ?"
        rows = db.execute(sql, (item.id,)).fetchall() if db else []
    found = [Held(row[0], unseal(key, row[1], f"locator {row[0]}"), row[2]) for row in rows]
    return sorted(found, key=lambda it: (it.locator, it.instance))


def decide(
    folder: Path, key: bytes, id: str, verdict: Verdict, *, by: str, why: str, rectangles: Sequence[Rectangle] = ()
) -> Item:
    """Records what a person decided on all instances of an item; returns the item as it is then.

    The line in the audit log is on disk first: a crash in between leaves a line without a decision, never the reverse.
    `why` is sealed and not in the log, because people type names.

    Args:
        folder: the site's.
        key: the site's wrapping key.
        id: the item's, or its first letters.
        verdict: released (as it is), blackout (with `rectangles`), or rejected (stays out, for ever).
        by: who decides.
        why: what was seen.
        rectangles: for blackout, at least one.

    Raises:
        DataError: no such item, a reason that nobody may overrule, no name or reason, rectangles missing, unwanted or
            not inside the frame.
    """
    if not (by.strip() and why.strip()):
        raise DataError("A decision needs a name and a reason.", remedy="Give --by and --why.")
    if bool(rectangles) != (verdict == "blackout"):
        raise DataError("Rectangles belong to a blackout, and a blackout to rectangles.", remedy="Give --rect.")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    sides = [[it.top, it.left, it.bottom, it.right] for it in rectangles]
    with writing(folder) as db:
        item = _get(db, id)
        if verdict != "rejected" and not item.releasable:
            raise DataError(
                f"Item {item.id} cannot be let in by anybody: {REASONS[item.reason]}.", remedy=what_to_do(item.reason)
            )
        blackout.check(rectangles, item.rows, item.columns)
        row = (verdict, json.dumps(sides), by.strip(), now, b"")
        sql = "INSERT INTO decisions (kind, rectangles, decided_by, decided_at, why) VALUES (?, ?, ?, ?, ?)"
        number = db.execute(sql, row).lastrowid
        sealed = seal(key, why.strip(), f"why {number}")
        db.execute("UPDATE decisions SET why = ? WHERE number = ?", (sealed, number))
        db.execute("UPDATE instances SET decision = ? WHERE item = ?", (number, item.id))
        _drop_unused(db)
        told: dict[str, Any] = {"decision": verdict, "by": by.strip(), "item": item.id, "reason": item.reason}
        log.append(folder, "quarantine", **told, instances=item.instances, rectangles=sides)
        return _get(db, item.id)


def why(folder: Path, key: bytes, id: str) -> str:
    """What the person of the last decision typed as the reason, "" without one; errors as `get`."""
    item = get(folder, id)
    with reading(folder) as db:
        sql = "SELECT number, why FROM decisions WHERE number = (SELECT max(decision) FROM instances WHERE item = ?)"
        row = db.execute(sql, (item.id,)).fetchone() if db else None
    return unseal(key, row[1], f"why {row[0]}") if row else ""


# -------------------------------------------------------------------------------------------------------------- rows


def _item_of(it: Found) -> str:
    """A short id: 49 bits of a hash of HMACs, so nothing can be computed back from it."""
    parts = (it.patient, it.series, it.reason, it.traits.sop_class, str(it.traits.rows), str(it.traits.columns))
    number = int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest(), "big")
    letters = []
    for _ in range(_ID_LENGTH):
        number, digit = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[digit])
    return "".join(letters)


def _row(db: sqlite3.Connection, instance: str) -> dict[str, Any] | None:
    return next(_dicts(db.execute("SELECT * FROM instances WHERE instance = ?", (instance,))), None)


def _dicts(cursor: sqlite3.Cursor) -> Iterator[dict[str, Any]]:
    names = [column[0] for column in cursor.description]
    return (dict(zip(names, row, strict=True)) for row in cursor)


def _items(db: sqlite3.Connection, id: str = "") -> list[Item]:
    sql = f"""WITH grouped AS (
            SELECT item AS id, {", ".join(_SHARED)}, max(frames) AS frames, count(*) AS instances,
                sum(decision IS NULL) AS waiting, min(first_seen) AS first_seen, max(decision) AS last
            FROM instances WHERE substr(item, 1, length(:id)) = :id GROUP BY item)
        SELECT grouped.*, coalesce(kind, '') AS decision, coalesce(rectangles, '[]') AS rectangles,
            coalesce(decided_by, '') AS by, coalesce(decided_at, '') AS "when"
        FROM grouped LEFT JOIN decisions ON number = last ORDER BY first_seen, id"""
    found = []
    for row in _dicts(db.execute(sql, {"id": id})):
        del row["last"]
        found.append(Item(**{**row, "rectangles": _rectangles(row["rectangles"])}))
    return found


def _get(db: sqlite3.Connection | None, id: str) -> Item:
    wanted = id.strip().lower()
    found = _items(db, wanted) if db and wanted else []
    if len(found) != 1:
        said = f"Several items begin with '{wanted}'." if found else "There is no item of that id in quarantine."
        raise DataError(said, remedy="'fedscan agent quarantine list SITE_DIR' shows the ids.")
    return found[0]


def _drop_unused(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM decisions WHERE number NOT IN (SELECT decision FROM instances WHERE decision NOT NULL)")


def _rectangles(text: str) -> tuple[Rectangle, ...]:
    return tuple(Rectangle(*sides) for sides in json.loads(text))
