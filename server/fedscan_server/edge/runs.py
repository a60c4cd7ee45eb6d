"""Runs as their people see them: taken in, listed, followed, stopped and gone on with. Every run is a folder.

STATE/runs/RUN_ID/  run.toml, order.json   what was asked, as its launcher signed it
                    init.safetensors       start weights, if it brought some
                    launch.json            ours: who, when, Flower's run ids, restarts
                    ...                    and what the round loop writes (`fedscan_server.tracking`)
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from fedscan_core import accounting, config, config_file, order, policy
from fedscan_core.config import NAME_PATTERN, RunConfig
from fedscan_core.errors import ConfigError, FedscanError, PrivacyError
from fedscan_core.files import sync_folder, write_atomic
from fedscan_core.order import Order
from fedscan_server import tracking
from fedscan_server.coordinator import control, sites, vault
from fedscan_server.coordinator.people import Person
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.edge.refused import Refused, not_found

ORDER, INIT, LAUNCH = "order.json", "init.safetensors", "launch.json"
MOST_OPEN = 20  # runs of one person that are not over: start weights may be 380 MB each
_LONGEST = 256 * 1024  # characters of an order, or of a RUN.toml
_RUN_ID = r"{name}-[0-9a-f]{{12}}"  # order.new_run_id


@dataclass(frozen=True)
class Launch:
    """What the edge keeps of a run.

    `flower`: Flower's run ids, the last one is current; `started`: when, "" = not since it was launched or resumed;
    `rounds`: those there were at the last restart; `restarts`: those since without a new round. Times are UTC.
    """

    launcher: str
    submitted: str
    flower: tuple[int, ...] = ()
    started: str = ""
    restarts: int = 0
    rounds: int = 0


def take(c: Coordinator, person: Person, order_text: str, run_toml: str, init: bytes) -> str:
    """Checks a run and makes its folder, whole or not at all; returns its id. The same run again changes nothing.

    Args:
        c: the coordinator.
        person: who sends it.
        order_text: `order.to_text`, signed by that person.
        run_toml: `config.to_toml`; model.init is "random" or INIT.
        init: safetensors, or b"".

    Raises:
        Refused: 400 or 413 (malformed), 403 (not this person's order), 409 (the id is taken, sites would refuse, or
            too many runs of this person are under way).
    """
    asked, run = _checked(person, order_text, run_toml, init)
    path = c.runs / asked.run_id
    if path.exists():
        _same(path, asked)
        return asked.run_id
    if sum(_open(path, person) for path in every(c)) >= MOST_OPEN:
        raise Refused(409, f"{MOST_OPEN} runs of yours are not over yet.", "Stop some: fedscan stop RUN.")
    _willing(c, run, asked)
    launch = Launch(person.name, _now())
    parts = {
        tracking.RUN: config.to_toml(run).encode(),
        ORDER: order.to_text(asked).encode(),
        LAUNCH: json.dumps(dataclasses.asdict(launch)).encode(),
    }
    if init:
        parts[INIT] = vault.seal(path / INIT, init)
    new = Path(tempfile.mkdtemp(dir=c.runs, prefix=".new-"))  # 0700
    try:
        for name, data in parts.items():
            write_atomic(new / name, data)
        os.rename(new, path)  # fails where another request was faster
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        if not path.exists():
            raise
        _same(path, asked)
    sync_folder(c.runs)
    return asked.run_id


def folder(c: Coordinator, run_id: str) -> Path:
    """The run's folder.

    Raises:
        Refused: 404.
    """
    path = c.runs / run_id
    if not re.fullmatch(NAME_PATTERN, run_id) or not (path / LAUNCH).is_file():
        raise not_found()
    return path


def every(c: Coordinator) -> list[Path]:
    """The folders of all runs."""
    return sorted(path.parent for path in c.runs.glob(f"*/{LAUNCH}") if re.fullmatch(NAME_PATTERN, path.parent.name))


def row(path: Path) -> dict[str, Any]:
    """One line of the list of runs."""
    launch, state, run = read_launch(path), tracking.read_state(path), read_run(path)
    rounds = tracking.read_rounds(path)
    return {
        "run_id": path.name,
        "name": run.name,
        "launcher": launch.launcher,
        "state": state["state"],
        "reason": state["reason"],
        "submitted": launch.submitted,
        "round": rounds[-1]["round"] if rounds else 0,
        "rounds": run.train.rounds,
    }


def detail(path: Path) -> dict[str, Any]:
    """A run's line, its summary (None before the end), its RUN.toml, and how many lines of progress there are."""
    summary = None
    if (path / tracking.SUMMARY).exists():
        summary = json.loads(vault.read(path / tracking.SUMMARY))
    lines = len(tracking.read_progress(path))
    return {**row(path), "summary": summary, "progress_lines": lines, "run": (path / tracking.RUN).read_text("utf-8")}


def stop(path: Path) -> None:
    """Asks the run to stop between two messages; a run that is over stays as it is."""
    if tracking.read_state(path)["state"] not in tracking.FINAL:
        tracking.ask_to_stop(path)


