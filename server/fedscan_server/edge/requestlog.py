"""Who asked for what, and what was answered: chained JSON lines without bodies, one file a month, mode 0600.

A thread of its own writes (each line is fsynced), so that a slow disk does not hold up the hospitals. What a peer makes
up does not enter: unknown paths are "other". Refusals of unknown peers are kept up to a rate, then counted.
"""

import queue
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from fedscan_core import auditlog
from fedscan_core.errors import FedscanError

_WAITING = 10_000  # lines
_STRANGERS = 120  # lines a minute


class RequestLog:
    """The log of one edge process; `close` writes what waits."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: where edge-YYYY-MM.jsonl lies."""
        self._folder = folder
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING)
        self._dropped, self._minute, self._strangers = 0, 0.0, 0
        self._thread = threading.Thread(target=self._write, name="request-log", daemon=True)
        self._thread.start()

    def add(self, who: str, what: str, status: int, address: str, **more: Any) -> None:
        """Notes one request: `who` is a site's or person's name, or "" for a stranger."""
        if not who and not self._room_for_stranger():
            self._dropped += 1
            return
        line = {"utc": datetime.now(UTC).isoformat(timespec="milliseconds"), "who": who, "what": what}
        if self._dropped:
            more["dropped"], self._dropped = self._dropped, 0
        try:
            self._queue.put_nowait({**line, "status": status, "address": address, **more})
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Waits up to 5 s until the lines are on disk."""
        self._queue.put(None)
        self._thread.join(5.0)

    def _room_for_stranger(self) -> bool:
        if monotonic() - self._minute > 60.0:
            self._minute, self._strangers = monotonic(), 0
        self._strangers += 1
        return self._strangers <= _STRANGERS

    def _write(self) -> None:
        while (line := self._queue.get()) is not None:
            path = self._folder / f"edge-{line['utc'][:7]}.jsonl"
            try:
                with auditlog.exclusive(path):
                    auditlog.append(path, line)
            except (OSError, FedscanError) as error:  # a full disk must not stop a federation
                print(f"the request log cannot be written: {error}", file=sys.stderr)
