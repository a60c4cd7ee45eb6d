"""Who withdrew at this site, for ever: SITE/withdrawals.jsonl, hash-chained and fsynced.

A register may be restored from an older copy, or not know yet: whoever is in here stays out until the register holds a
permit given on a later day. Only keyed HMACs are written. Keep the file in the site's backups: losing it loses this
memory, and nothing can notice that.
"""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from fedscan_core import auditlog
from fedscan_core.errors import ConsentError, RecordDamaged

FILE = "withdrawals.jsonl"


def add(site_folder: Path, name: str, day: date) -> None:
    """Records a withdrawal; on disk when this returns.

    Raises:
        ConsentError: the record was changed.
    """
    _append(site_folder, {"state": "withdrawn", "patient": name, "day": day.isoformat()})


def destroyed(site_folder: Path, name: str, day: date, what: Mapping[str, int], runs: list[dict[str, str]]) -> None:
    """Records what was destroyed (words -> how many), and the runs for which the patient had been eligible.

    Raises:
        ConsentError: the record was changed.
    """
    record = {"state": "destroyed", "patient": name, "day": day.isoformat(), "what": dict(what), "runs": runs}
    _append(site_folder, record)


def read(site_folder: Path) -> dict[str, date]:
    """Each withdrawn patient's last day of withdrawal.

    Raises:
        ConsentError: the record was changed.
    """
    rows = [row for row in _rows(site_folder) if row["state"] == "withdrawn"]
    return {row["patient"]: date.fromisoformat(row["day"]) for row in sorted(rows, key=lambda row: str(row["day"]))}


def history(site_folder: Path, name: str) -> list[dict[str, Any]]:
    """Everything recorded about one patient, oldest first.

    Raises:
        ConsentError: the record was changed.
    """
    return [row for row in _rows(site_folder) if row["patient"] == name]


def _rows(site_folder: Path) -> list[dict[str, Any]]:
    try:
        return auditlog.read(site_folder / FILE)
    except RecordDamaged as error:
        raise _damaged(error) from None


def _append(site_folder: Path, record: dict[str, Any]) -> None:
    path = site_folder / FILE
    try:
        with auditlog.exclusive(path):
            auditlog.append(path, record)
    except RecordDamaged as error:
        raise _damaged(error) from None


def _damaged(error: RecordDamaged) -> ConsentError:
    return ConsentError(error.message, remedy="Restore it from a backup: until then no patient is read.")
