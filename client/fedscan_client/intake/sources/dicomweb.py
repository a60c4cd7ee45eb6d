"""A PACS over DICOMweb (PS3.18): QIDO-RS says what there is, WADO-RS gives it as it is stored.

Asking is dicomweb-client's work. Retrieving is not: it would parse every instance, while here the bytes go from the
connection into the encrypted spool as they come, in parts, so memory does not grow with an instance.

Nothing of a user's own settings takes part (proxies, .netrc): a password goes to the PACS of site.toml and nowhere
else, and a redirect to another place is an error.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from email.message import Message
from functools import partial
from threading import Event
from typing import Any, TypeVar

import requests
from dicomweb_client.api import DICOMwebClient
from requests import exceptions as broken

from fedscan_client.intake.records import PatientId
from fedscan_client.intake.sources import spool as spools
from fedscan_client.intake.sources.pull import (
    Archive,
    ArchiveError,
    Instance,
    Interrupted,
    Permitted,
    Report,
    Retry,
    pull,
    quiet,
)
from fedscan_client.intake.sources.settings import DicomWeb, read_secret
from fedscan_client.intake.sources.spool import Spool
from fedscan_core.errors import ConfigError

_AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_PART = 1 << 20
_LOST_AT_MOST = 3  # interrupted instances of a series before a pause
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_STUDY, _SERIES, _INSTANCE, _CLASS = "0020000D", "0020000E", "00080018", "00080016"
_PATIENT, _ISSUER = "00100020", "00100021"
_MODALITY, _BODY_PART, _STUDY_DATE = "00080060", "00180015", "00080020"
_T = TypeVar("_T")


def retrieve(
    settings: DicomWeb,
    spool: Spool,
    *,
    known: Callable[[str], bool],
    progress: Callable[[int, int], None],
    stop: Event,
    permitted: Permitted | None = None,
    dry_run: bool = False,
) -> Report:
    """Retrieves what is new; see `pull`.

    Raises:
        ConfigError: a secret or certificate cannot be read.
        ArchiveError: the PACS refused or could not be reached before anything was found.
    """
    quiet()
    retry = Retry(settings.attempts, settings.retry_seconds, stop)
    with _session(settings) as session:
        archive = _archive(settings, session, spool, retry)
        return pull(archive, spool, retry, known=known, progress=progress, permitted=permitted, dry_run=dry_run)


def _session(settings: DicomWeb) -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    session.max_redirects = 0
    if settings.username:
        password = read_secret(settings.password_file, settings.password_env, "password")
        session.auth = (settings.username, password)
    elif settings.token_file or settings.token_env:
        session.headers["Authorization"] = f"Bearer {read_secret(settings.token_file, settings.token_env, 'token')}"
    for path in (settings.ca_file, settings.client_certificate, settings.client_key):
        if path and not path.is_file():
            raise ConfigError(f"There is no certificate or key {path}.", remedy="Correct the path in site.toml.")
    if settings.ca_file:
        session.verify = str(settings.ca_file)
    if settings.client_certificate:
        certificate = str(settings.client_certificate)
        session.cert = (certificate, str(settings.client_key)) if settings.client_key else certificate
    return session


def _archive(settings: DicomWeb, session: requests.Session, spool: Spool, retry: Retry) -> Archive:
    base = settings.url.rstrip("/")
    client = DICOMwebClient(base, session=session, timeout=settings.timeout_seconds, permissive_uid=True)
    client.set_http_retry_params(retry=False)
    wanted = settings.filter
    parts = wanted.body_part or ("",)
    whose: dict[str, PatientId | None] = {}

    def search(ask: Callable[..., list[dict[str, Any]]], unique: str, **filters: str) -> Iterator[dict[str, Any]]:
        return _paged(partial(ask, search_filters=filters), unique, settings.page_size, retry)

    def studies() -> Iterator[str]:
        filters = {**wanted.study, **({"StudyDate": wanted.dates} if wanted.dates else {})}
        ask = partial(client.search_for_studies, fields=["IssuerOfPatientID"])
        for modality in wanted.modality or ("",):
            narrowed = {**filters, **({"ModalitiesInStudy": modality} if modality else {})}
            for row in search(ask, _STUDY, **narrowed):
                uid = _value(row, _STUDY)
                if uid not in whose and _in_dates(row, settings):
                    number = _value(row, _PATIENT)
                    whose[uid] = PatientId(number, _value(row, _ISSUER)) if number else None
                    yield uid

    def series(study: str) -> Sequence[tuple[str, str]]:
        found: dict[str, str] = {}
        for modality in wanted.modality or ("",):
            for part in parts:
                filters = {**wanted.series}
                filters |= {"Modality": modality} if modality else {}
                filters |= {"BodyPartExamined": part} if part else {}
                ask = partial(client.search_for_series, study, fields=["Modality", "BodyPartExamined"])
                for row in search(ask, _SERIES, **filters):
                    # A server that ignores a filter would otherwise send us everything there is.
                    if _one_of(row, _MODALITY, wanted.modality) and _one_of(row, _BODY_PART, wanted.body_part):
                        found[_value(row, _SERIES)] = _value(row, _MODALITY)
        return list(found.items())

    def instances(study: str, series: str) -> Sequence[Instance]:
        ask = partial(client.search_for_instances, study, series)
        return [Instance(_value(row, _INSTANCE), _value(row, _CLASS)) for row in search(ask, _INSTANCE)]

    def fetch(
        study: str, series: str, missing: Sequence[Instance], whole: bool, attempt: int, tick: Callable[[], None]
    ) -> set[str]:
        refused: set[str] = set()
        lost: list[Interrupted] = []  # one instance that a server chokes on does not keep the others from us
        for each in missing:
            if retry.stop.is_set() or len(lost) == _LOST_AT_MOST:
                break
            url = f"{base}/studies/{study}/series/{series}/instances/{each.uid}"
            try:
                if _fetch_one(session, url, settings.timeout_seconds, spool, each.uid):
                    tick()
                else:
                    refused.add(each.uid)
            except Interrupted as error:
                lost.append(error)
        if lost:
            raise lost[-1]
        return refused

    return Archive(studies, series, instances, fetch, whose.get)


# ------------------------------------------------------------------------------------------------------------- QIDO-RS


def _paged(ask: Callable[..., list[dict[str, Any]]], unique: str, page: int, retry: Retry) -> Iterator[dict[str, Any]]:
    """All results, page by page until a page brings nothing new: a server may give less than asked for at once.

    If the last page that did was full, a larger one is asked for from the start. That finds the rest where a server
    ignores the offset, or applies it after the limit, as Orthanc 1.10 does to filters that it has no index for. What
    cannot be told from a complete answer is a server that ignores the offset and gives fewer than a page of its own.

    Raises:
        ArchiveError: the server gives the same full page whatever is asked: the rest cannot be listed.
    """
    seen: set[str] = set()

    def asked(limit: int, offset: int) -> tuple[int, list[dict[str, Any]]]:
        rows = retry(partial(_asked, partial(ask, limit=limit, offset=offset)))
        fresh = {_value(row, unique) or json.dumps(row, sort_keys=True): row for row in rows}
        fresh = {key: row for key, row in fresh.items() if key not in seen}
        seen.update(fresh)
        return len(rows), list(fresh.values())

    count, fresh = asked(page, 0)
    offset, full = 0, False
    while fresh:
        yield from fresh
        full = count >= page
        offset += count
        count, fresh = asked(page, offset)
    repeats = count == page
    while full:
        limit = 2 * len(seen) + 1
        count, fresh = asked(limit, 0)
        if not fresh and repeats and count == page:
            raise ArchiveError(
                f"The PACS lists no more than {page} results, whatever is asked for.",
                remedy="Set another page_size, or ask for less with study_date_from and study_date_to.",
            )
        yield from fresh
        full = bool(fresh) and count >= limit


def _asked(ask: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    try:
        rows = _translated(ask)
    except broken.HTTPError as error:
        raise ArchiveError(
            f"The PACS does not answer a query (HTTP {_status(error)}).",
            remedy="Check the url and the filter in site.toml.",
        ) from None
    except (ValueError, AttributeError):
        rows = [None]  # type: ignore[list-item]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ArchiveError("The PACS answers a query with something else than DICOM JSON.", remedy="Check the url.")
    return rows


def _value(row: dict[str, Any], tag: str) -> str:
    """The first value of an attribute as text, "" if there is none (DICOM JSON model, PS3.18 annex F)."""
    element = row.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return str(values[0]).strip() if isinstance(values, list) and values and isinstance(values[0], str) else ""


def _one_of(row: dict[str, Any], tag: str, wanted: Sequence[str]) -> bool:
    return not wanted or _value(row, tag) in wanted


def _in_dates(row: dict[str, Any], settings: DicomWeb) -> bool:
    first, _, last = settings.filter.dates.partition("-")
    day = _value(row, _STUDY_DATE)
    return not day or ((not first or first <= day) and (not last or day <= last))


# ------------------------------------------------------------------------------------------------------------- WADO-RS


def _fetch_one(session: requests.Session, url: str, timeout: float, spool: Spool, uid: str) -> bool:
    """Puts one instance into the spool; False: the PACS has it no more, or gives something that is not DICOM."""

    def fetched() -> bool:
        with session.get(url, headers={"Accept": _AS_STORED}, stream=True, timeout=timeout) as answer:
            answer.raise_for_status()
            spools.put(spool.folder, spool.key, _dicom(answer), uid)
        return True

    try:
        return _translated(fetched)
    except (broken.HTTPError, _NotDicom):
        return False


class _NotDicom(Exception):
    """What came is not a DICOM file."""


def _dicom(answer: requests.Response) -> Iterator[bytes]:
    """The DICOM file in an answer."""
    content = Message()
    content["content-type"] = answer.headers.get("Content-Type", "")
    parts: Iterable[bytes] = answer.iter_content(_PART)
    if content.get_content_type() == "multipart/related":
        parts = _first_part(parts, str(content.get_param("boundary", "")).encode("latin-1", "replace"))
    head, checked = b"", False
    for part in parts:
        if not checked:
            head += part
            if len(head) < 132:
                continue
            if head[128:132] != b"DICM":
                raise _NotDicom
            part, checked = head, True
        yield part
    if not checked:
        raise _NotDicom


def _first_part(parts: Iterable[bytes], boundary: bytes) -> Iterator[bytes]:
    """The body of the first part of a multipart message (RFC 2046 section 5.1.1), as it comes.

    Raises:
        Interrupted: the message ends before the part does.
    """
    if not boundary:
        raise _NotDicom
    stream = iter(parts)
    waiting = b"\r\n"  # so that the first boundary looks like every other
    opening = b"\r\n--" + boundary
    for mark in (opening, b"\r\n\r\n"):  # the headers end with an empty line, which is the first one if there are none
        while mark not in waiting:
            if len(waiting) > _PART * 2:
                raise _NotDicom
            waiting += next(stream, b"") or _cut()
        waiting = waiting.split(mark, 1)[1]
    while opening not in waiting:
        keep = len(opening) - 1
        yield waiting[:-keep]
        waiting = waiting[-keep:] + (next(stream, b"") or _cut())
    yield waiting.split(opening, 1)[0]


def _cut() -> bytes:
    raise Interrupted("The PACS broke off in the middle of an instance.", remedy="Run it again: it goes on there.")


# -------------------------------------------------------------------------------------------------------------- errors


def _translated(call: Callable[[], _T]) -> _T:
    """What `call` returns, with what may go wrong on the way as our errors; other HTTP errors are the caller's."""
    again = "Check that it is running and that the url in site.toml is right; then run it again."
    try:
        return call()
    except broken.SSLError:
        raise ArchiveError(
            "The PACS and we do not trust each other's TLS certificates.",
            remedy="Set ca_file to the certificate of who vouches for it, and client_certificate if it wants ours.",
        ) from None
    except broken.TooManyRedirects:
        raise ArchiveError(
            "The PACS sends us on to another address.", remedy="Write the final one into url, if you trust it."
        ) from None
    except broken.HTTPError as error:
        code = _status(error)
        if code in (401, 403):
            raise ArchiveError(
                f"The PACS refuses us (HTTP {code}).",
                remedy="Check username and password, or the token, and what the account may read.",
            ) from None
        if code in _BUSY:
            raise Interrupted(f"The PACS is busy or in trouble (HTTP {code}).", remedy=again) from None
        raise
    except (broken.ConnectionError, broken.Timeout, broken.ChunkedEncodingError, broken.ContentDecodingError):
        raise Interrupted("The PACS cannot be reached, or broke off.", remedy=again) from None


def _status(error: broken.HTTPError) -> int:
    return error.response.status_code if error.response is not None else 0
