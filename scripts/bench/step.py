#!/usr/bin/env python3
"""The price of a private step: ours beside ordinary training and beside Opacus, in one run.

    scripts/bench/step.py [--models cnn resnet18 densenet121 unet3d] [--images 1 4] [--repeats 7] [--json]

A step is: clipped (or plain) gradients of 32 images (64 x 64; 32^3 in 3-D), one thread, and SGD's update; without the
noise, whose price scripts/bench/noise.py prints. Variants take turns within one process; a ratio is the median over
the turns of a variant's processor time over that of the non-private step in the default layout (channels first).
Memory is the peak of two steps of a fresh process over the built network (and the plan). Variants:

- nonprivate in both layouts (channels first, channels last);
- fedscan: privacy.engine = "bookkeeping", in the layout that it chose by itself;
- loop: one ordinary backward pass per patient;
- opacus_hooks, opacus_functorch, opacus_ghost: Opacus 1.6 per image (it has no patients).

--device cuda runs the same table on a GPU (time by the wall clock, memory as CUDA's peak).
"""

import argparse
import ctypes
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedscan_client.dp import engine, plans
from fedscan_models import tasks
from fedscan_models.registry import ModelShape, build
from fedscan_models.segmenters import unet3d

MODELS = ("cnn", "resnet18", "densenet121", "unet3d")
OPACUS = ("opacus_hooks", "opacus_functorch", "opacus_ghost")
BATCH = 32
CLIP = 1.0
Step = Callable[[], None]


def network(name: str, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in training mode, 32 random images and their labels."""
    generator = torch.Generator().manual_seed(0)
    if name == "unet3d":
        module: nn.Module = unet3d(1, 1)
        x_B = torch.randn(BATCH, 1, 32, 32, 32, generator=generator)
        y_B = torch.randint(0, 2, (BATCH, 32, 32, 32), generator=generator)
    else:
        module = build(name, ModelShape(1, (64, 64), 1), seed=0).module
        x_B = torch.randn(BATCH, 1, 64, 64, generator=generator)
        y_B = torch.randint(0, 2, (BATCH,), generator=generator)
    return module.train().to(device), x_B.to(device), y_B.to(device)


def make_step(variant: str, name: str, images: int, device: str) -> tuple[Step, Callable[[], str]]:
    """(one step, the layout it computes in)."""
    module, x_B, y_B = network(name, device)
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    sizes = [images] * (BATCH // images)

    if variant.startswith("nonprivate"):
        if variant.endswith("last"):
            layout = torch.channels_last if x_B.dim() == 4 else torch.channels_last_3d
            module, x_B = module.to(memory_format=layout), x_B.to(memory_format=layout)

        def plain() -> None:
            optimizer.zero_grad()
            tasks.loss_rows(module(x_B), y_B).mean().backward()
            optimizer.step()

        return plain, lambda: "channels_last" if variant.endswith("last") else "channels_first"

    if variant in OPACUS:
        return opacus_step(variant, module, optimizer, x_B, y_B), lambda: "channels_first"

    which: engine.Engine = "bookkeeping" if variant == "fedscan" else "loop"

    def ours() -> None:
        optimizer.zero_grad()
        sums = engine.clipped_sum(module, tasks.loss_rows, x_B, y_B, sizes, clip=CLIP, engine=which)
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.to(parameter.dtype).div_(len(sizes))
        optimizer.step()

    # Made here, once: not part of a step.
    plan = plans.plan_for(module, tasks.loss_rows, x_B, y_B, images) if which == "bookkeeping" else None

    def layout_chosen() -> str:
        last = plan is not None and plan.memory_format != torch.contiguous_format
        return "channels_last" if last else "channels_first"

    return ours, layout_chosen


def opacus_step(variant: str, module: nn.Module, optimizer: torch.optim.Optimizer, x_B: Tensor, y_B: Tensor) -> Step:
    """Opacus' own step with noise multiplier 0, per image."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    settings: dict[str, Any] = dict(noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=BATCH)
    if variant == "opacus_ghost":
        wrapped = GradSampleModuleFastGradientClipping(module, max_grad_norm=CLIP)
        ghost = DPOptimizerFastGradientClipping(optimizer, **settings)

        def two_passes() -> None:
            ghost.zero_grad()
            wrapped.enable_hooks()
            DPTensorFastGradientClipping(wrapped, ghost, tasks.loss_rows(wrapped(x_B), y_B)).backward()
            ghost.step()

        return two_passes
    sampler = GradSampleModule(module, force_functorch=variant == "opacus_functorch")
    private = DPOptimizer(optimizer, **settings)

    def one_pass() -> None:
        private.zero_grad()
        tasks.loss_rows(sampler(x_B), y_B).mean().backward()
        private.step()

    return one_pass


def seconds(step: Step, device: str) -> float:
    """Processor time on a CPU, wall time on a GPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def variants_for(images: int) -> list[str]:
    """Opacus has no patients: it stands beside units of one image only."""
    return ["nonprivate", "nonprivate_last", "fedscan", "loop", *(OPACUS if images == 1 else ())]


def timed(name: str, images: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Rows of one network and unit size, without memory."""
    steps: dict[str, tuple[Step, Callable[[], str]]] = {}
    for variant in variants_for(images):
        try:
            steps[variant] = make_step(variant, name, images, device)
            for _ in range(2):
                steps[variant][0]()
        except Exception as error:  # a variant that cannot do this network is left out, and said so
            print(f"{name}: {variant} fails: {type(error).__name__}: {str(error)[:120]}", file=sys.stderr)
            steps.pop(variant, None)
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(repeats):
        for variant, (step, _) in steps.items():
            times[variant].append(seconds(step, device))
    base, rows = times["nonprivate"], []
    best = min((v for v in times if v.startswith("nonprivate")), key=lambda v: statistics.median(times[v]))

    def ratio(variant: str, to: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[variant], times[to], strict=True)), 3)

    for variant, (_, layout) in steps.items():
        rows.append(
            {
                "model": name,
                "variant": variant.removesuffix("_last"),
                "images_per_patient": images,
                "time_ratio": ratio(variant, "nonprivate"),
                "time_ratio_to_best_nonprivate": ratio(variant, best),
                "layout": layout(),
                "nonprivate_seconds": round(statistics.median(base), 4),
            }
        )
    return rows


