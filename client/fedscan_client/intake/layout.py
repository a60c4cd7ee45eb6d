"""What a header says of an instance's pixels, checked for sense and size before anything is allocated.

Source: PS3.3 C.7.6.3 (image pixel).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from fedscan_client.intake import headers
from fedscan_client.intake.records import Refused

MAX_FRAME = 2**26  # values of a frame: 67 million, more than any radiograph has
MAX_BYTES = 2**29  # of an instance, decoded: 2**28 values of 16 bits

_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


@dataclass(frozen=True)
class Layout:
    """What the header says of the pixels, checked for sense.

    Attributes:
        keyword: the element that holds them.
        frames: number of frames.
        rows: of a frame.
        columns: of a frame.
        samples: values of a pixel as stored, 1 or 3.
        photometric: photometric interpretation.
        allocated: bits of a value in memory: 1, 8, 16, 32, and 64 for real numbers.
        stored: bits of a value that count.
        signed: 1 where values are in two's complement.
    """

    keyword: str
    frames: int
    rows: int
    columns: int
    samples: int
    photometric: str
    allocated: int
    stored: int
    signed: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a decoded value before any palette."""
        kind = "f" if self.keyword != "PixelData" else "ui"[self.signed]
        return np.dtype(f"{kind}{max(1, self.allocated // 8)}")


def read(ds: Dataset) -> Layout:
    """Reads and checks the image pixel module (PS3.3 C.7.6.3).

    Raises:
        Refused: no_pixels, bad_header, bit_layout, colour or too_large.
    """
    found = [keyword for keyword in _KEYWORDS if keyword in ds]
    data = headers.value(ds, found[0]) if len(found) == 1 else None
    if not data:
        raise Refused("no_pixels")
    if not isinstance(data, bytes):  # its value representation lies
        raise Refused("bad_header")
    rows, columns, samples = (headers.count(ds, keyword) for keyword in ("Rows", "Columns", "SamplesPerPixel"))
    allocated = headers.count(ds, "BitsAllocated")
    frames = headers.value(ds, "NumberOfFrames")
    frames = 1 if frames in (None, "") else frames
    if not isinstance(frames, int) or frames < 1 or not rows or not columns:
        raise Refused("bad_header")
    photometric = headers.value(ds, "PhotometricInterpretation")
    if photometric not in {1: (*_GREY, "PALETTE COLOR"), 3: _COLOUR}.get(samples, ()):
        raise Refused("colour")
    if found[0] != "PixelData":
        if (found[0], allocated) not in (("FloatPixelData", 32), ("DoubleFloatPixelData", 64)) or samples != 1:
            raise Refused("bit_layout")
        stored, signed = allocated, 1
    else:
        stored, high, signed = (
            headers.count(ds, f"{name}") for name in ("BitsStored", "HighBit", "PixelRepresentation")
        )
        if (
            allocated not in (1, 8, 16, 32)
            or not 1 <= stored <= allocated
            or high != stored - 1
            or signed not in (0, 1)
        ):
            raise Refused("bit_layout")
        if photometric.startswith("YBR_FULL") and (stored != 8 or signed):
            raise Refused("colour")
    size = rows * columns * samples
    decoded = size * frames * max(1, allocated // 8) * (6 if photometric == "PALETTE COLOR" else 1)
    if size > MAX_FRAME or decoded > MAX_BYTES:
        raise Refused("too_large")
    return Layout(found[0], int(frames), rows, columns, samples, str(photometric), allocated, stored, signed)
