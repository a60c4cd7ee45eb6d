"""Reading one DICOM file at a cost that the file cannot raise.

pydicom believes a file's lengths: it allocates 4 GiB where four bytes say so, inflates a deflated file without end, and
unfolds millions of empty items. Here every read ends with the file, the header may have 32 MiB and 260,000 reads, and
inflating stops at 256 MiB. What cannot be read is one `Refused`, whatever pydicom made of it; nothing of the file's
text is in it.

Sources: PS3.10 7.1 (file meta information), PS3.5 7 (data elements) and A.5 (deflated transfer syntax).
"""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import BinaryIO, cast

import pydicom
from pydicom.dataset import FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from fedscan_client.intake.records import Refused

MAX_BYTES = 2**29 + 2**25  # of a file: decoded pixels as `layout.MAX_BYTES` allows, and its header
HEADER_BYTES = 2**25  # of everything but pixels: a functional group takes 1 to 2 kB for each frame
INFLATED_BYTES = 2**28
_READS = 2**18  # an element takes two or three, an item counts as four; not those in a sequence of stated length
_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # little endian, big endian
_ITEMS = 2**17  # of sequences of stated length, which pydicom unfolds when they are asked for


def header(stream: BinaryIO, size: int, *, tags: Sequence[str] | None = None) -> FileDataset:
    """Everything before the pixel data.

    Args:
        stream: the file, from its start; any object that can read, seek and tell.
        size: its bytes.
        tags: keywords to keep; None keeps all.

    Raises:
        Refused: not_dicom, unreadable or too_large.
    """
    return _parsed(_Bounded(stream, size, HEADER_BYTES), pixels=False, tags=tags)


def whole(stream: BinaryIO, size: int) -> FileDataset:
    """The whole instance, pixels still coded.

    Args:
        stream: the file, from its start; any object that can read, seek and tell.
        size: its bytes.

    Raises:
        Refused: not_dicom, unreadable or too_large.
    """
    if size > MAX_BYTES:
        raise Refused("too_large")
    return _parsed(_Bounded(stream, size, MAX_BYTES), pixels=True, tags=None)


class _Stop(BaseException):
    """Reading ends here. Not an Exception, which somebody on the way could take for the end of the file."""


class _Bounded:
    """A file that ends where it ends, and gives only so many bytes in so many reads."""

    def __init__(self, stream: BinaryIO, size: int, limit: int) -> None:
        """Takes the stream, its bytes, and how many of them may be read."""
        self.stream, self.limit = stream, limit
        self.stopped = ""  # the reason, where this ended it
        self._size, self._left, self._reads = size, limit, _READS
        self._read, self.seek, self.tell = stream.read, stream.seek, stream.tell

    def read(self, count: int = -1) -> bytes:
        """As a file's; a large read allocates no more than there is."""
        if not 0 <= count <= 2**16:
            there = max(0, self._size - self.tell())
            count = there if count < 0 else min(count, there)
        self._left -= count
        self._reads -= 1
        if self._left < 0 or self._reads < 0:
            self.stopped = self.stopped or "too_large"
            raise _Stop
        try:
            data = self._read(count)
        except OSError:
            self.stopped = "unreadable"
            raise _Stop from None
        if data[:4] in _ITEM_TAGS:
            self._reads -= 3
        return data

    def more(self) -> bytes:
        """The next 64 KiB, which count for nothing."""
        self._left, self._reads = self._left + 2**16, self._reads + 1
        return self.read(2**16)


def _parsed(stream: "_Bounded", *, pixels: bool, tags: Sequence[str] | None) -> FileDataset:
    source = stream
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote header values
            source, deflated = _inflated(stream)
            ds = pydicom.dcmread(
                cast(BinaryIO, source), stop_before_pixels=not pixels, specific_tags=list(tags) if tags else None
            )
            if deflated:
                ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    except (_Stop, Exception):  # a hostile file can raise anything, RecursionError and MemoryError included
        raise Refused(source.stopped or "not_dicom") from None
    ds.buffer = None  # pydicom keeps the file it read from
    values = [e.value for e in ds.values() if e.tag.group != 0x7FE0 and isinstance(e.value, bytes)]
    items = sum(value.count(tag) for value in values for tag in _ITEM_TAGS)
    if sum(map(len, values)) > HEADER_BYTES or items > _ITEMS:
        raise Refused("too_large")
    return ds


def _inflated(stream: _Bounded) -> tuple[_Bounded, bool]:
    """The stream from its start, and whether its data set was deflated, which it then is no longer."""
    start = stream.read(132)
    if start[128:] != b"DICM":
        raise ValueError("no preamble")
    syntax, at = b"", 0
    while len(head := stream.read(8)) == 8 and head[:2] == b"\x02\0":  # explicit VR little endian, always
        length = struct.unpack_from("<H", head, 6)[0]
        if head[4:6] in (b"OB", b"UN", b"SQ", b"UT"):
            length = struct.unpack("<L", stream.read(4))[0]
        at = stream.tell()
        value = stream.read(length)
        if head[2:4] == b"\x10\0":
            syntax, where = value.rstrip(b"\0 "), at
    end = stream.tell() - len(head)
    stream.seek(0)
    if syntax != DeflatedExplicitVRLittleEndian.encode():
        return stream, False
    plain = io.BytesIO()
    plain.write(stream.read(end))
    plain.seek(where)
    plain.write(b"1.2.840.10008.1.2.1".ljust(len(syntax), b"\0"))
    plain.seek(end)
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    while not unpack.eof and (packed := stream.more()):
        while packed:
            plain.write(unpack.decompress(packed, 2**20))
            packed = unpack.unconsumed_tail
            if plain.tell() > INFLATED_BYTES:
                stream.stopped = "too_large"
                raise _Stop
    size = plain.tell()
    plain.seek(0)
    return _Bounded(plain, size, stream.limit), True
