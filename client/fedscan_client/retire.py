"""Retiring a site: keys, cache and certificate are destroyed, for ever; ledger and audit log are kept and exported.

In this order, each step safe to do again: (1) a record in the audit log; (2) the file SITE/retired, which stops every
further enrolment and start; (3) the export; (4) the coordinator is told to forget the key; (5) destruction, keys first,
since without them the rest is unreadable wherever copies of it went.
"""

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedscan_client import connection as connections
from fedscan_client import door, key_use, keys, secret_file, site
from fedscan_client.audit import log
from fedscan_client.dp import ledger_lock
from fedscan_client.enrol import NEXT_KEY
from fedscan_client.node import start
from fedscan_client.site import Site
from fedscan_core.errors import FedscanError, FolderError
from fedscan_core.files import sync_folder, write_atomic

EXPORT = "retired.tar.gz"

# Kept where they are, and exported. The audit log's own key stays too: without it nobody can check the log; it opens
# nothing about patients.
KEPT = (
    "site.toml",
    "ledger.sqlite",
    "ledger.sqlite-wal",  # rows of a process that was killed
    "ledger.counter",
    "audit",
    "released.jsonl",
    "intake.jsonl",
    "withdrawals.jsonl",
    "runs.sqlite",
    "runs.sqlite-wal",
    "policy.json",
    "two_people.json",
)
_NOT_EXPORTED = (log.KEY, "log.lock")  # of SITE/audit: who has the key could forge a log

# Destroyed: secrets first, then what they protect, then what may depend on patients.
SECRETS = (connections.NODE_KEY, NEXT_KEY, keys.HANDED_OUT, "key.before")
FOLDERS = ("cache", "spool", "outbox", start.FOLDER)
FILES = (
    "intake.sqlite",
    "quarantine.sqlite",
    "eligible.sqlite",
    site.NAMED,
    "site.log",
    connections.CA_FILE,
    connections.FILE,
)


@dataclass(frozen=True)
class Retired:
    """What retiring does, or did: paths, whether the coordinator was told ("" = yes, else why not), the export."""

    destroyed: tuple[Path, ...]
    kept: tuple[Path, ...]
    by_hand: tuple[str, ...]
    export: Path
    sha256: str = ""
    not_told: str = ""


def plan(folder: Path, out: Path | None = None) -> Retired:
    """What `retire` would do; changes nothing.

    Raises:
        ConfigError: site.toml cannot be read.
        FolderError: the export's file is there already and is not this site's own.
    """
    here = site.load(folder)
    export = out or folder / EXPORT
    if export.exists() and not (folder / site.RETIRED).exists():
        raise FolderError(f"{export} is there already; it was left alone.", remedy="Give another file with --out.")
    gone = [path for path in _doomed(here) if path.exists() or path.is_symlink()]
    kept = [folder / name for name in KEPT if (folder / name).exists()]
    by_hand = []
    if here.key.source != "file":
        by_hand.append(f"Remove the site's key from {keys.where(folder, here.key)}, and from every backup.")
    else:
        by_hand.append("Destroy the backups of the site's key (fedscan agent key backup), on paper and on disks.")
    return Retired(tuple(gone), tuple(kept), tuple(by_hand), export)


def retire(folder: Path, out: Path | None = None) -> Retired:
    """Retires the site. Stopped half way, it is gone on with by calling it again.

    Args:
        folder: the site's.
        out: where the export goes; default SITE/retired.tar.gz.

    Raises:
        ConfigError, FolderError: see `plan`; or an agent serves the site, or the export cannot be written.
        SiteKeyError: a listener, pull or ingest of this site is at work.
        RecordDamaged: the audit log was changed: it takes no record, and nothing was destroyed.
    """
    here = site.load(folder)
    plan(folder, out)
    with start.only_agent(folder), key_use.alone(folder):
        ledger_lock.hold(here.ledger)  # until this process ends
        todo = plan(folder, out)
        if not (folder / site.RETIRED).exists():
            log.append(folder, "retire", destroyed=[path.name for path in todo.destroyed])
            write_atomic(folder / site.RETIRED, f"{datetime.now(UTC).date().isoformat()}\n".encode())
        sha = _export(here, todo)
        not_told = _tell(folder)
        for path in todo.destroyed:
            _destroy(path)
        sync_folder(folder)
    return Retired(todo.destroyed, todo.kept, todo.by_hand, todo.export, sha, not_told)


def _doomed(here: Site) -> list[Path]:
    secrets = [here.folder / name for name in SECRETS]
    if here.key.source == "file":
        secrets.append(here.folder / here.key.path)
    secrets.append(keys.staged_path(here.folder, here.key))
    secrets += here.folder.glob(".*.part")  # of writes that were killed: a key may be among them
    databases = [f"{name}{end}" for name in FILES for end in ("", "-wal", "-shm")]
    return [*secrets, *(here.folder / name for name in (*FOLDERS, *databases))]


def _tell(folder: Path) -> str:
    """Asks the coordinator to forget the key: why it could not be told, or "". The keys go all the same."""
    if not ((folder / connections.FILE).exists() and (folder / connections.NODE_KEY).exists()):
        return ""  # never enrolled, or an earlier call came as far as the keys
    try:
        door.retire(folder)
    except FedscanError as error:
        return str(error)
    return ""


def _export(here: Site, todo: Retired) -> str:
    """Writes the archive, fsynced, and returns its SHA-256. Deterministic but for the files' own times."""
    from fedscan_client import agent

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for path in todo.kept:
            members = sorted(it for it in path.rglob("*") if it.is_file()) if path.is_dir() else [path]
            for member in members:
                if not (path.is_dir() and member.name in _NOT_EXPORTED):
                    archive.add(member, f"{here.name}/{member.relative_to(here.folder)}", recursive=False)
        counter = here.book.counter
        if here.folder not in counter.parents and counter.exists():  # on another disk
            archive.add(counter, f"{here.name}/ledger.counter", recursive=False)
        told: object
        try:
            told = agent.report(here)
        except FedscanError as error:  # a ledger that was changed is exported as it is, and this beside it
            told = {"error": str(error)}
        _add_text(archive, f"{here.name}/ledger.json", json.dumps(told, indent=2) + "\n")
    content = data.getvalue()
    try:
        write_atomic(todo.export, content)
    except OSError as error:
        raise FolderError(
            f"{todo.export} cannot be written: {error.strerror}. Nothing was destroyed.",
            remedy="Give another file with --out.",
        ) from None
    return hashlib.sha256(content).hexdigest()


def _add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(text.encode()), 0o600
    archive.addfile(member, io.BytesIO(text.encode()))


def _destroy(path: Path) -> None:
    """Secrets are overwritten; the cache's own keys go before its images."""
    if path.is_dir() and not path.is_symlink():
        for key in sorted(path.rglob("*.key")):
            secret_file.forget(key)
        shutil.rmtree(path)
    else:
        secret_file.forget(path)
    with contextlib.suppress(OSError):
        sync_folder(path.parent)
