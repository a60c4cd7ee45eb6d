"""The label table: a CSV that says what each study or image shows. Identifiers become keyed HMACs as it is read.

Columns: one or more of sop_uid, accession, study_uid (the most specific one that is filled in counts); label; and
optionally split (train, val or test; blank leaves it to the site's keyed hash). A patient stays in one split.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from fedscan_client.intake.deid import pseudonym
from fedscan_client.intake.index import Header
from fedscan_client.intake.records import SPLITS
from fedscan_client.intake.sources.table import parse_rows, read_text
from fedscan_core.errors import DataError

_COLUMNS = {"sop_uid": "uid", "accession": "accession", "study_uid": "uid"}  # most specific first -> HMAC domain


@dataclass(frozen=True)
class Label:
    """One row. `line` is where it stands in the table, so that an error can name it without naming a patient."""

    label: str
    split: str
    line: int


@dataclass(frozen=True)
class Labels:
    """The table, by column and name."""

    rows: Mapping[tuple[str, str], Label]

    def of(self, header: Header, shared: Set[str] = frozenset()) -> Label | None:
        """The most specific row about an object, None if there is none; accession numbers in `shared` say nothing."""
        accession = "" if header.accession in shared else header.accession
        names = (("sop_uid", header.instance), ("accession", accession), ("study_uid", header.study))
        return next((found for name in names if name[1] and (found := self.rows.get(name))), None)


def read(path: Path, key: bytes) -> Labels:
    """Reads the table.

    Args:
        path: the CSV, UTF-8.
        key: the site's key for this project, see `deid.pseudonym`.

    Raises:
        DataError: naming the first line that is wrong; or there is no row.
    """
    rows: dict[tuple[str, str], Label] = {}
    for line, row in parse_rows(read_text(path), path.name, ("label",)):
        named = [(column, row[column]) for column in _COLUMNS if row.get(column)]
        if not named:
            raise DataError(
                f"Line {line} of {path.name} does not say which image or study it labels.",
                remedy=f"Fill in one of the columns {', '.join(_COLUMNS)}.",
            )
        label = Label(row["label"], row.get("split", ""), line)
        if not label.label or label.split not in ("", *SPLITS):
            raise DataError(
                f"Line {line} of {path.name} has no label, or a split not train, val or test.",
                remedy="Correct the line, or remove it.",
            )
        column, value = named[0]
        before = rows.setdefault((column, pseudonym(key, _COLUMNS[column], value)), label)
        if (before.label, before.split) != (label.label, label.split):
            raise DataError(
                f"Line {line} of {path.name} contradicts line {before.line} on the same study or image.",
                remedy="Keep one line for each.",
            )
    if not rows:
        raise DataError(f"{path.name} has no rows.", remedy="Add one row for each labelled study.")
    return Labels(rows)
