"""What is done to one element of a header: from the value found to the value that is kept, or None.

`profile.py` lists the actions. Each one makes a new value from a checked reading of the old one (a number, a word of a
list, a date), so that no byte of the old element is carried over. The standard's options: retain patient
characteristics, modified dates, clean descriptors (PS3.15 Annex E.3).
"""

import datetime
import functools
import hmac
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_has_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.valuerep import DSfloat

from fedscan_client.intake import headers
from fedscan_client.intake.kinds import TABLES
from fedscan_client.intake.profile import Element, Table
from fedscan_client.intake.profile_values import CODES, IMAGE_TYPES, MAKERS, OLD_CODES, WORDS
from fedscan_client.intake.records import Refused
from fedscan_core.errors import DataError

KEY_BYTES = 32
_MAX_SHIFT = 3650  # days
# DA, also as once written with points; DT from the day on.
_DATE = re.compile(r"(1[89]\d\d|2[01]\d\d)\.?(\d\d)\.?(\d\d)(?:\d{2,6}(?:\.\d{1,6})?)?(?:[+-]\d{4})?", re.ASCII)
_OLD_SCHEMES = ("SRT", "SNM3", "99SDM")  # names of SNOMED before 2018 (PS3.16 8)
_SOP_CLASSES = frozenset(uid for uid, entry in UID_dictionary.items() if entry[1] == "SOP Class")
_SEVERAL = frozenset({MultiValue, list, tuple, Sequence})
_ATLASES = frozenset(uid for uid, entry in UID_dictionary.items() if entry[1] == "Well-known frame of reference")


@dataclass(frozen=True)
class Secrets:
    """What the actions need to know: none of it is in the result but through HMAC.

    Attributes:
        key: the project's secret at this site.
        patient: pseudonym of the patient.
        days: by how much this patient's dates go back.
    """

    key: bytes
    patient: str
    days: int


def pseudonym(key: bytes, domain: str, value: str) -> str:
    """A keyed name for a value: 128 bits of HMAC-SHA-256, as 32 hex digits.

    Args:
        key: the secret of this project at this site, at least 32 bytes.
        domain: what kind of value it is: "pid", "uid" or "days"; equal values of two kinds get unrelated names.
        value: the hospital's own identifier.

    Raises:
        DataError: the key is too short.
    """
    if len(key) < KEY_BYTES:
        raise DataError(
            f"The site key has {len(key)} bytes, at least {KEY_BYTES} are needed.",
            remedy="Draw one at random, for example with 'openssl rand 32'.",
        )
    message = domain.encode() + b"\0" + value.encode()
    return hmac.digest(key, b"fedscan pseudonym 1\0" + message, "sha256").hex()[:32]


def pseudonymous_uid(key: bytes, uid: str) -> str:
    """A UID under 2.25 (PS3.5 B.2: a UUID as a decimal number) that stands for the given one."""
    bits = int(pseudonym(key, "uid", uid), 16)
    bits = bits & ~(0xF << 76) | 0x8 << 76  # version 8: made by a rule of our own (RFC 9562)
    bits = bits & ~(0x3 << 62) | 0x2 << 62  # the variant of RFC 9562
    return f"2.25.{bits}"


def secrets(key: bytes, patient: str) -> Secrets:
    """The patient's dates go back by 1 to 3650 days, the same for all of their studies, never forward."""
    return Secrets(key, patient, 1 + int(pseudonym(key, "days", patient), 16) % _MAX_SHIFT)


def apply(ds: Dataset, table: Table, given: Secrets) -> Dataset | None:
    """The elements of a table, made anew; the caller has entered `headers.quiet`.

    Returns:
        A new dataset; None where an element that must have a value has none.

    Raises:
        Refused: an element that is needed cannot be read, or the pixels would mean something else without it.
    """
    out: dict[BaseTag, Any] = {}
    there = ds.keys()
    for element in table:
        present = element.tag in there
        if element.action == "pixels" or not (present or element.type in ("1", "2")):
            continue
        found = headers.quick(ds, element.tag) if present else None
        value = _ACTIONS[element.action](found, element, given)
        if value is None:
            if element.type == "1":
                return None
            if element.type == "1c" and _values(found):
                raise Refused("bad_header")
            if element.type not in ("2", "2c"):
                continue
            value = Sequence() if element.vr == "SQ" else ""
        out[element.tag] = made(element.tag, _vr(element.vr, value), value)
    return Dataset(out)


