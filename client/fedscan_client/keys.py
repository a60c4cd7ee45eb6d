"""The site's key: what makes pseudonyms, and what protects everything kept of a patient. It never leaves the site.

`names` makes pseudonyms and is never changed: other names would be other patients. `wrapping` wraps each patient's own
key, the spool and the locators; `key_rotation.rotate` replaces it. Both are 32 bytes of the operating system's entropy.

Where it is kept is said in site.toml, and nowhere else is it written:

    [key]
    source = "file"            # SITE/key: a regular file of this user, mode 0600, or it is refused
    source = "environment"     # the variable FEDSCAN_SITE_KEY, put there by a secret store or systemd's EnvironmentFile
    source = "keyring"         # the operating system's keyring (pip install 'fedscan[keyring]')

Guarantee: without the key nothing in the cache can be read, and no pseudonym recomputed from a hospital's id (HMAC and
HKDF with SHA-256, RFC 2104 and 5869; AES-256-GCM, NIST SP 800-38D). Assumed: the machine's administrator, its memory
and whoever can run programs as this user. Neither `repr` nor an error's text holds a secret.
"""

import base64
import hashlib
import os
import secrets
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedscan_client import secret_file
from fedscan_client.audit import log
from fedscan_core import auditlog
from fedscan_core.errors import ConfigError, MissingExtra, SiteKeyError
from fedscan_core.files import sync_folder, write_atomic

KEY_BYTES = 32
STAGED = ".next"  # ending of the file that holds the new key while `key_rotation.rotate` is at work
HANDED_OUT = "key.environment"  # a key on its way to an environment variable
_BEFORE = "key.before"  # the old key, until the rotation of an environment variable has ended: the variable forgets it

_TOKEN = "fedscan-key-1:"
_CHECK_BYTES = 4  # of SHA-256: finds a typing error, not a forger
_ABOUT = "# The key of a fedscan site. Secret: never send it anywhere. `fedscan agent key backup` makes a safe copy.\n"
_DONE = "# Everything is under this key.\n"  # at the end of the staged key's file, until a person sets the variable
_BACKUP = "Restore it from its backup: fedscan agent key restore."


class Settings(BaseModel):
    """Section `[key]` of site.toml: where the key is kept.

    Attributes:
        source: file, environment or keyring.
        path: of the file; inside the site's folder unless absolute.
        variable: name of the environment variable.
        service: under which the keyring keeps it; two sites on one machine need two names.
        user: the name within that service.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: Literal["file", "environment", "keyring"] = "file"
    path: Path = Path("key")
    variable: str = Field(default="FEDSCAN_SITE_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    service: str = Field(default="fedscan", min_length=1)
    user: str = Field(default="site key", min_length=1)


@dataclass(frozen=True)
class SiteKey:
    """The site's two secrets.

    Attributes:
        names: makes pseudonyms, splits and date shifts.
        wrapping: wraps patients' keys, spool and locators.
        staged: the new `wrapping` while a rotation is unfinished: what was already wrapped with it stays readable.
    """

    names: bytes = field(repr=False)
    wrapping: bytes = field(repr=False)
    staged: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raises SiteKeyError where a secret has not 32 bytes."""
        if any(len(secret) != KEY_BYTES for secret in (self.names, self.wrapping, self.staged or self.wrapping)):
            raise SiteKeyError(f"A site key is made of secrets of {KEY_BYTES} bytes.", remedy="Use keys.create.")

    def project(self, name: str) -> bytes:
        """The secret for one project's pseudonyms: those of two projects cannot be linked without the site's key."""
        return _derive(self.names, "fedscan project 1\0" + name, KEY_BYTES)

    @property
    def names_id(self) -> str:
        """Public fingerprint of `names`; 64 bits of a one-way function."""
        return _derive(self.names, "fedscan key id 1", 8).hex()

    @property
    def wrapping_id(self) -> str:
        """Public fingerprint of `wrapping`."""
        return _derive(self.wrapping, "fedscan key id 1", 8).hex()

    @property
    def key_id(self) -> str:
        """Public fingerprint of both, for logs: the first half never changes, the second with every rotation."""
        return f"{self.names_id}-{self.wrapping_id}"

    def wrappings(self) -> dict[str, bytes]:
        """Fingerprint -> secret: what may have wrapped something, the present one first."""
        both = [self] if self.staged is None else [self, self.after()]
        return {key.wrapping_id: key.wrapping for key in both}

    def after(self) -> "SiteKey":
        """The key as it will be once the staged one is in place."""
        return SiteKey(self.names, self.staged or self.wrapping)


# ------------------------------------------------------------------------------------------------- where it is kept


def read_settings(site_folder: Path) -> Settings:
    """Section `[key]` of SITE/site.toml; the defaults where there is no such file or section yet.

    Raises:
        ConfigError: not TOML, or a wrong key or value.
    """
    path = site_folder / "site.toml"
    try:
        return Settings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")).get("key", {}))
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", remedy="Correct it.") from None
    except ValidationError as error:
        item = error.errors()[0]
        name = ".".join(["key", *map(str, item["loc"])])
        raise ConfigError(f"{path}: '{name}': {item['msg']}.", remedy="Correct that key.") from None


