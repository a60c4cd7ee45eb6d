"""A cached volume as a network sees it: windowed to [0, 1], each slice resized.

Source: PS3.3 C.11.2 (VOI LUT and window), C.7.6.3.1.2 (MONOCHROME1 is shown inverted).
Shape letters: Z slices, C channels, H rows, W columns.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedscan_client.intake import pictures
from fedscan_client.intake.records import Volume, Window

Choice = Literal["header", "full"] | tuple[float, float]


def render(
    volume: Volume, *, window: Choice, size: tuple[int, int], channels: pictures.Channels
) -> NDArray[np.float32]:
    """Renders every slice.

    Args:
        volume: as cached. Grey: its values go through the window, and MONOCHROME1 is inverted. Colour: its values are
            divided by the greatest of their type.
        window: "header": the header's VOI LUT, else its first window, else as "full"; "full": from the volume's least
            value to its greatest (nobody else's), a constant one is black; (center, width): in the volume's units,
            LINEAR, width at least 1.
        size: rows and columns of the result; aspect ratio is kept, see `pictures.fit`.
        channels: 1 (colour becomes grey by luma) or 3 (grey is repeated).

    Returns:
        float32 [Z, channels, rows, columns] in [0, 1].

    Raises:
        ValueError: a window narrower than 1.
    """
    if isinstance(window, tuple) and not window[1] >= 1:
        raise ValueError("a LINEAR window is at least 1 wide (PS3.3 C.11.2.1.2)")
    out = np.empty((len(volume.values), channels, *size), np.float32)
    colour = volume.values.ndim == 4
    table = np.asarray(volume.voi_lut[1]) if volume.voi_lut is not None else None
    limits = (0.0, 0.0) if colour else (float(volume.values.min()), float(volume.values.max()))
    for x, values in zip(out, volume.values, strict=True):
        if colour:
            y_CHW = values.transpose(2, 0, 1).astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
        else:
            y_HW = _grey(values, volume, window, limits, table)
            y_CHW = (1 - y_HW if volume.inverted else y_HW).astype(np.float32)[None]
        x[:] = pictures.finish(np.ascontiguousarray(y_CHW), size, channels)
    return out


def _grey(
    values: NDArray[Any],
    volume: Volume,
    choice: Choice,
    limits: tuple[float, float],
    table: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    x_HW = values.astype(np.float64)
    if isinstance(choice, tuple):
        return apply(x_HW, Window(*choice))
    if choice == "header" and table is not None and volume.voi_lut is not None:
        return np.asarray(table[np.clip(np.floor(x_HW) - volume.voi_lut[0], 0, len(table) - 1).astype(np.int64)])
    if choice == "header" and volume.windows:
        return apply(x_HW, volume.windows[0])
    low, span = limits[0] / 2, limits[1] / 2 - limits[0] / 2  # halves: the range of two huge numbers would overflow
    return (x_HW / 2 - low) / span if span > 0 else np.zeros_like(x_HW)


def apply(x_HW: NDArray[np.float64], window: Window) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, to [0, 1]; the window can be applied (LINEAR: at least 1 wide)."""
    center, width = window.center, window.width
    with np.errstate(over="ignore"):
        if window.function == "SIGMOID":
            y_HW = 1 / (1 + np.exp(-4 * (x_HW - center) / width))
        elif window.function == "LINEAR_EXACT":
            y_HW = (x_HW - center) / width + 0.5
        elif width == 1:
            y_HW = (x_HW > center - 0.5).astype(np.float64)
        else:
            y_HW = (x_HW - (center - 0.5)) / (width - 1) + 0.5
    return np.clip(y_HW, 0, 1)
