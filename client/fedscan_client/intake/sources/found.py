"""One object of a source, before anybody has looked inside."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO


@dataclass(frozen=True)
class Found:
    """An object that may be DICOM.

    Attributes:
        locator: finds it again with `open_locator` of its source. A folder's locator holds file names, which may hold
            patients' names: it is kept in memory or encrypted, never logged.
        stamp: changes when the object does: its size and time of modification.
        size: bytes.
        open: opens it for reading; seekable. Raises `Refused("unreadable")` or `DataError`.
    """

    locator: str = field(repr=False)
    stamp: str
    size: int
    open: Callable[[], BinaryIO] = field(repr=False)


def stamp(size: int, mtime_ns: int) -> str:
    """The stamp of an object of `size` bytes that was last modified at `mtime_ns`."""
    return f"{size}:{mtime_ns}"
