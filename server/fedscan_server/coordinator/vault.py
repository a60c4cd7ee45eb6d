"""Files encrypted at rest: AES-256-GCM (NIST SP 800-38D), where a key is set; plain files where none is.

The key is 64 hex digits in FEDSCAN_VAULT_KEY, or in the file that FEDSCAN_VAULT_KEY_FILE names. Each file has its own
key, derived (HKDF-SHA256, RFC 5869) from a random salt and the file's name below `runs/`: a file moved to another name
or another run does not open. An older copy of the same file does: rolling back is not found here.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.files import write_atomic

KEY, KEY_FILE = "FEDSCAN_VAULT_KEY", "FEDSCAN_VAULT_KEY_FILE"
MAGIC = b"fedscan-vault-1\n"
_SALT, _NONCE = 32, 12  # bytes


def write(path: Path, data: bytes) -> None:
    """Replaces the file atomically (0600): encrypted if a key is set, plain if not.

    Raises:
        ConfigError: the key is none, or its file cannot be read.
    """
    write_atomic(path, seal(path, data))


def read(path: Path) -> bytes:
    """What `write` wrote.

    Raises:
        ConfigError: it is encrypted and no key is set, or plain and a key is set: then somebody may have put it there.
        FolderError: it was changed, cut, exchanged with another file, or belongs to another key.
        FileNotFoundError: it is not there.
    """
    return unseal(path, path.read_bytes())


def is_sealed(path: Path) -> bool:
    """Whether the file is encrypted."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def seal(path: Path, data: bytes) -> bytes:
    """The bytes that `write` puts at `path`."""
    key = _key()
    if key is None:
        return data
    salt, nonce = secrets.token_bytes(_SALT), secrets.token_bytes(_NONCE)
    return MAGIC + salt + nonce + AESGCM(_file_key(key, salt, path)).encrypt(nonce, data, MAGIC)


def unseal(path: Path, data: bytes) -> bytes:
    """The content of bytes that lie at `path`; errors as in `read`."""
    key = _key()
    if not data.startswith(MAGIC):
        if key is None:
            return data
        raise ConfigError(
            f"{path} is not encrypted, though this coordinator encrypts.",
            remedy="If it is older than the key, finish that run without the key; if not, somebody exchanged it.",
        )
    if key is None:
        raise ConfigError(f"{path} is encrypted and no key is set.", remedy=f"Set {KEY_FILE} or {KEY}.")
    start = len(MAGIC) + _SALT + _NONCE
    salt, nonce = data[len(MAGIC) : len(MAGIC) + _SALT], data[len(MAGIC) + _SALT : start]
    try:
        return AESGCM(_file_key(key, salt, path)).decrypt(nonce, data[start:], MAGIC)
    except (InvalidTag, ValueError):
        raise FolderError(
            f"{path} does not open: it was changed, exchanged, or belongs to another key.",
            remedy="Restore it from a backup, or set the right key.",
        ) from None


def new_key(path: Path) -> None:
    """Writes a new random key to a new file (0600).

    Raises:
        FolderError: the file exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise FolderError(f"{path} exists; it was left alone.", remedy="A vault key must not be replaced.") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_key_set(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a usable key is set in this environment.

    Raises:
        ConfigError: something is set that is none.
    """
    return _key(environment) is not None


def _key(environment: Mapping[str, str] = os.environ) -> bytes | None:
    text, file = environment.get(KEY, ""), environment.get(KEY_FILE, "")
    source = KEY
    if file and not text:
        source = file
        try:
            if os.stat(file).st_mode & 0o077:
                raise ConfigError(f"Others can read {file}.", remedy=f"chmod 600 {file}")
            text = Path(file).read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}.", remedy=f"Correct {KEY_FILE}.") from None
    elif not text:
        return None
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"{source} holds no key: 64 hex digits.", remedy="Make one: openssl rand -hex 32")
    return key


def _file_key(key: bytes, salt: bytes, path: Path) -> bytes:
    """A file's own key. Its name is what follows the last `runs` in the path, so that STATE may be moved as a whole."""
    parts = path.absolute().parts
    below = len(parts) - 1 - parts[::-1].index("runs") if "runs" in parts[:-1] else len(parts) - 3
    name = "\0".join(parts[max(below + 1, 0) :])
    return HKDF(SHA256(), length=32, salt=salt, info=MAGIC + name.encode()).derive(key)
