"""The second pass of the intake for one series of a cleared patient: which objects pass, and the images they make.

An object passes when no other patient claims its UIDs, it is not a second copy, it has a label, and its kind is
accepted or was released by a rule of the site or by a person. What passes is de-identified object by object and
assembled. Where all objects of a series carry the same label they make stacks; where labels differ by slice, every
slice is an image.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date

from pydicom.dataset import Dataset

from fedscan_client.consent import Register
from fedscan_client.intake import cache, decode, deid, headers, objects, ocr, profile, quarantine, read, stack, traits
from fedscan_client.intake.cache import Entry
from fedscan_client.intake.cache_keys import Damaged
from fedscan_client.intake.index import Index, Row
from fedscan_client.intake.labels import Label, Labels
from fedscan_client.intake.quarantine import Known
from fedscan_client.intake.records import REVIEW, Rectangle, Refused, Volume
from fedscan_client.intake.report import Counts
from fedscan_client.intake.rules import blackout_for
from fedscan_client.intake.scan import name_of
from fedscan_client.keys import SiteKey
from fedscan_client.site import Site
from fedscan_core.errors import DataError

_VERSION = 1  # of the way from an object to the cached image: another number reads everything again

Piece = tuple[Entry, Volume | None]  # None: the image is in the cache already
Pair = tuple[Row, Label]


@dataclass(frozen=True)
class Work:
    """What every step of one run needs. `names`: the key for this project; `cached`: patients in the cache before."""

    site: Site
    key: SiteKey
    names: bytes
    index: Index
    labels: Labels
    register: Register
    cached: frozenset[str]
    dry: bool
    read: Counter[str] = field(default_factory=Counter)

    def known(self, patient: str) -> dict[str, Entry]:
        """The patient's images that the cache holds now, by their ids; none where they cannot be read."""
        if self.dry or patient not in self.cached:
            return {}
        try:
            return {it.id: it for it in cache.read_index(self.site.cache, self.key, patient).entries}
        except Damaged:
            objects.destroy(self.site, patient, for_good=False)  # the source still has them
            return {}


def born(work: Work, rows: Sequence[Row]) -> date | None:
    """The earliest birth date that these objects give; None where none does.

    Raises:
        Refused: unreadable: nothing can be concluded.
    """
    found = []
    for row in rows:
        try:
            text = str(headers.value(_header(work, row), "PatientBirthDate") or "")
        except OSError:
            raise Refused("unreadable") from None
        with contextlib.suppress(ValueError):
            found.append(date.fromisoformat(text))
    return min(found, default=None)


def pieces(
    work: Work,
    uid: str,
    rows: Sequence[Row],
    *,
    clashing: frozenset[str],
    shared: frozenset[str],
    seen: set[str],
    known: Mapping[str, Entry],
    split: str,
    counts: Counts,
) -> Iterator[Piece]:
    """The images that one series makes, one after the other.

    Args:
        work: this run's.
        uid: name of the series.
        rows: its objects, in the order of their instances.
        clashing: names of studies, series and instances that another patient claims as well.
        shared: names of accession numbers that another patient has too.
        seen: instances of the patient that were met before; these are added.
        known: images of the patient that are in the cache.
        split: the patient's, "" to leave it to the site's keyed hash.
        counts: what became of the objects is added here, when the iteration has ended.
    """
    chosen: list[Pair] = []
    for row in rows:
        label = work.labels.of(row.header, shared)
        if clashing & uids(row):
            counts["refused", "uid_on_two_patients"] += 1
        elif row.header.instance in seen:
            counts["refused", "duplicate"] += 1
        elif label is None:
            counts["unlabelled", ""] += 1
        else:
            chosen.append((row, label))
            seen.add(row.header.instance)
    together = len({label.label for _, label in chosen}) == 1 and not counts["unlabelled", ""]
    states = quarantine.states(work.site.folder, uid)
    digest = _digest(work, chosen, split, states)
    told = work.index.outcome(uid, digest)
    if told is not None and all(name in known for name in told["entries"]):
        waiting = sum(count for outcome, _, count in told["counts"] if outcome == "quarantined")
        if waiting <= sum(row.header.instance in states for row, _ in chosen):  # else the list was lost: anew
            counts.update({(outcome, reason): count for outcome, reason, count in told["counts"]})
            yield from ((known[name], None) for name in told["entries"])
            return

    became: Counts = Counter()
    made: list[str] = []
    groups = [chosen] if together else [[pair] for pair in chosen]
    for group in groups:
        for entry, volume in _assembled(work, group, split, states, digest.hex(), became):
            # An object may make several images, and stand in several series.
            name = hashlib.sha256(f"{uid}\0{len(made)}\0{entry.id}".encode()).hexdigest()[:32]
            made.append(name)
            yield replace(entry, id=name), volume
    counts.update(became)
    if not work.dry:
        lines = [[outcome, reason, count] for (outcome, reason), count in sorted(became.items())]
        work.index.settle(uid, rows[0].header.patient, digest, {"entries": made, "counts": lines})


def uids(row: Row) -> frozenset[str]:
    """Names of an object's study, series and instance."""
    return frozenset((row.header.study, row.header.series, row.header.instance))


