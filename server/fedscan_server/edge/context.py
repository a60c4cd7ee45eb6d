"""What the handlers of one edge process share."""

import asyncio
from dataclasses import dataclass, field
from time import monotonic

import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from fedscan_server.coordinator import sites
from fedscan_server.coordinator.sites import Enrolled
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.edge.limits import Busy, Failures, Replays
from fedscan_server.edge.requestlog import RequestLog

_ROSTER_SECONDS = 1.0  # a revocation, which another process may make, is seen after this at the latest
_SEEN_SECONDS = 10.0


@dataclass
class Edge:
    """One process's state. `online` are Flower's node ids, as the watchdog last saw them.

    `link` is the client of the SuperLink; `submitting` and `archiving` bound how much memory large bodies take.
    """

    coordinator: Coordinator
    link: httpx.AsyncClient
    log: RequestLog
    failures: Failures = field(default_factory=Failures)
    replays: Replays = field(default_factory=Replays)
    fleet_busy: Busy = field(default_factory=lambda: Busy(16))
    people_busy: Busy = field(default_factory=lambda: Busy(16))
    submitting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    archiving: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    online: frozenset[int] = frozenset()
    _roster: tuple[Enrolled, ...] = ()
    _roster_read: float = float("-inf")
    _seen: dict[str, float] = field(default_factory=dict)

    async def roster(self) -> tuple[Enrolled, ...]:
        """Every site that was ever enrolled, at most a second old."""
        if monotonic() - self._roster_read > _ROSTER_SECONDS:
            self._roster = tuple(await run_in_threadpool(sites.every, self.coordinator))
            self._roster_read = monotonic()
        return self._roster

    def forget_roster(self) -> None:
        """After a change of ours."""
        self._roster_read = float("-inf")

    async def seen(self, name: str) -> None:
        """Notes that a site was heard of, every 10 s at most."""
        if monotonic() - self._seen.get(name, float("-inf")) > _SEEN_SECONDS:
            self._seen[name] = monotonic()
            await run_in_threadpool(sites.seen, self.coordinator, name)

    def address(self, request: Request) -> str:
        """The peer's address. Behind a proxy of our own (we are bound to loopback) it is the one that the proxy saw."""
        peer = request.client.host if request.client else "?"
        if self.coordinator.bind[0] in ("127.0.0.1", "::1", "localhost"):
            forwarded = request.headers.getlist("x-forwarded-for")
            if forwarded:
                return forwarded[-1].rpartition(",")[2].strip()[:45]
        return peer