def resume(c: Coordinator, path: Path) -> None:
    """Makes a failed or stopped run one that waits to be started; `start` or the watchdog does it.

    Raises:
        Refused: 409, it goes on or is finished, or its order ran out.
    """
    state, asked = tracking.read_state(path)["state"], read_order(path)
    if state not in ("failed", "stopped"):
        raise Refused(409, f"Run {path.name} is {state}: it cannot be resumed.", "fedscan watch shows where it stands.")
    if fault := order.fault(asked):
        raise Refused(409, f"Run {path.name} cannot go on: {fault}.", "Launch it anew.")
    tracking.forget_stop(path)
    launch = read_launch(path)
    write_launch(path, dataclasses.replace(launch, restarts=0, rounds=len(tracking.read_rounds(path)), started=""))
    tracking.set_state(path, "waiting")


def start(c: Coordinator, path: Path) -> None:
    """Starts the run at Flower, and notes Flower's id.

    Raises:
        ConfigError: the SuperLink is away.
    """
    launch = read_launch(path)
    flower_id = control.start_run(c, path.name)
    write_launch(path, dataclasses.replace(launch, flower=(*launch.flower, flower_id), started=_now()))


def read_launch(path: Path) -> Launch:
    """RUN/launch.json."""
    tree = json.loads((path / LAUNCH).read_text("utf-8"))
    return Launch(**{**tree, "flower": tuple(tree["flower"])})


def write_launch(path: Path, launch: Launch) -> None:
    """Replaces RUN/launch.json."""
    write_atomic(path / LAUNCH, json.dumps(dataclasses.asdict(launch)).encode())


def read_run(path: Path) -> RunConfig:
    """RUN/run.toml."""
    return config_file.parse(tomllib.loads((path / tracking.RUN).read_text("utf-8")))


def read_order(path: Path) -> Order:
    """RUN/order.json."""
    return order.from_text((path / ORDER).read_text("utf-8"))


def _checked(person: Person, order_text: str, run_toml: str, init: bytes) -> tuple[Order, RunConfig]:
    if max(len(order_text), len(run_toml)) > _LONGEST:
        raise Refused(413, f"The run is described in more than {_LONGEST} characters.")
    try:
        asked = order.from_text(order_text)
        run = config_file.parse(tomllib.loads(run_toml))
    except FedscanError as error:
        raise Refused(400, error.message, error.remedy) from None
    except (ValueError, RecursionError):
        raise Refused(400, "The run is not TOML.", "Send it as config.to_toml writes it.") from None
    if asked.launcher != person.name:
        raise Refused(403, f"The order names {asked.launcher} as its launcher; you are {person.name}.")
    if not asked.signature or not order.signed_by(asked, person.public_key):
        raise Refused(403, "The order is not signed with your key.", "fedscan login again, with a new invitation.")
    if fault := order.fault(asked):
        raise Refused(400, f"The run cannot be launched: {fault}.", "Is your clock right?")
    if asked.config != config.for_sites(run):
        raise Refused(400, "The order asks for another run than RUN.toml.", "Install the same fedscan version.")
    if not re.fullmatch(_RUN_ID.format(name=re.escape(run.name[:40])), asked.run_id):
        raise Refused(400, "The run's id is not made of its name and a random number.")
    if run.model.init != (INIT if init else "random"):
        raise Refused(400, "The start weights and model.init do not belong together.", f"It is 'random' or '{INIT}'.")
    if init:
        try:
            load_safetensors(init)
        except (SafetensorError, ValueError, KeyError, TypeError):
            raise Refused(400, "The start weights are not safetensors.") from None
    return asked, run


def _open(path: Path, person: Person) -> bool:
    """Whether this run is that person's and not over; one whose files are damaged is nobody's."""
    try:
        return read_launch(path).launcher == person.name and tracking.read_state(path)["state"] not in tracking.FINAL
    except (OSError, ValueError, KeyError, TypeError, FedscanError):
        return False


def _same(path: Path, asked: Order) -> None:
    if not (path / ORDER).is_file() or read_order(path) != asked:
        raise Refused(409, f"There is another run {path.name}.", "Launch it anew: it gets another id.")


def _willing(c: Coordinator, run: RunConfig, asked: Order) -> None:
    """Raises Refused where fewer sites than the quorum would take part, by the policies that they publish."""
    enrolled = {site.name: site for site in sites.every(c) if not site.revoked}
    if missing := [name for name in run.federation.sites if name not in enrolled]:
        raise Refused(409, f"No such sites are enrolled here: {', '.join(missing)}.", "federation.sites")
    names = dict.fromkeys(run.federation.sites) or enrolled
    against = {name: why for name in names if (why := _refusal(run, asked, enrolled[name].policy))}
    if len(names) - len(against) < run.aggregation.min_sites:
        told = "; ".join(f"{name}: {why}" for name, why in against.items())
        raise Refused(
            409,
            f"{len(names) - len(against)} sites would take part, {run.aggregation.min_sites} are needed"
            f"{'. ' + told if told else ''}.",
            "fedscan launch RUN.toml --dry-run shows each site's policy.",
        )


def _refusal(run: RunConfig, asked: Order, published: dict[str, Any]) -> str | None:
    today = datetime.now(UTC).date()
    try:
        allowed, patients = policy.from_public(published)
        if why := policy.refusal(allowed, run, None, order=asked, today=today):  # before the plan, which takes longer
            return why
        plan = accounting.plan_for(run, patients)
    except (ConfigError, PrivacyError) as error:
        return error.message
    return policy.refusal(allowed, run, plan, order=asked, today=today)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
