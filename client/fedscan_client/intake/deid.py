"""De-identification: a new dataset is built from the allow-list; the old one is never edited.

Guarantee: the result holds only elements that a table of `kinds.py` names for its SOP class, each made anew by
`actions.py` from a checked reading of its value; nothing else of the object passes. Private and unknown elements,
overlays, curves, icons, comments and descriptions of people, the 128 bytes before DICM and the file meta group do not
exist in it. Pixels are decoded and written again as plain numbers, so neither compressed streams (comments, EXIF) nor
unused bits (overlays) nor trailing bytes carry anything along. Fail closed: an image whose kind, type or header is not
known to be harmless is refused by name (`Refused`).

Assumed: the key stays secret (without it a seven-digit hospital number cannot be recomputed; unkeyed SHA-256 of all of
them takes seconds), and pixels of an accepted kind, or released by a person, show no text.

What it does not do: find text that a device burned into the pixels without saying so, or remove the face from a head
scan. A patient whose dates are known from elsewhere can be recognised by the intervals between them.

PS3.15 Annex E: Basic Profile with the options Clean Descriptors, Modified Dates, Retain Patient Characteristics and,
for a released image, Clean Pixel Data. Method codes: PS3.16 CID 7050.
"""

from collections.abc import Sequence
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, ExplicitVRLittleEndian

from fedscan_client.intake import actions, headers, kinds
from fedscan_client.intake import blackout as rectangles
from fedscan_client.intake.actions import pseudonym, pseudonymous_uid
from fedscan_client.intake.decode import frames
from fedscan_client.intake.kinds import check_kind
from fedscan_client.intake.profile import VERSION
from fedscan_client.intake.records import PatientId, Rectangle, Refused

__all__ = ["check_kind", "deidentify", "identity", "patient_name", "pseudonym", "pseudonymous_uid"]

_METHODS = (
    ("113100", "Basic Application Confidentiality Profile"),
    ("113105", "Clean Descriptors Option"),
    ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    ("113108", "Retain Patient Characteristics Option"),
)
_CLEAN_PIXELS = ("113101", "Clean Pixel Data Option")


def identity(ds: Dataset, default_issuer: str = "") -> PatientId:
    """The patient as the hospital names them; `default_issuer` stands in where the header names no issuer.

    Raises:
        Refused: "patient_id": no id, several, or letters that could not be decoded (two ids could look the same); or
            the issuer is named by its Qualifiers Sequence (0010,0024) only, whose ids must not be taken for ours.
    """
    patient = headers.identifier(ds, "PatientID")
    if headers.value(ds, "IssuerOfPatientID") in (None, ""):
        if _qualified(ds):
            raise Refused("patient_id")
        return PatientId(patient, default_issuer)
    return PatientId(patient, headers.identifier(ds, "IssuerOfPatientID"))


def patient_name(key: bytes, patient: PatientId) -> str:
    """The patient's pseudonym in a project: 32 hex digits; equal ids of two issuers are two patients.

    Ids that are canonically equivalent (Unicode Annex 15: one letter, or a letter and its accent) are one patient.
    """
    return pseudonym(key, "pid", normalize("NFC", f"{patient.issuer}\0{patient.id}"))


def _qualified(ds: Dataset) -> bool:
    """Whether an item of Issuer of Patient ID Qualifiers Sequence (PS3.3 C.7.1.1) holds any value."""
    items = headers.value(ds, "IssuerOfPatientIDQualifiersSequence") or ()
    try:
        with headers.quiet():
            return any(element.VR != "SQ" and not element.is_empty for item in items for element in item.iterall())
    except Exception:  # pydicom parses on access, and a damaged element can raise anything
        raise Refused("bad_header") from None