def made(tag: BaseTag, vr: str, value: Any) -> DataElement:
    """An element whose value our own code made; a single one needs none of pydicom's checks, which take their time."""
    plain = isinstance(value, str | int | float) and vr not in ("PN", "UI", "IS")
    return DataElement(tag, vr, value, already_converted=plain)


def _vr(stated: str, value: Any) -> str:
    """The one VR of an element for which the dictionary leaves a choice."""
    if stated == "US or OW":
        return "OW"
    if not stated.startswith("US or SS"):
        return stated
    numbers = value if isinstance(value, list) else [value]
    return "SS" if any(isinstance(number, int) and number < 0 for number in numbers) else "US"


def _values(found: Any) -> list[Any]:
    """The values of an element, without empty ones."""
    several = type(found) in _SEVERAL
    return [value for value in (found if several else [found]) if value is not None and value not in ("", b"")]


def _fitting(values: list[Any], element: Element) -> Any:
    """One value, or a list of as many as the element may have; None for any other number of them."""
    if not element.fewest <= len(values) <= element.most:
        return None
    return values[0] if len(values) == 1 else values


def _uid(found: Any, element: Element, given: Secrets) -> Any:
    values = [value.strip() for value in _values(found) if isinstance(value, str)]
    return _fitting([pseudonymous_uid(given.key, value) for value in values], element)


def _frame(found: Any, element: Element, given: Secrets) -> Any:
    return found if isinstance(found, str) and found in _ATLASES else _uid(found, element, given)


def _class(found: Any, _element: Element, _given: Secrets) -> Any:
    return str(found) if isinstance(found, str) and found in _SOP_CLASSES else None


def _age(found: Any, _element: Element, _given: Secrets) -> Any:
    """Whole years; 90 stands for everybody older. An impossible age is dropped."""
    match = re.fullmatch(r"(\d{3})([DWMY])", str(found), re.ASCII)
    if match is None:
        return None
    years = int(match[1]) // {"D": 365, "W": 52, "M": 12, "Y": 1}[match[2]]
    return f"{min(years, 90):03d}Y" if years <= 130 else None


def _date(found: Any, _element: Element, given: Secrets) -> Any:
    """PS3.15 E.3.6: intervals between days stay. Both DA and DT may be a bare date (PS3.5 6.2)."""
    match = _DATE.fullmatch(str(found).strip())
    try:
        day = datetime.date(*map(int, match.groups())) if match else None
    except ValueError:
        day = None
    return f"{day - datetime.timedelta(given.days):%Y%m%d}" if day else None


def _code(found: Any, element: Element, _given: Secrets) -> Any:
    """Of a fixed number of values all must be known; of any number the known ones stay."""
    values = [str(value).strip() for value in _values(found)]
    known = [value for value in values if value in CODES[element.keyword]] or list(element.arguments)
    return _fitting(known, element) if element.fewest == 1 or known == values else None


def _image_type(found: Any, element: Element, _given: Secrets) -> Any:
    first, second, further = IMAGE_TYPES
    values = [str(value).strip() for value in _values(found)[:4]]
    if len(values) < 2 or values[0] not in first or values[1] not in second:
        return None
    return values[:2] + [value if value in further else "OTHER" for value in values[2:]]


def _words(found: Any, _element: Element, _given: Secrets) -> Any:
    known = WORDS & set(re.findall(r"[A-Z0-9]+", str(found)[:1024].upper(), re.ASCII))
    return " ".join(sorted(known))[:64] or None


def _maker(found: Any, _element: Element, _given: Secrets) -> Any:
    if not _values(found):
        return None
    words = re.findall(r"[a-z]+", str(found)[:1024].lower())
    return next((MAKERS[word] for word in words if word in MAKERS), "other")


def _number(found: Any, element: Element, _given: Secrets) -> Any:
    low, high = float(element.arguments[0]), float(element.arguments[1])
    numbers: list[Any] = []
    for value in _values(found):
        if isinstance(value, bytes) and len(value) == 2:  # an ambiguous VR that pydicom left unread
            value = int.from_bytes(value, "little")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if not math.isfinite(number) and element.type == "1c":
            raise Refused("not_finite")
        if not low <= number <= high:  # not for NaN either
            return None
        if element.vr == "DS":
            numbers.append(DSfloat(number, auto_format=True))
        else:
            numbers.append(number if element.vr in ("FD", "FL") else int(number))
    return _fitting(numbers, element)


def _index(found: Any, _element: Element, _given: Secrets) -> Any:
    return str(int(found)) if re.fullmatch(r"\d{1,6}", str(found).strip(), re.ASCII) else None


