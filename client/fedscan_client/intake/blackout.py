"""Rectangles over pixels: what black is, blacking out, and the rest of a frame around what is kept.

Guarantee: after `apply` every pixel inside a rectangle holds one constant that does not depend on any pixel, in every
frame; every other pixel is as it was. Assumed: the frames are decoded and rewritten uncompressed afterwards, so that
nothing of the old stream remains.

Shape letters: F frames, H rows, W columns.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedscan_client.intake import headers
from fedscan_client.intake.records import Rectangle, Refused
from fedscan_core.errors import DataError


def black(ds: Dataset) -> int:
    """The stored value that is shown black: the end of what `BitsStored` can hold, from the header alone.

    The lowest value (0, or the most negative one where PixelRepresentation is signed); the highest one where low values
    are shown white: MONOCHROME1 (PS3.3 C.7.6.3.1.2), or a negative RescaleSlope. 0 for colour, which is decoded to RGB.
    A constant and no neighbour's value, so that a reviewer can look for it; a window stretched over the whole range of
    an image includes it.

    Raises:
        Refused: the bit layout is not in the header.
    """
    if headers.count(ds, "SamplesPerPixel") == 3 or headers.value(ds, "PhotometricInterpretation") == "PALETTE COLOR":
        return 0
    stored, signed = headers.count(ds, "BitsStored"), headers.count(ds, "PixelRepresentation")
    if not 1 <= stored <= 32 or signed not in (0, 1):
        raise Refused("bit_layout")
    low = -(1 << stored - 1) if signed else 0
    inverted = (headers.photometric(ds) == "MONOCHROME1") != ((headers.decimal(ds, "RescaleSlope") or 1.0) < 0)
    return low + (1 << stored) - 1 if inverted else low


def apply(frames: NDArray[Any], rectangles: Sequence[Rectangle], background: int) -> NDArray[Any]:
    """A copy of the frames with the rectangles set to `background`.

    Args:
        frames: stored values [F, H, W] or [F, H, W, 3].
        rectangles: inside the frame.
        background: see `black`.

    Raises:
        DataError: a rectangle is empty or goes beyond the frame: nothing is guessed about where text is.
    """
    check(rectangles, *frames.shape[1:3])
    out = frames.copy()
    for it in rectangles:
        out[:, it.top : it.bottom, it.left : it.right] = background
    return out


def check(rectangles: Sequence[Rectangle], rows: int, columns: int) -> None:
    """Raises DataError for a rectangle that is empty or not inside the frame."""
    for it in rectangles:
        if not (0 <= it.top < it.bottom <= rows and 0 <= it.left < it.right <= columns):
            sides = f"{it.top},{it.left},{it.bottom},{it.right}"
            raise DataError(
                f"The rectangle {sides} is not inside {rows} rows x {columns} columns.",
                remedy="Give TOP,LEFT,BOTTOM,RIGHT in pixels from 0; row BOTTOM and column RIGHT are not blacked out.",
            )


def outside(kept: Sequence[Rectangle], rows: int, columns: int) -> tuple[Rectangle, ...]:
    """Disjoint rectangles that cover exactly what none of `kept` covers; () where everything is kept."""
    check(kept, rows, columns)
    result: list[Rectangle] = []
    edges = sorted({0, rows, *(it.top for it in kept), *(it.bottom for it in kept)})
    for top, bottom in pairwise(edges):
        left = 0
        for it in sorted((it for it in kept if it.top <= top and bottom <= it.bottom), key=lambda it: it.left):
            if it.left > left:
                result.append(Rectangle(top, left, bottom, it.left))
            left = max(left, it.right)
        if left < columns:
            result.append(Rectangle(top, left, bottom, columns))
    return tuple(result)
