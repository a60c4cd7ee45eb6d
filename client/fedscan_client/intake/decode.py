"""Decoding the pixel data of a DICOM object to the numbers stored in it, and nothing but those.

Shape letters: F frames, H rows, W columns.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array

from fedscan_client.intake import headers
from fedscan_client.intake.records import Refused

MAX_PIXELS = 2**26  # 67 million in all frames
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def frames(ds: Dataset) -> NDArray[Any]:
    """Decodes every frame to whole numbers: [F, H, W], or [F, H, W, 3] for colour (RGB).

    Bits outside `BitsStored` are cleared (old overlays, with text, hide there), and what follows the last pixel is left
    behind.

    Raises:
        Refused: a bit layout that does not add up, a size beyond `MAX_PIXELS`, no pixel data, or pixel data that cannot
            be decoded.
    """
    if not headers.value(ds, "PixelData"):
        raise Refused("no_pixels")
    rows, columns = (headers.count(ds, keyword) for keyword in ("Rows", "Columns"))
    allocated, stored = (headers.count(ds, keyword) for keyword in ("BitsAllocated", "BitsStored"))
    high, signed = (headers.count(ds, keyword) for keyword in ("HighBit", "PixelRepresentation"))
    samples, declared = headers.count(ds, "SamplesPerPixel"), headers.value(ds, "NumberOfFrames")
    number = 1 if declared in (None, "") else declared
    photometric = headers.value(ds, "PhotometricInterpretation")
    palette = photometric == "PALETTE COLOR"
    if not isinstance(photometric, str) or samples != (3 if photometric in _COLOUR else 1):
        raise Refused("colour")
    if not palette and photometric not in _GREY + _COLOUR:
        raise Refused("colour")
    if allocated not in (8, 16) or not 1 <= stored <= allocated or high != stored - 1 or signed not in (0, 1):
        raise Refused("bit_layout")
    if not isinstance(number, int) or number < 1 or not rows * columns:
        raise Refused("bad_header")
    if rows * columns * number > MAX_PIXELS:
        raise Refused("too_large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote header values
            raw = np.asarray(pixel_array(ds))
            raw = apply_color_lut(raw, ds) if palette else raw
    except Exception:  # decoders raise many kinds on damaged data
        raise Refused("pixels_undecodable") from None
    shape = (number, rows, columns, 3)[: 4 if samples == 3 or palette else 3]
    if raw.size != np.prod(shape) or raw.dtype.kind not in "iu":
        raise Refused("pixels_undecodable")
    if palette:
        return raw.reshape(shape)
    # pydicom 3 clears the bits above the stored ones; an image for which it did not is not passed on.
    low = -(1 << stored - 1) if signed else 0
    if raw.min() < low or raw.max() >= low + (1 << stored):
        raise Refused("bit_layout")
    return raw.reshape(shape).astype(f"{'i' if signed else 'u'}{allocated // 8}", copy=False)
