"""Which frames form one stack, in which order, and where it lies.

A stack is regular: one orientation, one size, one spacing, and every slice within a fifth of the slice distance of its
place on the line from the first to the last. (Scanners that write tenths of a millimetre put a slice of 0.6 mm up to
0.1 mm beside it; a missing slice moves another one by half the distance at least.) Slices lie along that line even
where it is not the normal (a tilted CT gantry); the distance is measured along the normal. Nothing is interpolated and
nothing is guessed: what is not regular is refused.

Source: PS3.3 C.7.6.2.1.1.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedscan_client.intake.records import Refused
from fedscan_client.intake.slices import MARKS, Plane, Slice

TOLERANCE = 0.2  # of the slice distance
_SAME_PLACE = 0.01  # mm: slices closer than this are at one place
_COSINE = 1e-3  # direction cosines, as they are rounded in headers
_MOST = 64  # stacks of a series
_PROJECTIONS = ("CR", "DX", "MG")
_TOMOGRAPHIC = ("CT", "MR", "PT")

Where = tuple[tuple[float | None, float | None, float | None], tuple[float, ...] | None]


def stacks(slices: Sequence[Slice], modality: str) -> list[list[Slice]]:
    """Frames in stacks, each sorted along the normal.

    Frames without a place form one stack for each instance, in their own order: radiographs, cine loops.

    Raises:
        Refused: "geometry".
    """
    placed: list[list[Slice]] = []
    instances: dict[int, list[Slice]] = {}
    for one in slices:
        if one.plane is None or modality in _PROJECTIONS:
            instances.setdefault(one.source, []).append(one)
            continue
        home = next((stack for stack in placed if _alike(stack[0], one)), None)
        if home is None:
            placed.append([one])
            if len(placed) > _MOST:
                raise Refused("geometry")
        else:
            home.append(one)
    if modality in _TOMOGRAPHIC and len(instances) > 1:
        raise Refused("geometry")  # slices of one body whose order is unknown
    if any(not _same_size(frames[0], one) for frames in instances.values() for one in frames):
        raise Refused("geometry")
    found = [part for stack in placed for part in _parts(stack)] + list(instances.values())
    return sorted(found, key=lambda stack: min(one.source for one in stack))


def place(stack: Sequence[Slice]) -> Where:
    """Spacing of slices, rows and columns in mm, and the affine of a stack; see `records.Volume`.

    Raises:
        Refused: "geometry", the slices are not evenly spaced.
    """
    first, rows_columns = stack[0], stack[0].spacing or (None, None)
    if first.plane is None or len(stack) < 2:
        return (None, *rows_columns), None
    at_Z3 = np.array([_plane(one).position for one in stack])
    step_3 = (at_Z3[-1] - at_Z3[0]) / (len(stack) - 1)
    distance = float(step_3 @ first.plane.normal)
    off_Z3 = at_Z3 - at_Z3[0] - np.arange(len(stack))[:, None] * step_3
    if not np.isfinite(distance) or np.linalg.norm(off_Z3, axis=1).max() > TOLERANCE * distance:
        raise Refused("geometry")
    if first.spacing is None:
        return (distance, None, None), None
    affine = np.eye(4)
    affine[:3, 0] = first.plane.along_row * first.spacing[1]
    affine[:3, 1] = first.plane.along_column * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step_3, at_Z3[0]
    return (distance, *first.spacing), tuple(float(number) for number in affine.ravel())


def _plane(one: Slice) -> Plane:
    assert one.plane is not None
    return one.plane


def _same_size(a: Slice, b: Slice) -> bool:
    return a.stored.shape == b.stored.shape and a.stored.dtype == b.stored.dtype


def _alike(a: Slice, b: Slice) -> bool:
    """Whether two frames can lie in one stack."""
    facts = [
        (one.stored.shape, one.inverted, one.unit, one.frame_of_reference, one.stored.dtype.kind == "f")
        for one in (a, b)
    ]
    if facts[0] != facts[1] or (a.spacing is None) != (b.spacing is None):
        return False
    axes = [np.concatenate([_plane(one).along_row, _plane(one).along_column]) for one in (a, b)]
    if np.abs(axes[0] - axes[1]).max() > _COSINE:
        return False
    return a.spacing is None or b.spacing is None or bool(np.allclose(a.spacing, b.spacing, rtol=1e-3, atol=0))


def _parts(stack: list[Slice]) -> list[list[Slice]]:
    """A stack sorted along its normal; where places repeat, one for each time, echo, ... that headers tell apart."""
    normal_3 = _plane(stack[0]).normal

    def depth(one: Slice) -> float:
        return float(_plane(one).position @ normal_3)

    def sorted_apart(slices: list[Slice]) -> NDArray[np.float64]:
        slices.sort(key=depth)
        return np.diff([depth(one) for one in slices])

    if (sorted_apart(stack) > _SAME_PLACE).all():
        return [stack]
    for marks in [*((mark,) for mark in MARKS), MARKS]:
        parts: dict[tuple[float, ...], list[Slice]] = {}
        for one in stack:
            parts.setdefault(tuple(one.marks.get(mark, -np.inf) for mark in marks), []).append(one)
        if len(parts) > 1 and all((sorted_apart(part) > _SAME_PLACE).all() for part in parts.values()):
            return [parts[key] for key in sorted(parts)]
    raise Refused("geometry")
