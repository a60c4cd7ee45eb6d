r"""Kinds of objects: which are accepted, which wait for a person, and which elements each one keeps.

Hospitals store radiographs, mammograms, CT, MR and PET without text in the pixels, so an original one is accepted at
once. Ultrasound, fluoroscopy, secondary captures, photographs and the like usually carry text: they need a rule of the
site or a person (`REVIEW`). Everything else is refused whatever anybody says: reports, documents, presentation
states, waveforms, radiotherapy, segmentations, raw data, video, whole slides (their label is a photograph of the
patient's name), private and unknown kinds.

SOP classes: PS3.4 Table B.5-1. Which modules each one has: PS3.3 Annex A.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID, AllTransferSyntaxes

from fedscan_client.intake import headers
from fedscan_client.intake.profile import Table
from fedscan_client.intake.profile_enhanced import ENHANCED
from fedscan_client.intake.profile_modules import MODULES
from fedscan_client.intake.records import Refused

# Every table by name; a table of items is found here.
TABLES: Mapping[str, Table] = MappingProxyType({**MODULES, **ENHANCED})

_GENERAL = "PATIENT STUDY SERIES EQUIPMENT IMAGE PIXELS GREY "


@dataclass(frozen=True)
class Kind:
    """One SOP class.

    Attributes:
        title: in words.
        table: every element that is kept of it.
        review: a rule of the site or a person must release it.
    """

    title: str
    table: Table
    review: bool


def _kind(title: str, modules: str, review: bool) -> Kind:
    """The elements of several modules; of an element that is in two, the later module's row holds."""
    rows = {row.tag: row for name in (_GENERAL + modules).split() for row in TABLES[name]}
    return Kind(title, tuple(rows[tag] for tag in sorted(rows)), review)


_STORAGE = "1.2.840.10008.5.1.4.1.1."

# SOP class after the common root | modules beside the general ones | title
_ACCEPTED = """
1       | PLANE PROJECTION             | Computed Radiography
1.1     | PLANE PROJECTION DX          | Digital X-Ray, for presentation
1.1.1   | PLANE PROJECTION DX          | Digital X-Ray, for processing
1.2     | PLANE PROJECTION DX MG       | Digital Mammography, for presentation
1.2.1   | PLANE PROJECTION DX MG       | Digital Mammography, for processing
2       | PLANE CT                     | CT
2.1     | ENHANCED ENHANCED_CT         | Enhanced CT
2.2     | ENHANCED ENHANCED_CT         | Legacy Converted Enhanced CT
4       | PLANE MR                     | MR
4.1     | ENHANCED ENHANCED_MR         | Enhanced MR
4.4     | ENHANCED ENHANCED_MR         | Legacy Converted Enhanced MR
128     | PLANE PT                     | PET
128.1   | ENHANCED ENHANCED_PT         | Legacy Converted Enhanced PET
130     | ENHANCED ENHANCED_PT         | Enhanced PET
"""
_REVIEW = """
1.3     | PLANE PROJECTION DX          | Intra-oral X-Ray, for presentation
1.3.1   | PLANE PROJECTION DX          | Intra-oral X-Ray, for processing
3       | PLANE CINE US                | Ultrasound Multi-frame (retired)
3.1     | PLANE CINE US                | Ultrasound Multi-frame
4.3     | ENHANCED ENHANCED_MR         | Enhanced MR Color
5       | PLANE CINE NM                | Nuclear Medicine (retired)
6       | PLANE CINE US                | Ultrasound (retired)
6.1     | PLANE CINE US                | Ultrasound
6.2     | ENHANCED US                  | Enhanced US Volume
7       | PLANE PROJECTION CINE SC     | Secondary Capture
7.1     | PLANE PROJECTION CINE SC     | Multi-frame Single Bit Secondary Capture
7.2     | PLANE PROJECTION CINE SC     | Multi-frame Grayscale Byte Secondary Capture
7.3     | PLANE PROJECTION CINE SC     | Multi-frame Grayscale Word Secondary Capture
7.4     | PLANE PROJECTION CINE SC     | Multi-frame True Color Secondary Capture
12.1    | PLANE PROJECTION CINE XA     | X-Ray Angiography
12.1.1  | PROJECTION ENHANCED          | Enhanced X-Ray Angiography
12.2    | PLANE PROJECTION CINE XA     | X-Ray Radiofluoroscopy
12.2.1  | PROJECTION ENHANCED          | Enhanced X-Ray Radiofluoroscopy
12.3    | PLANE PROJECTION CINE XA     | X-Ray Angiography Bi-plane (retired)
13.1.1  | ENHANCED                     | X-Ray 3D Angiography
13.1.2  | ENHANCED                     | X-Ray 3D Craniofacial
13.1.3  | ENHANCED                     | Breast Tomosynthesis
20      | PLANE CINE NM                | Nuclear Medicine
77.1.1  | PLANE CINE                   | Visible Light Endoscopy
77.1.2  | PLANE CINE                   | Visible Light Microscopy
77.1.4  | PLANE CINE                   | Visible Light Photography
77.1.5.1 | PLANE CINE                  | Ophthalmic Photography, 8 bit
77.1.5.2 | PLANE CINE                  | Ophthalmic Photography, 16 bit
77.1.5.4 | ENHANCED                    | Ophthalmic Tomography
77.1.7  | PLANE CINE                   | Dermoscopic Photography
"""


def _read(text: str, review: bool) -> dict[str, Kind]:
    rows = (map(str.strip, line.split("|")) for line in text.strip().splitlines())
    return {_STORAGE + sop_class: _kind(title, modules, review) for sop_class, modules, title in rows}


KINDS: Mapping[str, Kind] = MappingProxyType({**_read(_ACCEPTED, False), **_read(_REVIEW, True)})

_VIDEO = frozenset(
    str(uid) for uid in AllTransferSyntaxes if any(word in uid.name for word in ("MPEG", "HEVC", "SMPTE"))
)


def kind_of(ds: Dataset) -> Kind:
    """The kind of an object that may be accepted, at once or after a release.

    Raises:
        Refused: "sop_class": of no such kind, or a video.
    """
    found = headers.value(ds, "SOPClassUID")
    kind = KINDS.get(found) if isinstance(found, str) else None
    meta = getattr(ds, "file_meta", None)
    syntax = headers.value(meta, "TransferSyntaxUID") if isinstance(meta, Dataset) else None
    if kind is None or (isinstance(syntax, UID) and str(syntax) in _VIDEO):
        raise Refused("sop_class")
    return kind


def check_kind(ds: Dataset) -> None:
    r"""Refuses, by name, every object that could carry an identity in its pixels.

    Raises:
        Refused: "sop_class", which nobody may overrule; or a reason of `REVIEW`, which a rule of the site or a person
            may: the kind often has text in its pixels, ImageType is not ORIGINAL\PRIMARY, or the header says (or does
            not clearly deny) that text is burned in or that the patient is recognisable.
    """
    kind = kind_of(ds)
    # The gravest first: it is the one that a person who looks at the image is told.
    if headers.value(ds, "RecognizableVisualFeatures") not in (None, "", "NO"):
        raise Refused("recognizable")
    if headers.value(ds, "BurnedInAnnotation") not in (None, "", "NO"):
        raise Refused("burned_in")
    if kind.review:
        raise Refused("kind")
    image_type = headers.value(ds, "ImageType")
    if not isinstance(image_type, MultiValue) or list(image_type[:2]) != ["ORIGINAL", "PRIMARY"]:
        raise Refused("image_type")
