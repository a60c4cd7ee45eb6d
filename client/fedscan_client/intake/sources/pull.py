"""Asking a PACS: whatever it lists is fetched once, and every instance is accounted for.

The walk is study, series, instances. Before a series is fetched, each of its instances is looked up: what the intake
has read before (`known`) or the spool still holds is not fetched again, so a pull that was cut off, by Ctrl-C, by the
network or by the PACS, goes on where it stopped. That an instance was retrieved is read off the spool, not off what the
PACS says it sent.

DICOMweb and DIMSE differ only in the four functions of an `Archive`.
"""

import logging
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fedscan_client.intake.records import PatientId
from fedscan_client.intake.sources import spool as spools
from fedscan_client.intake.sources.spool import Spool
from fedscan_core.errors import DataError

_UID = re.compile(r"[0-9.]{1,64}")  # PS3.5 section 9; nothing else goes into a URL or an identifier
_LONGEST_PAUSE = 60.0
_GIVE_UP_AFTER = 3  # series in a row that could not be had: then the PACS is gone, not the series
_T = TypeVar("_T")

Permitted = Callable[[PatientId], bool]


class ArchiveError(DataError):
    """The PACS cannot be reached, refuses us, or answers what we cannot use."""


class Interrupted(ArchiveError):
    """It may work when tried again: the connection broke, the PACS is busy or starting."""


@dataclass(frozen=True)
class Instance:
    """One instance as a PACS lists it; `sop_class` is "" where it does not say."""

    uid: str
    sop_class: str = ""


@dataclass(frozen=True)
class Archive:
    """How one kind of PACS is asked. Each may raise `Interrupted` (tried again) or `ArchiveError` (the end).

    Attributes:
        studies: Study Instance UIDs; repeats by itself what was interrupted.
        series: of a study: (Series Instance UID, modality).
        instances: of a study and series.
        fetch: (study, series, instances, whether these are all of the series, number of the attempt, tick) puts them
            into the spool and calls `tick` for each; returns the UIDs that the PACS refuses for good.
        patient: whose a study is that `studies` gave; None where the PACS does not say.
    """

    studies: Callable[[], Iterable[str]]
    series: Callable[[str], Sequence[tuple[str, str]]]
    instances: Callable[[str, str], Sequence[Instance]]
    fetch: Callable[[str, str, Sequence[Instance], bool, int, Callable[[], None]], set[str]]
    patient: Callable[[str], PatientId | None] = lambda study: None