def _assembled(
    work: Work,
    group: Sequence[Pair],
    split: str,
    states: Mapping[str, Known],
    digest: str,
    counts: Counts,
) -> Iterator[tuple[Entry, Volume]]:
    """De-identifies some objects of one series and puts them together; what cannot be used is counted."""
    passed: list[tuple[Pair, Mapping[str, str]]] = []

    def cleaned() -> Iterator[Dataset]:
        for number, pair in enumerate(group):
            try:
                clean = _clean(work, pair[0], states.get(pair[0].header.instance), number, len(group))
            except Refused as refused:
                counts["quarantined" if refused.reason in REVIEW else "refused", refused.reason] += 1
                _set_aside(work, pair[0], refused.reason)
                continue
            if clean is None:  # dry: it would be read now
                counts["accepted", ""] += 1
                continue
            passed.append((pair, _facts(clean)))
            yield clean

    try:
        volumes = stack.assemble(cleaned())
    except Refused as refused:
        counts["refused", refused.reason] += len(passed)
        if passed:
            _set_aside(work, passed[0][0][0], refused.reason)
        return
    used: set[int] = set()
    for volume, members in volumes:
        first, facts = passed[members[0]]
        names = sorted(passed[member][0][0].header.instance for member in members)
        yield (
            Entry(
                id=hashlib.sha256("\0".join(names).encode()).hexdigest()[:32],
                study=first[0].header.study,
                label=first[1].label,
                split=split,
                sex=facts["sex"],
                age=int(facts["age"]) if facts["age"] else None,
                group={"manufacturer": facts["manufacturer"], "modality": facts["modality"]},
                digest=digest,
            ),
            volume,
        )
        used.update(members)
    counts["accepted", ""] += len(used)
    if len(used) < len(passed):
        counts["refused", "geometry"] += len(passed) - len(used)


def _clean(work: Work, row: Row, state: Known | None, number: int, of: int) -> Dataset | None:
    """Reads an object whole and de-identifies it; None in a dry run, just before its pixels would be read.

    Raises:
        Refused: it waits for a person or was rejected, changed since its header was read, or cannot be used.
    """
    rectangles = None
    if state is not None:
        content = _content(work, row) if state.reason in REVIEW else ""
        alarmed = (state.state, state.reason, state.digest) == ("waiting", "text_seen", content)
        if alarmed or state.state == "rejected":
            raise Refused(state.reason)
        rectangles = state.let_in(content)  # None as well where it is not what was looked at: it waits anew
    decided = rectangles is not None
    if rectangles is None and row.header.review:
        rectangles = _by_rule(work, row)
        if rectangles is None:
            raise Refused(row.header.review)
    if work.dry:
        return None
    ds = _whole(work, row)
    if name_of(ds, work.names, work.site.issuer, work.register) != row.header:
        raise Refused("changed")
    work.read["instances"] += 1
    released = bool(row.header.review)
    clean = deid.deidentify(ds, work.names, issuer=work.site.issuer, blackout=rectangles or (), released=released)
    if not decided and not released and work.site.quarantine.ocr != "off":
        _look(work, clean, number, of)
    return clean


def _whole(work: Work, row: Row) -> Dataset:
    try:
        with objects.opened(work.site, work.key, row.locator) as (stream, size):
            return read.whole(stream, size)
    except Refused:
        raise
    except (DataError, OSError):
        raise Refused("unreadable") from None


def _content(work: Work, row: Row) -> str:
    """Digest of an object's bytes: what a person decides holds for these."""
    try:
        with objects.opened(work.site, work.key, row.locator) as (stream, _):
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    except Refused:
        raise
    except (DataError, OSError):
        raise Refused("unreadable") from None


def _by_rule(work: Work, row: Row) -> tuple[Rectangle, ...] | None:
    if not work.site.quarantine.rule:
        return None
    try:
        return blackout_for(_header(work, row), work.site.quarantine.rule)
    except OSError:
        raise Refused("unreadable") from None


def _look(work: Work, clean: Dataset, number: int, of: int) -> None:
    """The second alarm, where the site switched it on.

    Raises:
        Refused: something like text was read.
    """
    pixels = decode.frames(clean)
    for frame in ocr.reads(work.site.quarantine.ocr, number, of, len(pixels)):
        if ocr.alarm(pixels[frame]):
            raise Refused("text_seen")


def _set_aside(work: Work, row: Row, reason: str) -> None:
    if work.dry:
        return
    about, seen, content = row.header, traits.UNKNOWN, row.stamp
    with contextlib.suppress(DataError, OSError):
        seen = traits.traits(_header(work, row), work.names)
        content = _content(work, row) if reason in REVIEW else row.stamp
    put = quarantine.Found(reason, about.patient, about.series, about.instance, row.locator, content, seen)
    quarantine.put(work.site.folder, work.key.wrapping, [put])


def _header(work: Work, row: Row) -> Dataset:
    with objects.opened(work.site, work.key, row.locator) as (stream, size):
        return read.header(stream, size)


def _digest(work: Work, chosen: Iterable[Pair], split: str, states: Mapping[str, Known]) -> bytes:
    """Changes with everything that decides what a series becomes: its objects, labels, rules, decisions, this code."""
    pairs = list(chosen)
    told = [
        _VERSION,
        profile.VERSION,
        split,
        work.site.quarantine.model_dump(mode="json"),
        [[row.header.instance, row.stamp, label.label] for row, label in pairs],
        [asdict(it) for row, _ in pairs if (it := states.get(row.header.instance)) and it.state != "waiting"],
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()


def _facts(clean: Dataset) -> dict[str, str]:
    """What is kept beside the pixels, from the de-identified object only."""
    return {
        "sex": str(clean.get("PatientSex") or ""),
        "age": str(clean.get("PatientAge") or "")[:3],
        "manufacturer": str(clean.get("Manufacturer") or ""),
        "modality": str(clean.get("Modality") or ""),
    }
