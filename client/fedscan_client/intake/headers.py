"""Reading one value of a DICOM header, whatever the file holds there.

pydicom parses an element when it is first asked for, so a damaged one raises on access, and almost
anything; its warnings and log lines quote the value. Every read of a header goes through `value`.
"""

import logging
import math
import warnings
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from fedscan_client.intake.records import Refused

# pydicom also logs what it warns of; no header value may reach the agent's log.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


def value(ds: Dataset, keyword: str) -> Any:
    """The value of an element, None where absent.

    Raises:
        Refused: it cannot be parsed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote header values
            return ds.get(keyword)
    except Exception:  # pydicom parses on access, and a damaged element can raise anything
        raise Refused("bad_header") from None


def photometric(ds: Dataset) -> str | None:
    """MONOCHROME1 or MONOCHROME2, None for anything else."""
    found = value(ds, "PhotometricInterpretation")
    return str(found) if found in ("MONOCHROME1", "MONOCHROME2") else None


def count(ds: Dataset, keyword: str) -> int:
    """A whole number from 0 to 65535.

    Raises:
        Refused: absent, or something else.
    """
    found = value(ds, keyword)
    if not isinstance(found, int) or not 0 <= found <= 65535:
        raise Refused("bad_header")
    return int(found)


def decimal(ds: Dataset, keyword: str) -> float | None:
    """The first value of a decimal element, None where absent or empty.

    Raises:
        Refused: not a finite number.
    """
    found = value(ds, keyword)
    if isinstance(found, MultiValue | list):
        found = found[0] if found else None
    return None if found is None or found == "" else _finite(found)


def decimals(ds: Dataset, keyword: str) -> tuple[float, ...]:
    """All values of a decimal element, none where absent or empty.

    Raises:
        Refused: one of them is not a finite number.
    """
    found = value(ds, keyword)
    if found is None or found == "":
        return ()
    return tuple(_finite(one) for one in (found if isinstance(found, MultiValue | list) else [found]))


def _finite(found: Any) -> float:
    try:
        number = float(found)
    except (TypeError, ValueError, OverflowError):
        raise Refused("bad_header") from None
    if not math.isfinite(number):
        raise Refused("not_finite")
    return number


def identifier(ds: Dataset, keyword: str) -> str:
    """A patient id or UID as one clean string.

    Raises:
        Refused: missing, several values, or letters that could not be decoded (two different ids
            could look the same).
    """
    found = value(ds, keyword)
    text = found.strip() if isinstance(found, str) else ""
    if not text or not text.isprintable() or "\ufffd" in text:
        raise Refused("patient_id" if keyword == "PatientID" else "uid_missing")
    return text