@dataclass(frozen=True)
class Retry:
    """Exponential backoff: pauses of `pause`, 2 `pause`, 4 `pause`, ... seconds, at most a minute each."""

    attempts: int
    pause: float
    stop: threading.Event

    def __call__(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, tried again while it raises `Interrupted`."""
        for attempt in range(self.attempts):
            try:
                return call()
            except Interrupted:
                if attempt + 1 == self.attempts or not self.wait(attempt):
                    raise
        raise AssertionError("there is at least one attempt")

    def wait(self, attempt: int) -> bool:
        """Waits before the attempt after this one; False: somebody said stop."""
        return not self.stop.wait(min(self.pause * 2**attempt, _LONGEST_PAUSE))


@dataclass(frozen=True)
class Report:
    """What a pull did. `found` = `retrieved` + `already_known` + `failed` + `left`.

    Attributes:
        studies: that were walked through, at least in part.
        no_consent: further studies, of patients who are not permitted or whom the PACS does not name.
        series: of them.
        unlisted: studies and series that the PACS lists without a usable UID: what is in them cannot be asked for.
        found: instances that the PACS listed.
        retrieved: that are in the spool now and were not before.
        already_known: read or spooled before, or listed a second time.
        failed: asked for and not received, or listed without a usable UID; the next pull asks again.
        left: not asked for, or not to the end, because the pull was over; all new ones in a dry run.
        modalities: instances found of each modality.
        new: those of them that were new.
        reason: the last one for which instances failed, where there is one to tell.
        problem: why it ended early, "" if it did not.
    """

    studies: int
    no_consent: int
    series: int
    unlisted: int
    found: int
    retrieved: int
    already_known: int
    failed: int
    left: int
    modalities: Mapping[str, int]
    new: Mapping[str, int]
    reason: str = ""
    problem: str = ""


def pull(
    archive: Archive,
    spool: Spool,
    retry: Retry,
    *,
    known: Callable[[str], bool],
    progress: Callable[[int, int], None],
    permitted: Permitted | None = None,
    dry_run: bool = False,
) -> Report:
    """Retrieves what is new into the spool.

    Args:
        archive: the PACS.
        spool: where to.
        retry: how often, and the event that ends it.
        known: whether an instance (by its SOP Instance UID) was read before.
        progress: is told (instances dealt with, instances found), now and then and from any thread.
        permitted: whether a patient's images may be fetched; what is not theirs to give, or nobody's by name, stays
            where it is. None: everybody's are fetched, and the intake asks.
        dry_run: only counts.

    Raises:
        ArchiveError: the PACS refused or could not be reached before anything was found. Later the report tells.
    """
    counts: Counter[str] = Counter()
    modalities: Counter[str] = Counter()
    new_of: Counter[str] = Counter()
    problem, reason, in_a_row = "", "", 0

    def has(uid: str) -> bool:
        return known(uid) or spools.has(spool.folder, spool.key, uid)

    def tell(arrived: int = 0) -> None:
        done = sum(counts[name] for name in ("retrieved", "already_known", "failed", "left"))
        progress(min(done + arrived, counts["found"]), counts["found"])

    try:
        for study in archive.studies():
            if retry.stop.is_set():
                break
            if not usable(study):
                counts["unlisted"] += 1
                continue
            whose = archive.patient(study)
            if permitted is not None and (whose is None or not permitted(whose)):
                counts["no_consent"] += 1
                continue
            series_of = retry(partial(archive.series, study))
            counts["studies"] += 1
            for series, modality in series_of:
                if retry.stop.is_set():
                    break
                if not usable(series):
                    counts["unlisted"] += 1
                    continue
                counts["series"] += 1
                listed = retry(partial(archive.instances, study, series))
                counts["found"] += len(listed)
                modalities[modality] += len(listed)
                sound = {each.uid: each for each in listed if usable(each.uid)}
                counts["failed"] += sum(not usable(each.uid) for each in listed)
                new = [each for uid, each in sound.items() if not has(uid)]
                counts["already_known"] += sum(usable(each.uid) for each in listed) - len(new)
                new_of[modality] += len(new)
                tell()
                if dry_run:
                    counts["left"] += len(new)
                    continue
                whole = len(new) == len(listed)
                got, lost = _fetch(archive, spool, retry, study, series, new, whole, tell)
                counts["retrieved"] += got
                over = retry.stop.is_set() or (lost is not None and not isinstance(lost, Interrupted))
                counts["left" if over else "failed"] += len(new) - got
                tell()
                in_a_row, reason = (in_a_row + 1, str(lost)) if lost else (0, reason)
                if lost and (over or in_a_row >= _GIVE_UP_AFTER):
                    raise lost
    except ArchiveError as error:
        if not (counts["studies"] or counts["unlisted"] or counts["no_consent"]):
            raise
        problem = str(error)
    if retry.stop.is_set():
        problem = problem or "It was stopped."
    names = ("studies", "no_consent", "series", "unlisted", "found", "retrieved", "already_known", "failed", "left")
    return Report(
        **{name: counts[name] for name in names}, modalities=modalities, new=new_of, reason=reason, problem=problem
    )


def usable(uid: str) -> bool:
    """Whether this is a UID that can be asked for."""
    return _UID.fullmatch(uid) is not None


def quiet() -> None:
    """Silences libraries whose log lines and warnings quote identifiers: theirs never reach a log of ours."""
    from pynetdicom import _config

    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False
    for name in ("pynetdicom", "pydicom", "dicomweb_client", "retrying", "urllib3", "requests"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"(pydicom|pynetdicom|dicomweb_client)(\.|$)")


def _fetch(
    archive: Archive,
    spool: Spool,
    retry: Retry,
    study: str,
    series: str,
    wanted: Sequence[Instance],
    whole: bool,
    tell: Callable[[int], None],
) -> tuple[int, ArchiveError | None]:
    """Fetches until all is there or nothing helps: (how many arrived, what broke it off)."""
    missing, refused, attempt = list(wanted), set[str](), 0
    lost: ArchiveError | None = None
    arrived = Counter[str]()

    def tick() -> None:
        arrived["so far"] += 1
        tell(arrived["so far"])

    while missing and not retry.stop.is_set():
        before, lost = len(missing), None
        try:
            refused |= archive.fetch(study, series, missing, whole and len(missing) == len(wanted), attempt, tick)
        except ArchiveError as error:
            lost = error
        missing = [each for each in missing if not spools.has(spool.folder, spool.key, each.uid)]
        if all(each.uid in refused for each in missing) or not isinstance(lost, Interrupted | None):
            break
        # Progress starts the count of attempts again. A PACS that answers, yet twice sends nothing, will not send it.
        attempt = 0 if len(missing) < before else attempt + 1
        if attempt >= (retry.attempts if lost else 2) or not retry.wait(attempt - 1 if attempt else 0):
            break
        missing = [each for each in missing if each.uid not in refused]
    return sum(spools.has(spool.folder, spool.key, each.uid) for each in wanted), lost
