"""The site's audit log: one line for whatever left, was decided, seen or changed, on disk before the call returns.

    SITE/audit/log-000001.jsonl    HMAC-chained JSON lines (see `chain`); a full file is followed by the next number
    SITE/audit/key                 what the chain is keyed with (0600), drawn by the first append
    SITE/audit/log.lock            one writer at a time

Guarantee: an edited, dropped, inserted or moved line is found by `verify.verify`; so is a cut at the end, an older copy
or a log begun anew, up to the last anchor that somebody else keeps. Even who has the key cannot rewrite what was
anchored. Assumed: no line holds what identifies a patient; every writer of this repository keeps to that.

A last line without its line end is a write that never returned, so nobody acted on it: the next append drops it.
The logs of earlier versions, released.jsonl and intake.jsonl, stay as they are; the first record holds their digests.

Events: release, answer, request, approval, policy, budget, start, stop, anchor, access, ingest, pull, quarantine,
withdrawal, key. Others may come.
"""

import contextlib
import getpass
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedscan_client import secret_file
from fedscan_client.audit import chain
from fedscan_core import auditlog
from fedscan_core.errors import RecordDamaged, SiteKeyError
from fedscan_core.files import sync_folder, write_atomic

FOLDER, KEY = "audit", "key"
OLD = ("released.jsonl", "intake.jsonl")  # what earlier versions wrote
ROTATE_BYTES = 8 << 20  # a file longer than this is followed by another one

_NAME = re.compile(r"log-([0-9]{6,})\.jsonl")
_EVENT = re.compile(r"[a-z][a-z-]*")


def append(site_folder: Path, event: str, **fields: Any) -> None:
    """Adds one record; see `append_all`."""
    append_all(site_folder, [(event, fields)])


