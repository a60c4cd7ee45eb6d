"""The spool: what came over the network, encrypted, until the intake has read it.

    FOLDER/ab/ab12....enc        one DICOM file (PS3.10); the name is a keyed hash of its SOP Instance UID
    FOLDER/ab/.ab12...part       one that is being written

The hospital's names, numbers and pixels are never on disk in clear. A file is sealed block by block as it arrives, so
memory does not grow with it (STREAM: Hoang, Reyhanitabar, Rogaway and Vizár, "Online Authenticated-Encryption and its
Nonce-Reuse Misuse-Resistance", CRYPTO 2015):

    magic | nonce, AES-256-GCM of (file key, UID) under the wrapping key | blocks of 1 MiB under the file key

The nonce of a block is its number and whether it is the last one, the file key is drawn at random for each file, and
the file's name is authenticated with its key: a block that was altered, moved, left out or taken from another file,
and a file that was cut or renamed, is an error on reading. Assumed: AES-GCM (NIST SP 800-38D) with random 96-bit
nonces, fewer than 2^32 files under one wrapping key. What it does not hide: number, size and time of the files.

The same instance twice is one file. If its data set differs (file meta information aside, which says how it travelled)
the first one stays and the second is told as "conflict": whoever sends first cannot be overwritten by another peer.
"""

import fcntl
import hashlib
import hmac
import io
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedscan_client.intake.sources.found import Found, stamp
from fedscan_core.errors import DataError
from fedscan_core.files import sync_folder

BLOCK = 1 << 20
_MAGIC = b"fedscan-spool-1\n"
_NONCE, _TAG, _KEY, _UID = 12, 16, 32, 64
_HEAD = len(_MAGIC) + _NONCE + _KEY + _UID + _TAG
_LOCATOR = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{38}\.enc")

Outcome = Literal["stored", "same", "conflict"]


@dataclass(frozen=True)
class Spool:
    """Where received objects go, and the site's wrapping key (32 bytes)."""

    folder: Path
    key: bytes = field(repr=False)


def put(folder: Path, key: bytes, data: bytes | Iterable[bytes | memoryview], uid: str) -> Outcome:
    """Stores one DICOM file; when it returns, the file and its name are on disk (fsync).

    Args:
        folder: the spool; made if need be.
        key: the site's wrapping key.
        data: the file, whole or in parts of any size.
        uid: its SOP Instance UID.

    Returns:
        "stored"; "same": it was there; "conflict": another data set under the same UID was there, and stays.

    Raises:
        OSError: the disk is full or refuses; nothing is left behind. What `data` raises comes through likewise.
        DataError: the UID is not one.
    """
    path = folder / _locator(key, uid)
    for made in (folder, path.parent):
        if not made.exists():
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(made.parent)
    file_key = secrets.token_bytes(_KEY)
    digest = hashlib.sha256()
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # says to `clean` that somebody is at work here
            file.write(_MAGIC + _wrap(key, path.name, file_key, uid))
            cipher = AESGCM(file_key)
            for number, (block, last) in enumerate(_blocks([data] if isinstance(data, bytes) else data)):
                digest.update(_body(block) if number == 0 else block)
                file.write(cipher.encrypt(_nonce(number, last), block, None))
            file.flush()
            try:
                there = path.exists() and _digest(folder, key, path)
            except DataError:  # damaged: as good as absent
                path.unlink()
                there = False
            if not there:
                os.fsync(file.fileno())
        if not there:
            try:
                os.link(part, path)  # unlike a rename it never replaces what another peer has just stored
                sync_folder(path.parent)
                return "stored"
            except FileExistsError:
                there = _digest(folder, key, path)
        return "same" if there == digest.digest() else "conflict"
    finally:
        Path(part).unlink(missing_ok=True)


def has(folder: Path, key: bytes, uid: str) -> bool:
    """Whether an object of this SOP Instance UID is there."""
    return (folder / _locator(key, uid)).exists()


