"""Stored pixel values of one DICOM instance, whatever its coding, at a cost that its header cannot raise.

Every claim is compared with the bytes that are there before anything is allocated, and a compressed frame's own header
with the instance's. Compressed frames are decoded in a child process (`decoders`). What comes back has the claimed
shape and type, nothing outside BitsStored (old overlays, with text, hide there), and nothing of what follows the last
pixel.

Sources: PS3.3 C.7.6.3 (image pixel), PS3.5 A.4 and Annex G (encapsulation, RLE).
Shape letters: F frames, H rows, W columns.
"""

import struct
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, convert_color_space

from fedscan_client.intake import codestream, decoders, headers, layout, unpack
from fedscan_client.intake.layout import Layout
from fedscan_client.intake.records import Refused

_NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
_DEFLATED_FRAMES = uid.UID("1.2.840.10008.1.2.8.1")  # PS3.5 A.4.13
_CODECS: Mapping[str, str] = MappingProxyType(
    {
        uid.JPEG2000Lossless: "openjpeg",
        uid.JPEG2000: "openjpeg",
        uid.HTJ2KLossless: "openjpeg",
        uid.HTJ2KLosslessRPCL: "openjpeg",
        uid.HTJ2K: "openjpeg",
        uid.JPEGLSLossless: "pyjpegls",
        uid.JPEGLSNearLossless: "pyjpegls",
        uid.JPEGLossless: "gdcm",
        uid.JPEGLosslessSV1: "gdcm",
        uid.JPEGBaseline8Bit: "pillow",
        uid.JPEGExtended12Bit: "pillow",  # gdcm where it has more than 8 bits
    }
)


def frames(ds: Dataset) -> NDArray[Any]:
    """All frames of an instance.

    Args:
        ds: an instance with its file meta group, pixels still coded.

    Returns:
        [F, H, W], or [F, H, W, 3] in RGB: stored values, before any rescaling, in the machine's byte order; whole
        numbers of the allocated width, or real numbers where the pixels are. Palettes are applied (8 or 16 bits).

    Raises:
        Refused: see `layout.read`; or transfer_syntax, pixels_undecodable, bit_layout.
    """
    shape = layout.read(ds)
    if shape.frames == 1:
        return next(iterate(ds))[None]
    out: NDArray[Any] | None = None
    for number, frame in enumerate(iterate(ds)):
        if out is None:
            out = np.empty((shape.frames, *frame.shape), frame.dtype)
        out[number] = frame
    assert out is not None
    return out


def iterate(ds: Dataset) -> Iterator[NDArray[Any]]:
    """The frames of an instance one by one, [H, W] or [H, W, 3]; some may be read-only views of the pixel data.

    Raises:
        Refused: as `frames`, when the frame that is wrong is reached.
    """
    shape = layout.read(ds)
    syntax = getattr(getattr(ds, "file_meta", None), "TransferSyntaxUID", None)
    if syntax in _NATIVE:
        coded = _native(ds, shape, syntax)
    elif syntax is not None and (syntax in _CODECS or syntax in (uid.RLELossless, _DEFLATED_FRAMES)):
        coded = (_unpacked(source, shape, syntax) for source in _encapsulated(ds, shape))
    else:
        raise Refused("transfer_syntax")
    count = 0
    for frame, colour in coded:
        count += 1
        yield _finished(frame, colour, ds, shape)
    if count != shape.frames:
        raise Refused("pixels_undecodable")


Colour = Literal["RGB", "YBR"] | None
Coded = tuple[NDArray[Any], Colour]  # a frame, and what its three samples are


def _native(ds: Dataset, shape: Layout, syntax: str) -> Iterator[Coded]:
    bits = prod((shape.frames, shape.rows, shape.columns, shape.samples, shape.allocated))
    if shape.photometric == "YBR_FULL_422":
        bits = bits // 3 * 2
    if len(headers.value(ds, shape.keyword)) * 8 < bits:
        raise Refused("pixels_undecodable")
    options: dict[str, Any] = {"raw": True, "view_only": True, "correct_unused_bits": False}
    for number in range(shape.frames):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they quote header values
                pixels, _ = get_decoder(uid.UID(syntax)).as_array(ds, index=number, **options)
        except Exception:  # pydicom raises many kinds on headers that contradict themselves
            raise Refused("pixels_undecodable") from None
        yield pixels, "YBR" if shape.photometric.startswith("YBR") else "RGB"


