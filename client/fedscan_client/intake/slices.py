"""What one frame brings to a volume: stored values, where it lies, and what its values mean.

A frame's facts stand in its instance, or, in an enhanced multi-frame object, in its own functional group or in the one
that all frames share (PS3.3 C.7.6.16).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedscan_client.intake import decode, headers, layout
from fedscan_client.intake.records import Refused, Window

# What tells frames at one place apart (PS3.3 C.7.6.17, C.8.3.1, C.8.13.5), in the order in which it is tried.
MARKS = (
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "EchoTime",
    "EffectiveEchoTime",
    "EchoNumbers",
    "DiffusionBValue",
    "InversionTime",
    "TriggerTime",
)
_GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "ImagePositionPatient": "PlanePositionSequence",
        "ImageOrientationPatient": "PlaneOrientationSequence",
        "PixelSpacing": "PixelMeasuresSequence",
        "RescaleSlope": "PixelValueTransformationSequence",
        "WindowCenter": "FrameVOILUTSequence",
        "TemporalPositionIndex": "FrameContentSequence",
        "EffectiveEchoTime": "MREchoSequence",
        "DiffusionBValue": "MRDiffusionSequence",
    }
)

Table = tuple[int, int, NDArray[Any]]  # first mapped value, bits of an entry, entries


@dataclass(frozen=True)
class Plane:
    """Where a frame lies (PS3.3 C.7.6.2.1.1): mm in patient coordinates, LPS."""

    position: NDArray[np.float64]
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector across the plane."""
        normal = np.cross(self.along_row, self.along_column)
        return np.asarray(normal / np.linalg.norm(normal))


@dataclass(frozen=True, eq=False)
class Slice:
    """One frame.

    Attributes:
        source: number of its instance.
        stored: [H, W] or [H, W, 3] stored values.
        spacing: distance of rows and of columns in mm; None where unknown.
        plane: None where the header does not say.
        frame_of_reference: positions of two of them have nothing to do with one another.
        slope: of the rescaling (PS3.3 C.11.1).
        intercept: of the rescaling.
        table: the modality LUT, instead of slope and intercept.
        unit: what a rescaled value means, "" where unknown.
        windows: usable ones, in rescaled units.
        voi_lut: the first VOI LUT.
        padding: stored values from the first to the second are no measurement (C.7.5.1.1.2).
        inverted: MONOCHROME1.
        marks: which of `MARKS` it has.
    """

    source: int
    stored: NDArray[Any]
    spacing: tuple[float, float] | None
    plane: Plane | None
    frame_of_reference: str
    slope: float
    intercept: float
    table: Table | None
    unit: str
    windows: tuple[Window, ...]
    voi_lut: Table | None
    padding: tuple[float, float] | None
    inverted: bool
    marks: Mapping[str, float]


def of(ds: Dataset, source: int) -> Iterator[Slice]:
    """The frames of one instance, decoded.

    Raises:
        Refused: see `decode.frames`; or bad_header, not_finite, geometry.
    """
    shape = layout.read(ds)
    shared = _items(ds, "SharedFunctionalGroupsSequence")[:1]
    own = _items(ds, "PerFrameFunctionalGroupsSequence")
    if own and len(own) != shape.frames:
        raise Refused("geometry")
    for number, stored in enumerate(decode.iterate(ds)):
        groups = [*own[number : number + 1], *shared]

        def where(keyword: str, groups: list[Dataset] = groups) -> Dataset:
            """The data set that holds an element for this frame."""
            places = [item for group in groups for item in _items(group, _GROUPS.get(keyword, ""))[:1]]
            return next((place for place in places if keyword in place), ds)

        slope = headers.decimal(where("RescaleSlope"), "RescaleSlope")
        intercept = headers.decimal(where("RescaleSlope"), "RescaleIntercept")
        if slope == 0:
            raise Refused("bad_header")
        marks = {mark: headers.decimal(where(mark), mark) for mark in MARKS}
        yield Slice(
            source=source,
            stored=stored,
            spacing=_spacing(where("PixelSpacing")),
            plane=_plane(where("ImagePositionPatient"), where("ImageOrientationPatient")),
            frame_of_reference=str(headers.value(ds, "FrameOfReferenceUID") or ""),
            slope=1.0 if slope is None else slope,
            intercept=intercept or 0.0,
            table=_table(ds, "ModalityLUTSequence") if stored.ndim == 2 else None,
            unit=_unit(ds, where("RescaleSlope")),
            windows=_windows(where("WindowCenter")),
            voi_lut=_table(ds, "VOILUTSequence") if stored.ndim == 2 else None,
            padding=_padding(ds),
            inverted=shape.photometric == "MONOCHROME1",
            marks={mark: found for mark, found in marks.items() if found is not None},
        )


