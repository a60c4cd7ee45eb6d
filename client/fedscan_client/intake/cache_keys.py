"""Whose cache it is, and its patients' own keys under the site's: checked, wrapped, rotated.

    CACHE/key.check             public fingerprints of the site key that the cache belongs to
          keys/PSEUDONYM.key    8 bytes: fingerprint of the `wrapping` that wraps it; the rest: see `seal`
          cache.lock            one process writes at a time; freed when that process ends

A patient's key is bound to the pseudonym and to the site key's `names`: under another site key it does not open, even
where `wrapping` is the same.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InvalidTag

from fedscan_client.intake import seal
from fedscan_client.keys import KEY_BYTES, SiteKey, derive_wrapping
from fedscan_core import auditlog
from fedscan_core.errors import DataError, FolderError, SiteKeyError
from fedscan_core.files import write_atomic

_CHECK = "key.check"
_ID_BYTES = 8
REMEDY = "Remove this patient from the cache (fedscan agent patient withdraw) or the whole cache, and ingest again."


class Damaged(DataError):
    """Files of one patient that were altered or lost: that patient is left out, the others are not concerned."""


def is_pseudonym(text: str) -> bool:
    """Whether it may name a patient's files."""
    return re.fullmatch(r"[0-9a-f]{24,64}", text) is not None


def key_path(folder: Path, pid: str) -> Path:
    """Where a patient's key lies.

    Raises:
        DataError: `pid` is no pseudonym.
    """
    if not is_pseudonym(pid):
        raise DataError(
            "The name of a cached patient is not a pseudonym.", remedy="Remove foreign files from the cache folder."
        )
    return folder / "keys" / f"{pid}.key"


def with_key(folder: Path) -> list[str]:
    """Pseudonyms of all patients that have a key, sorted."""
    return sorted(path.stem for path in (folder / "keys").glob("*.key") if is_pseudonym(path.stem))


def is_cache(folder: Path) -> bool:
    """Whether anything was ever written there."""
    return (folder / _CHECK).exists() or bool(with_key(folder))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the cache against other writers; waits for them."""
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with auditlog.exclusive(folder / "cache"):
        yield


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says in our own words that a disk is full or a folder is not writable."""
    try:
        yield
    except OSError as error:
        raise FolderError(f"The cache {folder} cannot be written: {error.strerror}.", remedy="Check it.") from None


def check_key(folder: Path, key: SiteKey) -> None:
    """Makes sure that the cache is this site key's. Call it before pseudonyms are compared with what the cache holds.

    Raises:
        SiteKeyError: it belongs to another one, or to what this one was before or will be after a rotation.
    """
    path = folder / _CHECK
    try:
        told = json.loads(path.read_text(encoding="ascii"))
        names, wrapping = str(told["names"]), str(told["wrapping"])
    except FileNotFoundError:
        found = with_key(folder)
        if found and not any(_opened(folder, key, name) for name in found):
            raise SiteKeyError(
                f"The site key opens nothing in the cache {folder}.",
                remedy="Put the key back that belongs to it: fedscan agent key restore.",
            ) from None
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise SiteKeyError(f"{path} is damaged.", remedy="Remove this one file: it is made again.") from None
    if names != key.names_id or wrapping not in key.wrappings():
        what = "another site key" if names != key.names_id else "this site key before or after a rotation"
        raise SiteKeyError(
            f"The cache {folder} belongs to {what}: {names}-{wrapping}, not {key.key_id}. Nothing was written.",
            remedy="If it was rotated just now, start again; else put the right key back: fedscan agent key restore.",
        )


def claim(folder: Path, key: SiteKey) -> None:
    """`check_key`, and a new cache is this key's from now on. The caller holds `locked`."""
    check_key(folder, key)
    with writing(folder):
        for name in ("keys", "patients"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        if not (folder / _CHECK).exists():
            _write_check(folder, key)


def new_key(folder: Path, key: SiteKey, pid: str) -> None:
    """Draws a patient's own key and keeps it wrapped. The caller holds `locked`."""
    with writing(folder):
        write_atomic(key_path(folder, pid), _wrap(secrets.token_bytes(KEY_BYTES), key, pid))


def unwrap(folder: Path, key: SiteKey, pid: str) -> bytes:
    """A patient's own key.

    Raises:
        SiteKeyError: the cache belongs to another site key.
        Damaged: there is none, or it was altered.
    """
    opened = _opened(folder, key, pid)
    if opened is None:
        check_key(folder, key)  # if it is the site key that is wrong, say so
        if not key_path(folder, pid).exists():
            raise Damaged(f"The cache has no key of patient {pid}.", remedy="Ingest again.")
        raise Damaged(f"The key of patient {pid} was altered, or the site's was rotated meanwhile.", remedy=REMEDY)
    return opened


def wrapped_by(folder: Path, key: SiteKey) -> dict[str, str]:
    """Patient -> fingerprint of what wraps their key, after every one of them was opened.

    Raises:
        SiteKeyError: as `check_key`.
        Damaged: keys that do not open, by pseudonym.
    """
    check_key(folder, key)
    names = with_key(folder)
    bad = [name for name in names if _opened(folder, key, name) is None]
    if bad:
        raise Damaged(f"The keys of {len(bad)} patients are damaged: {', '.join(bad[:5])}.", remedy=REMEDY)
    return {name: key_path(folder, name).read_bytes()[:_ID_BYTES].hex() for name in names}


def rewrap(folder: Path, key: SiteKey, pid: str) -> None:
    """Wraps one patient's key with the staged site key. The caller holds `locked`."""
    data_key = unwrap(folder, key, pid)
    with writing(folder):
        write_atomic(key_path(folder, pid), _wrap(data_key, key.after(), pid))


def mark_rotated(folder: Path, key: SiteKey) -> None:
    """From now on the cache is the staged key's: a process that holds only the old one writes no more."""
    for path in (folder / "keys").glob(".*.part"):  # of killed writes: an old wrapping must not outlive its key
        path.unlink()
    with writing(folder):
        _write_check(folder, key.after())


def _write_check(folder: Path, key: SiteKey) -> None:
    told = json.dumps({"names": key.names_id, "wrapping": key.wrapping_id})
    write_atomic(folder / _CHECK, told.encode() + b"\n")


def _wrap(data_key: bytes, key: SiteKey, pid: str) -> bytes:
    wrapping = derive_wrapping(key.wrapping, "patient key")
    return bytes.fromhex(key.wrapping_id) + seal.seal(wrapping, data_key, seal.about("key", key.names_id, pid))


def _opened(folder: Path, key: SiteKey, pid: str) -> bytes | None:
    try:
        blob = key_path(folder, pid).read_bytes()
        wrapping = key.wrappings()[blob[:_ID_BYTES].hex()]
        told = seal.about("key", key.names_id, pid)
        return seal.unseal(derive_wrapping(wrapping, "patient key"), blob[_ID_BYTES:], told)
    except (OSError, KeyError, InvalidTag):
        return None
