"""What FHIR resources are made of, read strictly: JSON, elements, codes, dates and periods.

Anything that is not known raises `NotUnderstood`: the consent it stands in then permits nothing. Sources: FHIR R4 and
R5, "JSON representation", "Datatypes".
"""

import functools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

Node = dict[str, Any]


def elements(names: str) -> frozenset[str]:
    """Element names out of a line of text."""
    return frozenset(names.split())


# Elements that never change what a consent means: FHIR 2.1.3.0.6 "extension", the narrative, an element's own id.
IGNORED = frozenset({"id", "extension"})
# Element names that may be shown to people; another one could be anything.
_STANDARD = elements(
    "implicitRules modifierExtension contained meta security tag action actor agreement class code coding data "
    "dataPeriod decision documentType expression grantee period policy policyBasis policyRule provision purpose "
    "reference regulatoryBasis resourceType scope securityLabel status type verification link identifier"
)
_DATE = re.compile(
    r"(?P<year>\d{4})(-(?P<month>\d\d)(-(?P<day>\d\d)"
    r"(?P<time>T\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d))?)?)?",
    re.ASCII,
)
_YEARS = (1900, 9999)


class NotUnderstood(Exception):
    """Something that is not known, at `where`: a path of element names, perhaps with a code; nothing else."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = "".join(letter if letter.isprintable() else "?" for letter in where[:200])


class Malformed(Exception):
    """Not the JSON that FHIR allows. The text names no value."""


@dataclass(frozen=True)
class Moment:
    """A FHIR date or dateTime: the days it may stand for, as written, and the instant where it says one."""

    first: date
    last: date
    instant: datetime | None = None


@dataclass(frozen=True)
class Period:
    """Days on which something holds, both included; None: open.

    `end` is the last day with any part in it, `whole_end` the last day that is in it as a whole.
    """

    start: date | None = None
    end: date | None = None
    whole_end: date | None = None


def parse(text: str) -> Any:
    """The JSON value of a text.

    Raises:
        Malformed: no JSON, a key twice, NaN or Infinity, a number or nesting beyond reason.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise Malformed("it is nested too deeply") from None
    except ValueError:  # JSONDecodeError quotes nothing, but a number too long is a plain ValueError
        raise Malformed("it is not valid JSON") from None


def _unique(pairs: list[tuple[str, Any]]) -> Node:
    node = dict(pairs)
    if len(node) != len(pairs):
        raise Malformed("an element stands twice in one object")
    return node


def _no_constant(_: str) -> None:
    raise Malformed("it holds NaN or Infinity")


def check(node: Any, known: Collection[str], where: str) -> Node:
    """The node, where it is an object that holds known elements only, and not nothing.

    Raises:
        NotUnderstood: it is not.
    """
    if not isinstance(node, dict) or not node:
        raise NotUnderstood(where)
    for name in node:
        if name not in known and name not in IGNORED:
            raise NotUnderstood(f"{where}.{name}" if name in _STANDARD else f"{where}: an element that is not known")
    return node


def items(node: Node, name: str, where: str) -> Sequence[Any]:
    """A repeated element; empty where absent.

    Raises:
        NotUnderstood: no list, or an empty one, which FHIR does not allow.
    """
    if name not in node:
        return ()
    found = node[name]
    if not isinstance(found, list) or not found:
        raise NotUnderstood(f"{where}.{name}")
    return found


def string(node: Node, name: str, where: str) -> str | None:
    """A string element, None where absent.

    Raises:
        NotUnderstood: no string, or an empty one.
    """
    found = node.get(name)
    if found is None and name not in node:
        return None
    if not isinstance(found, str) or not found.strip():
        raise NotUnderstood(f"{where}.{name}")
    return found


def coding(node: Any, where: str) -> str:
    """A Coding as "system|code". Its display and version are left aside.

    Raises:
        NotUnderstood: an unknown element, or no code.
    """
    node = check(node, ("system", "version", "code", "display", "userSelected"), where)
    system, code = string(node, "system", where) or "", string(node, "code", where)
    if code is None or "|" in system:  # the bar is ours
        raise NotUnderstood(where)
    return f"{system}|{code}"


