"""The ASGI application: finds the handler, answers errors, writes the request log. Nothing else listens on the port.

Paths are compared as they came, undecoded and whole: what is not in a table does not exist.
"""

import asyncio
import re
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fedscan_core.errors import FedscanError
from fedscan_server.edge import fleet, open_door, people_door, sites_door
from fedscan_server.edge.context import Edge
from fedscan_server.edge.refused import Refused, not_found

PREFIX = "/fedscan/v1"
SEND_SECONDS = 60.0  # for a peer to take the next piece of an answer

Handler = Callable[[Edge, Request], Awaitable[Response]]

ROUTES: dict[tuple[str, str], Handler] = {
    ("GET", "/hello"): open_door.hello,
    ("POST", "/enrol"): open_door.enrol,
    ("POST", "/login"): open_door.login,
    ("GET", "/site"): sites_door.about,
    ("PUT", "/site/policy"): sites_door.put_policy,
    ("POST", "/site/anchor"): sites_door.post_anchor,
    ("GET", "/site/anchors"): sites_door.anchors,
    ("POST", "/site/retire"): sites_door.retire,
    ("GET", "/sites"): people_door.sites,
    ("GET", "/runs"): people_door.listing,
    ("POST", "/runs"): people_door.submit,
    ("GET", "/runs/ID"): people_door.one,
    ("GET", "/runs/ID/progress"): people_door.progress,
    ("GET", "/runs/ID/archive"): people_door.tar,
    ("POST", "/runs/ID/stop"): people_door.stop,
    ("POST", "/runs/ID/resume"): people_door.resume,
}
_RUN = re.compile(r"/runs/([A-Za-z0-9][A-Za-z0-9_.-]{0,63})(/[a-z]+)?")


class App:
    """The application over one `Edge`."""

    def __init__(self, edge: Edge) -> None:
        self.edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return  # no websockets; the server runs without lifespan
        request = Request(scope, receive, send)
        request.state.who, request.state.run = "", ""
        sent: dict[str, Any] = {"status": 0, "bytes": 0}

        async def timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
            sent["bytes"] += len(message.get("body", b""))
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        what = "other"
        try:
            async with AsyncExitStack() as stack:
                request.state.until_answered = stack  # what a handler holds until its answer is out
                try:
                    handler, what = find(scope)
                    request.scope["path_params"] = {"run_id": match[1]} if (match := _run(scope)) else {}
                    response = await handler(self.edge, request)
                except Exception as error:
                    response = answer_to(error)
                await response(scope, receive, timed)
        except TimeoutError:
            raise ConnectionAbortedError("the peer takes no answer") from None  # the server cuts the connection
        finally:
            self._note(request, what, sent)

    def _note(self, request: Request, what: str, sent: dict[str, Any]) -> None:
        status = sent["status"]
        if status == 200 and (what == "GET /hello" or what.removeprefix("fleet ") in fleet.QUIET):
            return
        more = {"run": request.state.run} if request.state.run else {}
        self.edge.log.add(request.state.who, what, status, self.edge.address(request), bytes=sent["bytes"], **more)


def find(scope: Scope) -> tuple[Handler, str]:
    """The handler, and what the log calls it.

    Raises:
        Refused: 404; 405 for a path of ours with another method; 400 for a query where none is taken.
    """
    path, method = scope["raw_path"].decode("ascii", "replace"), scope["method"]
    if scope["query_string"] and not path.endswith("/progress"):  # no signature covers a query
        raise Refused(400, "This takes no ?query.")
    if path in fleet.PATHS:
        return fleet.forward, "fleet " + path.removeprefix("/v1/fleet/")
    if not path.startswith(PREFIX + "/"):
        raise not_found()
    rest = path.removeprefix(PREFIX)
    if match := _RUN.fullmatch(rest):
        rest = "/runs/ID" + (match[2] or "")
    if (method, rest) in ROUTES:
        return ROUTES[method, rest], f"{method} {rest}"
    others = sorted(way for way, known in ROUTES if known == rest)
    if others:
        raise Refused(405, f"This takes {' or '.join(others)}.")
    raise not_found()


def answer_to(error: Exception) -> Response:
    """What a peer is told. Of an error that is not ours it is told nothing; the operator's log has it."""
    if isinstance(error, Refused):
        return error.response()
    if not isinstance(error, FedscanError):
        traceback.print_exception(error, file=sys.stderr)
    else:
        print(f"edge: {error}", file=sys.stderr)  # its text may name files of this machine
    return Refused(500, "The coordinator failed.", "Its operator's logs say more.").response()


def _run(scope: Scope) -> re.Match[str] | None:
    return _RUN.fullmatch(scope["raw_path"].decode("ascii", "replace").removeprefix(PREFIX))
