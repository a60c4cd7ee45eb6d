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
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import apply_color_lut, convert_color_space, get_decoder, unpack_bits

from fedscan_client.intake import codestream, decoders, headers
from fedscan_client.intake.records import Refused

MAX_FRAME = 2**26  # values of a frame: 67 million, more than any radiograph has
MAX_BYTES = 2**29  # of an instance, decoded: 2**28 values of 16 bits

_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
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


def layout(ds: Dataset) -> Layout:
    """Reads and checks the image pixel module (PS3.3 C.7.6.3).

    Raises:
        Refused: no_pixels, bad_header, bit_layout, colour or too_large.
    """
    found = [keyword for keyword in _KEYWORDS if keyword in ds]
    if len(found) != 1 or not headers.value(ds, found[0]):
        raise Refused("no_pixels")
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


def frames(ds: Dataset) -> NDArray[Any]:
    """All frames of an instance.

    Args:
        ds: an instance with its file meta group, pixels still coded.

    Returns:
        [F, H, W], or [F, H, W, 3] in RGB: stored values, before any rescaling, in the machine's byte order; whole
        numbers of the allocated width, or real numbers where the pixels are. Palettes are applied (8 or 16 bits).

    Raises:
        Refused: see `layout`; or transfer_syntax, pixels_undecodable, bit_layout.
    """
    shape = layout(ds)
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
    shape = layout(ds)
    syntax = getattr(getattr(ds, "file_meta", None), "TransferSyntaxUID", None)
    if syntax in _NATIVE:
        coded = _native(ds, shape, syntax)
    elif syntax in _CODECS or syntax in (uid.RLELossless, _DEFLATED_FRAMES):
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote header values
            for number in range(shape.frames):
                pixels, _ = get_decoder(uid.UID(syntax)).as_array(ds, index=number, **options)
                yield pixels, "YBR" if shape.photometric.startswith("YBR") else "RGB"
    except Exception:  # pydicom raises many kinds on headers that contradict themselves
        raise Refused("pixels_undecodable") from None


def _encapsulated(ds: Dataset, shape: Layout) -> Iterator[bytes]:
    """The code stream of each frame; of those beyond NumberOfFrames none."""
    data = headers.value(ds, "PixelData")
    offsets = headers.value(ds, "ExtendedOffsetTable"), headers.value(ds, "ExtendedOffsetTableLengths")
    # No coding makes a frame much larger than it is; and a stream of that size cannot hold a bomb.
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
        return _rle(source, shape), colour
    if syntax == _DEFLATED_FRAMES:
        return _inflated(source, shape), colour
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


def _rle(source: bytes, shape: Layout) -> NDArray[Any]:
    """PS3.5 Annex G: one segment for each byte of each sample, most significant first."""
    width = max(1, shape.allocated // 8)
    size = shape.rows * shape.columns if shape.allocated > 1 else -(-shape.rows * shape.columns // 8)
    try:
        count, *offsets = struct.unpack_from("<16L", source)
    except struct.error:
        raise Refused("pixels_undecodable") from None
    if count != width * shape.samples or any(a >= b for a, b in zip(offsets[:count], [*offsets[1:count], len(source)])):
        raise Refused("pixels_undecodable")
    planes = np.empty((shape.samples, size, width), "u1")
    for number in range(count):
        end = offsets[number + 1] if number + 1 < count else len(source)
        planes[number // width, :, width - 1 - number % width] = _packbits(source[offsets[number] : end], size)
    if shape.allocated == 1:
        return _bitmap(planes.tobytes(), shape)
    values = planes.reshape(shape.samples, -1).view(f"<u{width}")
    return (
        values.reshape(shape.samples, shape.rows, shape.columns)
        .transpose(1, 2, 0)
        .squeeze(axis=2 if shape.samples == 1 else ())
    )


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


def _inflated(source: bytes, shape: Layout) -> NDArray[Any]:
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
