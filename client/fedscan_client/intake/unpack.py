"""Frames packed so simply that Python undoes it: RLE and deflate, each up to the size of a frame and no further.

Sources: PS3.5 Annex G (RLE lossless), A.4.13 (deflated image frames).
"""

import struct
import zlib
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.pixels.utils import unpack_bits

from fedscan_client.intake.layout import Layout
from fedscan_client.intake.records import Refused


def rle(source: bytes, shape: Layout) -> NDArray[Any]:
    """PS3.5 Annex G: one segment for each byte of each sample, most significant first."""
    width = max(1, shape.allocated // 8)
    size = shape.rows * shape.columns if shape.allocated > 1 else -(-shape.rows * shape.columns // 8)
    try:
        count, *offsets = struct.unpack_from("<16L", source)
    except struct.error:
        raise Refused("pixels_undecodable") from None
    if count != width * shape.samples:
        raise Refused("pixels_undecodable")
    planes = np.empty((shape.samples, size, width), "u1")
    for number, (start, end) in enumerate(pairwise([*offsets[:count], len(source)])):
        planes[number // width, :, width - 1 - number % width] = _packbits(source[start:end], size)
    if shape.allocated == 1:
        return _bitmap(planes.tobytes(), shape)
    values = planes.view(f"<u{width}").reshape(shape.samples, shape.rows, shape.columns)
    return values[0] if shape.samples == 1 else values.transpose(1, 2, 0)


def _packbits(segment: bytes, size: int) -> NDArray[np.uint8]:
    """Undoes PS3.5 G.3.2 up to `size` bytes, whatever follows."""
    out, position = bytearray(), 0
    try:
        while len(out) < size:
            length = segment[position]
            if length < 128:
                out += segment[position + 1 : position + 2 + length]
                position += 2 + length
            else:
                if length > 128:
                    out += segment[position + 1 : position + 2] * (257 - length)
                position += 2 if length > 128 else 1
    except IndexError:
        raise Refused("pixels_undecodable") from None
    return np.frombuffer(out, "u1", size)


def inflated(source: bytes, shape: Layout) -> NDArray[Any]:
    """PS3.5 A.4.13: a frame of one sample, as it is in native coding, through RFC 1951."""
    size = -(-prod((shape.rows, shape.columns, shape.samples, shape.allocated)) // 8)
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(source, size)
    except zlib.error:
        raise Refused("pixels_undecodable") from None
    if len(data) < size or shape.samples != 1:
        raise Refused("pixels_undecodable")
    if shape.allocated == 1:
        return _bitmap(data, shape)
    return np.frombuffer(data, shape.dtype.newbyteorder("<")).reshape(shape.rows, shape.columns)


def _bitmap(data: bytes, shape: Layout) -> NDArray[Any]:
    return np.asarray(unpack_bits(data))[: shape.rows * shape.columns].reshape(shape.rows, shape.columns)
