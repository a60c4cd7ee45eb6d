"""The ServerApp: one visible round loop. It never sees an image, a count or a metric of a site, only noisy releases.

    declare -> (send model -> add updates as they come -> step -> checkpoint -> record) x rounds -> evaluate -> summary

Whoever starts a run hands over a `Job`: in simulation `fedscan.simulation` does, for hospitals
`fedscan_server.deployed`. Who is asked and for how long is in `fedscan_server.rounds` and `rounds_declare`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors import SafetensorError
from safetensors.numpy import load

from fedscan_core import accounting, config, wire
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError, RunFailed, WireError
from fedscan_core.wire import Arrays, Reply, Request
from fedscan_models import registry
from fedscan_server import aggregate, bound, checkpoint, evaluate, tracking
from fedscan_server.checkpoint import Checkpoint
from fedscan_server.rounds import NO_ANSWER, UNKNOWN, UNREACHABLE, Job, Mail, exchange
from fedscan_server.rounds_declare import Nodes, declare
from fedscan_server.tracking import Progress

__all__ = ["Job", "Progress", "initial_model", "make_app", "run_rounds"]


def make_app(job: Job) -> ServerApp:
    """The ServerApp of one job."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_rounds(grid, job)

    return app


def run_rounds(grid: Grid, job: Job) -> None:
    """Runs or resumes a job to its end.

    Raises:
        ConfigError: too few sites take part; nothing was trained.
        FolderError: the run folder is damaged or another run's.
        RunFailed: every round was void, or the job was stopped.
    """
    run, began = job.run, time.monotonic()
    sha = config.sha256(run)
    model, trainable = initial_model(run, job.init, job.disk.read)
    state = checkpoint.latest(job.folder, sha, job.disk) or Checkpoint(0, model, model, {})
    mail = Mail(grid, job)
    nodes, plans = declare(mail, state.round)
    weights = aggregate.weights({n: plan.patients_declared for n, plan in plans.items()}, run.aggregation.weights)
    quorum = job.quorum(len(plans))
    tracking.keep_rounds(job.folder, state.round)
    metrics: dict[str, Any] = {}

    for round_ in range(state.round + 1, run.train.rounds + 1):
        started = time.monotonic()
        total, notes, missing, up = aggregate.RunningSum(), list[str](), list[str](), 0
        longest = _longest(run, plans, state.model, trainable)
        for answer in exchange(mail, "train", Request(job.order, round_, state.model), nodes, list(plans)):
            try:
                update = _usable(answer.reply, state.model, trainable, longest[answer.site])
                total.add(update, weights[answer.site])
                up += wire.nbytes(update)
            except WireError as error:
                notes.append(f"{answer.site}: {error}")
                missing += [answer.site] if str(error) in _MISSING else []
            if (answered := total.sites + len(notes)) < len(plans):  # the last one is told with the round's record
                low, high = _spent(run, plans, round_ * run.train.local_steps)  # the noise is drawn before it comes
                job.watch(Progress("round", round_, run.train.rounds, answered, len(plans), low, high))
        void = total.sites < quorum
        state = _step(run, state, None if void else total, round_)
        low, high = _spent(run, plans, round_ * run.train.local_steps)
        metrics = _judge(job, state, round_)
        late, mail.late = mail.late, []
        tracking.add_round(  # before the checkpoint: a crash between the two does the round again and loses no line
            job.folder,
            {
                "round": round_,
                "sites": total.sites,
                "dropped": sorted(notes),
                "void": void,
                "epsilon_spent_min": low,
                "epsilon_spent_max": high,
                "bytes_up": up,
                "bytes_down": wire.nbytes(state.model) * len(plans),
                "seconds": round(time.monotonic() - started, 4),
                **({"missing": sorted(missing), "late": sorted(late)} if job.deployed else {}),
                **({"metrics": metrics} if metrics else {}),
            },
        )
        checkpoint.write(job.folder, state, sha, job.disk)
        job.watch(Progress("round", round_, run.train.rounds, len(plans), len(plans), low, high, metrics, tuple(notes)))

    records = tracking.read_rounds(job.folder)
    if all(record["void"] for record in records):
        reasons = {note for record in records for note in record["dropped"]}
        raise RunFailed(
            f"No round had {quorum} usable updates; the model is the one it started from.",
            remedy="; ".join(sorted(reasons)[:3]) or "Look into the sites' own logs.",
        )
    if job.judge and not metrics:  # resumed after the last round
        metrics = job.judge(state.average)
    _finish(mail, state, nodes, plans, records, metrics, time.monotonic() - began)


_MISSING = (NO_ANSWER, UNREACHABLE, UNKNOWN)


