"""One series of one patient as volumes: sorted, checked, in the units of the modality, in the smallest exact type.

Memory: the stored slices are let go one by one while the volume is filled. An object of many frames is there twice
while its frames are taken out of it.

Source: PS3.3 C.11.1 (modality transformation), C.7.5.1.1.2 (padding).
"""

import mmap
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedscan_client.intake import geometry, headers, slices
from fedscan_client.intake.records import Refused, Volume
from fedscan_client.intake.slices import Slice
from fedscan_core.errors import DataError

MAX_VOXELS = 2**28  # of a series, for it is in memory as a whole: 1,024 slices of 512 x 512
_TYPES = (np.uint8, np.int16, np.uint16, np.int32)


def assemble(instances: Iterable[Dataset]) -> list[tuple[Volume, tuple[int, ...]]]:
    """Turns a series into volumes.

    Slices of one orientation, size and spacing form a volume, sorted along the slice normal; localisers and mixed
    series become several, and so do frames at one place that the header tells apart (acquisition, time, echo,
    b-value). A radiograph, or an object of several frames without a place, is a volume of its own. Values are rescaled
    slice by slice: whole numbers stay whole, in the smallest of uint8, int16, uint16 and int32 that holds them, all
    others become float32; colour stays 8- or 16-bit RGB. Padding takes the least value that was measured (the greatest
    where MONOCHROME1 shows that one black), so that it stretches nothing. Windows are those of the middle slice.

    Args:
        instances: de-identified, of one series of one patient; read once, in any order.

    Returns:
        Volumes, each with the numbers of the instances in it.

    Raises:
        Refused: geometry, too_large, bad_header, not_finite, colour, or whatever `decode.frames` refuses.
        DataError: two patients or two series came together.
    """
    found: list[Slice] = []
    voxels, identity, modality = 0, None, ""
    for number, ds in enumerate(instances):
        whose = headers.identifier(ds, "PatientID"), headers.identifier(ds, "SeriesInstanceUID")
        if identity not in (None, whose):
            raise DataError(
                "Images of two patients or of two series were to become one volume.",
                remedy="This is a fault of the program: report it. Nothing was kept.",
            )
        identity, modality = whose, str(headers.value(ds, "Modality") or "")
        for one in slices.of(ds, number):
            voxels += one.stored.size
            if voxels > MAX_VOXELS:
                raise Refused("too_large")
            found.append(replace(one, stored=_apart(one.stored)))
    stacks = geometry.stacks(found, modality)
    found.clear()
    out = []
    for stack in stacks:
        numbers = tuple(sorted({one.source for one in stack}))
        out.append((_volume(stack, modality), numbers))
    return out


def _apart(stored: NDArray[Any]) -> NDArray[Any]:
    """A copy that the system gets back when it is let go: from the heap it would not, and memory would be twice."""
    if stored.nbytes < 2**16:
        return stored.copy()
    copy = np.frombuffer(mmap.mmap(-1, stored.nbytes), stored.dtype).reshape(stored.shape)
    copy[:] = stored
    return copy


def _volume(stack: list[Slice], modality: str) -> Volume:
    """Fills one volume; empties the list while it does."""
    spacing, affine = geometry.place(stack)
    middle = stack[len(stack) // 2]
    table = middle.voi_lut
    return Volume(
        values=_colour(stack) if middle.stored.ndim == 3 else _grey(stack),
        modality=modality,
        spacing_mm=spacing,
        affine=affine,
        windows=middle.windows,
        voi_lut=None if table is None else (table[0], tuple(np.minimum(table[2] / (2 ** table[1] - 1), 1).tolist())),
        inverted=middle.inverted,
        unit=middle.unit,
    )


def _colour(stack: list[Slice]) -> NDArray[Any]:
    if stack[0].stored.dtype not in (np.uint8, np.uint16):
        raise Refused("colour")
    values = np.empty((len(stack), *stack[0].stored.shape), stack[0].stored.dtype)
    for z in reversed(range(len(stack))):
        values[z] = stack.pop().stored
    return values


def _grey(stack: list[Slice]) -> NDArray[Any]:
    ranges = [_range(one) for one in stack]
    measured = [(low, high) for low, high in ranges if low <= high] or [(0.0, 0.0)]
    low, high = min(low for low, _ in measured), max(high for _, high in measured)
    if not (abs(low) < np.finfo(np.float32).max and abs(high) < np.finfo(np.float32).max):
        raise Refused("not_finite")
    whole = all(_whole(one) for one in stack)
    dtype = next((t for t in _TYPES if whole and np.iinfo(t).min <= low and high <= np.iinfo(t).max), np.float32)
    black = high if stack[0].inverted else low
    values = np.empty((len(stack), *stack[0].stored.shape), dtype)
    for z in reversed(range(len(stack))):
        one = stack.pop()
        values[z] = _rescaled(one.stored, one)
        if one.padding is not None:
            values[z][_padded(one)] = black
    return values


def _whole(one: Slice) -> bool:
    return one.stored.dtype.kind in "iu" and (
        one.table is not None or (one.slope.is_integer() and one.intercept.is_integer())
    )


def _padded(one: Slice) -> NDArray[np.bool_]:
    assert one.padding is not None
    return np.asarray((one.stored >= one.padding[0]) & (one.stored <= one.padding[1]))


def _range(one: Slice) -> tuple[float, float]:
    """Least and greatest rescaled value that is no padding; (inf, -inf) where all is."""
    stored = one.stored if one.padding is None else one.stored[~_padded(one)]
    if not stored.size:
        return np.inf, -np.inf
    if one.table is not None:
        stored = _rescaled(stored, one)
        return float(stored.min()), float(stored.max())
    ends = _rescaled(np.array([stored.min(), stored.max()]), one)
    if not np.isfinite(ends).all():  # a NaN is both least and greatest
        raise Refused("not_finite")
    return float(ends.min()), float(ends.max())


def _rescaled(stored: NDArray[Any], one: Slice) -> NDArray[Any]:
    if one.table is not None:
        first, _, entries = one.table
        return entries[np.clip(stored.astype(np.int64) - first, 0, len(entries) - 1)]
    if one.slope == 1 and one.intercept == 0:
        return stored
    with np.errstate(over="ignore", invalid="ignore"):
        return stored * np.float64(one.slope) + one.intercept
