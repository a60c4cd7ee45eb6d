"""The ServerApp: one visible round loop. It never sees an image, a count or a metric of a site, only noisy releases.

    declare -> (send model -> add updates as they come -> step -> checkpoint -> record) x rounds -> evaluate -> summary

Whoever starts a run hands over a `Job`: in simulation `fedscan.simulation` does.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedscan_core import accounting, config, wire
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError, RunFailed, WireError
from fedscan_core.order import Order
from fedscan_core.wire import Arrays, Reply, Request
from fedscan_models import registry
from fedscan_server import aggregate, checkpoint, evaluate, tracking
from fedscan_server.checkpoint import Checkpoint

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Progress:
    """What a live view shows. `phase`: declare, round, evaluate, done."""

    phase: str
    round: int
    rounds: int
    sites_done: int
    sites: int
    epsilon_low: float = 0.0
    epsilon_high: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One run for the server.

    Attributes:
        run: the experiment.
        order: what is asked of the sites, under an id that is this run's for ever.
        folder: the run folder, made already.
        sites: how many nodes to wait for before the run begins; some runtimes connect them one by one.
        judge: simulation only: exact metrics of a model on pretend held-out patients.
        watch: told of every step.
        stop: set by somebody else to end the run between two messages; it stays resumable.
        timeout: seconds to wait for the sites of one round; None = for ever.
    """

    run: RunConfig
    order: Order
    folder: Path
    sites: int = 1
    judge: Callable[[Arrays], dict[str, Any]] | None = None
    watch: Callable[[Progress], None] = lambda progress: None
    stop: threading.Event = field(default_factory=threading.Event)
    timeout: float | None = None


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
        RunFailed: every round was void, or the job was stopped.
    """
    run, began = job.run, time.monotonic()
    sha = config.sha256(run)
    model, trainable = initial_model(run)
    state = checkpoint.latest(job.folder, sha) or Checkpoint(0, model, model, {})
    nodes, plans = _declare(grid, job, state.round)
    weights = _weights(run, plans)
    needed = min(run.aggregation.min_sites, len(plans))
    tracking.keep_rounds(job.folder, state.round)
    metrics: dict[str, Any] = {}

    for round_ in range(state.round + 1, run.train.rounds + 1):
        started = time.monotonic()
        total, notes, up = aggregate.RunningSum(), list[str](), 0
        out = Request(job.order, round_, state.model)
        for name, reply in _exchange(grid, job, "train", out, nodes):
            try:
                update = _usable(reply, state.model, trainable)
                total.add(update, weights[name])
                up += wire.nbytes(update)
            except WireError as error:
                notes.append(f"{name}: {error}")
            if (answered := total.sites + len(notes)) < len(nodes):  # the last one is told with the round's record
                low, high = _spent(run, plans, round_ * run.train.local_steps)  # the noise is drawn before it comes
                job.watch(Progress("round", round_, run.train.rounds, answered, len(nodes), low, high))
        void = total.sites < needed
        state = _step(run, state, None if void else total, round_)
        low, high = _spent(run, plans, round_ * run.train.local_steps)
        metrics = _judge(job, state, round_)
        tracking.add_round(  # before the checkpoint: a crash between the two does the round again and loses no line
            job.folder,
            {
                "round": round_,
                "sites": total.sites,
                "dropped": notes,
                "void": void,
                "epsilon_spent_min": low,
                "epsilon_spent_max": high,
                "bytes_up": up,
                "bytes_down": wire.nbytes(state.model) * len(nodes),
                "seconds": round(time.monotonic() - started, 4),
                **({"metrics": metrics} if metrics else {}),
            },
        )
        checkpoint.write(job.folder, state, sha)
        job.watch(Progress("round", round_, run.train.rounds, len(nodes), len(nodes), low, high, metrics, tuple(notes)))

    records = tracking.read_rounds(job.folder)
    if all(record["void"] for record in records):
        reasons = {note for record in records for note in record["dropped"]}
        raise RunFailed(
            f"No round had {needed} usable updates; the model is the one it started from.",
            remedy="; ".join(sorted(reasons)[:3]) or "Look into the sites' own logs.",
        )
    if job.judge and not metrics:  # resumed after the last round
        metrics = job.judge(state.average)
    _finish(grid, job, state, nodes, plans, records, metrics, time.monotonic() - began)


def initial_model(run: RunConfig) -> tuple[Arrays, frozenset[str]]:
    """The start weights (from the seed, or the local file of model.init) and the names of what is trained.

    Raises:
        ConfigError: the file is missing, is no safetensors file, or does not fit the network.
    """
    network = registry.for_run(run)
    trainable = frozenset(name for name, p in network.module.named_parameters() if p.requires_grad)
    model: Arrays = {name: tensor.numpy().copy() for name, tensor in network.module.state_dict().items()}
    if run.model.init == "random":
        return model, trainable
    remedy = "Set model.init to a file this model was saved to, or to 'random'."
    try:
        loaded: Arrays = load_file(run.model.init)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.init: {run.model.init} cannot be read: {error}.", remedy=remedy) from None
    for name, array in model.items():
        if name not in loaded or loaded[name].shape != array.shape:
            raise ConfigError(
                f"model.init: {run.model.init} does not fit: '{name}' has another shape or is missing.", remedy=remedy
            )
    return {name: loaded[name].astype(array.dtype) for name, array in model.items()}, trainable


# ------------------------------------------------------------------------------------------------ the steps of a run


def _declare(grid: Grid, job: Job, done: int) -> tuple[dict[int, str], dict[str, SitePlan]]:
    """Asks every site for its plan. The run goes on without the sites that refuse, as long as there are enough.

    Raises:
        ConfigError: too few sites take part; it names the first refusals and their reasons.
    """
    nodes = {node: str(node) for node in _connected(grid, job)}
    request = Request(job.order, 0)
    plans: dict[str, SitePlan] = {}
    names: dict[int, str] = {}
    refused: list[str] = []
    for name, reply, node in _replies(grid, job, "query", request, nodes):
        if isinstance(reply, str):
            refused.append(f"node {name}: {reply}")
        elif reply.status != "ok" or reply.plan is None:
            refused.append(f"{reply.site}: {reply.reason or 'could not answer'}")
        elif reply.site in plans:
            refused.append(f"node {name}: answers as {reply.site}, which another node does already")
        elif fault := accounting.plan_fault(job.run, reply.plan):
            refused.append(f"{reply.site}: {fault}")
        else:
            plans[reply.site] = reply.plan
            names[node] = reply.site
        job.watch(Progress("declare", done, job.run.train.rounds, len(plans), len(nodes), notes=tuple(refused[-1:])))
    if len(plans) < min(job.run.aggregation.min_sites, len(nodes)) or not plans:
        needed = min(job.run.aggregation.min_sites, len(nodes)) or 1
        raise ConfigError(
            f"{len(plans)} of {len(nodes)} sites take part, {needed} needed. Refused: {'; '.join(sorted(refused)[:5])}",
            remedy="Ask for what the sites' policies allow.",
        )
    return dict(sorted(names.items(), key=lambda item: item[1])), plans


def _connected(grid: Grid, job: Job) -> list[int]:
    """The nodes, once as many are there as the job waits for, or its time is over."""
    give_up = math.inf if job.timeout is None else time.monotonic() + job.timeout
    while len(nodes := list(grid.get_node_ids())) < job.sites and time.monotonic() < give_up:
        if job.stop.wait(POLL_SECONDS):
            raise RunFailed("The run was stopped.")
    return nodes


def _weights(run: RunConfig, plans: dict[str, SitePlan]) -> dict[str, float]:
    """Public shares of the sites, adding up to 1."""
    size = {n: float(p.patients_declared) if run.aggregation.weights == "declared" else 1.0 for n, p in plans.items()}
    return {name: value / math.fsum(size.values()) for name, value in size.items()}


def _exchange(
    grid: Grid, job: Job, kind: str, request: Request, nodes: dict[int, str]
) -> Iterator[tuple[str, Reply | str]]:
    """(site name, reply or what was wrong with it), as they arrive; a site that answers as another is dropped."""
    for name, reply, _ in _replies(grid, job, kind, request, nodes):
        if isinstance(reply, Reply) and reply.site != name:
            yield name, f"answered as {reply.site}"
        else:
            yield name, reply


def _replies(
    grid: Grid, job: Job, kind: str, request: Request, nodes: dict[int, str]
) -> Iterator[tuple[str, Reply | str, int]]:
    content = wire.request_record(request)
    messages = [Message(content, dst_node_id=node, message_type=kind) for node in nodes]
    waiting = set(grid.push_messages(messages))
    give_up = math.inf if job.timeout is None else time.monotonic() + job.timeout
    heard: set[int] = set()
    while waiting and time.monotonic() < give_up:
        if job.stop.is_set():
            raise RunFailed("The run was stopped.")
        arrived = list(grid.pull_messages(waiting))
        for message in arrived:
            waiting.discard(message.metadata.reply_to_message_id)
            node = message.metadata.src_node_id
            heard.add(node)
            yield nodes[node], _read(message), node
        if not arrived:
            time.sleep(POLL_SECONDS)
    for node in nodes.keys() - heard:
        yield nodes[node], "did not answer in time", node


def _read(message: Message) -> Reply | str:
    if message.has_error():
        return "the site's app did not answer"
    try:
        return wire.read_reply(message.content)
    except WireError as error:
        return str(error)


def _usable(reply: Reply | str, model: Arrays, trainable: frozenset[str]) -> Arrays:
    if isinstance(reply, str):
        raise WireError(reply)
    if reply.status != "ok":
        raise WireError(reply.reason or reply.status)
    return aggregate.check_update(reply.update, model, trainable)


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
    grid: Grid,
    job: Job,
    state: Checkpoint,
    nodes: dict[int, str],
    plans: dict[str, SitePlan],
    records: list[dict[str, Any]],
    metrics: dict[str, Any],
    seconds: float,
) -> None:
    """The private evaluation if the run has one, then the released model and the summary."""
    run = job.run
    if run.evaluation.private and run.privacy.enabled:
        released: list[np.ndarray] = []
        noise: list[float] = []
        request = Request(job.order, wire.EVALUATION_ROUND, state.average)
        for name, reply in _exchange(grid, job, "evaluate", request, nodes):
            if isinstance(reply, Reply) and reply.status == "ok" and evaluate.fits(run, reply.histogram):
                assert reply.histogram is not None
                released.append(reply.histogram)
                noise.append(plans[name].evaluation_noise)
            job.watch(Progress("evaluate", run.train.rounds, run.train.rounds, len(released), len(nodes)))
        metrics |= evaluate.private_metrics(run, released, noise)
    sha = config.sha256(run)
    tracking.write_model(
        job.folder, state.average, {"run": run.name, "config_sha256": sha, "labels": "|".join(run.task.labels)}
    )
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
    tracking.write_summary(job.folder, summary)
    low, high = _spent(run, plans, run.train.rounds * run.train.local_steps)
    job.watch(Progress("done", run.train.rounds, run.train.rounds, len(nodes), len(nodes), low, high, metrics))
