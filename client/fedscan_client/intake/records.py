"""What the rooms of the intake hand to one another: who a patient is, one image as the cache keeps it, and why not.

Shape letters: Z slices or frames, H rows, W columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from numpy.typing import NDArray

from fedscan_core.errors import DataError

SPLITS = ("train", "val", "test")

# Reasons that a person, or a rule of the site, may overrule: the image as such is sound.
REVIEW: Mapping[str, str] = MappingProxyType(
    {
        "kind": "images of this kind (SOP class) often have text in their pixels",
        "image_type": "the image is not ORIGINAL\\PRIMARY",
        "burned_in": "the header does not rule out text burned into the pixels",
        "recognizable": "the header says that the patient can be recognised in the pixels",
        "text_seen": "character recognition found something like text in the pixels",
    }
)

# Every reason for which something is set aside. Words of ours only: header text never becomes a reason, because
# reasons are printed, logged and counted.
REASONS: Mapping[str, str] = MappingProxyType(
    {
        **REVIEW,
        "not_dicom": "the file is not DICOM or its header cannot be parsed",
        "unreadable": "the file cannot be read, or is damaged",
        "catalogue": "it is a DICOMDIR: the list of a medium, not an image",
        "bad_header": "an element that is needed holds something that is not allowed there",
        "patient_id": "the patient id is missing, has several values or unreadable letters",
        "uid_missing": "the study, series or instance UID is missing or is more than one value",
        "uid_on_two_patients": "its study, series or instance UID also belongs to another patient",
        "duplicate": "the same instance was already read from another file",
        "changed": "the file changed between the two readings",
        "sop_class": "the kind of object (SOP class) is no image that is accepted",
        "no_pixels": "it holds no pixel data",
        "colour": "its photometric interpretation is not supported, or contradicts the pixels",
        "bit_layout": "its bits allocated, bits stored and high bit do not fit together",
        "too_large": "it claims more pixels or bytes than are accepted",
        "transfer_syntax": "no decoder for its compression is installed",
        "pixels_undecodable": "its pixel data cannot be decoded",
        "not_finite": "its rescale or window values, or the pixels after them, are not finite",
        "two_splits": "the label table puts its patient into two splits",
        "geometry": "the slices of its series do not form one regular stack",
    }
)


def what_to_do(reason: str) -> str:
    """The next step for a reason, as a sentence."""
    if reason in REVIEW:
        return "Look at it ('show'), then 'release', 'blackout' or 'reject' it, or write a rule for the device."
    if reason in ("not_dicom", "catalogue", "sop_class", "no_pixels", "duplicate"):
        return "Nothing to do: it is no image that can be used. 'reject' takes it off the list of what waits."
    if reason in ("transfer_syntax", "colour"):
        return "This version cannot use it. Send it uncompressed, or leave it out."
    return "Nobody can let it in: correct it at the source, then ingest again."


class Refused(DataError):
    """One instance or series set aside, under a reason of `REASONS`."""

    def __init__(self, reason: str) -> None:
        """Takes a key of `REASONS`."""
        super().__init__(
            f"Image set aside: {REASONS[reason]}.",
            remedy="It is left out and counted; correct it at the source and ingest again.",
        )
        self.reason = reason


@dataclass(frozen=True)
class PatientId:
    """A patient as the hospital names them (PS3.3 C.7.1.1): never stored, never logged, only its keyed HMAC is.

    Attributes:
        id: Patient ID (0010,0020), without spaces around it.
        issuer: Issuer of Patient ID (0010,0021), or the site's default issuer where the header names none.
    """

    id: str
    issuer: str = ""


@dataclass(frozen=True)
class Rectangle:
    """Pixels to black out in every frame: rows `top` to `bottom`, columns `left` to `right`, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class Window:
    """One VOI window (PS3.3 C.11.2), in the units of `Volume.values`."""

    center: float
    width: float
    function: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"] = "LINEAR"


@dataclass(frozen=True, eq=False)
class Volume:
    """One image as it is cached: a radiograph (Z = 1), a stack of slices, or the frames of a multi-frame object.

    Attributes:
        values: [Z, H, W] or [Z, H, W, 3] (RGB): whole numbers or float32, after the modality transformation (PS3.3
            C.11.1), before any window; slices sorted along the normal.
        modality: CR, DX, MG, CT, MR, PT, ...
        spacing_mm: distance of slices, rows and columns; None where the header does not give it.
        affine: 4 x 4, voxel (column, row, slice) to patient coordinates in mm (LPS, PS3.3 C.7.6.2.1.1), row by row;
            None for anything but a regular stack.
        windows: the header's windows, the first is the default one; empty: none usable.
        voi_lut: the header's first VOI LUT: first mapped value and the table scaled to [0, 1]; None: none.
        inverted: MONOCHROME1: low values are shown white.
        unit: what one step of `values` means: HU, BQML, ... or "" (PS3.3 C.11.1.1.2).
    """

    values: NDArray[Any]
    modality: str
    spacing_mm: tuple[float | None, float | None, float | None] = (None, None, None)
    affine: tuple[float, ...] | None = None
    windows: tuple[Window, ...] = ()
    voi_lut: tuple[int, tuple[float, ...]] | None = None
    inverted: bool = False
    unit: str = ""