def found(folder: Path, key: bytes) -> Iterator[Found]:
    """Every object of the spool, in the order of its names, which is none; nothing where there is no spool."""
    for shard in sorted(folder.glob("[0-9a-f][0-9a-f]")):
        for name in sorted(os.listdir(shard)):
            locator = f"{shard.name}/{name}"
            if not _LOCATOR.fullmatch(locator):
                continue
            with suppress(FileNotFoundError):  # dropped meanwhile
                status = (shard / name).stat()
                size = _plain_size(status.st_size)
                yield Found(locator, stamp(size, status.st_mtime_ns), size, _opener(folder, key, locator))


def open_locator(folder: Path, key: bytes, locator: str) -> BinaryIO:
    """Opens one object; blocks are decrypted in memory as they are read.

    Raises:
        DataError: no such object, or it was altered, cut, or written under another key. Raised here for its head and
            its end, on reading for the blocks between.
    """
    return cast(BinaryIO, io.BufferedReader(_Opened(folder / _checked(locator), key), 1 << 16))


def rekey(folder: Path, old: bytes, new: bytes) -> dict[str, str]:
    """Wraps every file's key again, under a new wrapping key; the blocks and their time of modification stay.

    May be stopped anywhere and called again: each file is there under its old name or its new one, or both. Returns
    the new locator of every old one, also of those that were moved before.

    Raises:
        DataError: a file is under neither key; those before it are done.
    """
    moved: dict[str, str] = {}
    for path in sorted(folder.glob("[0-9a-f][0-9a-f]/*.enc")):
        with path.open("rb") as file:
            try:
                file_key, uid = _unwrap(old, path.name, file)
            except DataError:
                file.seek(0)
                _, uid = _unwrap(new, path.name, file)
                moved[_locator(old, uid)] = _locator(new, uid)
                continue
            moved[_locator(old, uid)] = _locator(new, uid)
            target = folder / _locator(new, uid)
            if not target.exists():
                if not target.parent.exists():
                    target.parent.mkdir(mode=0o700)
                    sync_folder(folder)
                descriptor, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=".part")
                with os.fdopen(descriptor, "wb") as copy:
                    fcntl.flock(copy, fcntl.LOCK_EX)
                    copy.write(_MAGIC + _wrap(new, target.name, file_key, uid))
                    shutil.copyfileobj(file, copy, BLOCK)
                    copy.flush()
                    os.fsync(copy.fileno())
                status = path.stat()
                os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))
                os.replace(part, target)
                sync_folder(target.parent)
        path.unlink()
        sync_folder(path.parent)
    return moved


def drop(folder: Path, locator: str) -> bool:
    """Removes one object, once what is made of it is on disk; says whether it was there."""
    path = folder / _checked(locator)
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    sync_folder(path.parent)
    return True


def clean(folder: Path) -> int:
    """Removes what an interrupted `put` left behind, and says how many; those being written now stay."""
    removed = 0
    for part in folder.glob("[0-9a-f][0-9a-f]/.*.part"):
        with suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
            removed += 1
    return removed


# -------------------------------------------------------------------------------------------------------------- names


def _locator(key: bytes, uid: str) -> str:
    if not 0 < len(uid.encode()) <= _UID:
        raise DataError("An object has no usable SOP Instance UID.", remedy="Correct it at the source.")
    name = hmac.new(_derived(key, b"names"), uid.encode(), hashlib.sha256).hexdigest()[:40]
    return f"{name[:2]}/{name}.enc"


def _checked(locator: str) -> str:
    if not _LOCATOR.fullmatch(locator):
        raise DataError("This names no object of the spool.", remedy="Locators are those that `found` gives.")
    return locator


def _opener(folder: Path, key: bytes, locator: str) -> Callable[[], BinaryIO]:
    return lambda: open_locator(folder, key, locator)


# ------------------------------------------------------------------------------------------------------------- format


def _derived(key: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=b"fedscan spool 1 " + purpose).derive(key)


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(_NONCE - 1, "big") + bytes([last])


def _wrap(key: bytes, name: str, file_key: bytes, uid: str) -> bytes:
    nonce = secrets.token_bytes(_NONCE)
    secret = file_key + uid.encode().ljust(_UID, b"\0")
    return nonce + AESGCM(_derived(key, b"files")).encrypt(nonce, secret, _MAGIC + name.encode())


