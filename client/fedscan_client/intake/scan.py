"""The first pass of the intake: every object's header is read once, and says whose and which object it is.

No pixel is touched here, and nobody's consent is needed: what is kept is keyed HMACs, see `index`.
"""

from collections.abc import Callable, Iterable

from pydicom.dataset import Dataset

from fedscan_client.consent import Register
from fedscan_client.intake import deid, headers, read
from fedscan_client.intake.index import Header, Index
from fedscan_client.intake.records import REVIEW, Refused
from fedscan_client.intake.sources.found import Found
from fedscan_core.errors import DataError

_DIRECTORY = "1.2.840.10008.1.3.10"  # Media Storage Directory Storage: a DICOMDIR (PS3.3 F)
_VERSION = 1  # of what is read of a header: another number reads every header again


def scan(
    found: Iterable[Found],
    index: Index,
    *,
    key: bytes,
    issuer: str,
    register: Register,
    tell: Callable[[int], None],
) -> None:
    """Reads the header of every object that is new or changed.

    Args:
        found: the source's objects.
        index: the open index.
        key: the site's key for this project.
        issuer: who gave out the patient ids, where a header does not say.
        register: whose issuers it speaks of decides whether a patient can be told from another hospital's.
        tell: told how many objects were looked at.
    """
    for number, item in enumerate(found, 1):
        stamp = f"{_VERSION}:{register.issuer}:{item.stamp}"
        if not index.seen(item.locator, stamp):
            index.put(item.locator, stamp, _header(item, key, issuer, register))
        tell(number)


def name_of(ds: Dataset, key: bytes, issuer: str, register: Register) -> Header:
    """Whose and which object this is; `reason` says so where it is of a kind that is never accepted.

    Raises:
        Refused: the header does not say.
    """
    reason = review = ""
    who = deid.identity(ds, issuer)
    if not register.covers(who.issuer):
        raise Refused("patient_id")
    patient = deid.patient_name(key, who)
    study, series, instance = (
        deid.pseudonym(key, "uid", headers.identifier(ds, keyword))
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    )
    accession = headers.value(ds, "AccessionNumber")
    accession = accession.strip() if isinstance(accession, str) else ""
    try:
        deid.check_kind(ds)
    except Refused as refused:
        if refused.reason in REVIEW:
            review = refused.reason
        else:
            reason = refused.reason
    accession = deid.pseudonym(key, "accession", accession) if accession else ""
    return Header(reason, patient, study, series, instance, accession, review)


def _header(item: Found, key: bytes, issuer: str, register: Register) -> Header:
    try:
        with item.open() as stream:
            ds = read.header(stream, item.size)
        if headers.value(ds.file_meta, "MediaStorageSOPClassUID") == _DIRECTORY:
            return Header("catalogue")
        return name_of(ds, key, issuer, register)
    except Refused as refused:
        return Header(refused.reason)
    except (DataError, OSError):
        return Header("unreadable")
