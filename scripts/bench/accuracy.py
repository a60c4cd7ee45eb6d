#!/usr/bin/env python3
"""Accuracy under patient-level privacy, on real images: ours beside what a user would write today.

    scripts/bench/accuracy.py --data DIR [--tasks pneumonia malaria cxr] [--repeats 5] [--json]

For each task and epsilon (none, 8, 3, 1; each site's own, delta 1e-5, patient unit, nobody trusted) this trains

- fedscan: the shipped RUN.toml through the deployed ClientApp and ServerApp;
- example: the network and settings of Flower's own Opacus example (SGD 0.001, momentum 0.9, batches of 32, clipping
  norm 1, 3 rounds of one epoch), its epsilon accounted over all rounds and for patients instead of images;

several times, each with fresh noise, and prints the median pooled AUROC of one split with its range, the 95 % interval
of the median run from a bootstrap over patients, the paired difference to the example and CPU seconds. Settings were
tuned on --split val; the default, test, is for one look at the end.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedscan import federation
from fedscan.grid import InlineGrid
from fedscan_client import app as client_app
from fedscan_client import cohort, evaluate, train
from fedscan_client import site as sites
from fedscan_client.site import Site
from fedscan_core import accounting, config, config_file
from fedscan_core.config import RunConfig
from fedscan_core.order import Order, new_run_id
from fedscan_models import registry, tasks
from fedscan_server import app as server_app

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TASKS = {
    "pneumonia": ("pneumonia_partitioned", "large2d"),
    "malaria": ("malaria", "large2d"),
    "cxr": ("cxr_pneumonia", "cxr"),
}
EPSILONS: tuple[float | None, ...] = (None, 8.0, 3.0, 1.0)


class ExampleNet(nn.Module):
    """The network of Flower's Opacus example, for any image size."""

    def __init__(self, channels: int, size: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5)
        height, width = (((side - 4) // 2 - 4) // 2 for side in size)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * height * width, 120), nn.Linear(120, 84), nn.Linear(84, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, K]."""
        x = (x - 0.5) / 0.5
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def main() -> None:
    """Parses, measures, prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, required=True, help="holds the folders large2d and cxr")
    words.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    words.add_argument("--repeats", type=int, default=5, help="runs with fresh noise (default %(default)s)")
    words.add_argument("--split", choices=("val", "test"), default="test")
    words.add_argument("--set", action="append", default=[], metavar="key=value", help="change the shipped runs")
    words.add_argument("--no-example", action="store_true", help="leave out the comparison")
    words.add_argument("--json", action="store_true", help="rows as JSON on standard output and nothing else there")
    arguments = words.parse_args()
    torch.set_num_threads(1)
    progress = Console(stderr=True, highlight=False)
    rows: list[dict[str, Any]] = []
    for task in arguments.tasks:
        rows += measure(task, arguments, progress)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows, Console(width=140))


def measure(task: str, arguments: argparse.Namespace, progress: Console) -> list[dict[str, Any]]:
    """All rows of one task."""
    name, folder = TASKS[task]
    where = f'data.dir="{(arguments.data / folder).absolute()}"'
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = config_file.load(
            CONFIGS / f"{name}.toml",
            # The whole epsilon on training, as the example does; the figures here are exact.
            [where, f"evaluation.split={arguments.split}", "evaluation.private=false", *arguments.set],
        )
        built, seconds = prepare(base, Path(scratch) / "ours", progress)
        pixels = config_file.load(
            CONFIGS / f"{name}.toml",
            [where, f"evaluation.split={arguments.split}", "evaluation.private=false", "model.name=cnn"],
        )
        raw, _ = prepare(pixels, Path(scratch) / "pixels", progress) if not arguments.no_example else ([], 0.0)
        for epsilon in EPSILONS:
            found = {
                "fedscan": [
                    ours(base, built, epsilon, Path(scratch)) for _ in range(arguments.repeats if epsilon else 1)
                ]
            }
            if raw:
                found["example"] = [example(pixels, raw, epsilon) for _ in range(arguments.repeats if epsilon else 1)]
            for method, runs in found.items():
                rows.append(row(task, method, epsilon, runs, found["example"] if method == "fedscan" and raw else None))
                rows[-1]["feature_cpu_seconds"] = round(seconds, 1) if method == "fedscan" else 0.0
                progress.print(f"{task} {method} epsilon {epsilon}: AUROC {rows[-1]['auroc']:.4f}")
    cohort.forget()
    return rows


def prepare(run: RunConfig, folder: Path, progress: Console) -> tuple[list[Site], float]:
    """The training sites with their images in memory, and the CPU seconds that took."""
    began = time.process_time()
    planned = federation.plan(run)
    with progress.status(f"reading the images of {run.name}"):
        built = federation.build(run, planned, folder, lambda done: None)
    training = [site for site, pretend in zip(built, planned, strict=True) if pretend.trains]
    unlimited = []
    for site in training:  # the bench repeats the run on the same pretend patients: no ledger would allow it
        policy = site.policy.__class__(**{**site.policy.__dict__, "max_epsilon": 1e9, "max_delta": 1.0})
        unlimited.append(site.model_copy(update={"policy": policy}))
        sites.save(unlimited[-1])
    return unlimited, time.process_time() - began


def with_epsilon(run: RunConfig, epsilon: float | None) -> RunConfig:
    """The run at this epsilon; None switches privacy off."""
    privacy = {"enabled": False} if epsilon is None else {"target_epsilon": epsilon, "noise_multiplier": None}
    return run.model_copy(update={"privacy": run.privacy.model_copy(update={**privacy, "delta": 1e-5})})


def ours(run: RunConfig, built: list[Site], epsilon: float | None, scratch: Path) -> dict[str, Any]:
    """One run through the deployed apps: scores of the held-out patients and CPU seconds."""
    run = with_epsilon(run, epsilon)
    folder = scratch / token_hex(4)
    folder.mkdir()
    began = time.process_time()
    app = client_app.make_app(lambda context: sites.load(built[int(context.node_config["partition-id"])].folder))
    job = server_app.Job(run, Order(new_run_id("bench"), config.for_sites(run)), folder)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server_app.make_app(job)(InlineGrid(app, len(built)), context)
    seconds = time.process_time() - began
    network = registry.for_run(run)
    model = load_file(folder / "model.safetensors")
    network.module.load_state_dict({name: torch.from_numpy(array) for name, array in model.items()})
    return scored(network.module, run, built) | {"seconds": seconds}


def example(run: RunConfig, built: list[Site], epsilon: float | None) -> dict[str, Any]:
    """The example's network and settings; rounds of one epoch, plain average of the sites."""
    began = time.process_time()
    torch.manual_seed(0)
    net = ExampleNet(run.task.channels, run.task.image_size, tasks.outputs(run.task.labels))
    locals_ = []
    for site in built:
        steps = math.ceil(site.patients_declared / 32)
        settings = {"rounds": 3, "local_steps": steps, "patients_per_step": 32, "optimizer": "sgd", "ema": 0.0}
        settings |= {"learning_rate": 0.001, "momentum": 0.9, "weight_decay": 0.0, "tail_average": 0.0}
        settings |= {"augmentation": "none", "multiplicity": 1}
        own = with_epsilon(run, epsilon).model_copy(update={"train": run.train.model_copy(update=settings)})
        own = own.model_copy(update={"privacy": own.privacy.model_copy(update={"clip": 1.0, "engine": "opacus"})})
        locals_.append((site, own, accounting.plan_for(own, site.patients_declared)))
    size = sum(site.patients_declared for site in built)
    for round_ in range(1, 4):
        start = {name: value.clone() for name, value in net.state_dict().items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for site, own, plan in locals_:
            net.load_state_dict(start)
            patients = cohort.load_patients(site, run, "train")
            delta = train.train_round(net, patients, own, plan, round_=round_, site=site.name)
            for name, array in delta.items():
                total[name] += torch.from_numpy(array) * (site.patients_declared / size)
        net.load_state_dict({name: start[name] + total[name] for name in start})
    seconds = time.process_time() - began
    return scored(net, run, built) | {"seconds": seconds}


def scored(module: nn.Module, run: RunConfig, built: list[Site]) -> dict[str, Any]:
    """Scores, targets and patients of the held-out images, in the sites' order."""
    held = [cohort.load_patients(site, run, run.evaluation.split) for site in built]
    scores = np.concatenate([evaluate.predict(module, part).numpy()[:, 0] for part in held])
    targets = np.concatenate([part.targets.numpy() for part in held])
    patients = np.concatenate([np.repeat(np.array(part.ids), np.diff(part.offsets)) for part in held])
    per_site = {}
    for site, part in zip(built, held, strict=True):
        if len(part.targets.unique()) == 2:  # undefined where a label is missing
            per_site[site.name] = tasks.auroc(evaluate.predict(module, part).numpy()[:, 0], part.targets.numpy())
    pooled = tasks.auroc(scores, targets)
    return {"scores": scores, "targets": targets, "patients": patients, "auroc": pooled, "per_site": per_site}


def row(
    task: str, method: str, epsilon: float | None, runs: list[dict[str, Any]], against: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """One line of the table."""
    middle = sorted(runs, key=lambda run: run["auroc"])[len(runs) // 2]
    low, high = tasks.auroc_interval(middle["scores"], middle["targets"], middle["patients"], seed=0)
    found = {
        "task": task,
        "method": method,
        "epsilon": epsilon,
        "auroc": statistics.median(run["auroc"] for run in runs),
        "auroc_min": min(run["auroc"] for run in runs),
        "auroc_max": max(run["auroc"] for run in runs),
        "auroc_interval": [low, high],
        "auroc_per_site": {
            name: statistics.median(run["per_site"][name] for run in runs) for name in runs[0]["per_site"]
        },
        "repeats": len(runs),
        "train_cpu_seconds": round(statistics.median(run["seconds"] for run in runs), 1),
    }
    if against:
        other = sorted(against, key=lambda run: run["auroc"])[len(against) // 2]
        # Both see the same images in the same order: the sites are dealt from the same seed.
        assert (other["patients"] == middle["patients"]).all()
        difference = tasks.paired_bootstrap(
            middle["scores"], other["scores"], middle["targets"], middle["patients"], seed=0
        )
        found["difference_to_example"] = list(difference)
    return found


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table for people."""
    table = Table(
        "task", "method", "epsilon", "AUROC", "min to max", "95 % interval", "minus example", "per site", "CPU s"
    )
    for found in rows:
        low, high = found["auroc_interval"]
        difference = found.get("difference_to_example")
        table.add_row(
            found["task"],
            found["method"],
            "no DP" if found["epsilon"] is None else f"{found['epsilon']:g}",
            f"{found['auroc']:.4f}",
            f"{found['auroc_min']:.4f} to {found['auroc_max']:.4f}",
            f"{low:.3f} to {high:.3f}",
            f"{difference[0]:+.3f} ({difference[1]:+.3f} to {difference[2]:+.3f})" if difference else "",
            ", ".join(f"{name} {value:.3f}" for name, value in found["auroc_per_site"].items()),
            f"{found['feature_cpu_seconds'] + found['train_cpu_seconds']:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