def load(site_folder: Path, settings: Settings) -> SiteKey:
    """The site's key. While a rotation is unfinished it opens what was wrapped before and after.

    Once all is under the new key it is that one, whatever the environment variable says yet.

    Raises:
        SiteKeyError: it is missing, damaged, or others can read it.
        MissingExtra: source "keyring" without the package keyring.
    """
    key, done = _load(site_folder, settings)
    return key.after() if done else key


def load_both(site_folder: Path, settings: Settings) -> SiteKey:
    """As `load`, but with the old key and the staged one until the rotation has ended: for `key_rotation`."""
    return _load(site_folder, settings)[0]


def half_rotated(site_folder: Path, settings: Settings) -> bool:
    """Whether a rotation was stopped: some of what is kept may be under the old key, some under the staged one."""
    staged = secret_file.read(staged_path(site_folder, settings))
    return staged is not None and _DONE not in staged


def create(site_folder: Path, settings: Settings) -> SiteKey:
    """Draws the key of a new site and keeps it where `settings` say.

    For an environment variable it is written to SITE/key.environment (0600), as `VARIABLE=value`, to be moved to where
    the variable is set from.

    Raises:
        SiteKeyError: there already is one; it is left alone.
    """
    key = SiteKey(secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES))
    with auditlog.exclusive(site_folder / "key"):
        put(site_folder, settings, key, "key created")
    return key


def with_staged(site_folder: Path, settings: Settings, key: SiteKey) -> SiteKey:
    """`key` together with the staged one of an unfinished rotation, if there is one. Errors as `load`."""
    path = staged_path(site_folder, settings)
    return _with(key, secret_file.read(path), path)


def put(site_folder: Path, settings: Settings, key: SiteKey, event: str) -> None:
    """Keeps `key` where `settings` say and logs `event` with the fingerprint. Never replaces another key.

    The caller holds `auditlog.exclusive(SITE/key)`.

    Raises:
        SiteKeyError: another key is there.
    """
    there = _read(site_folder, settings)
    if there is None and settings.source == "environment":
        there = (secret_file.read(site_folder / HANDED_OUT) or "").partition("=")[2] or None
    if there is not None:
        if _parse(there, where(site_folder, settings)) != key:
            raise SiteKeyError(
                f"There already is a site key in {where(site_folder, settings)}; it was left alone.",
                remedy="Whatever was written with it would be lost. A new site gets a folder of its own.",
            )
    else:
        _write(site_folder, settings, key)
    note(site_folder, event, key)


def replace_by_staged(site_folder: Path, settings: Settings, key: SiteKey) -> bool:
    """The last step of a rotation: the staged key takes the old one's place; False where a person must do it.

    Everything is under the staged key already.
    """
    path = staged_path(site_folder, settings)
    for name in (path.name, _BEFORE):
        for stray in path.parent.glob(f".{name}.*.part"):  # a key whose writing was killed: never used
            stray.unlink()
    if settings.source == "file":
        os.replace(path, site_folder / settings.path)
        sync_folder(path.parent)
        return True
    if settings.source == "keyring":
        _write(site_folder, settings, key.after())
    elif _parse(_read(site_folder, settings) or "", where(site_folder, settings)) != key.after():
        if half_rotated(site_folder, settings):
            with path.open("ab") as file:
                file.write(_DONE.encode())
                file.flush()
                os.fsync(file.fileno())
        return False
    for left in (site_folder / _BEFORE, site_folder / HANDED_OUT, path):  # old keys first; without `path` it has ended
        secret_file.forget(left)
    sync_folder(path.parent)
    return True


def stage(site_folder: Path, settings: Settings, key: SiteKey) -> SiteKey:
    """`key` with a new `wrapping` beside the old one, on disk before this returns."""
    staged = replace(key, staged=secrets.token_bytes(KEY_BYTES))
    if settings.source == "environment":  # first: it counts only together with the staged one
        write_atomic(site_folder / _BEFORE, (_ABOUT + text_of(key) + "\n").encode())
    write_atomic(staged_path(site_folder, settings), (_ABOUT + text_of(staged.after()) + "\n").encode())
    return staged


def staged_path(site_folder: Path, settings: Settings) -> Path:
    """Where the new key lies during a rotation; it is as precious as the key itself."""
    path = site_folder / (settings.path if settings.source == "file" else "key")
    return path.with_name(path.name + STAGED)


def where(site_folder: Path, settings: Settings) -> str:
    """The key's place in words."""
    if settings.source == "environment":
        return f"the environment variable {settings.variable}"
    if settings.source == "keyring":
        return f"the keyring (service '{settings.service}', user '{settings.user}')"
    return str(site_folder / settings.path)


