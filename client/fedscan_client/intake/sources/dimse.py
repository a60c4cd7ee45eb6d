"""A PACS over DIMSE (PS3.4 annex C, Study Root): C-FIND says what there is, C-MOVE or C-GET brings it.

C-MOVE lets the PACS send to an SCP of ours (`scp.py`) that runs as long as the pull. C-GET brings the instances back on
our own association, which needs one presentation context for each SOP class and transfer syntax: an association is made
for the SOP classes of one series at a time, so that each comes as it is stored.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_network
from threading import Event
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import AllTransferSyntaxes
from pynetdicom import AE, DEFAULT_TRANSFER_SYNTAXES, build_role, evt
from pynetdicom.association import Association

from fedscan_client.intake.records import PatientId
from fedscan_client.intake.sources import scp
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
from fedscan_client.intake.sources.settings import DimseGet, DimseMove, DimseStore, Peer
from fedscan_client.intake.sources.spool import Spool
from fedscan_core.errors import ConfigError

# Study Root Query/Retrieve Information Model
FIND, MOVE, GET = (f"1.2.840.10008.5.1.4.1.2.2.{number}" for number in (1, 2, 3))
_UIDS_AT_ONCE = 200  # of one request at IMAGE level
_ROOM = 126  # contexts for storage in one association: 128 (PS3.8 section 9.3.2.2) without C-FIND and C-GET
_AGAIN = "Check that it is running and that host, port and tls in site.toml are right; then run it again."

Contexts = Sequence[tuple[str, Sequence[str]]]


def retrieve(
    settings: DimseMove | DimseGet,
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
        ConfigError: our own address cannot be listened on, or a certificate cannot be used.
        ArchiveError: the PACS refused or could not be reached before anything was found.
    """
    quiet()
    retry = Retry(settings.attempts, settings.retry_seconds, stop)
    line = _Line(settings, scp.storing(spool, scp.Received(), lambda: line.tick()))
    with contextlib.ExitStack() as stack:
        if isinstance(settings, DimseMove) and not dry_run:
            stack.enter_context(scp.listening(_destination(settings), spool, scp.Received(), lambda: line.tick()))
        stack.callback(line.close)
        return pull(
            _archive(line, retry), spool, retry, known=known, progress=progress, permitted=permitted, dry_run=dry_run
        )


@dataclass
class _Line:
    """The association with the PACS, kept for the next request that needs the same presentation contexts."""

    settings: DimseMove | DimseGet
    store: Callable[[Any], int]  # what to do with an instance that comes by C-GET
    tick: Callable[[], None] = lambda: None  # of the series in progress
    contexts: Contexts = ()
    association: Association | None = None

    def open(self, model: str, contexts: Contexts = ()) -> Association:
        """An association over which `model` can be asked for.

        Raises:
            ArchiveError: the PACS refuses us; `Interrupted`: it cannot be reached, or is busy.
        """
        wanted = [(FIND, ()), *(((MOVE, ()),) if isinstance(self.settings, DimseMove) else ((GET, ()),)), *contexts]
        if self.association is None or not self.association.is_established or self.contexts != wanted:
            self.close()
            self.association, self.contexts = _associate(self.settings, wanted, self.store), wanted
        if model not in [context.abstract_syntax for context in self.association.accepted_contexts]:
            raise ArchiveError(
                "The PACS does not offer us what was asked of it (C-FIND, C-MOVE or C-GET).",
                remedy="Ask its administrator to allow it for our AE title, or use another kind of source.",
            )
        return self.association

    def abort(self) -> None:
        """Ends it at once."""
        if self.association is not None and self.association.is_alive():
            self.association.abort()
        self.association = None

    def close(self) -> None:
        """Ends it in good order, if it is still there."""
        if self.association is not None and self.association.is_established:
            self.association.release()
        self.association = None


def _destination(settings: DimseMove) -> DimseStore:
    """The SCP that C-MOVE sends to."""
    senders = settings.senders
    if not senders:
        try:
            addresses = {str(info[4][0]) for info in socket.getaddrinfo(settings.host, None)}
        except OSError:
            raise ConfigError(
                f"The host {settings.host} has no address.", remedy="Correct host in site.toml, or name the senders."
            ) from None
        senders = tuple(
            Peer(ae_title=settings.pacs_ae_title, address=ip_network(address.partition("%")[0]))
            for address in sorted(addresses)
        )
    return DimseStore(
        kind="dimse-store",
        ae_title=settings.ae_title,
        listen_address=settings.listen_address,
        listen_port=settings.listen_port,
        allow=senders,
        tls=settings.tls,
        timeout_seconds=settings.timeout_seconds,
    )