def concept(node: Any, where: str) -> tuple[str, ...]:
    """A CodeableConcept as its codings; its text where it has none.

    Raises:
        NotUnderstood: an unknown element, or neither.
    """
    node = check(node, ("coding", "text"), where)
    codes = tuple(coding(item, where) for item in items(node, "coding", where))
    text = string(node, "text", where)
    if not codes and (text is None or "|" in text):
        raise NotUnderstood(where)
    return codes or (str(text),)


def identifier(node: Any, where: str) -> tuple[str | None, str | None]:
    """An Identifier as its system and value; None where absent.

    Raises:
        NotUnderstood: an unknown element, or one of the two that is no string.
    """
    node = check(node, ("use", "type", "system", "value", "period", "assigner"), where)
    return string(node, "system", where), string(node, "value", where)


def known(tokens: Collection[str], accepted: Collection[str]) -> bool:
    """Whether each token, or its system as "system|", is accepted."""
    return all(token in accepted or f"{token.partition('|')[0]}|" in accepted for token in tokens)


@functools.lru_cache(maxsize=4096)
def moment(text: str, where: str) -> Moment:
    """A FHIR date or dateTime.

    Raises:
        NotUnderstood: it is none, or outside 1900 to 9999.
    """
    match = _DATE.fullmatch(text)
    try:
        if match is None or not _YEARS[0] <= int(match["year"]) <= _YEARS[1]:
            raise NotUnderstood(where)
        first = date(int(match["year"]), int(match["month"] or 1), int(match["day"] or 1))
        if match["time"]:
            return Moment(first, first, datetime.fromisoformat(text))
    except ValueError:
        raise NotUnderstood(where) from None
    if match["day"]:
        return Moment(first, first)
    month = int(match["month"] or 12)
    last = date(first.year, month, 31) if month == 12 else date(first.year, month + 1, 1) - timedelta(days=1)
    return Moment(first, last)


def later(one: Moment, other: Moment) -> bool:
    """Whether one moment is surely later than the other. Between a day and an instant a day lies for time zones."""
    if one.instant and other.instant:
        return one.instant > other.instant
    day = timedelta(days=1 if one.instant or other.instant else 0)
    return one.first - day > other.last


def same(one: Moment, other: Moment) -> bool:
    """Whether two moments are surely the same day, or the same instant."""
    if one.instant or other.instant:
        return one.instant == other.instant
    return one.first == one.last == other.first == other.last


def newest(moments: Sequence[Moment]) -> list[int]:
    """Indices of the moments than which none is surely later."""
    instant = max((m.instant for m in moments if m.instant), default=None)
    instant_day = max((m.first for m in moments if m.instant), default=date.min)
    day = max((m.first for m in moments if not m.instant), default=date.min)
    one = timedelta(days=1)

    def beaten(moment: Moment) -> bool:
        if moment.instant:
            return bool(instant and instant > moment.instant) or (day > date.min and day - one > moment.last)
        return day > moment.last or (instant_day > date.min and instant_day - one > moment.last)

    return [index for index, moment in enumerate(moments) if not beaten(moment)]


def period(node: Any, where: str) -> Period:
    """A Period. Its ends count as a whole day where it names days, months or years (FHIR, Period.end).

    Raises:
        NotUnderstood: an unknown element, no date, or an end before the start.
    """
    node = check(node, ("start", "end"), where)
    start, end = (string(node, name, where) for name in ("start", "end"))
    begins = moment(start, f"{where}.start") if start else None
    ends = moment(end, f"{where}.end") if end else None
    if begins and ends and begins.first > ends.last:
        raise NotUnderstood(where)
    if ends is None:
        return Period(begins.first if begins else None)
    whole = ends.last - timedelta(days=1) if ends.instant else ends.last
    return Period(begins.first if begins else None, ends.last, whole)
