"""DICOM files below a folder: any depth, any name, also inside zip archives.

A locator is the path below the root, "/" between folders, and "path!member" inside an archive; "%" and "!" in names and
bytes that are not UTF-8 are written as %XX, so that a locator is valid text and names one object only.

Safe against what a share may hold: symbolic links are not followed, pipes and devices not opened, archives are read in
memory within the limits below (nothing is ever unpacked to disk), an archive inside an archive is not opened. What is
left out is counted under a key of `SKIPPED`. **Nothing may be concluded from an object's absence in a scan that skipped
any**: a share that half failed must not look like a withdrawal.
"""

import functools
import io
import os
import stat
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from fedscan_client.intake.records import Refused
from fedscan_client.intake.sources.found import Found, stamp
from fedscan_core.errors import DataError

SKIPPED = MappingProxyType(
    {
        "still_writing": "is still being written, or has a name that says so: left for the next run",
        "unreadable": "a file or folder that may not, or could not, be read",
        "link": "a symbolic link, which could lead out of the folder",
        "zip_damaged": "an archive, or a member of one, that is damaged or contradicts itself",
        "zip_encrypted": "a member of an archive that needs a password",
        "zip_nested": "an archive inside an archive",
        "zip_too_large": "an archive with too many members, or one that unpacks to too much",
    }
)

# Names that programs give to what they are still writing.
UNFINISHED = (".part", ".partial", ".filepart", ".tmp", ".temp", ".crdownload")
# A file server's clock may be off by this much, in seconds: what changed within it is looked at twice.
CLOCK_SKEW = 3600.0

MAX_MEMBERS = 100_000
MAX_MEMBER_BYTES = 1 << 29
MAX_RATIO = 200  # of unpacked to packed; for members and archives over `RATIO_FROM`
RATIO_FROM = 1 << 24
_MAX_CATALOGUE = 1 << 24  # bytes of an archive's central directory, which is read whole

_DICOMDIR_CLASS = b"1.2.840.10008.1.3.10"  # Media Storage Directory Storage
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError, RuntimeError)


def found(root: Path, *, settle_seconds: float, skipped: MutableMapping[str, int] | None = None) -> Iterator[Found]:
    """Every object below a folder: sorted by folder, and last those that changed within the last hour.

    A file is given out when its size and time of modification have not changed for `settle_seconds`. For older files
    one look is enough; the recent ones are looked at a second time `settle_seconds` after the first, all together,
    whatever a file server's clock says. Those that changed meanwhile are left for the next run.

    Args:
        root: the folder, or the DICOMDIR of a medium, which stands for its folder.
        settle_seconds: see above.
        skipped: is counted up, by the keys of `SKIPPED`, for what is left out.

    Raises:
        DataError: there is no such folder, it cannot be read, or there is no file in it at all: a share that is not
            mounted looks like that, and is not a folder from which everything was deleted.
    """
    home = _home(root)
    counts = skipped if skipped is not None else {}
    recent: list[tuple[str, os.stat_result]] = []
    seen, looked_at = 0, time.monotonic()
    for path, status in _walk(home, counts):
        seen += 1
        looked_at = time.monotonic()
        if path.lower().endswith(UNFINISHED):
            _count(counts, "still_writing")
        elif status.st_mtime > time.time() - settle_seconds - CLOCK_SKEW:
            recent.append((path, status))
        else:
            yield from _objects(home, path, status, counts)
    if not seen and not counts:
        raise DataError(
            f"There is no file in the image folder {home}.",
            remedy="Check that the share is mounted and that this is the right folder; nothing was changed.",
        )
    if recent:
        time.sleep(max(0.0, looked_at + settle_seconds - time.monotonic()))
    for path, status in recent:
        try:
            now = os.lstat(home / path)
        except FileNotFoundError:  # renamed or taken back: the next run finds it, if it is there
            _count(counts, "still_writing")
        except OSError:
            _count(counts, "unreadable")
        else:
            if (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
                yield from _objects(home, path, now, counts)
            else:
                _count(counts, "still_writing")


def open_locator(root: Path, locator: str) -> BinaryIO:
    """Opens an object that `found` gave, and nothing outside the root whatever the locator says.

    Raises:
        DataError: the locator leads out of the root.
        Refused: "unreadable", it is not there any more or cannot be read.
    """
    home = _home(root)
    text, *member = locator.split("!", 1)
    name = _unquoted(text)
    if "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise _outside()
    path = home / name
    try:
        if not path.resolve().is_relative_to(home.resolve()):
            raise _outside()
        file = _open(path)
    except OSError:
        raise Refused("unreadable") from None
    if not member:
        return file
    file.close()
    return _open_member(path, _unquoted(member[0]))


# --------------------------------------------------------------------------------------------------------------- files


def _home(root: Path) -> Path:
    try:
        if root.is_file():
            with _open(root) as file:
                head = file.read(1024)
            if head[128:132] == b"DICM" and _DICOMDIR_CLASS in head:
                return root.parent
        elif root.is_dir():
            return root
    except OSError:
        pass
    raise DataError(
        f"The image folder {root} does not exist, is not a folder, or may not be read.",
        remedy="Check the path, its permissions, and that the share is mounted; nothing was changed.",
    )


def _walk(home: Path, counts: MutableMapping[str, int]) -> Iterator[tuple[str, os.stat_result]]:
    """Regular files as (path below home, status), names sorted within each folder."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(home / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            if not folder:
                raise DataError(
                    f"The image folder {home} cannot be listed.",
                    remedy="Check its permissions and that the share is mounted; nothing was changed.",
                ) from None
            _count(counts, "unreadable")
            continue
        subfolders = []
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_symlink():
                    _count(counts, "link")
                elif entry.is_dir(follow_symlinks=False):
                    subfolders.append(path)
                elif entry.is_file(follow_symlinks=False):
                    yield path, entry.stat(follow_symlinks=False)
            except OSError:
                _count(counts, "unreadable")
        waiting += reversed(subfolders)


def _open(path: Path) -> io.BufferedReader:
    """Opens a regular file; a link or pipe that has taken its place is an OSError and never waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return os.fdopen(descriptor, "rb")


def _objects(home: Path, path: str, status: os.stat_result, counts: MutableMapping[str, int]) -> Iterator[Found]:
    """The file itself, or the members of the archive that it is."""
    try:
        with _open(home / path) as file:
            head = file.read(132)
    except OSError:
        _count(counts, "unreadable")
        return
    mark = stamp(status.st_size, status.st_mtime_ns)
    if _is_zip(head):
        yield from _members(home, path, mark, counts)
    else:
        locator = _quoted(path)
        yield Found(locator, mark, status.st_size, functools.partial(open_locator, home, locator))


def _count(counts: MutableMapping[str, int], reason: str, by: int = 1) -> None:
    counts[reason] = counts.get(reason, 0) + by


def _quoted(name: str) -> str:
    return "".join(
        "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogateescape"))
        if letter in "%!" or 0xDC80 <= ord(letter) <= 0xDCFF
        else letter
        for letter in name
    )


