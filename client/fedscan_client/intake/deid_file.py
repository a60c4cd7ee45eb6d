"""The header of a sample before and after, for hospital IT to look at on their own terminal."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from fedscan_client.intake import headers
from fedscan_client.intake.deid import deidentify
from fedscan_client.intake.records import Refused

_WIDTH = 60  # letters of a value that are shown


@dataclass(frozen=True)
class Row:
    """One element. `before` is the hospital's own value: for the eyes of its staff, never for a file or a log.

    Attributes:
        tag: (gggg,eeee), of an element in a sequence after the tags of the sequences and the number of the item.
        keyword: the standard's name, "" for a private or unknown element.
        before, after: the values in short; None where the element is absent.
    """

    tag: str
    keyword: str
    before: str | None
    after: str | None


def preview(ds: Dataset, key: bytes, *, issuer: str = "", released: bool = False) -> list[Row]:
    """What `deidentify` makes of a header, element by element in the order of tags; of a sequence its first item.

    Raises:
        Refused: as `deidentify`.
    """
    after = dict(_flat(deidentify(ds, key, issuer=issuer, released=released), ""))
    before = dict(_flat(ds, ""))
    return [Row(*place, before.get(place), after.get(place)) for place in sorted(before.keys() | after.keys())]


def _flat(ds: Dataset, path: str) -> Iterator[tuple[tuple[str, str], str]]:
    for tag in sorted(ds.keys()):
        name = f"{path}({tag.group:04X},{tag.element:04X})"
        try:
            found = headers.value(ds, int(tag))
        except Refused:
            found = "damaged"
        yield (name, keyword_for_tag(tag)), _short(found)
        if isinstance(found, Sequence) and len(found):
            yield from _flat(found[0], f"{name}[1]")


def _short(found: Any) -> str:
    """A value in one line of letters that no terminal obeys."""
    if isinstance(found, Sequence):
        return f"<{len(found)} item{'s' * (len(found) != 1)}>"
    if isinstance(found, bytes):
        return f"<{len(found)} bytes>"
    text = "" if found is None else str(found)
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: _WIDTH + 1])
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
