"""Consent as a CSV: a register, a list of cleared patients, or a list of objections.

UTF-8, comma-separated, the columns named in the first line, which may be preceded by

    # as-of: 2026-11-20       the day the list was drawn up; without it, the day on which the file was last modified
    # rows: 1234              how many rows follow: a cut list is then noticed

| kind | columns | may also have |
|---|---|---|
| register | patient_id, status (permit, deny or withdrawn), date | issuer, by_guardian, birth_date, until |
| cleared-list | patient_id | issuer, date |
| opt-out | patient_id | issuer, date |

Dates are YYYY-MM-DD; by_guardian is yes or no. A column of another name is refused: a misspelt `until` must not be
read as no end. No row's date is ever the list's: whether a register is too old must not depend on one patient.

An objection counts for its issuer, for the site's default one and for none. Patients are looked up by the issuer in
their image's header as well, so an objection that names none could be missed. Where `issuer` is a column, each row has
to name one, or [consent] has to; where it is none, the list speaks only of ids that [consent] issuer gave out, and an
image whose header names another issuer is refused by `Register.covers`. A header that spells its issuer unlike the list
is not noticed.

A register permits a patient when **every** row about them says `permit` with a date that is not in the future; the rows
of the newest date say until when and by whom. One `deny` or `withdrawn` among ten permits: not permitted. To let
somebody in again, the hospital removes the old row; no date order can do it by accident.
"""

import csv
import functools
import io
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from fedscan_client.consent.decision import Decision
from fedscan_client.consent.settings import Settings
from fedscan_client.intake.deid import patient_name
from fedscan_client.intake.records import PatientId
from fedscan_core.errors import ConsentError

_NEEDED = {"register": ("patient_id", "status", "date"), "cleared-list": ("patient_id",), "opt-out": ("patient_id",)}
_OPTIONAL = {
    "register": ("issuer", "by_guardian", "birth_date", "until"),
    "cleared-list": ("issuer", "date"),
    "opt-out": ("issuer", "date"),
}
_HEAD = re.compile(r"#\s*(as[-_ ]of|rows)\s*[:=]?\s*(\S+)", re.IGNORECASE)
_YES_NO = {"": False, "no": False, "yes": True}

Row = Mapping[str, str]


def read(
    settings: Settings, key: bytes, path: Path, today: date, notes: Counter[str]
) -> tuple[date, dict[str, Decision], Decision, str | None]:
    """A list's date, what it says of each patient in it, what of everybody else, and its only issuer.

    See `register.load` and `Register.issuer`.
    """
    drawn_up, columns, rows = _parse(settings, path)
    opt_out = settings.kind == "opt-out"
    by_name: dict[str, list[Row]] = defaultdict(list)
    for number, row in enumerate(rows, start=1):
        who = PatientId(row["patient_id"], row.get("issuer") or settings.issuer)
        if not is_identifier(who):
            raise ConsentError(  # a withdrawal whose id was lost could be anybody's
                f"Row {number} of the consent register {settings.path} has no patient id that can be read.",
                remedy="Correct the row, or leave it out if it is nobody's.",
            )
        if opt_out and "issuer" in columns and not who.issuer:
            raise ConsentError(  # it would be missed where the header names an issuer
                f"Row {number} of the consent register {settings.path} does not say who issued the patient id.",
                remedy="Fill in the issuer, as image headers name it, or set [consent] issuer for rows without one.",
            )
        # An objection must not be missed because a header and a list do not name the issuer alike.
        issuers = {who.issuer, settings.issuer, ""} if opt_out else {who.issuer}
        for issuer in issuers:
            by_name[patient_name(key, PatientId(who.id, issuer))].append(row)
    of = f"{settings.kind} of {drawn_up}"
    if opt_out:
        # By its columns, never by its rows: whom the list covers must not depend on one patient.
        only = None if "issuer" in columns else settings.issuer
        others = Decision(True, "no_objection", settings.legal_basis.strip())
        return drawn_up, dict.fromkeys(by_name, Decision(False, "objected", of)), others, only
    decisions = {name: _of_rows(settings.kind, mine, of, today, notes) for name, mine in by_name.items()}
    return drawn_up, decisions, Decision(False, "not_listed", of), None


def modified(path: Path) -> date:
    """The day on which a file was last modified, by this machine's clock.

    Raises:
        OSError: it is not there, or may not be looked at.
    """
    try:
        return date.fromtimestamp(path.stat().st_mtime)
    except (ValueError, OverflowError):
        return date.max  # beyond the calendar: from the future


def is_identifier(who: PatientId) -> bool:
    """Whether an identifier is whole: not empty, nothing unprintable, no letter that could not be decoded."""
    return bool(who.id) and (who.id + who.issuer).isprintable() and "\ufffd" not in who.id + who.issuer


@functools.lru_cache(maxsize=4096)
def iso(text: str) -> date | None:
    """The date written as YYYY-MM-DD, else None."""
    try:
        return date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII) else None
    except ValueError:
        return None


