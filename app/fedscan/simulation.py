"""A whole federation on this machine: pretend sites, the deployed ClientApp and ServerApp, and a run folder.

    plan (refuse what cannot work) -> folder -> sites and their images -> rounds -> summary

Everything up to the first round is undone when it fails; from then on the folder is whole and can be gone on with.

    RUN/simulation.json     who takes part, and under which id the sites book this run; written last before round 1
        sites/NAME/         a pretend site, ledger and all; a deployed one looks the same
        hospitals/NAME/     phantom hospitals' DICOM files, where the run has them
        (what the server writes: `fedscan_server.tracking`)
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fedscan import federation
from fedscan.grid import InlineGrid
from fedscan_client import app as client_app
from fedscan_client import cohort
from fedscan_client import evaluate as client_evaluate
from fedscan_client import site as sites
from fedscan_client.site import Site
from fedscan_core import config, config_file, files
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError, FedscanError, FolderError, MissingExtra, RunFailed
from fedscan_core.order import Order, new_run_id
from fedscan_core.wire import Arrays
from fedscan_models import registry, tasks
from fedscan_server import app as server_app
from fedscan_server import tracking
from fedscan_server.app import Job, Progress

STATE, LOG = "simulation.json", "log.txt"
SITES = "sites"
SIMULATION_ONLY = "simulation_only"  # exact metrics: no deployed federation could publish them

Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class _Federation:
    """What simulation.json holds."""

    run_id: str
    config_sha256: str
    sites: tuple[str, ...]
    evaluation_only: tuple[str, ...]


def simulate(
    run: RunConfig | Path | str,
    *,
    data: Path | str | None = None,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    watch: Watch = lambda progress: None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Runs one federation of pretend sites to its end and returns its summary.

    Args:
        run: the experiment, or the path of a RUN.toml.
        data: folder of the images; goes before the run's own `data.dir`.
        out: the run folder, which must not exist or be empty; default runs/NAME-TIME.
        overrides: `section.key=value`, with a RUN.toml only.
        watch: told of every step.
        stop: set it from elsewhere to end the run between two messages; `resume` goes on.

    Raises:
        FedscanError: exit_code 2, and nothing was left behind; or `RunFailed`, and `resume` may go on.
    """
    if not isinstance(run, RunConfig):
        run = config_file.load(Path(run), overrides)
    elif overrides:
        raise ConfigError("Overrides go with the path of a RUN.toml.", remedy="Change the RunConfig itself.")
    if run.data.source == "phantom" and data is not None:
        raise ConfigError("The run draws phantoms and reads no images.", remedy="Leave out --data.")
    where = data if data is not None else run.data.dir
    if where is not None and run.data.source != "phantom":
        run = run.model_copy(update={"data": run.data.model_copy(update={"dir": _absolute(where)})})
    if run.model.init != "random":
        run = run.model_copy(update={"model": run.model.model_copy(update={"init": _absolute(run.model.init)})})
    _check_backend(run)
    server_app.initial_model(run)  # a network or start weights that cannot be had: before anything is read
    planned = federation.plan(run)

    folder = Path(out) if out is not None else default_folder(run)
    with _new_folder(folder) as started, _logged(folder), _threads():
        files.write_atomic(folder / tracking.RUN, config.to_toml(run).encode())

        def tell(done: int) -> None:
            watch(Progress("prepare", 0, run.train.rounds, done, len(planned)))

        built = federation.build(run, planned, folder / SITES, tell)
        state = _Federation(
            run_id=new_run_id(run.name),
            config_sha256=config.sha256(run),
            sites=tuple(site.name for site, plan in zip(built, planned, strict=True) if plan.trains),
            evaluation_only=tuple(site.name for site, plan in zip(built, planned, strict=True) if not plan.trains),
        )
        files.write_atomic(folder / STATE, (json.dumps(state.__dict__, indent=2) + "\n").encode())
        return _run(run, folder, state, watch, stop or threading.Event(), started)


