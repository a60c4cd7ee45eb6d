"""Pictures of what waits, for a person's eyes: made in memory, shown on the terminal, never written anywhere.

Reading a frame, laying rectangles over it and turning it into grey values for a screen. Two views: "linear" stretches
the frame from its darkest to its brightest value; "equal" equalises its histogram, so that faint text shows as well.
Neither is the view of the training, and both show every value that is there.

Shape letters: F frames, H rows, W columns.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from rich.color import Color
from rich.segment import Segment, Segments
from rich.style import Style

from fedscan_client.intake import blackout, decode, headers
from fedscan_client.intake.records import Rectangle

View = Literal["linear", "equal"]
_GAP = 2  # columns between two pictures on the terminal


@dataclass(frozen=True, eq=False)
class Picture:
    """One instance, decoded.

    Attributes:
        frames: stored values [F, H, W] or RGB [F, H, W, 3].
        inverted: low values are shown white.
        background: the value that is shown black, see `blackout.black`.
    """

    frames: NDArray[Any]
    inverted: bool
    background: int


def picture(ds: Dataset) -> Picture:
    """Decodes an instance; the only place here that does.

    Raises:
        Refused: see `decode.frames`.
    """
    return Picture(decode.frames(ds), headers.photometric(ds) == "MONOCHROME1", blackout.black(ds))


def shown(it: Picture, index: int, rectangles: Sequence[Rectangle] = (), view: View = "linear") -> NDArray[np.uint8]:
    """One frame as a screen shows it: uint8 [H, W] or [H, W, 3].

    With rectangles it is blacked out first, and stretched as the frame before that was, so that two pictures of one
    frame can be compared.

    Raises:
        DataError: a rectangle is not inside the frame.
    """
    before = it.frames[index]
    after = blackout.apply(it.frames[index : index + 1], rectangles, it.background)[0]
    unit: NDArray[np.float64]
    if view == "equal":
        unit = np.asarray(np.searchsorted(np.sort(before, axis=None), after, side="left") / before.size)
    else:
        low, high = float(before.min()), float(before.max())
        unit = (after.astype(np.float64) - low) / max(high - low, 1e-9)
    grey: NDArray[np.uint8] = (255 * np.clip(unit, 0, 1)).round().astype(np.uint8)
    return np.invert(grey) if it.inverted else grey


def png(image: NDArray[np.uint8]) -> bytes:
    """A shown frame as the bytes of a PNG, at full size."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def terminal(images: Sequence[NDArray[np.uint8]], columns: int, lines: int) -> tuple[Segments, float]:
    """Pictures side by side as coloured half blocks, two rows of pixels on each line.

    Args:
        images: of one size, uint8 [H, W] or [H, W, 3].
        columns: width of the terminal.
        lines: how many of its lines may be used.

    Returns:
        What rich prints, and how many pixels of the image one of the terminal stands for (by side); beyond 1, small
        text cannot be read.
    """
    height, width = images[0].shape[:2]
    room = max(1, (columns - _GAP * (len(images) - 1)) // len(images))
    scale = min(room / width, 2 * lines / height, 1.0)
    size = (max(1, int(width * scale)), max(2, int(height * scale) // 2 * 2))
    small = [np.asarray(Image.fromarray(it).convert("RGB").resize(size, Image.Resampling.BOX)) for it in images]
    segments = []
    for row in range(0, size[1], 2):
        for number, image in enumerate(small):
            segments += [Segment(" " * _GAP)] if number else []
            for upper, lower in zip(image[row].tolist(), image[row + 1].tolist(), strict=True):
                segments.append(Segment("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower))))
        segments.append(Segment.line())
    return Segments(segments), 1 / scale