def _encapsulated(ds: Dataset, shape: Layout) -> Iterator[bytes]:
    """The code stream of each frame; of those beyond NumberOfFrames none."""
    data = headers.value(ds, "PixelData")
    offsets = headers.value(ds, "ExtendedOffsetTable"), headers.value(ds, "ExtendedOffsetTableLengths")
    # No coding makes a frame twice as large as it is.
    largest = 2 * shape.rows * shape.columns * shape.samples * max(1, shape.allocated // 8) + 2**16
    try:
        if all(offsets):
            lengths = struct.unpack(f"<{len(offsets[1]) // 8}Q", offsets[1])
            if sum(lengths) > len(data):
                raise Refused("pixels_undecodable")
        sources = generate_frames(
            data, number_of_frames=shape.frames, extended_offsets=offsets if all(offsets) else None
        )
        for source in islice(sources, shape.frames):
            if not 0 < len(source) <= largest:
                raise Refused("pixels_undecodable")
            yield source
    except Refused:
        raise
    except Exception:  # pydicom raises many kinds on damaged data
        raise Refused("pixels_undecodable") from None


def _unpacked(source: bytes, shape: Layout, syntax: str) -> Coded:
    """One compressed frame as whole numbers of its own width."""
    colour: Colour = "YBR" if shape.photometric.startswith("YBR_FULL") else "RGB"
    if syntax == uid.RLELossless:
        return unpack.rle(source, shape), colour
    if syntax == _DEFLATED_FRAMES:
        return unpack.inflated(source, shape), colour
    stream = codestream.read(source)
    if (stream.rows, stream.columns, stream.samples) != (shape.rows, shape.columns, shape.samples):
        raise Refused("pixels_undecodable")
    codec = _CODECS[syntax]
    if codec == "pillow" and stream.precision > 8:
        codec = "gdcm"
    if stream.precision > shape.allocated or (codec == "pillow" and stream.precision != 8):
        raise Refused("pixels_undecodable")
    if stream.colour and syntax not in (uid.JPEGLSLossless, uid.JPEGLSNearLossless):
        colour = stream.colour
    job = decoders.Job(
        shape.rows, shape.columns, shape.samples, shape.allocated, shape.stored, shape.signed, stream.colour == "RGB"
    )
    try:
        pixels = decoders.decode(codec, source, job)
    except Refused:
        if codec != "pyjpegls":
            raise
        pixels = decoders.decode("gdcm-jpegls", source, job)  # it takes preset parameters that CharLS does not
    # A stream that knows no sign, or another one than the header, holds two's complement of its own precision.
    if shape.signed and codec in ("openjpeg", "pyjpegls") and not stream.signed:
        pixels = _bits(pixels, stream.precision, shape.dtype)
    return pixels, colour


def _bits(pixels: NDArray[Any], bits: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The lowest bits of each value, as a signed or unsigned number of that width."""
    shift = 8 * dtype.itemsize - bits
    values = pixels.astype(dtype, copy=True)
    if shift:
        np.left_shift(values, shift, out=values)
        np.right_shift(values, shift, out=values)
    return values


def _finished(pixels: NDArray[Any], colour: Colour, ds: Dataset, shape: Layout) -> NDArray[Any]:
    """Bits outside the stored ones cleared, colour in RGB, and checked to be what was claimed."""
    wanted = (shape.rows, shape.columns) if shape.samples == 1 else (shape.rows, shape.columns, 3)
    if pixels.shape != wanted or pixels.dtype.kind not in ("f" if shape.dtype.kind == "f" else "iu"):
        raise Refused("pixels_undecodable")
    native = shape.dtype.newbyteorder("=")
    if shape.dtype.kind == "f" or (shape.stored == 8 * native.itemsize and pixels.dtype == native):
        values = pixels.astype(native, copy=False)
    else:
        values = _bits(pixels, shape.stored if shape.allocated > 1 else 8, native)
    if shape.samples == 3 and colour == "YBR":
        if shape.stored != 8 or shape.signed or shape.allocated != 8:
            raise Refused("colour")
        values = np.asarray(convert_color_space(values, "YBR_FULL", "RGB"))
    if shape.photometric == "PALETTE COLOR":
        values = _painted(values, ds)
    return values


def _painted(values: NDArray[Any], ds: Dataset) -> NDArray[Any]:
    """PS3.3 C.7.9: palette indices to RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_palette(ds)
            painted = np.asarray(apply_color_lut(values, ds))[..., :3]
    except Exception:  # pydicom raises many kinds on palettes that contradict themselves
        raise Refused("colour") from None
    if painted.shape != (*values.shape, 3) or painted.dtype not in (np.uint8, np.uint16):
        raise Refused("colour")
    return painted


def _check_palette(ds: Dataset) -> None:
    """Segments (PS3.3 C.7.9.2) may not unfold to more than the 2**16 entries of a palette; references are refused."""
    for name in ("Red", "Green", "Blue", "Alpha"):
        segmented = headers.value(ds, f"Segmented{name}PaletteColorLookupTableData")
        if not segmented:
            continue
        wide = int(headers.value(ds, "RedPaletteColorLookupTableDescriptor")[2]) > 8
        big = ds.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian
        data = np.frombuffer(segmented, (">u2" if big else "<u2") if wide else "u1")
        position = entries = 0
        while position + 1 < len(data):
            kind, length = int(data[position]), int(data[position + 1])
            entries += length
            if kind not in (0, 1) or entries > 2**16:
                raise Refused("colour")
            position += 2 + (length if kind == 0 else 1)