def _absolute(path: Path | str) -> str:
    """What run.toml keeps: --resume may be typed elsewhere."""
    return str(Path(path).expanduser().absolute())


def default_folder(run: RunConfig) -> Path:
    """runs/NAME-TIME."""
    return Path("runs") / f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}"


def resume(
    folder: Path | str, *, watch: Watch = lambda progress: None, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Goes on with a run after its last whole round; what was spent stays spent. A finished run is just read.

    Raises:
        FolderError: the folder holds no run that got as far as its first round, or another process works on it.
        FedscanError: as `simulate`; nothing is ever removed.
    """
    folder = Path(folder)
    try:
        known = json.loads((folder / STATE).read_text(encoding="utf-8"))
        state = _Federation(
            known["run_id"], known["config_sha256"], tuple(known["sites"]), tuple(known["evaluation_only"])
        )
    except FileNotFoundError:
        raise FolderError(
            f"{folder} holds no run that could go on (there is no {STATE}).",
            remedy="Give the folder of a run, or start it anew in another one.",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{folder / STATE} cannot be read: {error}.", remedy="Start the run anew.") from None
    run = config_file.load(folder / tracking.RUN)
    if config.sha256(run) != state.config_sha256:
        raise FolderError(
            f"{folder / tracking.RUN} says something else than when the run began.",
            remedy="Put the old file back, or start a new run in another folder.",
        )
    if (folder / tracking.SUMMARY).exists():
        watch(Progress("done", run.train.rounds, run.train.rounds, 0, 0, notes=("The run was finished already.",)))
        return tracking.read_summary(folder)
    _check_backend(run)
    with tracking.locked(folder), _logged(folder), _threads():
        everybody = (*state.sites, *state.evaluation_only)
        for number, name in enumerate(everybody):  # the images may have gone since
            federation.check_site(run, sites.load(folder / SITES / name), name in state.sites)
            watch(Progress("prepare", 0, run.train.rounds, number + 1, len(everybody)))
        return _run(run, folder, state, watch, stop or threading.Event(), lambda: None)


def _run(
    run: RunConfig,
    folder: Path,
    state: _Federation,
    watch: Watch,
    stop: threading.Event,
    started: Callable[[], None],
) -> dict[str, Any]:
    """The rounds, on the chosen backend; `started` is called once something is worth keeping."""
    training = [folder / SITES / name for name in state.sites]
    judge = functools.partial(_judge, run, folder / SITES, state)

    def tell(progress: Progress) -> None:
        # Once every site has booked the run, its folder is kept: a failure in the first round can be gone on with.
        if progress.phase != "declare" or progress.sites_done == progress.sites:
            started()
        watch(progress)

    app = client_app.make_app(functools.partial(_open, tuple(training)))
    job = Job(run, Order(state.run_id, config.for_sites(run)), folder, len(training), judge, tell, stop)
    try:
        if run.simulation.backend == "ray":
            _on_ray(run, job, app, len(training))
        else:
            context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
            server_app.make_app(job)(InlineGrid(app, len(training)), context)
    except RunFailed as error:
        advice = f"Go on: fedscan simulate --resume {folder}"
        if not stop.is_set():
            advice = f"What went wrong at a site is in its site.log, under {folder / SITES}. {error.remedy}"
        raise RunFailed(error.message, remedy=advice) from None
    except OSError as error:
        what = f" ({error.filename})" if error.filename else ""
        raise RunFailed(
            f"The run stopped: {error.strerror or error}{what}.",
            remedy=f"Mend that, then go on: fedscan simulate --resume {folder}",
        ) from error
    return tracking.read_summary(folder)


def _open(folders: tuple[Path, ...], context: Context) -> Site:
    return sites.load(folders[int(context.node_config["partition-id"])])


# ------------------------------------------------------------------------------------------------------- measurement


def _judge(run: RunConfig, folder: Path, state: _Federation, model: Arrays) -> dict[str, Any]:
    """Exact metrics on the pretend sites' held-out patients; the pooled ones are over the sites that train."""
    network = registry.for_run(run)
    network.module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in model.items()})
    scores: dict[str, np.ndarray] = {}
    targets: dict[str, np.ndarray] = {}
    for name in (*state.sites, *state.evaluation_only):
        site = sites.load(folder / name)
        parts = [cohort.load_patients(site, run, s) for s in federation.splits(run, name in state.sites)]
        held = [part for part in parts if len(part)]
        predicted = [client_evaluate.predict(network.module, part).numpy() for part in held]
        scores[name] = np.concatenate(predicted) if predicted else np.zeros((0, tasks.outputs(run.task.labels)))
        targets[name] = np.concatenate([part.targets.numpy() for part in held] or [np.zeros(0, np.int64)])
    per_site = {name: _auroc(scores[name], targets[name], run) for name in scores}
    pooled = _auroc(
        np.concatenate([scores[name] for name in state.sites]),
        np.concatenate([targets[name] for name in state.sites]),
        run,
    )
    return {
        "auroc": {"value": pooled, "status": SIMULATION_ONLY, "split": run.evaluation.split},
        "auroc_per_site": {
            name: {"value": value, "status": SIMULATION_ONLY} for name, value in per_site.items() if value is not None
        },
        "auroc_withheld": [name for name, value in per_site.items() if value is None],
    }


