"""`fedscan server check`: is this coordinator sound, and what of it lies in clear? Reads only; changes nothing."""

import contextlib
import shutil
import sqlite3
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from cryptography import x509

from fedscan_core.errors import ConfigError, FolderError
from fedscan_server.coordinator import pki, registry, service, state, superlink, vault
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.coordinator.status import look

DISK_BYTES = 10 * 2**30  # less free space is worth a remark
SOON = timedelta(days=30)
_NAMED = 5  # files named in one line


@dataclass(frozen=True)
class Item:
    """One line: "ok", "note" (know this) or "bad" (repair this; the exit code is 1)."""

    verdict: Literal["ok", "note", "bad"]
    text: str
    remedy: str = ""


def check(c: Coordinator) -> Iterator[Item]:
    """Looks at everything, in the order in which a person repairs it."""
    yield from _modes(c)
    yield from _secrets(c)
    yield from _certificate(c)
    yield from _flower()
    yield from _databases(c)
    yield from _disk(c)
    yield from _processes(c)
    yield from _clear(c)


def _modes(c: Coordinator) -> Iterator[Item]:
    """Files that others of this machine can read or change."""
    loose = [path for path in (c.folder, *c.folder.rglob("*")) if not path.is_symlink() and _open_to_others(path)]
    if loose:
        names = ", ".join(str(path.relative_to(c.folder.parent)) for path in loose[:_NAMED])
        more = f" and {len(loose) - _NAMED} more" if len(loose) > _NAMED else ""
        yield Item("bad", f"Others can read or change {names}{more}.", f"chmod -R go= {c.folder}")
    else:
        yield Item("ok", f"Nobody else can read {c.folder}.")


def _open_to_others(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # it went away meanwhile
        return bool(path.stat().st_mode & 0o077)
    return False


def _secrets(c: Coordinator) -> Iterator[Item]:
    for path in (c.folder / "secrets" / "control", c.superexec_secret):
        if not path.is_file() or path.stat().st_size < 32:
            yield Item("bad", f"{path} is missing or too short.", "Restore it from a backup.")
    if c.encrypt:
        try:
            service.environment(c)
            yield Item("ok", "The vault's key is there.")
        except ConfigError as error:
            yield Item("bad", error.message, error.remedy)


def _certificate(c: Coordinator) -> Iterator[Item]:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(c.certificate, c.private_key, password=lambda: "")
        certificate = x509.load_pem_x509_certificate(c.certificate.read_bytes())
    except (OSError, ssl.SSLError, ValueError) as error:
        yield Item(
            "bad",
            f"The certificate and its key do not go together ({type(error).__name__}).",
            "fedscan server cert renew",
        )
        return
    renew = "fedscan server cert renew, then stop and start; sites need nothing new."
    until, now = certificate.not_valid_after_utc, datetime.now(UTC)
    if not pki.covers(certificate, c.host):
        yield Item("bad", f"The certificate is not made for {c.host}.", renew)
    if until < now or certificate.not_valid_before_utc > now:
        yield Item("bad", f"The certificate is valid from {certificate.not_valid_before_utc} to {until}.", renew)
    elif until < now + SOON:
        yield Item("note", f"The certificate ends on {until:%Y-%m-%d}.", renew)
    else:
        yield Item("ok", f"The certificate for {c.host} is good until {until:%Y-%m-%d}.")
    if not c.ca_pem:
        yield Item("note", "The certificate is a public authority's: sites trust all of those.")
        return
    ca = x509.load_pem_x509_certificate(c.ca_pem.encode())
    if ca.not_valid_after_utc < now + 12 * SOON:
        yield Item(
            "note",
            f"The authority ends on {ca.not_valid_after_utc:%Y-%m-%d}.",
            "Every site has to enrol with a new one.",
        )


def _flower() -> Iterator[Item]:
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        installed = "not installed"
    if installed == superlink.FLOWER:
        yield Item("ok", f"Flower {installed}.")
    else:
        yield Item("bad", f"Flower is {installed}, not {superlink.FLOWER}.", f"Install flwr=={superlink.FLOWER}.")


def _databases(c: Coordinator) -> Iterator[Item]:
    try:
        with registry.open_(c) as db:
            sound = db.execute("PRAGMA quick_check").fetchone()[0]
    except FolderError as error:
        yield Item("bad", error.message, error.remedy)
        return
    if sound == "ok":
        yield Item("ok", "The registry of sites and people is sound.")
    else:
        yield Item("bad", f"{c.database} is damaged.", "Restore it from a backup.")


def _disk(c: Coordinator) -> Iterator[Item]:
    free = shutil.disk_usage(c.folder).free
    if free < DISK_BYTES:
        yield Item("note", f"{_size(free)} are free on the disk.", "A full disk ends runs; make room.")
    else:
        yield Item("ok", f"{_size(free)} are free on the disk.")


def _processes(c: Coordinator) -> Iterator[Item]:
    if service.pid(c) is None:
        yield Item("note", "The coordinator does not run.", "fedscan server start")
        return
    now = look(c)
    for name, why in (("SuperLink", now.superlink), ("edge", now.edge)):
        if why:
            yield Item("bad", f"The {name} does not answer: {why}", f"Look at {c.logs}.")
        else:
            yield Item("ok", f"The {name} answers.")


def _clear(c: Coordinator) -> Iterator[Item]:
    """What a copy of the disk would show."""
    if c.flower_database.exists() and (found := _flower_objects(c.flower_database)) is None:
        yield Item("note", f"{c.flower_database} cannot be read now: what lies in it is not known.", "Try again.")
    elif c.flower_database.exists() and found:
        count, size, free = found
        wal = c.flower_database.with_name(c.flower_database.name + "-wal")
        log = wal.stat().st_size if wal.exists() else 0
        if count or log:
            yield Item(
                "note",
                f"In clear in {c.flower_database.name}: {count} parts ({_size(size)}) of models on their way to sites "
                f"and of sites' noisy updates on their way to a run, until each is delivered; {_size(log)} in its "
                f"write-ahead log, emptied each minute; {_size(free)} of overwritten free pages.",
                "Flower cannot encrypt them: put the folder on an encrypted disk.",
            )
        else:
            yield Item("ok", f"No update waits in {c.flower_database.name}.")
    clear, sealed = 0, 0
    for path in c.runs.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(FileNotFoundError):
                if vault.is_sealed(path):
                    sealed += 1
                else:
                    clear += path.stat().st_size
    how = f"{sealed} files are encrypted." if c.encrypt else f"Nothing is encrypted: encrypt = true in {state.FILE}."
    yield Item("note", f"In clear in runs: {_size(clear)}: orders, settings, figures, logs. {how}")
    yield Item("note", "In clear: the private keys in pki, the secrets, and who takes part (coordinator.sqlite).")


def _flower_objects(path: Path) -> tuple[int, int, int] | None:
    """(parts, their bytes, bytes of free pages) of Flower's database; None where it cannot be read now."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2.0)) as db:
            count, size = db.execute(
                "SELECT count(*), coalesce(sum(length(content)), 0) FROM objects WHERE is_available = 1"
            ).fetchone()
            free = db.execute("PRAGMA freelist_count").fetchone()[0] * db.execute("PRAGMA page_size").fetchone()[0]
            return int(count), int(size), int(free)
    except sqlite3.Error:
        return None


def _size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