def _archive(line: _Line, retry: Retry) -> Archive:
    wanted = line.settings.filter
    whose: dict[str, PatientId | None] = {}

    def find(level: str, **keys: str) -> list[Dataset]:
        return _find(line, level, keys)

    def studies() -> Iterator[str]:
        asked = dict.fromkeys(("StudyInstanceUID", "PatientID", "IssuerOfPatientID"), "")
        for modality in wanted.modality or ("",):
            keys = {**wanted.study, "StudyDate": wanted.dates, "ModalitiesInStudy": modality, **asked}
            for row in retry(partial(find, "STUDY", **keys)):
                uid, number = _text(row, "StudyInstanceUID"), _text(row, "PatientID")
                if uid not in whose:
                    whose[uid] = PatientId(number, _text(row, "IssuerOfPatientID")) if number else None
                    yield uid

    def series(study: str) -> Sequence[tuple[str, str]]:
        rows = find(
            "SERIES", StudyInstanceUID=study, SeriesInstanceUID="", Modality="", BodyPartExamined="", **wanted.series
        )
        found = {
            _text(row, "SeriesInstanceUID"): _text(row, "Modality")
            for row in rows
            if _one_of(row, "Modality", wanted.modality) and _one_of(row, "BodyPartExamined", wanted.body_part)
        }
        return list(found.items())  # once, though a UID that two patients share is listed twice

    def instances(study: str, series: str) -> Sequence[Instance]:
        rows = find("IMAGE", StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID="", SOPClassUID="")
        return list(dict.fromkeys(Instance(_text(row, "SOPInstanceUID"), _text(row, "SOPClassUID")) for row in rows))

    def fetch(
        study: str, series: str, missing: Sequence[Instance], whole: bool, attempt: int, tick: Callable[[], None]
    ) -> set[str]:
        line.tick = tick
        # Not every PACS answers at IMAGE level: what it did not send that way is asked for with its series.
        by_series = whole or attempt > 0
        for group in [missing] if isinstance(line.settings, DimseMove) else _by_class(missing):
            for uids in _batches(group, by_series and len(group) == len(missing)):
                _bring(line, _identifier(study, series, uids), group)
        return set()

    return Archive(studies, series, instances, fetch, whose.get)


# ------------------------------------------------------------------------------------------------------------ requests


def _associate(settings: DimseMove | DimseGet, contexts: Contexts, store: Callable[[Any], int]) -> Association:
    ae = AE(settings.ae_title)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = settings.timeout_seconds
    ae.network_timeout = None  # the one of TCP; ours is how long an answer may take
    for abstract, transfer in contexts:
        ae.add_requested_context(abstract, list(transfer) or DEFAULT_TRANSFER_SYNTAXES)
    storage = sorted({abstract for abstract, transfer in contexts if transfer})
    association = ae.associate(
        settings.host,
        settings.port,
        ae_title=settings.pacs_ae_title,
        tls_args=(scp.client_context(settings.tls), settings.host) if settings.tls else None,
        ext_neg=[build_role(uid, scp_role=True) for uid in storage],
        evt_handlers=[(evt.EVT_C_STORE, store)] if storage else [],
        max_pdu=1 << 17,
    )
    if association.is_rejected:
        answer: Any = association.acceptor.primitive
        if answer is not None and answer.result == 0x02:
            raise Interrupted("The PACS has no association free at the moment.", remedy=_AGAIN)
        raise ArchiveError(
            f"The PACS {settings.pacs_ae_title} refuses the AE title {settings.ae_title}.",
            remedy="Ask its administrator to enter our AE title with this machine's address; check pacs_ae_title.",
        )
    if not association.is_established:
        raise Interrupted("The PACS cannot be reached, or broke off.", remedy=_AGAIN)
    wire: Any = association.dul.socket
    wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or each request waits 40 ms for its second half
    return association


