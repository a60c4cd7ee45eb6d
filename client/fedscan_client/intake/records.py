"""What the intake hands on (one `Record` per image) and what it sets aside (`Refused`, counted).

A `Record` is the only form in which an image reaches training. It holds a pseudonym, never a
hospital number, and pixels scaled without looking at any other patient.

Shape letters: C channels, H rows, W columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fedscan_core.errors import DataError

SPLITS = ("train", "val", "test")

# Every reason for which one image is set aside. Words of ours only: header text never becomes a
# reason, because reasons are printed, logged and counted.
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "not_dicom": "the file is not DICOM or its header cannot be parsed",
        "bad_header": "an element that is needed holds something that is not allowed there",
        "patient_id": "the patient id is missing, has several values or unreadable letters",
        "uid_missing": "the study, series or instance UID is missing or is more than one value",
        "uid_on_two_patients": "its study, series or instance UID also belongs to another patient",
        "duplicate": "the same instance was already read from another file",
        "changed": "the file changed between the two readings",
        "sop_class": "the kind of object (SOP class) is not on the list of accepted images",
        "image_type": "the image is not ORIGINAL\\PRIMARY",
        "burned_in": "the header does not rule out text burned into the pixels",
        "recognizable": "the header says that the patient can be recognised in the pixels",
        "no_pixels": "it holds no pixel data",
        "colour": "it is not MONOCHROME1 or MONOCHROME2",
        "multi_frame": "it holds more than one frame",
        "bit_layout": "its bits allocated, bits stored and high bit do not fit together",
        "too_large": "it claims more pixels than are accepted",
        "pixels_undecodable": "its pixel data cannot be decoded",
        "not_finite": "its rescale or window values, or the pixels after them, are not finite",
    }
)


class Refused(DataError):
    """One image set aside, under a reason of `REASONS`."""

    def __init__(self, reason: str) -> None:
        """Takes a key of `REASONS`."""
        super().__init__(
            f"Image set aside: {REASONS[reason]}.",
            remedy="It is left out and counted; correct it at the source and ingest again.",
        )
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Record:
    """One image of one patient, ready for training.

    Attributes:
        patient: pseudonym, the same for all images of a patient at this site.
        label: the label as written in the hospital's table.
        split: train, val, test, or "" where the table leaves it to the site.
        sex: M, F, O, or "" where unknown.
        age: whole years, 90 for everybody older, None where unknown.
        group: further values to report fairness by, such as {"manufacturer": "GE"}.
        image: float32 [C, H, W] in [0, 1].
    """

    patient: str
    label: str
    split: str
    sex: str
    age: int | None
    group: Mapping[str, str]
    image: NDArray[np.float32]