def _pointer(found: Any, element: Element, _given: Secrets) -> Any:
    tags = [value for value in _values(found) if isinstance(value, int) and dictionary_has_tag(value)]
    return _fitting(tags, element)


def _items(found: Any, element: Element, given: Secrets) -> Any:
    if not isinstance(found, Sequence):
        return None
    items = (apply(item, TABLES[element.arguments[0]], given) for item in found)
    kept = [item for item in items if item is not None and ("LUTData" not in item or _whole(item))]
    return Sequence(kept) if kept else None


def _codes(found: Any, element: Element, given: Secrets) -> Any:
    if not isinstance(found, Sequence):
        return None
    contexts, *tables = element.arguments
    kept = []
    for item in found:
        code, scheme = headers.quick(item, "CodeValue"), headers.quick(item, "CodingSchemeDesignator")
        known = _context(contexts).get((str(scheme), str(code)))
        if known is None:
            continue
        inner = apply(item, TABLES[tables[0]], given) if tables else None
        kept.append(coded(*known, inner or Dataset()))
    return Sequence(kept) if kept else None


def coded(value: str, scheme: str, meaning: str, item: Dataset | None = None) -> Dataset:
    """An item of a code sequence (PS3.3 8.8)."""
    item = item or Dataset()
    for tag, vr, text in ((0x00080100, "SH", value), (0x00080102, "SH", scheme), (0x00080104, "LO", meaning)):
        item.add(made(BaseTag(tag), vr, text))
    return item


@functools.cache
def _context(contexts: str) -> Mapping[tuple[str, str], tuple[str, str, str]]:
    """Codes of context groups (PS3.16) by scheme and value, also under the retired names of SNOMED."""
    from pydicom.sr._snomed_dict import mapping  # both are large, and few images have such codes
    from pydicom.sr.codedict import codes

    found: dict[tuple[str, str], tuple[str, str, str]] = {}
    for number in contexts.split(","):
        for code in getattr(codes, f"cid{number}").concepts.values():
            entry = (code.value, code.scheme_designator, code.meaning[:64])
            found[code.scheme_designator, code.value] = entry
            old = mapping["SCT"].get(code.value) if code.scheme_designator == "SCT" else None
            found.update({(scheme, old): entry for scheme in _OLD_SCHEMES if old})
    for old, new in OLD_CODES.items():
        if ("SCT", new) in found:
            found.update({(scheme, old): found["SCT", new] for scheme in ("SCT", *_OLD_SCHEMES)})
    return MappingProxyType(found)


def _lut(found: Any, element: Element, _given: Secrets) -> Any:
    """PS3.3 C.11.1.1 and C.11.2.1.1; 16 and more numbers that rise or fall throughout spell no name."""
    if element.keyword == "LUTDescriptor":
        numbers = [int(value) for value in _values(found) if isinstance(value, int)]
        if len(numbers) != 3 or not (-32768 <= numbers[1] <= 65535 and 8 <= numbers[2] <= 16):
            return None
        entries = numbers[0] & 0xFFFF  # written as SS where the first value mapped is negative
        return [entries - 65536 if numbers[1] < 0 and entries > 32767 else entries, *numbers[1:]]
    if isinstance(found, bytes):
        data = np.frombuffer(found[: len(found) // 2 * 2], "<u2")
    else:
        data = np.array([value & 0xFFFF for value in _values(found) if isinstance(value, int)], "<u2")
    steps = np.diff(data.astype(np.int32))
    return data.tobytes() if len(steps) >= 15 and ((steps >= 0).all() or (steps <= 0).all()) else None


def _whole(item: Dataset) -> bool:
    """Whether a lookup table has as many entries as its descriptor says (0 stands for 65536)."""
    return len(item.LUTData) == 2 * (item.LUTDescriptor[0] & 0xFFFF or 65536)


_ACTIONS: Mapping[str, Callable[[Any, Element, Secrets], Any]] = MappingProxyType(
    {
        "empty": lambda found, element, given: None,
        "dummy": lambda found, element, given: element.arguments[0],
        "uid": _uid,
        "frame": _frame,
        "class": _class,
        "pid": lambda found, element, given: given.patient,
        "age": _age,
        "date": _date,
        "code": _code,
        "imagetype": _image_type,
        "words": _words,
        "maker": _maker,
        "number": _number,
        "index": _index,
        "pointer": _pointer,
        "items": _items,
        "codes": _codes,
        "lut": _lut,
    }
)
