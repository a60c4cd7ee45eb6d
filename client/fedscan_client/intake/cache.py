"""The encrypted cache: what training reads, one patient at a time, and what a withdrawal destroys.

    <cache>/patients/<pseudonym>.enc    the patient's payload under the patient's own key
    <cache>/keys/<pseudonym>.key        version, nonce, AES-256-GCM of the patient's own key, under
    the site key

Each patient has a key of their own, drawn at random and wrapped by a key derived from the site key.
Removing one small key file therefore destroys the patient's data wherever copies of `patients/`
went; leave `keys/` out of backups, or the destruction is undone by a restore. The pseudonym is
authenticated with both files, so that one patient's file cannot stand in for another's.

A payload is numpy arrays without pickle plus JSON. Features or previews computed from images are
images too and belong in here.

AES-GCM with random 96-bit nonces: NIST SP 800-38D; HKDF: RFC 5869.
"""

import io
import json
import re
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedscan_core.errors import DataError
from fedscan_core.files import sync_folder, write_atomic

_VERSION = b"fedscan-cache-1\n"
_NONCE = 12
_REMEDY = "Check the site key; if it is right, remove the cache folder and ingest again."


@dataclass(frozen=True, eq=False)
class Payload:
    """What is kept of one patient: named arrays (no object arrays) and anything JSON can hold."""

    arrays: Mapping[str, NDArray[Any]]
    meta: Any


def patients(folder: Path) -> list[str]:
    """Pseudonyms of all patients in the cache, sorted; none where there is no cache yet."""
    return sorted(path.stem for path in (folder / "patients").glob("*.enc"))


def write_patient(folder: Path, key: bytes, pseudonym: str, payload: Payload) -> None:
    """Writes or replaces one patient; an unchanged payload leaves the file as it is.

    The file is complete or absent whatever happens (written aside, fsynced, renamed); mode 0600.

    Raises:
        DataError: the pseudonym is not one, or a file of this patient was written with another key
            or altered.
    """
    data_path, key_path = _paths(folder, pseudonym)
    plain = _pack(payload)
    if key_path.exists():
        patient_key = _open(_wrapping(key), key_path, b"key", pseudonym)
        if data_path.exists() and _open(patient_key, data_path, b"data", pseudonym) == plain:
            return
    else:
        # A new key before the new data: data without its key would be lost, a key without data is
        # harmless.
        patient_key = secrets.token_bytes(32)
        _write(key_path, _seal(_wrapping(key), patient_key, b"key", pseudonym))
    _write(data_path, _seal(patient_key, plain, b"data", pseudonym))


def read_patient(folder: Path, key: bytes, pseudonym: str) -> Payload:
    """Reads one patient.

    Raises:
        DataError: not in the cache, another site key, or a file that was altered.
    """
    data_path, key_path = _paths(folder, pseudonym)
    patient_key = _open(_wrapping(key), key_path, b"key", pseudonym)
    return _unpack(_open(patient_key, data_path, b"data", pseudonym))


def destroy_patient(folder: Path, pseudonym: str) -> bool:
    """Destroys one patient, the key first; says whether there was anything to destroy."""
    data_path, key_path = _paths(folder, pseudonym)
    found = False
    for path in (key_path, data_path):
        if path.exists():
            found = True
            path.unlink()
            sync_folder(path.parent)
    return found


def _paths(folder: Path, pseudonym: str) -> tuple[Path, Path]:
    if not re.fullmatch(r"[0-9a-f]{24,64}", pseudonym):
        raise DataError(
            "The name of a cached patient is not a pseudonym.",
            remedy="Remove foreign files from the cache folder.",
        )
    return folder / "patients" / f"{pseudonym}.enc", folder / "keys" / f"{pseudonym}.key"


def _wrapping(key: bytes) -> bytes:
    """The key that wraps patients' keys, unrelated to the one that makes pseudonyms."""
    return HKDF(SHA256(), 32, salt=None, info=b"fedscan cache key wrapping 1").derive(key)


def _seal(key: bytes, plain: bytes, purpose: bytes, pseudonym: str) -> bytes:
    nonce = secrets.token_bytes(_NONCE)
    bound = _VERSION + purpose + b"\0" + pseudonym.encode()
    return _VERSION + nonce + AESGCM(key).encrypt(nonce, plain, bound)


def _open(key: bytes, path: Path, purpose: bytes, pseudonym: str) -> bytes:
    try:
        blob = path.read_bytes()
    except OSError:
        raise DataError(f"The cache has no {purpose.decode()} of patient {pseudonym}.", remedy=_REMEDY) from None
    start = len(_VERSION) + _NONCE
    try:
        if not blob.startswith(_VERSION) or len(blob) < start + 16:
            raise InvalidTag
        bound = _VERSION + purpose + b"\0" + pseudonym.encode()
        return AESGCM(key).decrypt(blob[len(_VERSION) : start], blob[start:], bound)
    except InvalidTag:
        raise DataError(
            f"The cached {purpose.decode()} of patient {pseudonym} was altered, or written with another site key.",
            remedy=_REMEDY,
        ) from None


def _write(path: Path, blob: bytes) -> None:
    path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomic(path, blob)


def _pack(payload: Payload) -> bytes:
    meta = json.dumps(payload.meta, sort_keys=True, allow_nan=False).encode()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(sorted(payload.arrays.items())))
    return struct.pack("<Q", len(meta)) + meta + buffer.getvalue()


def _unpack(plain: bytes) -> Payload:
    (length,) = struct.unpack_from("<Q", plain)
    with np.load(io.BytesIO(plain[8 + length :]), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return Payload(arrays, json.loads(plain[8 : 8 + length]))
