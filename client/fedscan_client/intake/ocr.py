"""Tesseract as a second alarm for burned-in text; never proof that a frame is clean.

Silence means little. Measured with tesseract 5.3.0 by `scripts/bench/ocr.py` (figures in client/README.md): it reads
most bright text on black, and misses most text of low contrast or on textured anatomy; it knows Latin letters only and
no handwriting. So it may send an accepted image to a person and never lets one in.

The frame goes through a pipe, and the process may not write a byte into any file (resource limit on file size, no
core dumps), whatever libraries it is built with.

Shape letters: H rows, W columns.
"""

import io
import os
import shutil
import subprocess
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedscan_core.errors import DataError, MissingExtra

SECONDS = 20.0  # at most for one frame; a busy texture can keep tesseract at work for minutes
_LETTERS = 3  # a word has at least so many letters or digits
_CONFIDENCE = 50.0  # of 100, as tesseract counts; see the bench
_MAX_SIDE = 4096  # pixels; larger frames are halved until they fit
_ENVIRONMENT = ("PATH", "TESSDATA_PREFIX")  # nothing else: the site's key may be in the environment
# The shell sets the limits and becomes tesseract: no code of ours runs between fork and exec.
_COMMAND = "ulimit -f 0; ulimit -c 0; exec tesseract stdin stdout --psm 11 tsv"


def installed() -> bool:
    """Whether the program tesseract is on the path."""
    return shutil.which("tesseract") is not None


def alarm(frame: NDArray[Any], *, seconds: float = SECONDS) -> bool:
    """Whether something like text was read in a frame, or reading it took too long.

    Args:
        frame: [H, W] or [H, W, 3], any real type; stretched from its minimum to its maximum.
        seconds: the time limit; running into it counts as an alarm, since a person should look.

    Raises:
        MissingExtra: tesseract is not installed.
        DataError: it is installed but does not work, for example without its language file.
    """
    if not installed():
        raise MissingExtra(
            "Character recognition is switched on, but tesseract is not installed.",
            remedy='Install the package tesseract-ocr of the system, or set ocr = "off" under [quarantine].',
        )
    try:
        done = subprocess.run(
            ["sh", "-c", _COMMAND],
            input=_png(frame),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"OMP_THREAD_LIMIT": "1"},
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode or not lines:
        raise DataError(
            f"tesseract ended with code {done.returncode}.",
            remedy="Try 'tesseract --list-langs': the language eng is needed.",
        )
    return any(_is_word(line.split("\t")) for line in lines[1:])


def reads(setting: Literal["off", "sample", "all"], index: int, instances: int, frames: int) -> tuple[int, ...]:
    """Which frames of a series' instance are to be looked at.

    Args:
        setting: `rules.QuarantineSettings.ocr`; "sample" is the middle frame of the middle instance.
        index: number of the instance in its series, from 0.
        instances: how many there are.
        frames: how many frames this one has.
    """
    if setting == "all":
        return tuple(range(frames))
    return (frames // 2,) if setting == "sample" and index == instances // 2 else ()


def _is_word(cells: list[str]) -> bool:
    # Columns of tesseract's tsv: the 11th is the confidence (-1 for blocks and lines), the 12th the text.
    if len(cells) != 12 or float(cells[10]) < _CONFIDENCE:
        return False
    return sum(letter.isalnum() for letter in cells[11]) >= _LETTERS


def _png(frame: NDArray[Any]) -> bytes:
    x = frame.astype(np.float32)
    if x.ndim == 3:
        x = x @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
    while max(x.shape) > _MAX_SIDE:
        x = x[::2, ::2]
    low, high = float(x.min()), float(x.max())
    buffer = io.BytesIO()
    Image.fromarray(((x - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
