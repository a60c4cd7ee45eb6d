"""Two proxies for tests: one that stands before TLS and keeps what passes in clear, one as hospitals have (CONNECT)."""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

_BLOCK = 65536

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Serve = Callable[[Reader, Writer], Coroutine[Any, Any, None]]


class _Server:
    """Listens on 127.0.0.1 in a thread of its own; `serve` is run for every connection."""

    def __init__(self, serve: Serve, port: int = 0, inside: ssl.SSLContext | None = None) -> None:
        self._serve, self._tasks = serve, set[asyncio.Task[Any]]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listen = asyncio.start_server(self._run, "127.0.0.1", port, ssl=inside)
        self._server = asyncio.run_coroutine_threadsafe(listen, self._loop).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _run(self, reader: Reader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    def drop(self) -> None:
        """Ends every connection there is."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._tasks])

    def close(self) -> None:
        """Ends everything."""
        self._loop.call_soon_threadsafe(self._server.close)
        self.drop()


async def _pump(near: tuple[Reader, Writer], far: tuple[Reader, Writer], see: Callable[[bytes, bool], Any]) -> None:
    """Both directions until both sides ended; `see(data, upwards)` first looks at what passes, or delays it."""

    async def copy(reader: Reader, writer: Writer, upwards: bool) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await reader.read(_BLOCK):
                waiting = see(data, upwards)
                if waiting is not None:
                    await waiting
                writer.write(data)
                await writer.drain()
        writer.close()

    try:
        await asyncio.gather(copy(near[0], far[1], True), copy(far[0], near[1], False))
    finally:
        near[1].close()
        far[1].close()


class Tap:
    """Ends the agents' TLS with a certificate of the coordinator's own CA and keeps what passes, in clear.

    `up` and `down` are one bytearray for each connection.
    """

    def __init__(self, upstream: tuple[str, int], certificate: Path, key: Path, ca: Path, port: int = 0) -> None:
        self._upstream, self.up, self.down = upstream, list[bytearray](), list[bytearray]()
        inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        inside.load_cert_chain(certificate, key)
        self._outside = ssl.create_default_context(cafile=str(ca))
        self._server = _Server(self._serve, port, inside)
        self.port = self._server.port

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        far = await asyncio.open_connection(*self._upstream, ssl=self._outside)
        up, down = bytearray(), bytearray()
        self.up.append(up)
        self.down.append(down)
        await _pump((reader, writer), far, lambda data, upwards: (up if upwards else down).extend(data))

    def close(self) -> None:
        """Ends everything."""
        self._server.close()


class ConnectProxy:
    """A hospital's HTTP proxy: CONNECT only. `rate` (bytes/s both ways, 0 = free) and `cut` can be changed at any time.

    `seen` are the targets asked for; `other` are request lines that were no CONNECT.
    """

    def __init__(self, rate: float = 0.0) -> None:
        self.rate, self.seen, self.other, self._cut = rate, list[str](), list[str](), False
        self.bytes_up = self.bytes_down = 0
        self._server = _Server(self._serve)
        self.url = f"http://127.0.0.1:{self._server.port}"

    def cut(self, is_cut: bool = True) -> None:
        """True: every connection ends now and none is taken; False: mended."""
        self._cut = is_cut
        if is_cut:
            self._server.drop()

    def close(self) -> None:
        """Ends everything."""
        self._server.close()

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        if self._cut:
            return
        line = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0].decode("latin-1")
        if not line.startswith("CONNECT "):
            self.other.append(line)
            writer.write(b"HTTP/1.1 405 CONNECT only\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            return
        target = line.split()[1]
        self.seen.append(target)
        host, _, port = target.rpartition(":")
        far = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 ok\r\n\r\n")
        await writer.drain()
        await _pump((reader, writer), far, self._see)

    def _see(self, data: bytes, upwards: bool) -> Any:
        if upwards:
            self.bytes_up += len(data)
        else:
            self.bytes_down += len(data)
        return asyncio.sleep(len(data) / self.rate) if self.rate else None
