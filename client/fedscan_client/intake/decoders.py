"""Compressed frames, decoded by other people's C code: in a process of its own, because that code can crash or hang.

The child process holds one decoder call at a time, knows no key and no name (its environment is empty but for the
module path), writes no core file, may take 1 GiB more than it has at the start, and is ended by an alarm. A frame that
kills it is refused, and the next frame gets a new child.

One decoder for each coding, the same on every site, whatever else is installed:

| coding (PS3.5 A.4) | decoder | licence |
|---|---|---|
| JPEG 2000, HTJ2K | pylibjpeg-openjpeg | MIT |
| JPEG-LS | pyjpegls | MIT |
| JPEG lossless; JPEG of more than 8 bits | python-gdcm | BSD |
| JPEG of 8 bits | Pillow | MIT-CMU |

RLE and deflated frames are not here: see `decode`.
"""

import atexit
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from io import BytesIO
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedscan_client.intake.records import Refused

MEMORY = 2**30  # what decoding one frame may take, in bytes
_HEAD = struct.Struct("<BIIBBBB?dQ")  # codec, the fields of Job, seconds, bytes of the frame
_TYPES = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4")
_DONE, _FAILED, _ABSENT = range(3)


@dataclass(frozen=True)
class Job:
    """What a decoder is told about a frame: rows, columns, samples per pixel, bits, sign, and whether it is RGB."""

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    signed: int
    rgb: bool = False


def decode(codec: str, source: bytes, job: Job) -> NDArray[Any]:
    """Decodes one frame in the child process.

    Args:
        codec: a key of `CODECS`.
        source: the frame's code stream.
        job: what the header says of it.

    Returns:
        [rows, columns] or [rows, columns, samples]: whole numbers as the stream has them, read-only.

    Raises:
        Refused: it cannot be decoded to that size, within 1 GiB and 10 s (and 1 s more for each million values).
    """
    values = job.rows * job.columns * job.samples
    head = _HEAD.pack([*CODECS].index(codec), *astuple(job), 10 + values / 1e6, len(source))
    with _lock:
        status, kind, data = _ask(head, source, values)
    if status != _DONE:
        raise Refused("transfer_syntax" if status == _ABSENT else "pixels_undecodable")
    shape = (job.rows, job.columns, job.samples)[: 2 if job.samples == 1 else 3]
    return np.frombuffer(data, _TYPES[kind]).reshape(shape)


_lock = threading.Lock()
_child: tuple[int, "subprocess.Popen[bytes]"] | None = None  # whose it is (a forked process needs its own), and it


def _ask(head: bytes, source: bytes, values: int) -> tuple[int, int, bytes]:
    """One question and its answer; a child that dies over it has failed."""
    global _child
    if _child is None or _child[0] != os.getpid() or _child[1].poll() is not None:
        _child = os.getpid(), _start()
    process = _child[1]
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(head)
        process.stdin.write(source)
        process.stdin.flush()
        answer = process.stdout.read(2)
        if len(answer) == 2:
            status, kind = answer
            size = values * np.dtype(_TYPES[kind]).itemsize if status == _DONE else 0
            data = process.stdout.read(size)
            if len(data) == size:
                return status, kind, data
    except OSError:  # it died before it had read everything
        pass
    except BaseException:  # interrupted half way: its answer must not be taken for that to the next question
        close()
        raise
    close()
    return _FAILED, 0, b""


def _start() -> "subprocess.Popen[bytes]":
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {**keep, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from fedscan_client.intake import decoders; decoders.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # decoders print what they dislike, header values included
        env=environment,
        start_new_session=True,  # Ctrl-C is for the parent, whose end it notices
    )


def close() -> None:
    """Ends the child process, if this process has one."""
    global _child
    if _child is not None and _child[0] == os.getpid():
        process = _child[1]
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what it was not able to write
                pipe.close()
    _child = None


atexit.register(close)


def serve() -> None:
    """The child: answers questions until its input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold pixels
    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints is no answer
    codecs = [*CODECS.values()]
    while len(head := sys.stdin.buffer.read(_HEAD.size)) == _HEAD.size:
        codec, *fields, seconds, size = _HEAD.unpack(head)
        source, job = sys.stdin.buffer.read(size), Job(*fields)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process, in C code too
        try:
            pixels = codecs[codec](source, job)
            pixels = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
            if pixels.size != job.rows * job.columns * job.samples:
                raise ValueError("another size")
            answer, data = bytes([_DONE, _TYPES.index(pixels.dtype.str)]), pixels.data
        except ImportError:
            answer, data = bytes([_ABSENT, 0]), memoryview(b"")
        except Exception:
            answer, data = bytes([_FAILED, 0]), memoryview(b"")
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(answer)
        answers.write(data)
        answers.flush()


def _openjpeg(source: bytes, job: Job) -> NDArray[Any]:
    from openjpeg.utils import decode as openjpeg

    return np.asarray(openjpeg(source))


def _jpegls(source: bytes, job: Job) -> NDArray[Any]:
    import jpeg_ls

    data, info = jpeg_ls.decode_pixel_data(source)
    pixels = np.frombuffer(data, "u1" if info["bits_per_sample"] <= 8 else "<u2")
    if job.samples == 1 or info["interleave_mode"]:
        return pixels
    return pixels.reshape(job.samples, job.rows, job.columns).transpose(1, 2, 0)  # mode 0: colour by plane


def _pillow(source: bytes, job: Job) -> NDArray[Any]:
    from PIL import Image

    with Image.open(BytesIO(source), formats=("JPEG",)) as image:
        if image.mode == "RGB" and not job.rgb:
            image.draft("YCbCr", image.size)  # as stored: what it means is decided by the caller
        return np.asarray(image)


def _gdcm(source: bytes, job: Job, syntax: str = "JPEGLosslessProcess14_1") -> NDArray[Any]:
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(source)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((job.columns, job.rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.RGB if job.samples == 3 else gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    if job.samples == 3:
        image.SetPlanarConfiguration(0)
    image.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    image.SetPixelFormat(gdcm.PixelFormat(job.samples, job.allocated, job.stored, job.stored - 1, job.signed))
    data = image.GetBuffer().encode("utf-8", "surrogateescape")  # its char* comes as text
    return np.frombuffer(data, f"<{'i' if job.signed else 'u'}{job.allocated // 8}")


CODECS: Mapping[str, Callable[[bytes, Job], NDArray[Any]]] = MappingProxyType(
    {
        "openjpeg": _openjpeg,
        "pyjpegls": _jpegls,
        "gdcm": _gdcm,
        "gdcm-jpegls": partial(_gdcm, syntax="JPEGLSLossless"),
        "pillow": _pillow,
    }
)
