"""People's door: sites, and runs from launch to archive. A bearer token says who asks; roles say what they may."""

import asyncio
import base64
import binascii
import contextlib
from pathlib import Path
from time import monotonic
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fedscan_core.errors import ConfigError
from fedscan_server import tracking
from fedscan_server.coordinator.people import Person, Role
from fedscan_server.edge import archive, limits, runs, who
from fedscan_server.edge.context import Edge
from fedscan_server.edge.json_body import fields
from fedscan_server.edge.open_door import SMALL
from fedscan_server.edge.refused import Refused

LARGEST = 512 * 2**20  # bytes of a submission: 380 MB of start weights
_POLL_SECONDS, _LOOK_SECONDS = 20.0, 0.5
_LINES = 500  # of progress in one answer
_PIECE = 256 * 1024


async def sites(edge: Edge, request: Request) -> Response:
    """The enrolled sites, with the policies that they publish."""
    await _asks(edge, request, "viewer")
    told = [
        {"name": s.name, "online": s.node_id in edge.online, "last_seen": s.last_seen, "policy": s.policy}
        for s in await edge.roster()
        if not s.revoked
    ]
    return JSONResponse({"sites": told})


async def submit(edge: Edge, request: Request) -> Response:
    """Takes a signed run in and starts it. Where Flower is away the watchdog starts it later."""
    person = await _asks(edge, request, "researcher", body=False)
    if edge.submitting.locked():
        raise Refused(503, "Another run is being submitted.", "Try again in a moment.")
    async with edge.submitting:
        content = await limits.body(request, LARGEST, seconds=600.0)
        asked = await run_in_threadpool(fields, content, {"order": str, "run": str, "init": str})
        del content
        try:
            init = await run_in_threadpool(base64.b64decode, asked["init"], validate=True)
        except (binascii.Error, ValueError):
            raise Refused(400, "The start weights are not base64.") from None
        run_id = await run_in_threadpool(runs.take, edge.coordinator, person, asked["order"], asked["run"], init)
    request.state.run = run_id
    await _start(edge, runs.folder(edge.coordinator, run_id))
    return JSONResponse({"run_id": run_id})


async def listing(edge: Edge, request: Request) -> Response:
    """Every run; one whose folder is damaged is said to be so."""
    await _asks(edge, request, "viewer")
    return JSONResponse({"runs": await run_in_threadpool(_rows, edge)})


async def one(edge: Edge, request: Request) -> Response:
    """One run."""
    _, path = await _run(edge, request, "viewer")
    return JSONResponse(await run_in_threadpool(runs.detail, path))


async def progress(edge: Edge, request: Request) -> Response:
    """Lines of progress from ?after=N on; waits up to 20 s for one while the run goes on."""
    person, path = await _run(edge, request, "viewer")
    text = request.query_params.get("after", "0")
    if not text.isascii() or not text.isdigit() or len(text) > 9 or set(request.query_params) - {"after"}:
        raise Refused(400, "Only ?after=N can be asked, N a line's number from 0.")
    after, end = int(text), monotonic() + _POLL_SECONDS
    request.state.until_answered.enter_context(edge.people_busy(person.name))
    while True:
        state = (await run_in_threadpool(tracking.read_state, path))["state"]  # before the lines: none is missed
        lines = await run_in_threadpool(tracking.read_progress, path, after)
        if lines or state in tracking.FINAL or monotonic() > end or await request.is_disconnected():
            break
        await asyncio.sleep(_LOOK_SECONDS)
    lines = lines[:_LINES]
    return JSONResponse({"next": after + len(lines), "lines": lines, "state": state})


async def stop(edge: Edge, request: Request) -> Response:
    """Asks a run to stop."""
    path = await _own(edge, request)
    await run_in_threadpool(runs.stop, path)
    return JSONResponse(await run_in_threadpool(runs.row, path))


async def resume(edge: Edge, request: Request) -> Response:
    """Goes on with a failed or stopped run after its last whole round."""
    path = await _own(edge, request)
    async with edge.starting:
        await run_in_threadpool(runs.resume, edge.coordinator, path)
    await _start(edge, path)
    return JSONResponse(await run_in_threadpool(runs.row, path))


async def tar(edge: Edge, request: Request) -> Response:
    """The run's folder, with its SHA-256 in the header fedscan-sha256."""
    _, path = await _run(edge, request, "viewer")
    if edge.archiving.locked():
        raise Refused(503, "Other archives are being fetched.", "Try again in a moment.")
    await request.state.until_answered.enter_async_context(edge.archiving)
    content, digest = await run_in_threadpool(archive.pack, path)
    headers = {"content-length": str(len(content)), "fedscan-sha256": digest}
    pieces = (content[begin : begin + _PIECE] for begin in range(0, len(content), _PIECE))
    return StreamingResponse(pieces, media_type="application/x-tar", headers=headers)


async def _asks(edge: Edge, request: Request, role: Role, body: bool = True) -> Person:
    """Who asks; an empty body unless the caller reads them."""
    person = await who.person(edge, request, role)
    request.state.who = person.name
    if body and await limits.body(request, SMALL, seconds=15.0) not in (b"", b"{}"):
        raise Refused(400, "This takes no body.")
    return person


async def _run(edge: Edge, request: Request, role: Role) -> tuple[Person, Path]:
    person = await _asks(edge, request, role)
    path = runs.folder(edge.coordinator, request.path_params["run_id"])
    request.state.run = path.name
    return person, path


async def _own(edge: Edge, request: Request) -> Path:
    """The run, for its launcher or an operator."""
    person, path = await _run(edge, request, "researcher")
    launch = await run_in_threadpool(runs.read_launch, path)
    if launch.launcher != person.name and not person.may("operator"):
        raise Refused(403, f"Run {path.name} is {launch.launcher}'s.", "Ask them, or an operator.")
    return path


async def _start(edge: Edge, path: Path) -> None:
    """Starts a run that waits and that Flower does not have yet; the watchdog does the same."""
    async with edge.starting:
        launch = await run_in_threadpool(runs.read_launch, path)
        state = (await run_in_threadpool(tracking.read_state, path))["state"]
        if state == "waiting" and not launch.started:
            with contextlib.suppress(ConfigError):  # Flower is away: the run waits
                await run_in_threadpool(runs.start, edge.coordinator, path)


def _rows(edge: Edge) -> list[dict[str, Any]]:
    told = []
    for path in runs.every(edge.coordinator):
        try:
            told.append(runs.row(path))
        except Exception:  # somebody's damaged files must not hide all other runs
            told.append(
                {"run_id": path.name, "name": path.name, "launcher": "", "state": "failed", "reason": "damaged folder"}
                | {"submitted": "", "round": 0, "rounds": 0}
            )
    return told
