"""Previews in a browser of the same machine: full size, from memory, for one person, for a while.

Guarantee: the server listens on 127.0.0.1 only, on a port of the system's choice; it answers nothing but GET below a
random path of 256 bits, told to the person alone, and only to the host name 127.0.0.1 or localhost (another name that
was made to point here, DNS rebinding, gets nothing). Every answer forbids caches to keep it, scripts to run and other
pages to embed it. Nothing is written to disk by us. Assumed: other users of the machine cannot read this terminal or
the browser's history; a browser may swap memory to disk as every program may.

A page (`preview_page`) shows one frame before and after. Clicking two corners in the picture draws a rectangle, without
scripts: the browser sends the place (a server-side image map).
"""

import hmac
import html
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedscan_client.intake import preview, preview_page
from fedscan_client.intake.blackout import check
from fedscan_client.intake.preview import Picture
from fedscan_client.intake.preview_page import State
from fedscan_client.intake.records import Rectangle
from fedscan_core.errors import FedscanError

_ADDRESS = "127.0.0.1"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Shown:
    """What is served.

    Attributes:
        title: heading; words of ours only.
        instances: how many there are.
        load: decodes the instance of a number; called again when another one was shown in between.
        rectangles: the ones to begin with.
        instance, frame: where to begin.
    """

    title: str
    instances: int
    load: Callable[[int], Picture]
    rectangles: tuple[Rectangle, ...] = ()
    instance: int = 0
    frame: int = 0


def serve(it: Shown, ready: Callable[[str], None], *, idle_seconds: float = 900.0) -> None:
    """Serves until Ctrl-C, or until nobody asked for anything for a while.

    Args:
        it: what is shown.
        ready: called once with the address to open.
        idle_seconds: how long to wait for the next request.
    """
    token = secrets.token_urlsafe(32)
    server = _Server((_ADDRESS, 0), _Handler)
    server.begin(it, token)
    try:
        ready(f"http://{_ADDRESS}:{server.server_port}/{token}/")
        while time.monotonic() < server.asked + idle_seconds:
            server.handle_request()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    timeout = 0.2  # seconds between two looks at the clock
    asked = 0.0

    def begin(self, it: Shown, token: str) -> None:
        self.it, self.token, self.asked = it, token, time.monotonic()
        self._lock = threading.Lock()
        self._last: tuple[int, Picture | None] = (-1, None)

    def picture(self, number: int) -> Picture:
        """The picture of an instance; the last one is kept."""
        with self._lock:
            known, found = self._last
            if found is None or known != number:
                found = self.it.load(number)
                self._last = (number, found)
            return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no news, and a traceback could quote a header."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "fedscan", ""
    timeout = 10.0  # seconds for a browser that opened a connection and says nothing

    def do_GET(self) -> None:
        """Every request there is."""
        names = {f"{name}:{self.server.server_port}" for name in (_ADDRESS, "localhost")}
        path, _, query = self.path.partition("?")
        token, rest = path[1:].partition("/")[0], path[1:].partition("/")[2]
        if self.headers.get("Host") not in names:
            self.send_error(HTTPStatus.FORBIDDEN)
        elif not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self.server.asked = time.monotonic()
            try:
                self._answer(rest, query)
            except FedscanError as error:
                said = preview_page.whole(f"<p>{html.escape(str(error))}")
                self._reply(HTTPStatus.UNPROCESSABLE_ENTITY, "text/html; charset=utf-8", said)

    def _answer(self, rest: str, query: str) -> None:
        it = self.server.it
        if not rest:
            zoom = preview_page.zoom_for(self.server.picture(it.instance).frames.shape[2])
            self._redirect(State(it.instance, it.frame, zoom, "linear", it.rectangles))
            return
        state, what = preview_page.parse(rest) or (None, "")
        picture = self.server.picture(state.instance) if state and state.instance < it.instances else None
        if state is None or picture is None or state.frame >= len(picture.frames):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        frames, (rows, columns) = len(picture.frames), picture.frames.shape[1:3]
        check(state.rectangles, rows, columns)
        if what == "/click":
            self._redirect(preview_page.clicked(state, query, rows, columns))
        elif what:
            rectangles = state.rectangles if what == "/after" else ()
            image = preview.shown(picture, state.frame, rectangles, state.view)
            self._reply(HTTPStatus.OK, "image/png", preview.png(image))
        else:
            sizes = {"instances": it.instances, "frames": frames, "rows": rows, "columns": columns}
            page = preview_page.render(state, title=it.title, base=f"/{self.server.token}/", **sizes)
            self._reply(HTTPStatus.OK, "text/html; charset=utf-8", page)

    def _redirect(self, state: State) -> None:
        self._reply(HTTPStatus.SEE_OTHER, "text/plain", b"", {"Location": f"/{self.server.token}/{state.path()}"})

    def _reply(self, status: int, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A refusal says nothing and has the same headers."""
        self._reply(code, "text/plain", b"")

    def log_message(self, format: str, *args: Any) -> None:
        """No log: its lines would hold the token."""
