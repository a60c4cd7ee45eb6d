"""What an unknown peer may cost us: sizes, times, guesses and replays.

All of it is memory of one process, bounded, and gone with it. Everything runs on one event loop: no locks.
"""

import asyncio
import ipaddress
import re
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from time import monotonic

from starlette.requests import ClientDisconnect, Request

from fedscan_server.edge.refused import Refused

IDLE_SECONDS = 30.0  # the longest pause inside a body
_REMEMBERED = 640.0  # seconds: a request dated 300 s ahead is still good 300 s after its date, and a little more


def declared_length(request: Request, limit: int) -> int:
    """The body's declared length in bytes.

    Raises:
        Refused: 411 without a length (chunked bodies are not taken), 400 if it is unclear, 413 above `limit`.
    """
    values = request.headers.getlist("content-length")
    if request.headers.getlist("transfer-encoding") or not values:
        raise Refused(411, "The request does not say how long it is.", "Send it with Content-Length.")
    if len(values) != 1 or not re.fullmatch(r"[0-9]{1,12}", values[0]):
        raise Refused(400, "The request's length is unclear.")
    if int(values[0]) > limit:
        raise Refused(413, f"The request is larger than {limit} bytes.")
    return int(values[0])


async def pieces(
    request: Request, length: int, seconds: float, clock: Callable[[], float] = monotonic
) -> AsyncIterator[bytes]:
    """The body as it comes, exactly `length` bytes of it, within `seconds` and without long pauses.

    Raises:
        Refused: 408 if it is too slow, 400 if it is shorter or longer than declared.
    """
    end, seen = clock() + seconds, 0
    stream = request.stream().__aiter__()
    while True:
        try:
            async with asyncio.timeout(max(0.0, min(IDLE_SECONDS, end - clock()))):
                piece = await anext(stream, None)
        except TimeoutError:
            raise Refused(408, "The request came too slowly.", "Try again on a better line.") from None
        except ClientDisconnect:
            raise Refused(400, "The request broke off.") from None
        if piece is None:
            break
        seen += len(piece)
        if seen > length:
            break
        if piece:
            yield piece
    if seen != length:
        raise Refused(400, "The request is not as long as it says.")


async def body(request: Request, limit: int, seconds: float = 60.0) -> bytes:
    """The whole body in memory; at most `limit` bytes. A GET has none. See `declared_length`, `pieces` for errors."""
    if request.method == "GET":
        if request.headers.getlist("transfer-encoding") or request.headers.get("content-length", "0") != "0":
            raise Refused(400, "A GET request carries no body.")
        return b""
    length = declared_length(request, limit)
    content = bytearray()
    async for piece in pieces(request, length, seconds):
        content += piece
    return bytes(content)


@dataclass
class Failures:
    """Failed tries by door and address: after `most` within `window` seconds the address waits.

    At most `addresses` are remembered; the longest idle one is forgotten first. An IPv6 network counts as one address.
    """

    most: int = 20
    window: float = 60.0
    addresses: int = 10_000
    clock: Callable[[], float] = monotonic
    _tries: OrderedDict[tuple[str, str], deque[float]] = field(default_factory=OrderedDict)

    def check(self, door: str, address: str) -> None:
        """Before a try.

        Raises:
            Refused: 429, or 503 at the fleet's door, where only that means "later".
        """
        tries = self._tries.get((door, network(address)))
        while tries and tries[0] < self.clock() - self.window:
            tries.popleft()
        if tries and len(tries) >= self.most:
            status = 503 if door == "fleet" else 429
            raise Refused(status, "Too many failed tries from this address.", f"Wait {self.window:g} seconds.")

    def note(self, door: str, address: str) -> None:
        """After a failed try."""
        key = (door, network(address))
        self._tries.setdefault(key, deque(maxlen=self.most)).append(self.clock())
        self._tries.move_to_end(key)
        while len(self._tries) > self.addresses:
            self._tries.popitem(last=False)


def network(address: str) -> str:
    """Whom an address stands for: an IPv4 address for itself, an IPv6 address for its /64."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "?"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


@dataclass
class Replays:
    """The signatures seen lately, so that each is good once.

    Kept is r of an ECDSA signature (r, s): (r, -s) is valid too and would pass for another one. r is random, so no two
    honest requests share it. Only signatures that verified are kept, at most `most` of a site.
    """

    most: int = 50_000
    clock: Callable[[], float] = monotonic
    _seen: dict[str, OrderedDict[int, float]] = field(default_factory=dict)

    def first(self, site: str, r: int) -> bool:
        """Whether this is the first time; notes it.

        Raises:
            Refused: 503, the site has sent more requests than can be remembered.
        """
        seen, now = self._seen.setdefault(site, OrderedDict()), self.clock()
        while seen and next(iter(seen.values())) < now - _REMEMBERED:
            seen.popitem(last=False)
        if r in seen:
            return False
        if len(seen) >= self.most:
            raise Refused(503, "Too many requests.", "Wait a minute.")
        seen[r] = now
        return True


@dataclass
class Busy:
    """How many requests of one party are being served; more than `most` have to come back."""

    most: int
    _now: dict[str, int] = field(default_factory=dict)

    def __call__(self, who: str) -> "_Serving":
        """Context manager around one request of `who`.

        Raises:
            Refused: 503 on entering.
        """
        return _Serving(self, who)


@dataclass
class _Serving:
    busy: Busy
    who: str

    def __enter__(self) -> None:
        now = self.busy._now.get(self.who, 0)
        if now >= self.busy.most:
            raise Refused(503, "Too many requests at once.", "Wait a moment.")
        self.busy._now[self.who] = now + 1

    def __exit__(self, *_: object) -> None:
        self.busy._now[self.who] -= 1
        if not self.busy._now[self.who]:
            del self.busy._now[self.who]
