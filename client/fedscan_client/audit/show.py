"""What the audit log says, for people: what left the site, run by run, and the records one by one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedscan_client.audit import log
from fedscan_core import auditlog, wire

_ABOUT = ("event", "utc")


@dataclass(frozen=True)
class Released:
    """What one run got of one kind.

    Attributes:
        run_id: the run.
        what: update or histogram.
        rounds: how many different rounds.
        times: how often something was handed over; more than `rounds` where a server asked again and got the same.
        bytes: in all.
        epsilon, delta: what the run holds of the budget, whole; None where an earlier version did not write it down,
            "inf" for a run without privacy.
        first, last: UTC, "" where an earlier version did not write it down.
    """

    run_id: str
    what: str
    rounds: int
    times: int
    bytes: int
    epsilon: float | str | None
    delta: float | None
    first: str
    last: str


@dataclass(frozen=True)
class Left:
    """Everything that left. `answers`: how many of each status; all but `ok` are constants or public reasons."""

    released: tuple[Released, ...]
    answers: dict[str, int]

    @property
    def bytes(self) -> int:
        """Of updates and histograms."""
        return sum(each.bytes for each in self.released)


def released(site_folder: Path) -> Left:
    """What left this site, oldest run first, with what earlier versions wrote down.

    Raises:
        RecordDamaged: the log was changed.
    """
    rows = [(row, "") for row in auditlog.read(site_folder / "released.jsonl")]
    answers: Counter[str] = Counter()
    for record in log.read(site_folder):
        if record["event"] == "release":
            rows.append((record, record["utc"]))
        elif record["event"] == "answer":
            answers[record["status"]] += 1
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {}
    for row, utc in rows:
        groups.setdefault((row["run_id"], row["what"]), []).append((row, utc))
    return Left(tuple(_together(*key, group) for key, group in groups.items()), dict(sorted(answers.items())))


def _together(run_id: str, what: str, group: Sequence[tuple[dict[str, Any], str]]) -> Released:
    rounds = {row["round"] for row, _ in group}
    times = [utc for _, utc in group if utc]
    latest = group[-1][0]
    return Released(
        run_id,
        what,
        len(rounds),
        len(group),
        sum(row["bytes"] for row, _ in group),
        latest.get("epsilon_of_run"),
        latest.get("delta_of_run"),
        *((times[0], times[-1]) if times else ("", "")),
    )


def find(site_folder: Path, *, event: str = "", run_id: str = "", last: int = 0) -> list[dict[str, Any]]:
    """Records in order.

    Args:
        site_folder: the site's.
        event: only this one.
        run_id: only of the run whose id begins so.
        last: only the newest so many; 0 for all.

    Raises:
        RecordDamaged: the log was changed.
    """
    found = [
        record
        for record in log.read(site_folder)
        if event in ("", record["event"]) and str(record.get("run_id", "")).startswith(run_id)
    ]
    return found[-last:] if last else found


def words(record: dict[str, Any]) -> str:
    """A record's fields in one line, without its time and event; empty ones are left out."""
    fields = ((name, value) for name, value in record.items() if name not in _ABOUT and value not in ("", {}))
    return ", ".join(f"{name} {_short(value)}" for name, value in fields)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = wire.plain(str(value), 600)  # some of it is the server's wording: it steers no terminal
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text