def _auroc(scores_NK: np.ndarray, targets_N: np.ndarray, run: RunConfig) -> float | None:
    """None where it is undefined: a label that no image has, or scores of a model that diverged."""
    if len(set(targets_N.tolist())) < len(run.task.labels) or not np.isfinite(scores_NK).all():
        return None
    return tasks.auroc(scores_NK[:, 0] if scores_NK.shape[1] == 1 else scores_NK, targets_N)


# ----------------------------------------------------------------------------------------------------------- backends


def _check_backend(run: RunConfig) -> None:
    if run.simulation.backend != "ray":
        return
    try:
        import ray  # noqa: F401 - whether it is there
    except ImportError:
        raise MissingExtra(
            "simulation.backend = 'ray' needs Flower's simulation extra, which is not installed.",
            remedy="pip install -c constraints.txt 'fedscan[ray]', or leave out the backend.",
        ) from None


def _on_ray(run: RunConfig, job: Job, app: ClientApp, count: int) -> None:
    """Flower's own simulation runtime, through the entry point that starts no daemon and ends with the run."""
    from flwr.simulation import run_simulation

    resources: dict[str, Any] = {"num_cpus": run.simulation.cpus_per_site, "num_gpus": run.simulation.gpus_per_site}
    try:
        run_simulation(
            server_app=server_app.make_app(job),
            client_app=app,
            num_supernodes=count,
            backend_config={
                "client_resources": resources,
                "init_args": {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False},
            },
        )
    except BaseException:
        job.stop.set()  # the server's thread would wait for replies that nobody sends any more
        raise
    finally:
        import ray

        ray.shutdown()


# ------------------------------------------------------------------------------------------------------------- folder


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Callable[[], None]]:
    """Makes and locks the run folder. If the body fails before it calls what this yields, all of it is removed."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    tracking.create(folder)
    started = threading.Event()
    try:
        with tracking.locked(folder):
            yield started.set
    except OSError as error:
        if started.is_set():
            raise
        raise FolderError(f"{folder} cannot be filled: {error.strerror or error}.", remedy="Free some space.") from None
    finally:
        if not started.is_set():
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in made:
                with contextlib.suppress(OSError):  # a parent that somebody else uses by now
                    path.rmdir()


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Half of the processors for PyTorch while the run lasts, unless OMP_NUM_THREADS says otherwise.

    The models are small: on a machine that others use too, all processors were seven times slower than one of two.
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Sends what Flower and fedscan log to the run folder's log.txt while the run lasts."""
    handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("flwr", "fedscan")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except FedscanError as error:
        logging.getLogger("fedscan").error("%s", error)
        raise
    except Exception:
        logging.getLogger("fedscan").exception("the run failed")
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