def _find(line: _Line, level: str, keys: dict[str, str]) -> list[Dataset]:
    query = Dataset()
    query.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(query, keyword, value)
    rows = []
    code: int | None = None
    for status, row in line.open(FIND, line.contexts[2:]).send_c_find(query, FIND):
        code = status.get("Status")
        if code in (0xFF00, 0xFF01):
            rows.append(row if row is not None else Dataset())
    if code is None:
        line.abort()
        raise Interrupted("The PACS broke off a query.", remedy=_AGAIN)
    if code == 0xA700:
        raise ArchiveError(
            "The PACS finds more than it can list.", remedy="Ask for less with study_date_from and study_date_to."
        )
    if code != 0x0000:
        raise ArchiveError(
            f"The PACS refuses a query at {level} level (status 0x{code:04X}).",
            remedy="Check the filter in site.toml, and ask its administrator what our AE title may query.",
        )
    return rows


def _bring(line: _Line, query: Dataset, group: Sequence[Instance]) -> None:
    """Has instances brought, by C-MOVE or C-GET; whether they came is looked up in the spool, not here."""
    settings = line.settings
    if isinstance(settings, DimseMove):
        association = line.open(MOVE)
        association.dimse_timeout = settings.move_timeout_seconds
        answers = association.send_c_move(query, settings.ae_title, MOVE)
    else:
        association = line.open(GET, _storage_contexts(group))
        answers = association.send_c_get(query, GET)
    code: int | None = None
    for status, _ in answers:
        code = status.get("Status")
    association.dimse_timeout = settings.timeout_seconds
    if code is None:
        line.abort()
        raise Interrupted("The PACS broke off a retrieval.", remedy=_AGAIN)
    if code == 0xA801:
        raise ArchiveError(
            f"The PACS does not know where to send to: it has no address for the AE title {settings.ae_title}.",
            remedy="Ask its administrator to enter it with this machine's address and listen_port.",
        )
    if code not in (0x0000, 0xB000):  # all sent, or all that could be
        raise Interrupted(
            f"The PACS does not send what it is asked for (status 0x{code:04X}).",
            remedy="Ask its administrator whether our AE title may retrieve, and what its log says.",
        )


def _storage_contexts(group: Sequence[Instance]) -> Contexts:
    """For each SOP class one context with each transfer syntax: so an instance comes as it is stored."""
    classes = {each.sop_class for each in group}
    if all(classes):
        return [(uid, (syntax,)) for uid in sorted(classes) for syntax in AllTransferSyntaxes]
    # The PACS did not say what they are: it has to choose one transfer syntax for each class there is.
    return [(uid, AllTransferSyntaxes) for uid in scp.STORAGE[:_ROOM]]


def _identifier(study: str, series: str, uids: Sequence[str]) -> Dataset:
    """All of a series, or these instances of it."""
    query = Dataset()
    query.QueryRetrieveLevel = "IMAGE" if uids else "SERIES"
    query.StudyInstanceUID, query.SeriesInstanceUID = study, series
    if uids:
        query.SOPInstanceUID = list(uids)
    return query


def _batches(missing: Sequence[Instance], by_series: bool) -> Iterator[Sequence[str]]:
    if by_series:
        yield ()
        return
    for start in range(0, len(missing), _UIDS_AT_ONCE):
        yield [each.uid for each in missing[start : start + _UIDS_AT_ONCE]]


def _by_class(missing: Sequence[Instance]) -> list[list[Instance]]:
    """Groups of as many SOP classes as one association has room for."""
    classes = sorted({each.sop_class for each in missing})
    if not all(classes):
        return [list(missing)]
    room = _ROOM // len(AllTransferSyntaxes)
    return [
        [each for each in missing if each.sop_class in classes[start : start + room]]
        for start in range(0, len(classes), room)
    ]


def _text(row: Dataset, keyword: str) -> str:
    """A value as text, "" if there is none or it is not one."""
    try:
        value = row.get(keyword, "")
        return str(value).strip() if value else ""
    except Exception:  # pydicom decodes on access, and what a PACS sends can make it raise anything
        return ""


def _one_of(row: Dataset, keyword: str, wanted: Sequence[str]) -> bool:
    return not wanted or _text(row, keyword) in wanted
