"""Following a run at a coordinator: its lines of progress, over lost connections and restarts, until it ends."""

import math
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import httpx

from fedscan import people
from fedscan_core import config_file
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError

LONGEST_PAUSE = 30.0  # seconds between two tries when the coordinator is away


@dataclass(frozen=True)
class Step:
    """One line of progress, as `fedscan_server.app.Progress` has it; `view.View` shows it."""

    phase: str
    round: int
    rounds: int
    sites_done: int
    sites: int
    epsilon_low: float = 0.0
    epsilon_high: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def step(line: dict[str, Any]) -> Step | None:
    """Reads a line; None for one that is none. Fields of later versions are passed over, null is no bound."""
    known = {name: line[name] for name in _NAMES if name in line}
    for name in ("epsilon_low", "epsilon_high"):
        if name in known and known[name] is None:
            known[name] = math.inf
    try:
        known["notes"] = tuple(map(str, known.get("notes", ())))
        known["metrics"] = dict(known.get("metrics") or {})
        made = Step(**known)
        sound = all(isinstance(getattr(made, name), int) for name in ("round", "rounds", "sites_done", "sites"))
        sound = sound and all(isinstance(value, int | float) for value in (made.epsilon_low, made.epsilon_high))
    except (TypeError, ValueError):
        return None
    return made if sound and isinstance(made.phase, str) else None


_NAMES = tuple(each.name for each in fields(Step))


def follow(
    http: httpx.Client,
    run_id: str,
    show: Callable[[Step], None],
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