@headers.quiet()
def deidentify(
    ds: Dataset, key: bytes, *, issuer: str = "", blackout: Sequence[Rectangle] = (), released: bool = False
) -> Dataset:
    """Builds the de-identified image.

    Args:
        ds: a complete instance, as read from the file.
        key: the secret of this project at this site (`SiteKey.project`).
        issuer: of patient ids whose header names none.
        blackout: pixels that are made black in every frame.
        released: a rule of the site or a person has overruled the reasons of `REVIEW`.

    Returns:
        A new dataset with new file meta and a zero preamble: only elements of the kind's table, plus the declaration of
        what was done. The same input and key give the same bytes.

    Raises:
        Refused: the image is of a kind, or has a header or pixel data, that is not accepted.
    """
    kind = kinds.kind_of(ds)  # which nobody overrules
    if not released:
        check_kind(ds)
    patient = patient_name(key, identity(ds, issuer))
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        headers.identifier(ds, keyword)
    out = actions.apply(ds, kind.table, actions.secrets(key, patient))
    if out is None:
        raise Refused("bad_header")
    _mend(out, ds)
    pixels = frames(ds)
    if blackout:
        pixels = rectangles.apply(pixels, blackout, rectangles.black(ds))
    _write_pixels(out, ds, pixels)
    _declare(out, released or bool(blackout))
    out.preamble = b"\0" * 128
    out.file_meta = FileMetaDataset()
    out.file_meta.MediaStorageSOPClassUID = out.SOPClassUID
    out.file_meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID
    out.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    return out


def _mend(out: Dataset, ds: Dataset) -> None:
    """Two elements that depend on another one that may be gone."""
    pointers = out.get("FrameIncrementPointer")
    if pointers is not None and any(tag not in out for tag in np.atleast_1d(pointers).tolist()):
        del out.FrameIncrementPointer  # to a vector that this kind does not keep
    if "BodyPartExamined" in ds and not out.get("BodyPartExamined") and "ImageLaterality" not in out:
        out.Laterality = out.get("Laterality", "")  # type 2C unless the part is known not to be paired (C.7.3.1)


def _write_pixels(out: Dataset, ds: Dataset, pixels: NDArray[Any]) -> None:
    """The image pixel module (PS3.3 C.7.6.3) of plain numbers."""
    colour, stored = pixels.ndim == 4, headers.count(ds, "BitsStored")
    if headers.value(ds, "PhotometricInterpretation") == "PALETTE COLOR":
        # Many palettes of 16 bits hold 8; ultrasound allows no more (C.8.5.6), and no screen of colour shows more.
        pixels, stored = (pixels >> 8 if pixels.max() > 255 else pixels).astype(np.uint8), 8
    allocated = 8 * pixels.dtype.itemsize
    out.SamplesPerPixel = 3 if colour else 1
    out.PhotometricInterpretation = "RGB" if colour else str(headers.photometric(ds))
    if colour:
        out.PlanarConfiguration = 0
    if "NumberOfFrames" in ds or len(pixels) > 1:
        out.NumberOfFrames = len(pixels)
    out.Rows, out.Columns = pixels.shape[1:3]
    out.BitsAllocated, out.BitsStored, out.HighBit = allocated, stored, stored - 1
    out.PixelRepresentation = int(pixels.dtype.kind == "i")
    data = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<")).tobytes()
    out.add_new("PixelData", "OW", data + b"\0" if len(data) % 2 else data)


def _declare(out: Dataset, pixels_cleaned: bool) -> None:
    """What was done, and nothing that was not (PS3.15 E.1.1, PS3.3 C.7.1.1)."""
    methods = [*_METHODS, _CLEAN_PIXELS] if pixels_cleaned else _METHODS
    out.PatientIdentityRemoved = "YES"
    out.DeidentificationMethod = VERSION
    out.DeidentificationMethodCodeSequence = [actions.coded(code, "DCM", name) for code, name in sorted(methods)]
    out.LongitudinalTemporalInformationModified = "MODIFIED"
    if pixels_cleaned:
        out.BurnedInAnnotation = "NO"
