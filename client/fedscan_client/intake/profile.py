"""De-identification as data: the few DICOM elements that are kept, and what is done to each.

An allow-list, not a deny-list: what is not named here does not exist in the result, so a private
tag, a nested sequence, an overlay or an element added to the standard next year cannot pass. The
deny-list of PS3.15 Table E.1-1 alone lets through elements that it does not name (RetrieveURL,
SoftwareVersions, overlay descriptions). Values are checked as well, because a code string can hold
a name.

References are to the DICOM standard, PS3.3 (modules) and PS3.15 (Table E.1-1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

VERSION = "fedscan allow-list 1"

Action = Literal["empty", "uid", "pid", "code", "age", "maker", "count", "decimal", "constant", "pixels"]


@dataclass(frozen=True)
class Element:
    """One kept element.

    Attributes:
        tag: (group,element) in hex, as printed in the standard.
        keyword: the standard's keyword.
        action: empty (present without value), uid and pid (keyed pseudonym), code (only a value of
            `CODES`), age (whole years, at most 90), maker (only a name of `MAKERS`), count (whole
            number 0 to 65535), decimal (first value, finite), constant (a value of ours), pixels
            (decoded and written again, so that nothing but grey values passes).
        reference: where the standard defines it and what Table E.1-1 asks for.
    """

    tag: str
    keyword: str
    action: Action
    reference: str


PROFILE: tuple[Element, ...] = (
    Element("(0008,0008)", "ImageType", "constant", "PS3.3 C.7.6.1; only ORIGINAL\\PRIMARY is accepted"),
    Element("(0008,0016)", "SOPClassUID", "code", "PS3.3 C.12.1"),
    Element("(0008,0018)", "SOPInstanceUID", "uid", "PS3.15 E.1-1: U"),
    Element("(0008,0020)", "StudyDate", "empty", "PS3.15 E.1-1: Z; type 2"),
    Element("(0008,0030)", "StudyTime", "empty", "PS3.15 E.1-1: Z; type 2"),
    Element("(0008,0050)", "AccessionNumber", "empty", "PS3.15 E.1-1: Z; type 2"),
    Element("(0008,0060)", "Modality", "code", "PS3.3 C.7.3.1"),
    Element("(0008,0070)", "Manufacturer", "maker", "PS3.3 C.7.5.1; free text, so only known names"),
    Element("(0008,0090)", "ReferringPhysicianName", "empty", "PS3.15 E.1-1: Z; type 2"),
    Element("(0010,0010)", "PatientName", "empty", "PS3.15 E.1-1: Z; type 2"),
    Element("(0010,0020)", "PatientID", "pid", "PS3.15 E.1-1: Z; replaced by the pseudonym"),
    Element("(0010,0030)", "PatientBirthDate", "empty", "PS3.15 E.1-1: Z; type 2"),
    Element("(0010,0040)", "PatientSex", "code", "PS3.15 E.1-1: retain patient characteristics"),
    Element("(0010,1010)", "PatientAge", "age", "PS3.15 E.1-1: retain patient characteristics"),
    Element("(0018,0015)", "BodyPartExamined", "code", "PS3.3 C.7.3.1, PS3.16 Annex L"),
    Element("(0020,000D)", "StudyInstanceUID", "uid", "PS3.15 E.1-1: U"),
    Element("(0020,000E)", "SeriesInstanceUID", "uid", "PS3.15 E.1-1: U"),
    Element("(0020,0010)", "StudyID", "empty", "PS3.15 E.1-1: Z; type 2"),
    Element("(0020,0011)", "SeriesNumber", "empty", "PS3.3 C.7.3.1; type 2"),
    Element("(0020,0013)", "InstanceNumber", "empty", "PS3.3 C.7.6.1; type 2"),
    Element("(0028,0002)", "SamplesPerPixel", "count", "PS3.3 C.7.6.3"),
    Element("(0028,0004)", "PhotometricInterpretation", "code", "PS3.3 C.7.6.3"),
    Element("(0028,0010)", "Rows", "count", "PS3.3 C.7.6.3"),
    Element("(0028,0011)", "Columns", "count", "PS3.3 C.7.6.3"),
    Element("(0028,0100)", "BitsAllocated", "count", "PS3.3 C.7.6.3"),
    Element("(0028,0101)", "BitsStored", "count", "PS3.3 C.7.6.3"),
    Element("(0028,0102)", "HighBit", "count", "PS3.3 C.7.6.3"),
    Element("(0028,0103)", "PixelRepresentation", "count", "PS3.3 C.7.6.3"),
    Element(
        "(0028,0301)",
        "BurnedInAnnotation",
        "code",
        "PS3.3 C.7.6.1; NO is kept, never written by us",
    ),
    Element("(0028,1050)", "WindowCenter", "decimal", "PS3.3 C.11.2"),
    Element("(0028,1051)", "WindowWidth", "decimal", "PS3.3 C.11.2"),
    Element("(0028,1052)", "RescaleIntercept", "decimal", "PS3.3 C.11.1"),
    Element("(0028,1053)", "RescaleSlope", "decimal", "PS3.3 C.11.1"),
    Element("(0028,1056)", "VOILUTFunction", "code", "PS3.3 C.11.2"),
    Element("(7FE0,0010)", "PixelData", "pixels", "PS3.3 C.7.6.3"),
)

# Kinds of image that hospitals store without burned-in text. Secondary capture, ultrasound,
# angiography, reports, encapsulated documents and presentation states wait for a person's review,
# so are refused.
SOP_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "1.2.840.10008.5.1.4.1.1.1": "Computed Radiography",
        "1.2.840.10008.5.1.4.1.1.1.1": "Digital X-Ray, for presentation",
        "1.2.840.10008.5.1.4.1.1.1.1.1": "Digital X-Ray, for processing",
        "1.2.840.10008.5.1.4.1.1.1.2": "Digital Mammography, for presentation",
        "1.2.840.10008.5.1.4.1.1.1.2.1": "Digital Mammography, for processing",
        "1.2.840.10008.5.1.4.1.1.2": "CT",
        "1.2.840.10008.5.1.4.1.1.4": "MR",
        "1.2.840.10008.5.1.4.1.1.128": "PET",
    }
)

# The commonest of PS3.16 Annex L.
_BODY_PARTS = frozenset(
    {
        "ABDOMEN",
        "BRAIN",
        "BREAST",
        "CHEST",
        "HAND",
        "HEAD",
        "HEART",
        "HIP",
        "KNEE",
        "LIVER",
        "LUNG",
        "NECK",
        "PELVIS",
        "PROSTATE",
        "SKULL",
        "SPINE",
        "THORAX",
    }
)

# A code that is not in its set is dropped (or the image is refused where the code is essential).
CODES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "SOPClassUID": frozenset(SOP_CLASSES),
        "Modality": frozenset({"CR", "DX", "MG", "CT", "MR", "PT"}),
        "PatientSex": frozenset({"M", "F", "O"}),
        "BodyPartExamined": _BODY_PARTS,
        "PhotometricInterpretation": frozenset({"MONOCHROME1", "MONOCHROME2"}),
        "BurnedInAnnotation": frozenset({"NO"}),
        "VOILUTFunction": frozenset({"LINEAR", "LINEAR_EXACT", "SIGMOID"}),
    }
)

# Word in the header (lower case) -> name that is kept. Any other maker becomes "other".
# The last two are the pretend makers of the phantom hospitals.
MAKERS: Mapping[str, str] = MappingProxyType(
    {
        "agfa": "Agfa",
        "canon": "Canon",
        "carestream": "Carestream",
        "fujifilm": "Fujifilm",
        "ge": "GE",
        "hologic": "Hologic",
        "kodak": "Kodak",
        "konica": "Konica",
        "philips": "Philips",
        "samsung": "Samsung",
        "shimadzu": "Shimadzu",
        "siemens": "Siemens",
        "toshiba": "Toshiba",
        "acme": "Acme",
        "borealis": "Borealis",
    }
)
