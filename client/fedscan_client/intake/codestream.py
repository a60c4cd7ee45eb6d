"""What a compressed frame says about itself, read before a decoder sees it.

A decoder allocates what the stream claims, not what the DICOM header claims, so the two are compared first.
Sources: JPEG, ITU-T T.81 B.2; JPEG-LS, ITU-T T.87 C.2; JPEG 2000, ITU-T T.800 A.5.1.
"""

import struct
from dataclasses import dataclass
from typing import Literal

from fedscan_client.intake.records import Refused

# Frames of all JPEG processes, T.81 table B.1 (C4, C8 and CC are no frames), and JPEG-LS, T.87 table C.1.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7})
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length


@dataclass(frozen=True)
class Stream:
    """One compressed frame's own claims.

    Attributes:
        rows: of the frame.
        columns: of the frame.
        samples: per pixel.
        precision: bits of a sample.
        signed: JPEG 2000 only; the JPEG family knows no sign.
        colour: what three samples are, where the stream says so (JFIF, Adobe, component names); None: ask the header.
    """

    rows: int
    columns: int
    samples: int
    precision: int
    signed: bool = False
    colour: Literal["RGB", "YBR"] | None = None


def read(source: bytes) -> Stream:
    """The claims of a JPEG, JPEG-LS or JPEG 2000 frame.

    Raises:
        Refused: "pixels_undecodable", it is none of these, or ends within its header.
    """
    try:
        return _jpeg(source) if source.startswith(b"\xff\xd8") else _jpeg2000(source)
    except (struct.error, IndexError):
        raise Refused("pixels_undecodable") from None


def _jpeg(source: bytes) -> Stream:
    """Walks from marker to marker up to the frame header."""
    jfif, adobe, position = False, None, 2
    while True:
        while source[position] == 0xFF and source[position + 1] == 0xFF:  # fill bytes
            position += 1
        prefix, marker = source[position], source[position + 1]
        if prefix != 0xFF:
            raise Refused("pixels_undecodable")
        position += 2
        if marker in _ALONE:
            continue
        (length,) = struct.unpack_from(">H", source, position)
        body = source[position + 2 : position + length]
        if marker == 0xE0 and body.startswith(b"JFIF"):
            jfif = True
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        elif marker in _FRAMES:
            precision, rows, columns, samples = struct.unpack_from(">BHHB", body)
            names = bytes(body[6 + 3 * i] for i in range(samples))
            colour: Literal["RGB", "YBR"] | None = None
            if samples == 3:  # in the order in which libjpeg decides
                if jfif or adobe:
                    colour = "YBR"
                elif adobe == 0 or names.lower() == b"rgb":
                    colour = "RGB"
            return Stream(rows, columns, samples, precision, colour=colour)
        elif marker in (0xD9, 0xDA) or length < 2:
            raise Refused("pixels_undecodable")
        position += length


def _jpeg2000(source: bytes) -> Stream:
    """The SIZ segment, which is the first of a code stream; some writers put a JP2 file around it."""
    start = source.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start < 0:
        raise Refused("pixels_undecodable")
    width, height, left, top = struct.unpack_from(">4I", source, start + 8)
    (samples,) = struct.unpack_from(">H", source, start + 40)
    components = {source[start + 42 + 3 * i : start + 45 + 3 * i] for i in range(samples)}
    if len(components) != 1:
        raise Refused("pixels_undecodable")  # none, or of different kinds
    depth, *steps = components.pop()
    if steps != [1, 1]:
        raise Refused("pixels_undecodable")  # cut off, or subsampled
    return Stream(height - top, width - left, samples, (depth & 0x7F) + 1, signed=depth > 0x7F)
