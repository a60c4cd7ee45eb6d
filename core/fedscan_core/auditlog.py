"""An append-only file of JSON lines, each bound to the one before it by SHA-256 and on disk before the call returns.

The record of what left a site is such a file. The chain finds edits and removals inside the
file; a cut at its end can only be found by comparing `head` with a copy kept elsewhere. A last line without its line
end is a write that never returned, so nobody acted on it: it is dropped on the next append.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedscan_core.errors import RecordDamaged
from fedscan_core.files import sync_folder

START = "0" * 64


def read(path: Path) -> list[dict[str, Any]]:
    """All records in order, with the chain checked; [] where there is no file.

    Raises:
        RecordDamaged: a line was edited, removed or inserted.
    """
    return [record for record, _ in _lines(path)]


def head(path: Path) -> str:
    """Digest of the last whole line: commits to everything before it."""
    lines = _lines(path)
    return lines[-1][1] if lines else START


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the file against other processes; the lock dies with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "a", opener=lambda name, flags: os.open(name, flags, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def append(path: Path, record: dict[str, Any]) -> str:
    """Adds one record and returns the new head, after the line is on disk (fsync).

    Looks at the last line only; `read` checks the whole chain. The caller holds `exclusive(path)` when another
    process may write too. The names `seq` and `prev` are the chain's own.

    Raises:
        RecordDamaged: the last line is no record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        last, whole = _last_line(descriptor)
        seq, before = (0, START) if last is None else (_seq(path, last) + 1, _digest(last))
        text = json.dumps({**record, "seq": seq, "prev": before}, sort_keys=True, separators=(",", ":")).encode()
        os.ftruncate(descriptor, whole)  # drops a torn last line
        os.lseek(descriptor, 0, os.SEEK_END)
        view = memoryview(text + b"\n")
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if last is None:  # the file may be new: its name must be on disk too
        sync_folder(path.parent)
    return _digest(text)


def _seq(path: Path, line: bytes) -> int:
    try:
        return int(json.loads(line)["seq"])
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, "the last line") from None


def _last_line(descriptor: int) -> tuple[bytes | None, int]:
    """The last line that has its line end, and the file's length up to there."""
    size = os.fstat(descriptor).st_size
    block = 4096
    while True:
        start = max(0, size - block)
        data = os.pread(descriptor, size - start, start)
        end = data.rfind(b"\n")
        begin = data.rfind(b"\n", 0, max(end, 0))
        if end >= 0 and (begin >= 0 or start == 0):
            return data[begin + 1 : end], start + end + 1
        if start == 0:
            return None, 0
        block *= 4


def _whole_lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return data.split(b"\n")[:-1]


def _lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    result: list[tuple[dict[str, Any], str]] = []
    before = START
    for number, line in enumerate(_whole_lines(path)):
        try:
            record = json.loads(line)
            sound = record.pop("prev") == before and record.pop("seq") == number
        except (ValueError, KeyError, AttributeError):
            sound = False
        if not sound:
            raise _damaged(path, f"line {number + 1}")
        before = _digest(line)
        result.append((record, before))
    return result


def _damaged(path: Path, where: str) -> RecordDamaged:
    return RecordDamaged(
        f"{path}: {where} does not follow from the one before: the record was changed.",
        remedy="Restore the file from a backup; until then nothing is released.",
    )


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
