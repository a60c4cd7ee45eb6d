"""What two named people must agree on: the first one's word waits until another one says exactly the same.

    SITE/two_people.json    words that wait (0600): what it is about, a digest of exactly what, who, which login, when

Names are typed, not proved; the login of the operating system is noted beside each, here and in the audit log. Whoever
may write site.toml may also take `two_people` out of it: that is logged, and published with the policy.
"""

import getpass
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedscan_client.audit import log
from fedscan_core import auditlog, files
from fedscan_core.errors import ConfigError, FolderError

FILE = "two_people.json"
WAITS = timedelta(days=14)


@dataclass(frozen=True)
class Word:
    """What one person said: `subject` is a SHA-256, `why` as the caller gave it, `utc` ISO 8601."""

    what: str
    subject: str
    by: str
    login: str
    utc: str
    why: str


def agree(folder: Path, what: str, subject: dict[str, Any], by: str, why: str) -> Word | None:
    """The first person's word once a second one says the same within 14 days; None: this word now waits for another.

    The first word is used up before this returns: a crash before the decision took effect asks both again.

    Args:
        folder: the site's.
        what: "budget" or "quarantine".
        subject: exactly what is decided, fit for JSON; only its digest is kept.
        by: who says it.
        why: kept while it waits; sealed by the caller where it may name a patient.

    Raises:
        ConfigError: no name.
        FolderError: the file of words cannot be read.
    """
    name, now = person(by), datetime.now(UTC)
    digest = hashlib.sha256(json.dumps([what, subject], sort_keys=True).encode()).hexdigest()
    with auditlog.exclusive(folder / FILE):
        words = [word for word in _read(folder) if datetime.fromisoformat(word.utc) > now - WAITS]
        same = [word for word in words if word.subject == digest]
        first = next((word for word in same if _plain(word.by) != _plain(name)), None)
        if first is None and not same:
            words.append(Word(what, digest, name, login(), now.isoformat(timespec="seconds"), why))
            log.append(folder, what, step="first of two people", by=name, login=login(), subject=digest)
        if first is not None:
            words = [word for word in words if word.subject != digest]
        files.write_atomic(folder / FILE, (json.dumps([asdict(word) for word in words], indent=2) + "\n").encode())
    return first


def person(text: str) -> str:
    """A name as it is kept.

    Raises:
        ConfigError: none, too long, or with characters that cannot be printed.
    """
    name = " ".join(text.split())
    if not _plain(name) or len(name) > 100 or not name.isprintable():
        raise ConfigError("A decision needs the name of who takes it.", remedy='Give it: --by "A. Meier".')
    return name


def login() -> str:
    """The operating system's name of who runs this."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry
        return f"uid {os.getuid()}"


def several(text: str) -> bool:
    """Whether a text names two different people: "A. Meier and B. Schmidt", or with a comma."""
    return len({_plain(name) for name in text.replace(",", " and ").split(" and ") if _plain(name)}) > 1


def _plain(name: str) -> str:
    """What is compared: A. Meier and A.Meier are one person."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _read(folder: Path) -> list[Word]:
    path = folder / FILE
    try:
        return [Word(**word) for word in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        raise FolderError(f"{path} cannot be read.", remedy="Remove it: who has decided alone decides again.") from None
