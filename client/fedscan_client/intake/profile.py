"""The form of the de-identification tables: which DICOM elements are kept, and what is done to each.

An allow-list, not a deny-list: what no table names does not exist in the result, so a private tag, a nested sequence,
an overlay or an element added to the standard next year cannot pass. The deny-list of PS3.15 Table E.1-1 alone lets
through elements that it does not name (RetrieveURL, SoftwareVersions, overlay descriptions). Values are checked as
well, because a code string can hold a name.

The tables are text, for an auditor to read: `profile_modules.py` (modules of ordinary images), `profile_enhanced.py`
(functional groups of multi-frame images), `profile_values.py` (every word that may pass). `kinds.py` says which tables
a kind of image uses. A table is a head line `[NAME] section of PS3.3, title` and a row for each element:

    group,element  keyword  action  type

Actions (`actions.py`):
    empty            no value
    dummy:WORD       WORD, whatever was there
    uid              keyed pseudonym 2.25....; all values of the element
    frame            the same, but a frame of reference of the standard's own (an atlas) stays
    class            a SOP class of the standard; anything else is removed
    pid              keyed pseudonym of issuer and patient id
    age              whole years, 90 for everybody older
    date             shifted by the patient's own number of days; of a date and time only the date
    code[:WORD]      only values of `profile_values.CODES`; WORD in place of any other
    imagetype        values 1 and 2 checked as above, further ones only of a closed list
    words            free text reduced to the words of a closed list, in alphabetical order
    maker            only a name of `profile_values.MAKERS`, otherwise "other"
    number:LOW:HIGH  numbers, as many as the dictionary allows (at most 32, or a third argument), within a range
    index            a name that is a whole number of up to six digits
    pointer          tags of the dictionary (attribute pointers)
    items:NAME       a sequence, each of its items by table NAME
    codes:CID,...    a code sequence: only codes of these context groups of PS3.16, with the standard's meaning; a name
                     at the end is a table for what else is kept in the items
    lut              a lookup table written again from its numbers, which must rise or fall throughout
    pixels           written by us from the decoded values

Types: 1 always written, or refused; 1c where present it must be valid, or the image is refused; 2 always written,
empty where no value passes; 2c the same where the element was present; 3 left out where no value passes.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

from pydicom.datadict import dictionary_VM, dictionary_VR, keyword_for_tag
from pydicom.tag import BaseTag

VERSION = "fedscan allow-list 2"

Action = Literal[
    "empty", "dummy", "uid", "frame", "class", "pid", "age", "date", "code", "imagetype", "words", "maker", "number",
    "index", "pointer", "items", "codes", "lut", "pixels",
]  # fmt: skip
Type = Literal["1", "1c", "2", "2c", "3"]

_MANY = 32  # values of an element that may have any number of them


@dataclass(frozen=True)
class Element:
    """One kept element.

    Attributes:
        tag: group and element.
        keyword: the standard's keyword.
        vr: value representation in the standard's dictionary.
        action: what is done to it, see this file's docstring.
        arguments: of the action.
        type: when it is written, see this file's docstring.
        fewest, most: how many values may pass.
        section: where PS3.3 defines it.
    """

    tag: BaseTag
    keyword: str
    vr: str
    action: Action
    arguments: tuple[str, ...]
    type: Type
    fewest: int
    most: int
    section: str


Table = tuple[Element, ...]


def tables(text: str) -> MappingProxyType[str, Table]:
    """Reads tables as written in the docstring above.

    Raises:
        ValueError: a row that is not of that form, a tag that is not the keyword's, an element twice in a table.
    """
    found: dict[str, list[Element]] = {}
    rows: list[Element] = []
    section = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("["):
            name, section = line[1:].split("] ", 1)
            rows = found.setdefault(name, [])
            continue
        where, keyword, what, kind = line.split()
        tag = BaseTag(int(where.replace(",", ""), 16))
        action, *arguments = what.split(":")
        if keyword_for_tag(tag) != keyword or action not in get_args(Action) or kind not in get_args(Type):
            raise ValueError(f"not a row of a table: {line}")
        if tag in {row.tag for row in rows}:
            raise ValueError(f"twice in a table: {line}")
        fewest, most = _multiplicity(dictionary_VM(tag), arguments[2:] if action == "number" else ())
        cited, vr = section.split(" ", 1)[0], dictionary_VR(tag)
        what_is_done, when = cast(Action, action), cast(Type, kind)
        rows.append(Element(tag, keyword, vr, what_is_done, tuple(arguments), when, fewest, most, cited))
    return MappingProxyType({name: tuple(rows) for name, rows in found.items()})


def _multiplicity(stated: str, cap: list[str] | tuple[()]) -> tuple[int, int]:
    """Fewest and most values from a VM such as 1, 1-2, 2-n or 3-3n."""
    fewest, _, most = stated.replace(" or 1", "").partition("-")
    limit = int(cap[0]) if cap else _MANY
    return int(fewest), limit if most.endswith("n") else int(most or fewest)
