"""Copies of the audit log's records for the hospital's log collector: RFC 5424 messages over TLS (RFC 5425).

The log on disk is the record. Sending starts from it, after it was written: SITE/audit/syslog.json holds up to where
the collector has got it, so a collector that was away gets everything once it is back, in order. Nothing here is ever
called by what makes or sends an update: a collector that is slow, gone or hostile delays no release and stops none.
TCP says nothing about what a collector did with its bytes: the last records before it died may be missing there.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedscan_client.audit import chain, log
from fedscan_client.audit.settings import Settings
from fedscan_core.errors import ConfigError, FedscanError, FolderError, RecordDamaged
from fedscan_core.files import write_atomic

CURSOR = "syslog.json"
PRIORITY = 13 * 8 + 6  # facility "log audit", severity "informational" (RFC 5424, section 6.2.1)
POLL_SECONDS = 2.0
LONGEST_PAUSE = 300.0  # between attempts while the collector is away
_BATCH = 500


def ship(site_folder: Path, settings: Settings, *, timeout: float = 10.0) -> int:
    """Sends every record that the collector has not got yet; returns how many. 0 where no collector is named.

    Only one process sends at a time: where another does, this one returns 0.

    Args:
        site_folder: the site's.
        settings: `[audit]` of site.toml.
        timeout: seconds for connecting and for each write.

    Raises:
        FolderError: the collector cannot be reached, or its certificate is not to be trusted; nothing is lost.
        ConfigError: the file of its authority cannot be read.
        RecordDamaged: the log was changed, or is another one than the one that was sent.
    """
    folder = site_folder / log.FOLDER
    if not settings.syslog or not log.files(folder):
        return 0
    with _alone(folder) as alone:
        if not alone:
            return 0
        cursor = _cursor(folder)
        waiting = list(_after(site_folder, cursor))
        if not waiting:
            return 0
        try:
            with _connected(site_folder, settings, timeout) as channel:
                for start in range(0, len(waiting), _BATCH):
                    batch = waiting[start : start + _BATCH]
                    channel.sendall(b"".join(framed(message(record)) for record, _ in batch))
                    record, mac = batch[-1]
                    write_atomic(folder / CURSOR, json.dumps({"seq": record["seq"], "mac": mac}).encode())
        except OSError as error:  # ssl.SSLError and socket.timeout are some
            raise FolderError(
                f"The log collector {settings.syslog} cannot be reached: {error.__class__.__name__}: {error}.",
                remedy="Nothing is lost: it gets what it lacks as soon as it answers. Check [audit] of site.toml.",
            ) from None
        return len(waiting)


def follow(site_folder: Path, settings: Settings, stop: threading.Event, tell: Callable[[str], None]) -> None:
    """Sends records as they come, until `stop` is set; for a thread of the agent. Raises nothing.

    `tell` gets the text of each new problem, once until it goes away.
    """
    pause, said, seen = POLL_SECONDS, "", dict[str, int]()
    while settings.syslog and not stop.wait(pause):
        try:
            sizes = {path.name: path.stat().st_size for path in log.files(site_folder / log.FOLDER)}
            if sizes != seen:  # reading all of a long log every two seconds would be a waste
                ship(site_folder, settings)
        except (FedscanError, OSError) as error:
            pause = min(LONGEST_PAUSE, pause * 2)
            if str(error) != said:
                said = str(error)
                tell(said)
        else:
            pause, said, seen = POLL_SECONDS, "", sizes


def message(record: dict[str, Any], host: str = "") -> bytes:
    """One record as an RFC 5424 message: its name as MSGID, all of it as JSON in MSG, which is plain ASCII.

    `record` as `log.records` gives it; `host`: HOSTNAME, default this machine's.
    """
    name = re.sub(r"[^!-~]", "", host or socket.gethostname())[:255] or "-"
    header = f"<{PRIORITY}>1 {record['utc']} {name} fedscan {os.getpid()} {record['event'][:32]} - "
    return header.encode() + json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def framed(text: bytes) -> bytes:
    """A message with its length in front (RFC 5425, section 4.3)."""
    return f"{len(text)} ".encode() + text


@contextlib.contextmanager
def _connected(site_folder: Path, settings: Settings, timeout: float) -> Iterator[ssl.SSLSocket]:
    authority = None if settings.syslog_ca is None else site_folder / settings.syslog_ca
    try:
        context = ssl.create_default_context(cafile=authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{authority}, the authority of the log collector, cannot be read: {error}.", remedy="Correct syslog_ca."
        ) from None
    host, port = settings.address
    with (
        socket.create_connection((host, port), timeout=timeout) as plain,
        context.wrap_socket(plain, server_hostname=host) as channel,
    ):
        yield channel
        with contextlib.suppress(OSError):  # a collector that hangs up without a word
            channel.unwrap()


def _after(site_folder: Path, cursor: tuple[int, str]) -> Iterator[tuple[dict[str, Any], str]]:
    """The records after the last one that was sent; the chain up to there is checked too."""
    at, sent = cursor
    last = -1
    for record, mac in log.records(site_folder):
        last = record["seq"]
        if last == at and mac != sent:
            break
        if last > at:
            yield record, mac
    else:
        if last >= at:
            return
    raise RecordDamaged(
        f"{site_folder / log.FOLDER} is not the log that was sent to the log collector: it lost records, or is an "
        "older copy.",
        remedy=f"Type: fedscan agent audit verify {site_folder}   Once it is clear, remove {CURSOR} to send all again.",
    )


def _cursor(folder: Path) -> tuple[int, str]:
    try:
        told = json.loads((folder / CURSOR).read_bytes())
        return int(told["seq"]), str(told["mac"])
    except FileNotFoundError:
        return -1, chain.START
    except (ValueError, KeyError, TypeError):
        raise RecordDamaged(f"{folder / CURSOR} is damaged.", remedy="Remove it: everything is sent again.") from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    with open(folder / "syslog.lock", "a", opener=lambda name, flags: os.open(name, flags, 0o600)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
