"""Freed memory is kept for the next step: Linux maps every page of a fresh block anew, for a third of a step's time.

Nothing here has to do with privacy or with results. Where there is no glibc (another system, musl), it does nothing.
"""

import ctypes
import functools
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST_ON_HEAP = 32 * 2**20  # bytes of a block: the most that glibc takes from the heap


@functools.cache
def keep_freed() -> None:
    """From now on this process keeps what it frees rather than hand it back at once: blocks of up to 32 MiB."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, _MOST_ON_HEAP)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back() -> None:
    """Hands back to the system what was kept so far: a round is over."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
