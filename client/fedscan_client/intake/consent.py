"""Consent as a cleared list: only a patient whom the hospital's register permits is ever read.

Default deny. A patient is permitted when the register names them and **every** row about them says
`permit` with a date that is not in the future. A patient without a row, a status that is not known,
a date that cannot be read, one `deny` or `withdrawn` row among ten permits: not permitted. To let
somebody in again after a withdrawal, the hospital removes the old row; no date order can do it by
accident.

The register is a CSV with the columns patient_id, status (permit, deny or withdrawn) and date
(ISO), in UTF-8. Its first line may say on which day it was drawn up, `# as-of: 2026-11-20`; without
that line the newest date in it counts. A register that is missing, unreadable, damaged or too old
stops everything
(`ConsentError`): a list that was cleared months ago does not know of last week's withdrawals.
"""

import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from fedscan_client.intake.sources.table import parse_rows, read_text
from fedscan_core.errors import ConsentError

_AS_OF = re.compile(r"#\s*as[-_ ]of\s*[:=]?\s*(\S+)\s*", re.IGNORECASE)
_REMEDY = (
    "Export the register again as a UTF-8 CSV with the columns patient_id, status (permit, deny or "
    "withdrawn) and date (YYYY-MM-DD)."
)


@dataclass(frozen=True)
class Register:
    """The patients whom the hospital has cleared, as of one day."""

    drawn_up: date
    permitted: frozenset[str]

    def permits(self, patient_id: str) -> bool:
        """Whether images of this patient (hospital id) may be read. Default: no."""
        return patient_id.strip() in self.permitted


def read_register(path: Path, *, as_of: date, max_age_days: int) -> Register:
    """Reads the consent register.

    Args:
        path: the CSV file.
        as_of: the day of the question, normally today.
        max_age_days: how old the register may be on that day.

    Raises:
        ConsentError: it is missing, unreadable, empty, from the future or too old, a row has no
            patient id, or a row does not have the same number of fields as the header.
    """
    text = read_text(path, ConsentError)
    head, _, rest = text.partition("\n")
    declared: date | None = None
    if head.lstrip(' "').startswith("#"):
        match = _AS_OF.fullmatch(head.strip(' \r,;"'))  # spreadsheets add commas
        declared = _iso(match.group(1)) if match else None
        if declared is None:
            raise ConsentError(
                f"The first line of the consent register {path.name} is a comment without a date.",
                remedy="Write it as '# as-of: YYYY-MM-DD'.",
            )
        text = rest
    rows = parse_rows(text, path.name, ("patient_id", "status", "date"), ConsentError)
    dates: list[date] = []
    permitted: dict[str, bool] = {}
    for line, row in rows:
        patient_id = row["patient_id"]
        if not patient_id:
            # A withdrawal whose id was lost could be anybody's.
            raise ConsentError(
                f"Row {line} of the consent register {path.name} has no patient id.",
                remedy=_REMEDY,
            )
        day = _iso(row["date"])
        if day is not None and day <= as_of:
            dates.append(day)
        ok = row["status"].lower() == "permit" and day is not None and day <= as_of
        permitted[patient_id] = permitted.get(patient_id, True) and ok
    drawn_up = declared or max(dates, default=None)
    if drawn_up is None or not rows:
        raise ConsentError(f"The consent register {path.name} has no row with a usable date.", remedy=_REMEDY)
    age = (as_of - drawn_up).days
    if not 0 <= age <= max_age_days:
        raise ConsentError(
            f"The consent register {path.name} is dated {drawn_up}; on {as_of} it may be at most "
            f"{max_age_days} days old and not from the future.",
            remedy="Export a fresh register, and check the clock of this machine.",
        )
    return Register(drawn_up, frozenset(p for p, ok in permitted.items() if ok))


def _iso(text: str) -> date | None:
    """The date written as YYYY-MM-DD, else None."""
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None
