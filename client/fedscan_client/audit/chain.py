"""One line of the audit log: JSON whose last field is an HMAC-SHA256 (RFC 2104) of all that stands before it.

    {"event":"release", ..., "prev":"<mac of the line before>","seq":12,"utc":"...","mac":"<64 hex>"}

The MAC is over the line's bytes as they stand in the file, so there is one reading of them. Each line holds the MAC of
the one before (`prev`) and its number (`seq`): whoever lacks the key can change, drop or move none but the last.
"""

import hashlib
import hmac
import json
import math
import re
from collections.abc import Mapping
from typing import Any

START = "0" * 64  # `prev` of the first line
OWN = frozenset({"seq", "prev", "mac", "utc", "event"})  # names that no field may have

_END = re.compile(rb',"mac":"([0-9a-f]{64})"\}\Z')


class Broken(Exception):
    """A line that was not written by this log; the text says why."""


def seal(key: bytes, record: Mapping[str, Any]) -> tuple[bytes, str]:
    """The line of a record, without its line end, and its MAC. `record` holds `seq` and `prev` already."""
    body = json.dumps(_plain(record), sort_keys=True, separators=(",", ":"), default=str).encode()
    mac = hmac.new(key, body, hashlib.sha256).hexdigest()
    return body[:-1] + f',"mac":"{mac}"}}'.encode(), mac


def unseal(key: bytes, line: bytes) -> tuple[dict[str, Any], str]:
    """The record of a line, with `seq` and `prev`, and its MAC.

    Raises:
        Broken: the line is not what was written.
    """
    found = _END.search(line)
    if found is None:
        raise Broken("it is no record")
    body, mac = line[: found.start()] + b"}", found[1].decode()
    if not hmac.compare_digest(hmac.new(key, body, hashlib.sha256).hexdigest(), mac):
        raise Broken("it was edited, or written under another key")
    record: dict[str, Any] = json.loads(body)
    return record, mac


def anchor(key: bytes, mac: str) -> str:
    """What is told to others about a log whose last line has this MAC: 64 hex digits that say nothing without the key.

    It commits to every line up to that one. A line begins with a brace, so no line's MAC is ever an anchor.
    """
    return hmac.new(key, f"fedscan anchor 1\0{mac}".encode(), hashlib.sha256).hexdigest()


def key_id(key: bytes) -> str:
    """Fingerprint of the log's key: 64 bits of a one-way function."""
    return hmac.new(key, b"fedscan audit key 1", hashlib.sha256).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """JSON has no infinity: it is written as a word."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
