"""What nobody asks for: runs that Flower lost go on, runs that are to stop do stop, who is online stays true."""

import asyncio
import dataclasses
import sys
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from fedscan_core import order
from fedscan_core.errors import FedscanError
from fedscan_server import tracking
from fedscan_server.coordinator import control
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.edge import runs
from fedscan_server.edge.context import Edge

SECONDS = 5.0  # between two looks
MOST_RESTARTS = 5  # in a row without a new round
STOP_GRACE = timedelta(minutes=2)  # for the round loop to see the stop file between two messages
_PAUSE = timedelta(seconds=10)  # before the first restart; doubled each time


async def run(edge: Edge) -> None:
    """Looks every few seconds, for ever; a look that fails is told to the operator and made again."""
    while True:
        try:
            await look(edge)
        except FedscanError:
            pass  # the SuperLink is away: it is being started again
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
        await asyncio.sleep(SECONDS)


async def look(edge: Edge) -> None:
    """One look.

    Raises:
        FedscanError: the SuperLink does not answer.
    """
    edge.online = frozenset(await run_in_threadpool(control.online_nodes, edge.coordinator))
    for path in await run_in_threadpool(runs.every, edge.coordinator):
        try:
            async with edge.starting:
                await run_in_threadpool(look_at_run, edge.coordinator, path)
        except (OSError, ValueError, KeyError, TypeError) as error:  # damaged files of one run
            print(f"run {path.name}: {error!r}", file=sys.stderr)


def look_at_run(c: Coordinator, path: Path, now: datetime | None = None) -> None:
    """Starts, restarts, stops or ends one run as needed.

    Raises:
        FedscanError: the SuperLink does not answer.
    """
    now = now or datetime.now(UTC)
    if tracking.read_state(path)["state"] in tracking.FINAL:
        return
    launch = runs.read_launch(path)
    over = not launch.started or control.run_status(c, launch.flower[-1]).over
    if tracking.read_state(path)["state"] in tracking.FINAL:  # it ended between the two looks
        return
    if (path / tracking.STOP).exists():
        _stop(c, path, launch, over, now)
    elif over:
        _start(c, path, launch, now)


def _stop(c: Coordinator, path: Path, launch: runs.Launch, over: bool, now: datetime) -> None:
    asked = datetime.fromtimestamp((path / tracking.STOP).stat().st_mtime, UTC)
    if not over and now - asked < STOP_GRACE:
        return
    if not over:
        control.stop_run(c, launch.flower[-1])
    tracking.set_state(path, "stopped", "stopped on request")


def _start(c: Coordinator, path: Path, launch: runs.Launch, now: datetime) -> None:
    """Flower has nothing that works on this run: it was never started, or its ServerApp died."""
    if fault := order.fault(runs.read_order(path), now):
        tracking.set_state(path, "failed", fault)
        return
    if launch.started:
        rounds = len(tracking.read_rounds(path))
        if rounds > launch.rounds:
            launch = dataclasses.replace(launch, restarts=0, rounds=rounds)
        if launch.restarts >= MOST_RESTARTS:
            reason = f"the round loop ended {MOST_RESTARTS + 1} times without a new round; the operator's log says why"
            tracking.set_state(path, "failed", reason)
            return
        if now < datetime.fromisoformat(launch.started) + _PAUSE * 2**launch.restarts:
            return
        runs.write_launch(path, dataclasses.replace(launch, restarts=launch.restarts + 1))
    runs.start(c, path)