def _items(ds: Dataset, keyword: str) -> list[Dataset]:
    found = headers.value(ds, keyword) if keyword else None
    if found is not None and not (hasattr(found, "__iter__") and all(isinstance(item, Dataset) for item in found)):
        raise Refused("bad_header")
    return list(found or [])


def _spacing(ds: Dataset) -> tuple[float, float] | None:
    found = headers.decimals(ds, "PixelSpacing") or headers.decimals(ds, "ImagerPixelSpacing")
    return (found[0], found[1]) if len(found) == 2 and min(found) > 0 else None


def _plane(position: Dataset, orientation: Dataset) -> Plane | None:
    at = headers.decimals(position, "ImagePositionPatient")
    axes = np.array(headers.decimals(orientation, "ImageOrientationPatient"))
    if not at or not len(axes):
        return None
    if len(at) != 3 or len(axes) != 6:
        raise Refused("bad_header")
    along_row, along_column = axes[:3], axes[3:]
    products = [along_row @ along_row - 1, along_column @ along_column - 1, along_row @ along_column]
    if np.abs(products).max() > 0.01:  # written with few digits, they are not exactly orthonormal
        raise Refused("geometry")
    return Plane(np.array(at), along_row, along_column)


def _unit(ds: Dataset, rescale: Dataset) -> str:
    """Rescale Type, or Units of PET; CT without either is in Hounsfield units (PS3.3 C.8.2.1.1.2)."""
    found = str(headers.value(rescale, "RescaleType") or headers.value(ds, "Units") or "")
    if not found and "RescaleIntercept" in rescale and headers.value(ds, "Modality") == "CT":
        return "HU"
    return found if re.fullmatch(r"[A-Z0-9_]{1,16}", found) and found != "US" else ""  # US: unspecified


def _windows(ds: Dataset) -> tuple[Window, ...]:
    """The windows that can be applied (PS3.3 C.11.2.1.2)."""
    declared = headers.value(ds, "VOILUTFunction")
    function: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"] = (
        declared if declared in ("SIGMOID", "LINEAR_EXACT") else "LINEAR"
    )
    pairs = zip(headers.decimals(ds, "WindowCenter"), headers.decimals(ds, "WindowWidth"), strict=False)
    least = 1.0 if function == "LINEAR" else 0.0
    return tuple(Window(center, width, function) for center, width in pairs if width > 0 and width >= least)


def _padding(ds: Dataset) -> tuple[float, float] | None:
    first = headers.decimal(ds, "PixelPaddingValue")
    if first is None:
        return None
    last = headers.decimal(ds, "PixelPaddingRangeLimit")
    return (first, first) if last is None else (min(first, last), max(first, last))


def _table(ds: Dataset, keyword: str) -> Table | None:
    """The first look-up table of a sequence (PS3.3 C.11.1.1 and C.11.2.1.1)."""
    item = next(iter(_items(ds, keyword)), None)
    if item is None:
        return None
    descriptor = headers.decimals(item, "LUTDescriptor")
    data = headers.value(item, "LUTData")
    if len(descriptor) != 3 or not data:
        raise Refused("bad_header")
    count, first, bits = (int(number) for number in descriptor)
    count = count or 2**16
    try:
        if isinstance(data, bytes):
            entries = np.frombuffer(data, "u1" if bits <= 8 and len(data) < 2 * count else "<u2")[:count]
        else:
            entries = np.array(data, "u2")[:count]
    except (ValueError, TypeError, OverflowError):
        raise Refused("bad_header") from None
    if not 0 < len(entries) == count <= 2**16 or not 8 <= bits <= 16:
        raise Refused("bad_header")
    return first, bits, entries
