"""Two proxies for tests: one that stands before TLS and keeps what passes in clear, one as hospitals have (CONNECT)."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

_BLOCK = 65536


class _Server:
    """Accepts on 127.0.0.1; every connection is a thread that `serve` runs; all end with `close`."""

    def __init__(self, serve: Callable[[socket.socket], None], port: int = 0) -> None:
        self._serve, self._open, self._lock = serve, set[socket.socket](), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        self.keep(connection)
        with contextlib.suppress(OSError, ssl.SSLError):
            self._serve(connection)
        connection.close()

    def keep(self, connection: socket.socket) -> None:
        """Closed by `drop`."""
        with self._lock:
            self._open.add(connection)

    def drop(self) -> None:
        """Ends every connection there is."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            self._open.clear()

    def close(self) -> None:
        """Listens no longer."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()


def _pump(one: socket.socket, other: socket.socket, see: Callable[[bytes, bool], None]) -> None:
    """Both directions until one side ends; `see(data, upwards)` first looks at, or delays, what passes."""

    def copy(source: socket.socket, target: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError, ssl.SSLError, ValueError):
            while data := source.recv(_BLOCK):
                see(data, upwards)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    back = threading.Thread(target=copy, args=(other, one, False), daemon=True)
    back.start()
    copy(one, other, True)
    back.join()


class Tap:
    """Ends the agents' TLS with a certificate of the coordinator's own CA and keeps what passes, in clear.

    `up` and `down` are one bytearray for each connection.
    """

    def __init__(self, upstream: tuple[str, int], certificate: Path, key: Path, ca: Path, port: int = 0) -> None:
        self._upstream, self.up, self.down = upstream, list[bytearray](), list[bytearray]()
        self._inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._inside.load_cert_chain(certificate, key)
        self._outside = ssl.create_default_context(cafile=str(ca))
        self._server = _Server(self._serve, port)
        self.port = self._server.port

    def _serve(self, connection: socket.socket) -> None:
        with self._inside.wrap_socket(connection, server_side=True) as agent:
            self._server.keep(agent)
            plain = socket.create_connection(self._upstream)
            with self._outside.wrap_socket(plain, server_hostname=self._upstream[0]) as edge:
                self._server.keep(edge)
                up, down = bytearray(), bytearray()
                self.up.append(up)
                self.down.append(down)
                _pump(agent, edge, lambda data, upwards: (up if upwards else down).extend(data))

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

    def _serve(self, connection: socket.socket) -> None:
        if self._cut:
            return
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(_BLOCK)
            if not data:
                return
            head += data
        line = head.split(b"\r\n", 1)[0].decode("latin-1")
        if not line.startswith("CONNECT "):
            self.other.append(line)
            connection.sendall(b"HTTP/1.1 405 CONNECT only\r\ncontent-length: 0\r\n\r\n")
            return
        target = line.split()[1]
        self.seen.append(target)
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self._server.keep(upstream)
            connection.sendall(b"HTTP/1.1 200 ok\r\n\r\n")
            _pump(connection, upstream, self._see)

    def _see(self, data: bytes, upwards: bool) -> None:
        if self._cut:
            raise OSError("cut")
        if upwards:
            self.bytes_up += len(data)
        else:
            self.bytes_down += len(data)
        if self.rate:
            time.sleep(len(data) / self.rate)
