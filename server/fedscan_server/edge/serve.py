"""The server under the application: uvicorn with TLS, and what uvicorn lacks against slow and greedy peers.

uvicorn has no time limit for a request's head, nor a limit on connections of one address. `_Connection` adds both.
"""

import asyncio
import contextlib
import signal
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedscan_server.coordinator.state import Coordinator
from fedscan_server.edge.limits import network

HEAD_SECONDS = 20.0  # for a request's head, and between two requests
MOST_CONNECTIONS, MOST_OF_ADDRESS = 2000, 200
_HANDSHAKE_SECONDS = 10.0
_LOOPBACK = ("127.0.0.1", "::1")  # our own proxy, which limits its peers itself

_open: Counter[str] = Counter()


class _Connection(H11Protocol):
    """One connection; cut off when nothing has been asked for a while, or when its address has too many."""

    _since = 0.0
    _watch: asyncio.TimerHandle | None = None
    _from = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol does
        super().connection_made(transport)
        self._since = self.loop.time()
        self._from = network(self.client[0]) if self.client else "?"
        _open[self._from] += 1
        if self._from not in _LOOPBACK and _open[self._from] > MOST_OF_ADDRESS:
            transport.abort()
            return
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _open[self._from] -= 1
        if not _open[self._from]:
            del _open[self._from]
        if self._watch:
            self._watch.cancel()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        asking = self.cycle is None or self.cycle.response_complete or self.transport.is_closing()
        if asking and self.loop.time() - self._since > HEAD_SECONDS:
            self.transport.abort()
            return
        self._watch = self.loop.call_later(HEAD_SECONDS / 4, self._look)


class Server(uvicorn.Server):
    """uvicorn's server with short TLS handshakes, ending in order on SIGTERM and SIGINT."""

    async def startup(self, sockets: Any = None) -> None:
        """Opens the port."""
        loop = asyncio.get_running_loop()
        plain = loop.create_server

        async def short(*args: Any, **named: Any) -> Any:  # uvicorn passes no times on; asyncio's handshake has 60 s
            if named.get("ssl"):
                named |= {"ssl_handshake_timeout": _HANDSHAKE_SECONDS, "ssl_shutdown_timeout": 5.0}
            return await plain(*args, **named)

        loop.create_server = short  # type: ignore[method-assign]
        try:
            await super().startup(sockets)
        finally:
            loop.create_server = plain  # type: ignore[method-assign]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ends the server; uvicorn would raise the signal again, and the process would die before its clean-up."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, both = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for number in both:
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in both:
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        self.should_exit = True


def server(app: ASGIApp, c: Coordinator) -> Server:
    """The server of a coordinator, with its certificate. `config.ssl` is its TLS context."""
    config = uvicorn.Config(
        app,
        host=c.bind[0],
        port=c.bind[1],
        loop="asyncio",
        http=_Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        ssl_certfile=c.certificate,
        ssl_keyfile=c.private_key,
        proxy_headers=False,  # else a peer on loopback could pose as any address
        server_header=False,
        access_log=False,
        log_config=None,
        log_level="error",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=int(HEAD_SECONDS),  # SuperNodes ask every 3 s
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=32 * 1024,
    )
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return Server(config)