def append_all(site_folder: Path, records: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Adds records that belong together with one write and one fsync, and returns the anchor after them.

    Checks the last line only; `read` and `verify.verify` check all. Other processes may write at the same time.

    Args:
        site_folder: the site's.
        records: event and fields; values that JSON can hold, and nothing that identifies a patient.

    Raises:
        RecordDamaged: the last line was changed, or the key is missing, damaged, readable by others or another one.
        OSError: it could not be written (disk full); the log is as it was.
        ValueError: an event or a field has a name that it may not have.
    """
    for event, fields in records:
        if not _EVENT.fullmatch(event) or chain.OWN & fields.keys():
            raise ValueError(f"No record of the audit log: {event} with {sorted(fields)}.")
    folder = site_folder / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with auditlog.exclusive(folder / "log"):
        key = _key_for_writing(folder)
        at = _end(folder, key)
        utc = datetime.now(UTC).isoformat(timespec="seconds")
        first = [("begin", {"key": chain.key_id(key), "old": _old(site_folder)})] if at.seq == 0 else []
        lines, mac = [], at.mac
        for number, (event, fields) in enumerate([*first, *records]):
            line, mac = chain.seal(key, {**fields, "utc": utc, "event": event, "seq": at.seq + number, "prev": mac})
            lines.append(line + b"\n")
        _write(at.path, at.size, b"".join(lines))
        if at.size == 0:  # the file may be new: its name must be on disk too
            sync_folder(folder)
            sync_folder(site_folder)
    return chain.anchor(key, mac)


def access(site_folder: Path, what: str, **fields: Any) -> None:
    """Notes that somebody of this machine looked at what the site keeps: `what`, and the account's name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.geteuid())
    append(site_folder, "access", what=what, user=user, **fields)


def anchor(site_folder: Path) -> str:
    """Keyed digest of everything in the log, 64 hex digits, for others to keep; "" where there is no log yet.

    Tells nothing without the key, not even how long the log is. Looks at the last line only. Errors as `read`.
    """
    folder = site_folder / FOLDER
    last = head(site_folder)
    return "" if last == chain.START else chain.anchor(read_key(folder), last)


def head(site_folder: Path) -> str:
    """MAC of the last record, `chain.START` where there is none. Looks at the last line only. Errors as `read`."""
    folder = site_folder / FOLDER
    return _end(folder, read_key(folder)).mac if files(folder) else chain.START


def read(site_folder: Path) -> list[dict[str, Any]]:
    """All records in order, each with `utc` and `event`; [] where there is no log. The whole chain is checked.

    Raises:
        RecordDamaged: a line was edited, dropped, inserted or moved, or the key is not the log's.
    """
    return [
        {name: record[name] for name in record if name not in ("seq", "prev")} for record, _ in records(site_folder)
    ]


def records(site_folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """As `read`, one by one with its MAC; a record holds `seq` and `prev` too."""
    folder = site_folder / FOLDER
    found = files(folder)
    if not found:
        return
    key, before, seq = read_key(folder), chain.START, 0
    for path in found:
        lines, torn = whole_lines(path)
        if torn and path != found[-1]:
            raise damaged(path, f"after line {len(lines)}", "the file ends within a line")
        for number, line in enumerate(lines, 1):
            try:
                record, mac = chain.unseal(key, line)
            except chain.Broken as error:
                raise damaged(path, f"line {number}", str(error)) from None
            if record["prev"] != before or record["seq"] != seq:
                raise damaged(path, f"line {number}", "it does not follow from the one before")
            yield record, mac
            before, seq = mac, seq + 1


# --------------------------------------------------------------------------------------------------- files and the key


def files(folder: Path) -> list[Path]:
    """The log's files in order; `folder` is SITE/audit."""
    try:
        found = {int(match[1]): folder / match[0] for match in map(_NAME.fullmatch, os.listdir(folder)) if match}
    except FileNotFoundError:
        return []
    return [found[number] for number in sorted(found)]


def whole_lines(path: Path) -> tuple[list[bytes], int]:
    """The lines that have their line end, and how many bytes stand after them."""
    *lines, torn = path.read_bytes().split(b"\n")
    return lines, len(torn)


def read_key(folder: Path) -> bytes:
    """The key of the log in `folder` (SITE/audit).

    Raises:
        RecordDamaged: it is missing, damaged, a link, another user's, or others can read it.
    """
    path = folder / KEY
    try:
        text = secret_file.read(path)
    except SiteKeyError as error:
        remedy = f"Make it a file of this user that nobody else can read: chmod 600 {path}"
        raise RecordDamaged(error.message, remedy=remedy) from None
    if text is None:
        raise RecordDamaged(
            f"{path}, the audit log's key, is missing: nothing can be checked or added.",
            remedy="Restore it from a backup of the site's folder. It is never made again for a log that exists.",
        )
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise RecordDamaged(f"{path} does not hold the audit log's key.", remedy="Restore it from a backup.")
    return key


def damaged(path: Path, where: str, why: str) -> RecordDamaged:
    """The error for a line that is not as it was written."""
    return RecordDamaged(
        f"The audit log was changed: {path}, {where}: {why}.",
        remedy=f"See what is left of it: fedscan agent audit verify {path.parent.parent}",
    )


def _key_for_writing(folder: Path) -> bytes:
    """The key; drawn here for a log that has no line yet. The caller holds the lock."""
    if not (folder / KEY).exists() and not any(path.stat().st_size for path in files(folder)):
        write_atomic(folder / KEY, f"{secrets.token_hex(32)}\n".encode())
    return read_key(folder)


@dataclass(frozen=True)
class _End:
    """Where the next record goes: file and offset, its number, and the MAC of the one before."""

    path: Path
    size: int
    seq: int
    mac: str


def _end(folder: Path, key: bytes) -> _End:
    found = files(folder)
    if not found:
        return _End(folder / "log-000001.jsonl", 0, 0, chain.START)
    last, size = _last_line(found[-1])
    path = found[-1]
    if last is None and len(found) > 1:  # a crash before the first line of a new file was whole
        last, _ = _last_line(found[-2])
    if last is None:
        if len(found) > 1:
            raise damaged(found[-2], "its end", "there is no line")
        return _End(path, 0, 0, chain.START)
    try:
        record, mac = chain.unseal(key, last)
    except chain.Broken as error:
        raise damaged(path, "the last line", str(error)) from None
    if size > ROTATE_BYTES:
        number = int(path.name[len("log-") : -len(".jsonl")]) + 1
        path, size = folder / f"log-{number:06d}.jsonl", 0
    return _End(path, size, record["seq"] + 1, mac)


def _last_line(path: Path) -> tuple[bytes | None, int]:
    """The last line that has its line end, and the file's length up to there."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        block = 4096
        while True:
            start = max(0, size - block)
            file.seek(start)
            data = file.read(size - start)
            end = data.rfind(b"\n")
            begin = data.rfind(b"\n", 0, max(end, 0))
            if end >= 0 and (begin >= 0 or start == 0):
                return data[begin + 1 : end], start + end + 1
            if start == 0:
                return None, 0
            block *= 4


def _write(path: Path, size: int, data: bytes) -> None:
    """Puts `data` on disk after the file's first `size` bytes; what stood there is a torn line."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.ftruncate(descriptor, size)
            os.lseek(descriptor, size, os.SEEK_SET)
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)  # a disk that is full: half of it would count as written
            raise
    finally:
        os.close(descriptor)


def _old(site_folder: Path) -> dict[str, dict[str, Any]]:
    """What earlier versions left: digest of the file, and the head of its chain ("" if that is broken)."""
    told = {}
    for name in OLD:
        path = site_folder / name
        if path.is_file():
            try:
                last = auditlog.head(path)
            except RecordDamaged:
                last = ""
            data = path.read_bytes()
            told[name] = {"lines": data.count(b"\n"), "sha256": hashlib.sha256(data).hexdigest(), "head": last}
    return told