def _of_rows(kind: str, rows: Sequence[Row], of: str, today: date, notes: Counter[str]) -> Decision:
    """What all rows about one patient say together."""
    read = [_of_row(kind, row, of, today, notes) for row in rows]
    refusal = next((decision for decision in read if not decision.permit), None)
    if refusal is not None:
        return refusal
    newest = max(decision.given or date.min for decision in read)
    last = [decision for decision in read if (decision.given or date.min) == newest]
    born = {decision.born for decision in read if decision.born}
    if len(born) > 1:
        notes["birth_date: two of one patient"] += 1
        return Decision(False, "not_understood", of)
    end = min((decision.until for decision in last if decision.until), default=None)
    by_guardian = any(decision.by_guardian for decision in last)
    permit = end is None or end >= today
    reason = last[0].reason if permit else "expired"
    return Decision(permit, reason, of, last[0].given, end, by_guardian, next(iter(born), None))


def _of_row(kind: str, row: Row, of: str, today: date, notes: Counter[str]) -> Decision:
    def unclear(column: str) -> Decision:
        notes[column] += 1
        return Decision(False, "not_understood", of)

    status = row.get("status", "permit").lower()
    if status in ("deny", "withdrawn"):
        return Decision(False, "denied", of)
    if status != "permit":
        return unclear("status")
    given = iso(row.get("date", ""))
    if given is None and (kind == "register" or row.get("date")):
        return unclear("date")
    if given is not None and given > today:
        return Decision(False, "not_yet", of)
    end, born = iso(row.get("until", "")), iso(row.get("birth_date", ""))
    for column, value in (("until", end), ("birth_date", born)):
        if row.get(column) and value is None:
            return unclear(column)
    by_guardian = _YES_NO.get(row.get("by_guardian", "").lower())
    if by_guardian is None:
        return unclear("by_guardian")
    return Decision(True, "permit" if kind == "register" else "cleared", of, given, end, by_guardian, born)


def _parse(settings: Settings, path: Path) -> tuple[date, list[str], list[Row]]:
    """A list's date, columns and rows. Error texts hold nothing out of it."""
    name = f"The consent register {settings.path}"
    try:
        day = modified(path)  # before reading: who writes in between makes it seem older, never newer
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConsentError(f"{name} is not UTF-8 text.", remedy="Save it as 'CSV UTF-8'.") from None
    except OSError as error:
        raise ConsentError(
            f"{name} cannot be read ({error.strerror}).", remedy="Check [consent] path and its permissions."
        ) from None
    as_of, count, text = _declared(name, text)
    columns, rows = _rows(name, text, _NEEDED[settings.kind], _OPTIONAL[settings.kind])
    if not rows and count != 0:
        raise ConsentError(
            f"{name} has no rows: perhaps the export failed.",
            remedy="Export it again; a list that is truly empty says so by '# rows: 0' in its first lines.",
        )
    if count is not None and count != len(rows):
        raise ConsentError(f"{name} has {len(rows)} rows and announces {count}.", remedy="Export it again.")
    return as_of or day, columns, rows


def _declared(name: str, text: str) -> tuple[date | None, int | None, str]:
    """The lines before the column names: as-of, number of rows, and the rest of the text."""
    as_of: date | None = None
    count: int | None = None
    while text.lstrip(' "').startswith("#"):
        line, _, text = text.partition("\n")
        match = _HEAD.fullmatch(line.strip(' \r,;"'))  # spreadsheets add commas
        if match and match[1].lower() == "rows" and match[2].isdecimal() and count is None:
            count = int(match[2][:18])
        elif match and match[1].lower() != "rows" and as_of is None and (day := iso(match[2])):
            as_of = day
        else:
            raise ConsentError(
                f"{name} begins with a comment that is neither '# as-of: YYYY-MM-DD' nor '# rows: NUMBER'.",
                remedy="Correct it, or take it away.",
            )
    return as_of, count, text


def _rows(name: str, text: str, needed: Sequence[str], optional: Sequence[str]) -> tuple[list[str], list[Row]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        columns = [column.strip().lower() for column in next(reader, [])]
        if not set(needed) <= set(columns) <= {*needed, *optional} or len(set(columns)) != len(columns):
            raise ConsentError(
                f"{name} must have the columns {', '.join(needed)}, may have {', '.join(optional)}, and nothing else.",
                remedy="Name the columns in the first line, separated by commas; leave other columns out.",
            )
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(columns):  # a shifted row would put one patient's value on another
                raise ConsentError(
                    f"Line {reader.line_num} of the table in {name[0].lower()}{name[1:]} has {len(fields)} values, not "
                    f"{len(columns)}.",
                    remedy="Put values that contain commas in double quotes.",
                )
            rows.append(dict(zip(columns, (field.strip() for field in fields), strict=True)))
    except csv.Error:
        raise ConsentError(
            f"{name} is no valid CSV near line {reader.line_num} of its table.", remedy="Export it again as CSV."
        ) from None
    return columns, rows
