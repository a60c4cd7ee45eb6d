"""One agent for each ledger: a file lock that dies with its process.

A deployed agent takes the ledger while it works on a request (`hold`, `release`); a second one is refused meanwhile.
Simulation does not: one process plays many sites, and Ray's actors open the same site's ledger one after another.
Whoever does not hold a ledger borrows it for one transaction, together with others of its kind (SQLite lets them in one
by one), and is refused while it is held.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fedscan_core.errors import FolderError

_PATIENCE = 2.0  # seconds; a borrower's transaction ends in milliseconds
_held: dict[Path, int] = {}  # by this process, with the lock's descriptor


def hold(ledger: Path) -> None:
    """Takes the ledger until `release`, or until this process ends, however it ends. A second call does nothing.

    Raises:
        FolderError: another process holds it.
    """
    path = _lock_of(ledger)
    if path in _held:
        return
    descriptor = _open(path)
    end = time.monotonic() + _PATIENCE
    while not _locked(descriptor, fcntl.LOCK_EX):
        if time.monotonic() > end:
            raise _taken(ledger, descriptor)
        time.sleep(0.02)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    _held[path] = descriptor


def release() -> None:
    """Gives back whatever this process holds."""
    while _held:
        _, descriptor = _held.popitem()
        os.ftruncate(descriptor, 0)  # it names nobody
        os.close(descriptor)


@contextlib.contextmanager
def borrow(ledger: Path) -> Iterator[None]:
    """For one transaction: nobody else holds the ledger.

    Raises:
        FolderError: another process holds it.
    """
    path = _lock_of(ledger)
    if path in _held:
        yield
        return
    descriptor = _open(path)
    if not _locked(descriptor, fcntl.LOCK_SH):
        raise _taken(ledger, descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock_of(ledger: Path) -> Path:
    return ledger.absolute().with_suffix(".lock")


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _taken(ledger: Path, descriptor: int) -> FolderError:
    who = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
    os.close(descriptor)
    return FolderError(
        f"Another agent{f' (process {who})' if who else ''} works with {ledger}.",
        remedy="Stop it first: a ledger has one agent.",
    )
