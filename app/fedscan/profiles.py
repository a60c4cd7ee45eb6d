"""A researcher's coordinators: one file of profiles and one key for each, readable by nobody else.

$XDG_CONFIG_HOME/fedscan/coordinators.toml     default = NAME, and a table [coordinator.NAME] for each
$XDG_CONFIG_HOME/fedscan/keys/NAME             the Ed25519 key (OpenSSH) that signs what is launched there

The key never leaves this machine. Who has the file can act as its owner until the coordinator removes that person.
"""

import dataclasses
import os
import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
)

from fedscan_core.auditlog import exclusive
from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.files import sync_folder, write_atomic

_HEAD = b"""\
# Coordinators to launch at. `fedscan login INVITE` adds to this file; keep it secret: the tokens are passwords.
# `default` is the one that is meant where no --profile is given.
"""


@dataclass(frozen=True)
class Profile:
    """One person at one coordinator.

    Attributes:
        name: what --profile takes.
        address: https://HOST[:PORT].
        coordinator: what the coordinator calls itself.
        ca: PEM of the only authority that is trusted; "" = public authorities.
        person: the name that orders are launched under.
        role: viewer, researcher or operator, as it was at the time of `login`.
        token: bearer token.
    """

    name: str
    address: str
    coordinator: str
    ca: str
    person: str
    role: str
    token: str = dataclasses.field(repr=False)


def folder() -> Path:
    """Where profiles and keys lie: $XDG_CONFIG_HOME/fedscan, by default ~/.config/fedscan."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "fedscan"


def file() -> Path:
    """The file of profiles."""
    return folder() / "coordinators.toml"


def every() -> tuple[dict[str, Profile], str]:
    """All profiles by name, and the name of the default one ("" where there is none).

    Raises:
        ConfigError: the file is damaged, or others can read it.
    """
    path = file()
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"Others can read {path}, which holds passwords.", remedy=f"chmod 600 {path}")
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        tables = tree.get("coordinator", {})
        found = {name: Profile(name=name, **table) for name, table in tables.items()}
        default = tree.get("default", "")
        sound = isinstance(default, str) and all(
            isinstance(value, str) for profile in found.values() for value in dataclasses.asdict(profile).values()
        )
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", remedy="Check who owns it.") from None
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound or not all(re.fullmatch(NAME_PATTERN, name) for name in found):
        raise ConfigError(f"{path} is damaged.", remedy="Mend it, or move it away and ask for new invitations.")
    return found, default


def load(name: str | None = None) -> Profile:
    """The profile of this name; without a name the default one.

    Raises:
        ConfigError: there is none of that name, none at all, or the file is damaged.
    """
    found, default = every()
    if not found:
        raise ConfigError(
            "You are logged in at no coordinator.", remedy="Ask one for an invitation, then: fedscan login INVITE.toml"
        )
    wanted = name or default
    if wanted not in found:
        what = f"There is no profile '{wanted}'." if wanted else f"{file()} names no default."
        raise ConfigError(what, remedy=f"Give one of these: --profile {' | '.join(sorted(found))}")
    return found[wanted]


def save(profile: Profile) -> bool:
    """Adds a profile, or replaces the one of that name; the first one is the default. True if it is the default.

    Raises:
        ConfigError: the file is damaged; it was left alone.
        FolderError: it cannot be written; the old one is whole.
    """
    try:
        return _save(profile)
    except OSError as error:
        remedy = "Mend that, then log in with a new invitation: this one is used."
        raise FolderError(f"{file()} cannot be written: {error.strerror}.", remedy=remedy) from None


def _save(profile: Profile) -> bool:
    with exclusive(file()):
        found, default = every()
        default = default if default in found else profile.name
        found[profile.name] = profile
        tables: dict[str, Any] = {}
        for name, each in sorted(found.items()):
            tables[name] = {key: value for key, value in dataclasses.asdict(each).items() if key != "name"}
        write_atomic(file(), _HEAD + tomli_w.dumps({"default": default, "coordinator": tables}).encode())
    return default == profile.name


def check_name(name: str) -> None:
    """Refuses a name that could be no file's.

    Raises:
        ConfigError: so.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"'{name}' is no name of a profile.", remedy="Use letters, digits, dot, dash, underscore.")


def name_for(coordinator: str) -> str:
    """A profile name made of a coordinator's own: letters and digits, the rest dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", coordinator).strip("-").lower()[:40] or "coordinator"


def make_key(name: str) -> Ed25519PrivateKey:
    """The key of a profile, made (0600) where there is none; one that is there stays: hospitals know its half.

    Raises:
        ConfigError: as `key`.
        FolderError: it cannot be made.
    """
    _make_once(_key_file(name))
    return key(name)


def key(name: str) -> Ed25519PrivateKey:
    """The key of a profile.

    Raises:
        ConfigError: it is missing, damaged, of another kind, or others can read it.
    """
    path = _key_file(name)
    again = "Restore it from a backup; or move it away and log in with a new invitation."
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"Others can read {path}, your signing key.", remedy=f"chmod 600 {path}")
        found = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{path}, your signing key, cannot be read: {error.strerror}.", remedy=again) from None
    except ValueError:
        raise ConfigError(f"{path} holds no key.", remedy=again) from None
    if not isinstance(found, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds another kind of key.", remedy=again)
    return found


def _key_file(name: str) -> Path:
    return folder() / "keys" / name


def _make_once(path: Path) -> None:
    """A temporary file, then a link: there is a whole key at `path` or none, and two logins agree on one."""
    if path.exists():
        return
    data = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(part, data)
        try:
            os.link(part, path)
        except FileExistsError:
            pass  # another login was faster
        finally:
            part.unlink()
        sync_folder(path.parent)
    except OSError as error:
        raise FolderError(
            f"{path} cannot be made: {error.strerror}.", remedy="Set XDG_CONFIG_HOME to a folder of your own."
        ) from None
