"""A copy of the site's key for the safe: text that can be printed, sealed with a passphrase.

scrypt (RFC 7914) with n = 2^17, r = 8, p = 1, which takes 128 MiB of memory for each guess, then AES-256-GCM. The text
is base32: capital letters and 2 to 7, so that nothing is mistaken for anything else when it is typed from paper; each
line ends with a check of its own.

Guarantee: without the passphrase the text tells the key's public fingerprint and the day. It is as strong as the
passphrase; keep the two apart. A backup of before a rotation opens nothing of after it.
"""

import base64
import binascii
import hashlib
import re
import secrets
import unicodedata
from datetime import date
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedscan_client import keys
from fedscan_client.intake import cache_keys
from fedscan_client.keys import KEY_BYTES, Settings, SiteKey
from fedscan_core import auditlog
from fedscan_core.errors import FolderError, SiteKeyError
from fedscan_core.files import write_atomic

SHORTEST = 12  # characters of a passphrase
LOG_N = 17  # scrypt's n = 2^17: 128 * n * r = 128 MiB
_MOST_LOG_N = 20  # 1 GiB: a backup must not be able to exhaust a machine
_TITLE = "FEDSCAN SITE KEY BACKUP 1"
_LINE = 32  # characters
_LONGEST = 1 << 16
_SALT, _NONCE, _TAG = 16, 12, 16
_HEAD = re.compile(r"key [0-9a-f]{16}-[0-9a-f]{16} made \d{4}-\d{2}-\d{2} scrypt (\d{1,2})")


def backup(key: SiteKey, path: Path, passphrase: str) -> None:
    """Writes a backup of `key` (mode 0600). During an unfinished rotation that is the old key: finish it first.

    Raises:
        SiteKeyError: a rotation is unfinished, or the passphrase is too short.
        FolderError: there is a file already, or it cannot be written.
    """
    if key.staged is not None:
        raise SiteKeyError(
            "A rotation of the key is unfinished.", remedy="Finish it first: fedscan agent key rotate; then back it up."
        )
    if len(passphrase) < SHORTEST:
        raise SiteKeyError(
            f"The passphrase is shorter than {SHORTEST} characters.", remedy="Take five or six words at random."
        )
    refuse_existing(path)
    head = f"key {key.key_id} made {date.today()} scrypt {LOG_N}"
    salt, nonce = secrets.token_bytes(_SALT), secrets.token_bytes(_NONCE)
    secret = AESGCM(_stretch(passphrase, salt, LOG_N)).encrypt(nonce, key.names + key.wrapping, _told(head))
    text = base64.b32encode(salt + nonce + secret).decode().rstrip("=")
    lines = [text[start : start + _LINE] for start in range(0, len(text), _LINE)]
    body = [f"{number}  {_spaced(line)}  {_check(number, line)}" for number, line in enumerate(lines, 1)]
    words = "To restore: fedscan agent key restore SITE_DIR THIS_FILE", "Keep the passphrase elsewhere."
    try:
        write_atomic(path, "\n".join([_TITLE, f"{head} {_check(0, head)}", *body, *words, ""]).encode())
    except OSError as error:
        raise FolderError(f"{path} cannot be written: {error.strerror}.", remedy="Give another place.") from None


def refuse_existing(path: Path) -> None:
    """Raises FolderError where there is anything at `path`."""
    if path.exists() or path.is_symlink():
        raise FolderError(f"{path} exists; it was left alone.", remedy="Give a new name.")


def read(path: Path, passphrase: str) -> SiteKey:
    """The key in a backup; nothing is written.

    Raises:
        SiteKeyError: no backup, a line that was mistyped (by number), or another passphrase.
    """
    head, data = _parse(path)
    log_n = int(head.rpartition(" ")[2])
    salt, nonce, secret = data[:_SALT], data[_SALT : _SALT + _NONCE], data[_SALT + _NONCE :]
    try:
        plain = AESGCM(_stretch(passphrase, salt, log_n)).decrypt(nonce, secret, _told(head))
    except InvalidTag:
        raise SiteKeyError(
            f"The passphrase does not open {path.name}.", remedy="Try again; upper and lower case are different."
        ) from None
    return SiteKey(plain[:KEY_BYTES], plain[KEY_BYTES:])


def restore(path: Path, passphrase: str, site_folder: Path, settings: Settings, cache: Path | None) -> SiteKey:
    """Puts the key of a backup where the site keeps its key.

    Args:
        path: the backup.
        passphrase: of the backup.
        site_folder: the site's.
        settings: where the key is kept; for an environment variable it is written to SITE/key.environment.
        cache: the cache's folder, to refuse a key that is not its own; None: the site has none.

    Raises:
        SiteKeyError: as `read`; another key is in place, or the cache belongs to another one. Nothing was written.
    """
    key = read(path, passphrase)
    with auditlog.exclusive(site_folder / "key"):
        if cache is not None:
            cache_keys.check_key(cache, keys.with_staged(site_folder, settings, key))
        keys.put(site_folder, settings, key, "key restored")
    return key


def _parse(path: Path) -> tuple[str, bytes]:
    try:
        with path.open("rb") as file:
            lines = [line.strip() for line in file.read(_LONGEST).decode("ascii", "replace").splitlines()]
    except OSError as error:
        raise SiteKeyError(f"{path} cannot be read: {error.strerror}.", remedy="Give the backup's file.") from None
    lines = [line for line in lines if line]
    if len(lines) < 3 or " ".join(lines[0].upper().split()) != _TITLE:
        raise SiteKeyError(f"{path.name} is no backup of a site key of this version.", remedy="Give the whole file.")
    *words, check = lines[1].lower().split()
    head = " ".join(words)
    form = _HEAD.fullmatch(head)
    if form is None or check.upper() != _check(0, head) or not LOG_N <= int(form[1]) <= _MOST_LOG_N:
        raise SiteKeyError(
            f"{path.name}: the line that begins with 'key' is not as it was written.",
            remedy="Compare it with the original.",
        )
    text = ""
    size = -(-8 * (_SALT + _NONCE + 2 * KEY_BYTES + _TAG) // 5)
    for number, line in enumerate(lines[2:], 1):
        if len(text) >= size:
            break
        words = line.upper().split()
        letters = "".join(words[1:-1])
        if len(words) < 3 or words[0] != str(number) or words[-1] != _check(number, letters):
            raise SiteKeyError(
                f"{path.name}: line {number} does not fit its check.", remedy="Compare it with the original."
            )
        text += letters
    try:
        if len(text) != size:
            raise binascii.Error
        return head, base64.b32decode(text + "=" * (-len(text) % 8))
    except binascii.Error:
        raise SiteKeyError(f"{path.name}: a line is missing.", remedy="Compare it with the original.") from None


def _spaced(line: str) -> str:
    return " ".join(line[start : start + 4] for start in range(0, len(line), 4))


def _check(number: int, letters: str) -> str:
    return base64.b32encode(hashlib.sha256(f"{number} {letters}".encode()).digest()[:5]).decode()[:4]


def _told(head: str) -> bytes:
    return f"{_TITLE}\n{head}".encode()


def _stretch(passphrase: str, salt: bytes, log_n: int) -> bytes:
    text = unicodedata.normalize("NFKC", passphrase)  # keyboards write the same letter in several ways
    return Scrypt(salt=salt, length=KEY_BYTES, n=2**log_n, r=8, p=1).derive(text.encode())
