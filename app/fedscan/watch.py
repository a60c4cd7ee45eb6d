"""Following a run at a coordinator: its lines of progress, over lost connections and restarts, until it ends."""

import time
import tomllib
from collections.abc import Callable
from typing import Any

import httpx

from fedscan import people
from fedscan_core import config_file
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError
from fedscan_server import tracking
from fedscan_server.tracking import Progress

LONGEST_PAUSE = 30.0  # seconds between two tries when the coordinator is away


def step(line: dict[str, Any]) -> Progress | None:
    """Reads a line; None for one that is none. Fields of later versions are passed over."""
    try:
        made = tracking.progress_of(line)
        numbers = (made.round, made.rounds, made.sites_done, made.sites)
        sound = isinstance(made.phase, str) and all(isinstance(number, int) for number in numbers)
        sound &= all(isinstance(value, int | float) for value in (made.epsilon_low, made.epsilon_high))
        sound &= isinstance(made.metrics, dict) and all(isinstance(note, str) for note in made.notes)
    except (TypeError, ValueError):
        return None
    return made if sound else None


def follow(
    http: httpx.Client,
    run_id: str,
    show: Callable[[Progress], None],
    *,
    after: int = 0,
    tell: Callable[[str], None] = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Shows every step from line `after` on until the run has ended, and returns its last state.

    A coordinator that is away is asked again for ever, with growing pauses; `tell` hears when it goes and comes back.

    Raises:
        CoordinatorError: it refuses: the run is gone, or the token is.
    """
    pause = 0.0
    while True:
        began = time.monotonic()
        try:
            after_now, lines, state = people.progress(http, run_id, after)
        except people.Unreachable as error:
            if not pause:
                tell(f"{error.message} Trying again; the run itself goes on.")
            pause = min(max(1.0, 2 * pause), LONGEST_PAUSE)
            sleep(pause)
            continue
        if pause:
            tell("The coordinator answers again.")
        pause = 0.0
        for line in lines:
            if (made := step(line)) is not None:
                show(made)
        if state in people.FINAL and not lines:
            return state
        if not lines and time.monotonic() - began < 1.0:  # it should have waited for news
            sleep(1.0)
        after = max(after, after_now)


def config_of(detail: people.Detail) -> RunConfig | None:
    """The run's configuration where the coordinator tells it and this version reads it."""
    try:
        return config_file.parse(tomllib.loads(detail.toml)) if detail.toml else None
    except (tomllib.TOMLDecodeError, ConfigError):
        return None


def find(http: httpx.Client, wanted: str) -> people.Run:
    """The run of this id, or the only one whose id begins so.

    Raises:
        ConfigError: none, or several.
    """
    known = people.runs(http)
    found = [run for run in known if run.run_id == wanted] or [run for run in known if run.run_id.startswith(wanted)]
    if not found:
        raise ConfigError(f"There is no run '{wanted}' at this coordinator.", remedy="`fedscan runs` lists them.")
    if len(found) > 1:
        names = ", ".join(run.run_id for run in found[:5])
        raise ConfigError(f"{len(found)} runs begin with '{wanted}': {names}.", remedy="Give more of the name.")
    return found[0]