def _unquoted(text: str) -> str:
    return unquote_to_bytes(text).decode("utf-8", "surrogateescape")


def _outside() -> DataError:
    return DataError(
        "A locator leads out of the image folder.", remedy="The index was altered; remove it and ingest again."
    )


# ------------------------------------------------------------------------------------------------------------ archives


def _is_zip(head: bytes) -> bool:
    """Whether a file that begins like this is a zip archive (and not DICOM: a preamble may hold anything)."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06") and head[128:132] != b"DICM"


def _members(home: Path, path: str, mark: str, counts: MutableMapping[str, int]) -> Iterator[Found]:
    try:
        archive = _archive(home / path, mark)
    except _TooLarge:
        _count(counts, "zip_too_large")
        return
    except _BAD_ZIP:
        _count(counts, "zip_damaged")
        return
    infos = [info for info in archive.infolist() if not info.is_dir()]
    packed, unpacked = (sum(getattr(info, size) for info in infos) for size in ("compress_size", "file_size"))
    if len(infos) > MAX_MEMBERS or _swells(packed, unpacked):
        _count(counts, "zip_too_large")
        return
    names: set[str] = set()
    for info in sorted(infos, key=lambda info: info.filename):
        problem = _problem(archive, info) if info.filename not in names else "zip_damaged"
        names.add(info.filename)
        if problem:
            _count(counts, problem)
            continue
        locator = f"{_quoted(path)}!{_quoted(info.filename)}"
        yield Found(locator, f"{mark}:{info.CRC:08x}", info.file_size, functools.partial(open_locator, home, locator))


def _problem(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    """Why a member is not read, "" if it is; looks at its first bytes."""
    if info.flag_bits & 0x1:
        return "zip_encrypted"
    if info.file_size > MAX_MEMBER_BYTES or _swells(info.compress_size, info.file_size):
        return "zip_too_large"
    if info.filename.lower().endswith(UNFINISHED):
        return "still_writing"
    try:
        with archive.open(info) as member:
            return "zip_nested" if _is_zip(member.read(132)) else ""
    except _BAD_ZIP:
        return "zip_damaged"


def _swells(packed: int, unpacked: int) -> bool:
    return unpacked > RATIO_FROM and unpacked > MAX_RATIO * packed


def _open_member(path: Path, name: str) -> BinaryIO:
    """A member in memory: reading back and forth in a compressed stream would unpack it again and again."""
    try:
        status = os.lstat(path)
        archive = _archive(path, stamp(status.st_size, status.st_mtime_ns))
        info = archive.getinfo(name)
        if _problem(archive, info):
            raise Refused("unreadable")
        with archive.open(info) as member:  # gives at most the declared size, and checks it and the CRC at the end
            data = member.read(info.file_size + 1)
        if len(data) != info.file_size:
            raise Refused("unreadable")
        return io.BytesIO(data)
    except (KeyError, _TooLarge, *_BAD_ZIP):
        raise Refused("unreadable") from None


class _TooLarge(Exception):
    """An archive whose catalogue alone is over the limit."""


class _Bounded(io.BufferedReader):
    """A file of which zipfile cannot be made to read an unbounded amount at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads at most the limit."""
        if size is not None and size > _MAX_CATALOGUE:
            raise _TooLarge
        return super().read(size)


class _Archive(zipfile.ZipFile):
    """Closes its file when it leaves the memory of recent archives."""

    _own: io.BufferedReader | None = None

    def __init__(self, path: Path) -> None:
        self._own = _Bounded(_open(path).detach())
        super().__init__(self._own)

    def __del__(self) -> None:
        super().__del__()
        if self._own:
            self._own.close()


_recent = threading.Lock()


def _archive(path: Path, mark: str) -> zipfile.ZipFile:
    """The archive, opened; the last few are kept, because opening one reads its whole catalogue."""
    with _recent:
        return _open_archive(path, mark)


@functools.lru_cache(maxsize=4)
def _open_archive(path: Path, mark: str) -> zipfile.ZipFile:
    return _Archive(path)
