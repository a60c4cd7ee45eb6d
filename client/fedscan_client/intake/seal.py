"""Sealed files of the cache: AES-256-GCM (NIST SP 800-38D) over bytes, or over an array in the `.npy` format.

    16 bytes   "fedscan-cache-2" and a line end
    12 bytes   nonce, drawn at random: at most 2^32 files under one key, and a patient has few
    n bytes    ciphertext
    16 bytes   tag

Guarantee: whoever has not the key reads only the length, and cannot change, cut or exchange a file unnoticed
(`InvalidTag`), because what a file is about (`about`) is authenticated with it. Writing takes memory
for one block beside the array, reading none beside the array. There is no pickle: the `.npy` header must be, byte for
byte, that of the type and shape that the reader expects. Files are never written to again once they are there: whatever
cuts one off while it is being read ends the reading process.
"""

import functools
import io
import json
import math
import mmap
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

VERSION = b"fedscan-cache-2\n"
NONCE, TAG = 12, 16
_BLOCK = 1 << 20
_KINDS = "biuf"  # bool, whole numbers, floats


def about(purpose: str, *names: str) -> bytes:
    """What a file is, as associated data."""
    return VERSION + json.dumps([purpose, *names]).encode()


def seal(key: bytes, plain: bytes, told: bytes) -> bytes:
    """Version, nonce, ciphertext and tag of `plain`; `told` is authenticated with it."""
    nonce = secrets.token_bytes(NONCE)
    return VERSION + nonce + AESGCM(key).encrypt(nonce, plain, told)


def unseal(key: bytes, blob: bytes, told: bytes) -> bytes:
    """The reverse of `seal`.

    Raises:
        InvalidTag: another key, other associated data, or altered.
    """
    start = len(VERSION) + NONCE
    if len(blob) < start + TAG or not blob.startswith(VERSION):
        raise InvalidTag
    return AESGCM(key).decrypt(blob[len(VERSION) : start], blob[start:], told)


def plain_array(values: NDArray[Any]) -> NDArray[Any]:
    """The array as it is kept: contiguous, little-endian.

    Raises:
        ValueError: objects, texts or records: nothing but numbers is kept.
    """
    if values.dtype.kind not in _KINDS:
        raise ValueError(f"An array of {values.dtype.name} is not kept: only numbers are.")
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(values.shape)


def write_array(path: Path, key: bytes, values: NDArray[Any], told: bytes) -> str:
    """Writes a new file (0600), forced to the disk; returns its nonce and tag in hex, which no other file has.

    Args:
        path: must not exist.
        key: 32 bytes.
        values: as `plain_array` gives it.
        told: authenticated with it, see `about`.
    """
    nonce = secrets.token_bytes(NONCE)
    encryptor = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(told)
    data = values.reshape(-1).view(np.uint8).data
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
        _write(file, VERSION + nonce + encryptor.update(_header(values.dtype.str, values.shape)))
        for start in range(0, len(data), _BLOCK):
            _write(file, encryptor.update(data[start : start + _BLOCK]))
        _write(file, encryptor.finalize() + encryptor.tag)
        os.fsync(file.fileno())
    return (nonce + encryptor.tag).hex()


def read_array(path: Path, key: bytes, mark: str, dtype: str, shape: tuple[int, ...], told: bytes) -> NDArray[Any]:
    """Reads an array; memory is known before the file is opened.

    Args:
        path: the file.
        key: with which it was written.
        mark: what `write_array` returned: no earlier or other file of the same patient will do.
        dtype: as numpy writes it, such as "<i2".
        shape: of the array.
        told: as written.

    Raises:
        InvalidTag: it is not exactly that file.
        OSError: it is gone or cannot be read.
    """
    header, marks = _header(dtype, shape), bytes.fromhex(mark)
    nonce, tag = marks[:NONCE], marks[NONCE:]
    start = len(VERSION) + NONCE
    out = np.empty(len(header) + np.dtype(dtype).itemsize * math.prod(shape), np.uint8)
    with _mapped(path, start + len(out) + TAG) as file:
        if file[:start] != VERSION + nonce or file[-TAG:] != tag:
            raise InvalidTag
        with memoryview(file) as whole, whole[start:] as sealed:
            AESGCM(key).decrypt_into(nonce, sealed, told, out.data)
    if out[: len(header)].tobytes() != header:
        raise InvalidTag
    return out[len(header) :].view(dtype).reshape(shape)


def _mapped(path: Path, length: int) -> mmap.mmap:
    """The file in memory, without a copy: that copy would cost more than the cipher."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size != length:
            raise InvalidTag
        at = 0
        while at < length:  # a bad disk is an OSError here; at the first touch of a mapping it would end the process
            sent = os.sendfile(_nowhere(), file, at, length - at)
            if not sent:
                raise InvalidTag
            at += sent
        return mmap.mmap(file, length, access=mmap.ACCESS_READ)
    finally:
        os.close(file)


@functools.cache
def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


@functools.lru_cache(maxsize=256)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Magic and header of a `.npy` file, version 1.0 (numpy.lib.format)."""
    if np.dtype(dtype).kind not in _KINDS:
        raise InvalidTag
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _write(file: io.RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]