def initial_model(
    run: RunConfig, file: Path | None = None, read: Callable[[Path], bytes] = Path.read_bytes
) -> tuple[Arrays, frozenset[str]]:
    """The start weights (from the seed, or a local file) and the names of what is trained.

    Args:
        run: the experiment.
        file: stands for model.init, where that names a file on somebody else's machine.
        read: how the file is read.

    Raises:
        ConfigError: the file is missing, is no safetensors file, or does not fit the network.
    """
    network = registry.for_run(run)
    trainable = frozenset(name for name, p in network.module.named_parameters() if p.requires_grad)
    model: Arrays = {name: tensor.numpy().copy() for name, tensor in network.module.state_dict().items()}
    if run.model.init == "random":
        return model, trainable
    path = file or Path(run.model.init)
    remedy = "Set model.init to a file this model was saved to, or to 'random'."
    try:
        loaded: Arrays = load(read(path))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.init: {path} cannot be read: {error}.", remedy=remedy) from None
    for name, array in model.items():
        if name not in loaded or loaded[name].shape != array.shape:
            raise ConfigError(
                f"model.init: {path} does not fit: '{name}' has another shape or is missing.", remedy=remedy
            )
    return {name: loaded[name].astype(array.dtype) for name, array in model.items()}, trainable


# ------------------------------------------------------------------------------------------------ the steps of a run


def _longest(run: RunConfig, plans: dict[str, SitePlan], model: Arrays, trainable: frozenset[str]) -> dict[str, float]:
    """How long each site's update of this round may be."""
    trained = {name: model[name] for name in trainable}
    entries, start = sum(array.size for array in trained.values()), aggregate.norm(trained)
    return {name: bound.longest(run, plan, entries, start) for name, plan in plans.items()}


def _usable(reply: Reply | str, model: Arrays, trainable: frozenset[str], longest: float) -> Arrays:
    if isinstance(reply, str):
        raise WireError(reply)
    if reply.status != "ok":
        raise WireError(reply.reason or reply.status)
    return aggregate.check_update(reply.update, model, trainable, longest)


def _step(run: RunConfig, state: Checkpoint, total: aggregate.RunningSum | None, round_: int) -> Checkpoint:
    """The state after a round; after a void one (None) the model stays, and counts once more in the average."""
    model, optimizer = state.model, state.optimizer
    if total is not None:
        step, optimizer = aggregate.STRATEGIES[run.aggregation.strategy](run.aggregation, optimizer, total.mean())
        model = aggregate.apply_step(run.aggregation, model, step)
    average = aggregate.averaged(
        state.average,
        model,
        ema=run.train.ema,
        tail_share=run.train.tail_average,
        round_=round_,
        rounds=run.train.rounds,
    )
    return Checkpoint(round_, model, average, optimizer)


def _judge(job: Job, state: Checkpoint, round_: int) -> dict[str, Any]:
    """Simulation only: exact metrics of the model that would be released now."""
    run = job.run
    due = round_ == run.train.rounds or (run.evaluation.every and round_ % run.evaluation.every == 0)
    return job.judge(state.average) if job.judge and due else {}


def _spent(run: RunConfig, plans: dict[str, SitePlan], steps: int) -> tuple[float, float]:
    """Lowest and highest epsilon spent on training so far over the sites (upper bounds)."""
    if not run.privacy.enabled:
        return math.inf, math.inf
    values = [accounting.epsilon_so_far(plan, steps) for plan in set(plans.values())]
    return min(values), max(values)


def _finish(
    mail: Mail,
    state: Checkpoint,
    nodes: Nodes,
    plans: dict[str, SitePlan],
    records: list[dict[str, Any]],
    metrics: dict[str, Any],
    seconds: float,
) -> None:
    """The private evaluation if the run has one, then the released model and the summary."""
    job = mail.job
    run = job.run
    if run.evaluation.private and run.privacy.enabled:
        released: list[np.ndarray] = []
        noise: list[float] = []
        request = Request(job.order, wire.EVALUATION_ROUND, state.average)
        for answer in exchange(mail, "evaluate", request, nodes, list(plans)):
            reply = answer.reply
            if isinstance(reply, Reply) and reply.status == "ok" and evaluate.fits(run, reply.histogram):
                assert reply.histogram is not None
                released.append(reply.histogram)
                noise.append(plans[answer.site].evaluation_noise)
            job.watch(Progress("evaluate", run.train.rounds, run.train.rounds, len(released), len(plans)))
        metrics |= evaluate.private_metrics(run, released, noise)
    sha = config.sha256(run)
    about = {"run": run.name, "config_sha256": sha, "labels": "|".join(run.task.labels)}
    tracking.write_model(job.folder, state.average, about, job.disk)
    summary = {
        "run": run.name,
        "run_id": job.order.run_id,
        "config_sha256": sha,
        "versions": tracking.versions(),
        "privacy_enabled": run.privacy.enabled,
        "rounds": run.train.rounds,
        "rounds_void": sum(record["void"] for record in records),
        "model": run.model.name,
        "parameters": sum(array.size for array in state.average.values()),
        "seconds": round(math.fsum(record["seconds"] for record in records), 3),
        "seconds_this_start": round(seconds, 3),
        "bytes_up": sum(record["bytes_up"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "sites": [
            {"name": name, **asdict(plan), "epsilon_replace_one": accounting.replace_one(plan.events(), plan.delta)}
            for name, plan in sorted(plans.items())
        ],
        "metrics": metrics,
    }
    tracking.write_summary(job.folder, summary, job.disk)
    low, high = _spent(run, plans, run.train.rounds * run.train.local_steps)
    job.watch(Progress("done", run.train.rounds, run.train.rounds, len(plans), len(plans), low, high, metrics))