def _unwrap(key: bytes, name: str, file: BinaryIO) -> tuple[bytes, str]:
    """File key and UID from the head of a file."""
    head = file.read(_HEAD)
    nonce, sealed = head[len(_MAGIC) : len(_MAGIC) + _NONCE], head[len(_MAGIC) + _NONCE :]
    try:
        if len(head) < _HEAD or not head.startswith(_MAGIC):
            raise InvalidTag
        secret = AESGCM(_derived(key, b"files")).decrypt(nonce, sealed, _MAGIC + name.encode())
    except InvalidTag:
        raise _damaged() from None
    return secret[:_KEY], secret[_KEY:].rstrip(b"\0").decode()


def _blocks(parts: Iterable[bytes | memoryview]) -> Iterator[tuple[bytes, bool]]:
    """Blocks of `BLOCK` bytes, each with whether it is the last; only an empty file has an empty one."""
    waiting = bytearray()
    for part in parts:
        with memoryview(part) as view:
            for start in range(0, len(view), BLOCK):  # never much more than two blocks in hand
                waiting += view[start : start + BLOCK]
                while len(waiting) > BLOCK:
                    yield bytes(waiting[:BLOCK]), False
                    del waiting[:BLOCK]
    yield bytes(waiting), True


def _plain_size(size: int) -> int:
    """Bytes of the object in a file of `size` bytes; negative if it is cut."""
    blocks = -(-(size - _HEAD) // (BLOCK + _TAG))
    return size - _HEAD - max(blocks, 1) * _TAG


def _body(block: bytes) -> bytes:
    """The first block without preamble and file meta information (PS3.10 section 7.1)."""
    if block[128:140] != b"DICM\x02\x00\x00\x00UL\x04\x00":
        return block
    return block[144 + int.from_bytes(block[140:144], "little") :]


def _digest(folder: Path, key: bytes, path: Path) -> bytes:
    digest = hashlib.sha256()
    with open_locator(folder, key, f"{path.parent.name}/{path.name}") as file:
        digest.update(_body(file.read(BLOCK)))
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.digest()


def _damaged() -> DataError:
    return DataError(
        "An object of the spool was altered or cut, or was written under another key.",
        remedy="Check the site's key; if it is right, remove the file: the PACS is asked for the instance again.",
    )


class _Opened(io.RawIOBase):
    """The plain bytes of one file, one decrypted block in memory at a time."""

    name = "an object of the spool"  # pydicom asks every buffered file for one

    def __init__(self, path: Path, key: bytes) -> None:
        super().__init__()
        try:
            self._file = path.open("rb")
        except OSError:
            raise DataError(
                "An object of the spool is not there any more.", remedy="It is received or asked for again."
            ) from None
        try:
            self._cipher = AESGCM(_unwrap(key, path.name, self._file)[0])
            self.size = _plain_size(os.fstat(self._file.fileno()).st_size)
            self._last = max(self.size - 1, 0) // BLOCK
            self._number, self._block = -1, b""
            self._position = 0
            self._load(self._last)  # the end first: a file that was cut is known before anything of it is used
        except BaseException:
            self._file.close()
            raise

    def _load(self, number: int) -> None:
        if number == self._number:
            return
        self._file.seek(_HEAD + number * (BLOCK + _TAG))
        try:
            sealed = self._file.read(BLOCK + _TAG)
            self._block = self._cipher.decrypt(_nonce(number, number == self._last), sealed, None)
        except (InvalidTag, ValueError):
            raise _damaged() from None
        self._number = number

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer from the block at the position."""
        with memoryview(buffer).cast("B") as view:
            if self._position >= self.size:
                return 0
            self._load(self._position // BLOCK)
            start = self._position % BLOCK
            part = self._block[start : start + len(view)]
            view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position; see `io.IOBase.seek`."""
        base = (0, self._position, self.size)[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Closes the file."""
        if not self.closed:
            self._file.close()
        super().close()
