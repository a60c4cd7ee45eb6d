"""The ServerApp of the deployed federation: finds its run by the one value it is given, and runs or resumes it.

The bundle that the edge starts holds no code and one key of configuration, the run's id. All else lies in the run
folder of the coordinator that the environment names (FEDSCAN_COORDINATOR). What happens to a run is told in two places:
RUN/state.json, in words made for whoever launched it, and RUN/log.txt (0600) with everything else. Nothing is raised
to Flower, which would keep the traceback in its database and hand it out.

A run ends as finished, failed or stopped. Where this program broke off instead (a full disk, a lost database, a
fault of ours), the run waits, and the edge starts it again: what was done stays done.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedscan_core import bundle, config, config_file, order
from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError, FedscanError, FolderError
from fedscan_server import app as loop
from fedscan_server import tracking
from fedscan_server.coordinator import sites, state, vault
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.rounds import Job
from fedscan_server.tracking import Disk, Progress

COORDINATOR = "FEDSCAN_COORDINATOR"  # environment: the coordinator's state folder
ORDER, INIT = "order.json", "init.safetensors"
BROKE_OFF = "The server's program broke off; it goes on by itself."
POLL = 0.5  # seconds between two looks for answers

log = logging.getLogger("fedscan")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs or resumes the run that the bundle's configuration names."""
    run(grid, state.load(Path(os.environ[COORDINATOR])), str(context.run_config[bundle.RUN_KEY]))


def run(grid: Grid, coordinator: Coordinator, run_id: str) -> None:
    """Runs or resumes one run to an end that state.json tells; raises nothing that depends on it.

    Raises:
        ConfigError: there is no such run.
    """
    folder = coordinator.runs / run_id
    if not re.fullmatch(NAME_PATTERN, run_id) or not (folder / tracking.RUN).is_file():
        raise ConfigError("There is no such run.", remedy="Runs are started by `fedscan launch`.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_logged(folder))
        try:
            stack.enter_context(tracking.locked(folder))
        except FolderError:
            log.warning("another process works on this run; this one leaves it alone")
            return
        if tracking.read_state(folder)["state"] not in tracking.FINAL:
            _run(grid, coordinator, folder)


def _run(grid: Grid, coordinator: Coordinator, folder: Path) -> None:
    if (folder / tracking.SUMMARY).exists():  # a crash between the summary and the state
        tracking.set_state(folder, "finished")
        return
    try:
        loop.run_rounds(grid, _job(coordinator, folder))
    except FedscanError as error:
        log.error("%s", error)
        _end(folder, "failed", str(error).replace(str(folder), folder.name))
    except Exception:
        log.exception("the round loop broke off")
        _end(folder, "waiting", BROKE_OFF)
    else:
        tracking.set_state(folder, "finished")


def _end(folder: Path, how: tracking.State, reason: str) -> None:
    """Keeps how it ended; on a disk that takes no more the state stays what it was, and the run is started again."""
    with contextlib.suppress(OSError):
        if (folder / tracking.STOP).exists():
            how, reason = "stopped", "The run was stopped."
        tracking.set_state(folder, how, reason)


def _job(coordinator: Coordinator, folder: Path) -> Job:
    """The job that the run folder describes.

    Raises:
        ConfigError: run.toml and order.json do not belong together, or the order is not valid now.
    """
    run_ = config_file.load(folder / tracking.RUN)
    asked = order.from_text((folder / ORDER).read_text(encoding="utf-8"))
    if asked.run_id != folder.name or asked.config != config.for_sites(run_):
        raise ConfigError("The run's order is another run's.", remedy="Launch it anew.")
    if fault := order.fault(asked):
        raise ConfigError(f"The run cannot go on: {fault}.", remedy="Launch it anew.")
    wanted = frozenset(run_.federation.sites)

    def names() -> dict[int, str]:
        try:
            return {node: name for node, name in sites.node_names(coordinator).items() if not wanted or name in wanted}
        except FolderError as error:  # the registry is locked or its disk is full: no fault of the run
            raise OSError(str(error)) from None

    def keep_anchor(site: str, round_: int, anchor: str) -> None:
        try:
            sites.add_anchor(coordinator, site, folder.name, round_, anchor)
        except FedscanError as error:  # the next one covers all that this one did
            log.error("an anchor of %s was not kept: %s", site, error)

    return Job(
        run_,
        asked,
        folder,
        watch=_keep(folder),
        deployed=True,
        names=names,
        keep_anchor=keep_anchor,
        init=folder / INIT,
        disk=Disk(vault.read, vault.write),
        poll=POLL,
    )


def _keep(folder: Path) -> Callable[[Progress], None]:
    """Writes each step that shows something new to progress.jsonl, and that the run is running once it does."""
    last: tuple[tracking.State, Progress] | None = None

    def watch(progress: Progress) -> None:
        nonlocal last
        now: tracking.State = "waiting" if progress.phase == "declare" else "running"
        if last is None or now != last[0]:
            tracking.set_state(folder, now)
        if last is None or progress != last[1]:
            tracking.add_progress(folder, progress)
        last = (now, progress)

    return watch


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Sends what Flower and fedscan log to the run's own log.txt (0600), and ours nowhere else."""
    os.close(os.open(folder / tracking.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    handler = logging.FileHandler(folder / tracking.LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("flwr", "fedscan")]
    propagated = log.propagate
    log.propagate = False  # the root logger's output goes to the SuperLink's database
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        log.propagate = propagated
        handler.close()