def note(site_folder: Path, event: str, key: SiteKey) -> None:
    """One line in the site's audit log."""
    log.append(site_folder, "key", did=event, key=key.key_id)


# ------------------------------------------------------------------------------------------------------ text and files


def _load(site_folder: Path, settings: Settings) -> tuple[SiteKey, bool]:
    """The key with the staged one, and whether everything is under the latter."""
    path = staged_path(site_folder, settings)
    staged = secret_file.read(path)  # first: should it take the key's place just now, the key read next is the new one
    text = _read(site_folder, settings)
    if text is None:
        raise SiteKeyError(
            f"There is no site key in {where(site_folder, settings)}.",
            remedy=f"{_handed_out(site_folder)}For a new site: fedscan agent key create {site_folder}. {_BACKUP}",
        )
    key = _with(_parse(text, where(site_folder, settings)), staged, path)
    if staged is None or settings.source != "environment":
        return key, False
    before = secret_file.read(site_folder / _BEFORE)
    if before is not None:  # whichever of the two the variable holds
        old = _parse(before, str(site_folder / _BEFORE)).wrapping
        key = SiteKey(key.names, old, key.after().wrapping)
    return key, _DONE in staged


def _with(key: SiteKey, staged: str | None, path: Path) -> SiteKey:
    if staged is None:
        return key
    following = _parse(staged, str(path))
    if following.names != key.names:
        raise SiteKeyError(
            f"{path}, the new key of an unfinished rotation, belongs to another site key.", remedy=_BACKUP
        )
    return key if following.wrapping == key.wrapping else replace(key, staged=following.wrapping)


def text_of(key: SiteKey) -> str:
    """The key as one line of text: `fedscan-key-1:` and base64 of names, wrapping and 4 bytes of checksum."""
    return _TOKEN + base64.b64encode(_with_check(key.names + key.wrapping)).decode()


def _parse(text: str, place: str) -> SiteKey:
    """The key in a text with comments; errors name the place, never the text."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    try:
        if len(lines) != 1 or not lines[0].startswith(_TOKEN):
            raise ValueError
        data = base64.b64decode(lines[0][len(_TOKEN) :], validate=True)
        if len(data) != 2 * KEY_BYTES + _CHECK_BYTES or data != _with_check(data[: 2 * KEY_BYTES]):
            raise ValueError
    except ValueError:  # binascii.Error is one
        raise SiteKeyError(
            f"{place} does not hold a whole site key of this version.",
            remedy="Keep it aside, and restore the key from its backup: fedscan agent key restore.",
        ) from None
    return SiteKey(data[:KEY_BYTES], data[KEY_BYTES : 2 * KEY_BYTES])


def _with_check(data: bytes) -> bytes:
    return data + hashlib.sha256(b"fedscan key 1\0" + data).digest()[:_CHECK_BYTES]


def _handed_out(site_folder: Path) -> str:
    path = site_folder / HANDED_OUT
    return f"Set the variable from {path}, then remove that file. " if path.exists() else ""


def _read(site_folder: Path, settings: Settings) -> str | None:
    if settings.source == "environment":
        return os.environ.get(settings.variable) or None
    if settings.source == "keyring":
        ring = _keyring()
        try:
            found: str | None = ring.get_password(settings.service, settings.user)
        except ring.errors.KeyringError as error:
            raise _keyring_failed(error) from None
        return found
    return secret_file.read(site_folder / settings.path)


def _write(site_folder: Path, settings: Settings, key: SiteKey) -> None:
    text = text_of(key)
    if settings.source == "keyring":
        ring = _keyring()
        try:
            ring.set_password(settings.service, settings.user, text)
        except ring.errors.KeyringError as error:
            raise _keyring_failed(error) from None
        return
    path, line = site_folder / settings.path, text
    if settings.source == "environment":
        path, line = site_folder / HANDED_OUT, f"{settings.variable}={text}"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, (_ABOUT + line + "\n").encode())
    except OSError as error:
        raise SiteKeyError(f"{path} cannot be written: {error.strerror}.", remedy="Check its folder.") from None


def _keyring() -> Any:
    try:
        import keyring
        import keyring.errors
    except ImportError:
        raise MissingExtra(
            "The keyring needs the package keyring.",
            remedy="Install it (pip install 'fedscan[keyring]'), or set source in [key] of site.toml.",
        ) from None
    return keyring


def _keyring_failed(error: Exception) -> SiteKeyError:
    return SiteKeyError(
        f"The operating system's keyring did not answer ({type(error).__name__}).",
        remedy="Unlock it, run this in a session that has one, or set source in [key] of site.toml.",
    )


def _derive(secret: bytes, purpose: str, length: int) -> bytes:
    return HKDF(SHA256(), length, salt=None, info=purpose.encode()).derive(secret)


def derive_wrapping(wrapping: bytes, purpose: str) -> bytes:
    """The key that wraps things of one kind, unrelated to those of any other kind (RFC 5869)."""
    return _derive(wrapping, f"fedscan wrapping 1\0{purpose}", KEY_BYTES)