def peak(variant: str, name: str, images: int, device: str) -> float:
    """Peak bytes of a step over the built network."""
    step, _ = make_step(variant, name, images, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        step()
        return float(torch.cuda.max_memory_allocated() - before)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before_kb = status("VmRSS")
    for _ in range(2):
        step()
    return 1024.0 * (status("VmHWM") - before_kb)


def status(key: str) -> int:
    """A line of /proc/self/status, in kB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def alone(*arguments: str) -> Any:
    """Runs this script for one thing in a fresh process; None if it fails."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    print(done.stderr, end="", file=sys.stderr)
    return json.loads(done.stdout) if done.returncode == 0 and done.stdout else None


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--images", nargs="+", type=int, default=[1, 4], help="images of a patient")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON on standard output")
    parser.add_argument("--time-of", nargs=2, metavar=("MODEL", "IMAGES"), help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", nargs=3, metavar=("VARIANT", "MODEL", "IMAGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if any(BATCH % images or images < 1 for images in arguments.images):
        parser.error(f"--images must divide {BATCH}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    device = ["--device", arguments.device]
    if arguments.time_of:
        name, images = arguments.time_of
        print(json.dumps(timed(name, int(images), arguments.repeats, arguments.device)))
        return
    if arguments.peak_of:
        variant, name, images = arguments.peak_of
        print(json.dumps(peak(variant, name, int(images), arguments.device)))
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        for images in arguments.images:
            print(f"{name}, patients of {images}: time, then memory ...", file=sys.stderr)
            repeats = ["--repeats", str(arguments.repeats)]
            found = alone("--time-of", name, str(images), *repeats, *device)
            if found is None:
                sys.exit(f"{name} could not be measured")
            base = None
            for row in found:
                last = row["variant"] == "nonprivate" and row["layout"] == "channels_last"
                variant = row["variant"] + ("_last" if last else "")
                bytes_ = alone("--peak-of", variant, name, str(images), *device)
                base = bytes_ if base is None else base  # the first row is the non-private step
                row["memory_ratio"] = round(bytes_ / base, 3) if bytes_ and base else None
            rows += found
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("model", "images", "variant", "layout", "time", "to best plain", "memory")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["images_per_patient"]),
            row["variant"],
            row["layout"],
            f"{row['time_ratio']:.2f}",
            f"{row['time_ratio_to_best_nonprivate']:.2f}",
            "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
