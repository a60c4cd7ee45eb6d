"""A research table: a CSV beside PNG, JPEG or npz files. Also how every CSV of a hospital is read.

Reading here never decodes pixels. Every problem with a table is one `DataError` that names the first thing wrong.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedscan_client.intake.pictures import npz_images
from fedscan_client.intake.records import SPLITS
from fedscan_core.errors import DataError, FedscanError

_KNOWN = ("file", "patient_id", "label", "index", "site", "split", "sex", "age")


@dataclass(frozen=True)
class TableRow:
    """One image of a research table; "" (or None) where the table says nothing.

    Attributes:
        file: path relative to the table's folder, inside it (checked).
        index: row of an npz file's `images`, None for PNG and JPEG.
        extra: every other column.
    """

    file: str
    patient_id: str
    label: str
    index: int | None
    site: str
    split: str
    sex: str
    age: str
    extra: Mapping[str, str]


def read_text(path: Path, error: type[FedscanError] = DataError) -> str:
    """The text of a UTF-8 file, without a byte order mark, lines ended by newlines.

    Raises:
        FedscanError: of the class given, when it is missing or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8 text.", remedy="Save it as 'CSV UTF-8'.") from None
    except OSError as problem:
        raise error(
            f"{path} cannot be read ({problem.strerror}).",
            remedy="Check the path and its permissions.",
        ) from None


def parse_rows(
    text: str, name: str, needed: Sequence[str], error: type[FedscanError] = DataError
) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV as (line number, column -> stripped value); blank lines are skipped.

    Raises:
        FedscanError: of the class given; a column is missing or named twice, or a row does not have
            as many fields as the header (a shifted row would put one patient's value on another).
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        columns = [column.strip() for column in next(reader, [])]
        missing = [column for column in needed if column not in columns]
        if missing:
            raise error(
                f"{name} has no column {missing[0]!r}.",  # what it has may be its first patient
                remedy="Name the columns in the first line, separated by commas.",
            )
        if len(set(columns)) != len(columns):
            raise error(f"{name} names a column twice.", remedy="Give each column its own name.")
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(columns):
                raise error(
                    f"Line {reader.line_num} of {name} has {len(fields)} values, not {len(columns)}.",
                    remedy="Put values that contain commas in double quotes.",
                )
            values = (field.strip() for field in fields)
            rows.append((reader.line_num, dict(zip(columns, values, strict=True))))
    except csv.Error as problem:
        raise error(
            f"{name} is not a valid CSV at line {reader.line_num} ({problem}).",
            remedy="Export it again as a comma-separated table.",
        ) from None
    return rows


def read_table(path: Path, label_column: str = "label") -> list[TableRow]:
    """Reads and checks a research table: a CSV whose `file` column points to images beside it.

    Needed columns: file, patient_id, label. Optional: index (row of an npz), site, split, sex, age;
    any other column is kept as text.

    Args:
        path: the CSV.
        label_column: which column holds the label.

    Raises:
        DataError: naming the first thing wrong with the table or the files it names.
    """
    rows = parse_rows(read_text(path), path.name, (*_KNOWN[:2], label_column))
    if not rows:
        raise DataError(f"{path.name} has no rows.", remedy="Add one row for each image.")
    table = [_row(path.name, line, {**row, "label": row[label_column]}) for line, row in rows]
    _check_files(path, table)
    _check_rows(path.name, table)
    return table


def row_path(table: Path, row: TableRow) -> Path:
    """The image file of a row, given the path of its table."""
    return table.parent / row.file


def _row(name: str, line: int, row: dict[str, str]) -> TableRow:
    for column in ("file", "patient_id", "label"):
        if not row[column]:
            raise DataError(f"Line {line} of {name} has no {column}.", remedy="Fill it in, or remove the row.")
    split = row.get("split", "")
    if split and split not in SPLITS:
        raise DataError(
            f"Line {line} of {name} has the split {split!r}.",
            remedy="Use train, val or test, or leave it blank.",
        )
    text = row.get("index", "")
    if text and not (text.isascii() and text.isdigit()):
        raise DataError(f"Line {line} of {name} has the index {text!r}.", remedy="Use whole numbers from 0.")
    index = int(text) if text else None
    if (index is not None) != row["file"].lower().endswith(".npz"):
        raise DataError(
            f"Line {line} of {name}: an index belongs to an npz file, and an npz file needs one.",
            remedy="Fill in the index for npz files only.",
        )
    extra = {column: value for column, value in row.items() if column not in _KNOWN}
    return TableRow(
        file=row["file"],
        patient_id=row["patient_id"],
        label=row["label"],
        index=index,
        site=row.get("site", ""),
        split=split,
        sex=row.get("sex", ""),
        age=row.get("age", ""),
        extra=extra,
    )


def _check_files(path: Path, table: list[TableRow]) -> None:
    """Every file exists, inside the table's folder, and every index is inside its npz."""
    home = path.parent.resolve()
    highest: dict[str, int] = {}
    for row in table:
        highest[row.file] = max(highest.get(row.file, -1), -1 if row.index is None else row.index)
    absent = []
    for file in highest:
        target = home / file
        if "\0" in file or not target.resolve().is_relative_to(home):
            raise DataError(
                f"{path.name} names {file!r}, which is outside the folder {home}.",
                remedy="Keep images in the table's folder, without '..' or links that lead out.",
            )
        if not target.is_file():
            absent.append(file)
    if absent:
        raise DataError(
            f"{path.name} names {len(absent)} file(s) that do not exist, first {absent[0]!r}.",
            remedy="Paths are relative to the folder of the table.",
        )
    for file, index in highest.items():
        if index >= 0:
            count = len(npz_images(home / file))
            if index >= count:
                raise DataError(
                    f"{path.name} asks for index {index} of {file}, which holds {count} images.",
                    remedy="Indices run from 0; check that table and npz belong together.",
                )


def _check_rows(name: str, table: list[TableRow]) -> None:
    """No image twice, and no patient in two splits (they could not be charged apart)."""
    seen: set[tuple[str, int | None]] = set()
    splits: dict[tuple[str, str], str] = {}
    for row in table:
        if (row.file, row.index) in seen:
            where = row.file if row.index is None else f"{row.file} index {row.index}"
            raise DataError(f"{name} names {where} twice.", remedy="Keep one row for each image.")
        seen.add((row.file, row.index))
        if splits.setdefault((row.site, row.patient_id), row.split) != row.split:
            raise DataError(
                f"{name} puts patient {row.patient_id!r} into two splits.",
                remedy="Split by patient, not by image.",
            )
