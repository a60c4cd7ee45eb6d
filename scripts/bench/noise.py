#!/usr/bin/env python3
"""What secret noise costs beside noise that anybody who knows the seed can subtract.

    scripts/bench/noise.py [--parameters 7000000] [--repeats 9] [--json]

One thread, CPU time. Every repeat runs each variant once, in turn; time_ratio is the median over the repeats of a
variant's time over torch.normal's in the same repeat:

- torch_normal: float32 from torch's seeded generator, what an ordinary private step draws;
- numpy_generator: float64 from numpy's seeded generator;
- fedscan_gaussian: float64 from the AES keystream;
- fedscan: `add_noise` as a training step calls it: keystream, rounding, grid, added to float64 sums;
- densenet121_step: one ordinary training step without privacy, 32 images of 64 x 64, for comparison.

memory_ratio is the peak memory on top of what was there before, over the bytes of the float32 parameters (Linux).
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedscan_client.dp.noise import SecretStream, add_noise
from fedscan_models import registry, tasks

Work = Callable[[], Any]


def main() -> None:
    """Parses, measures, prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--parameters", type=int, default=7_000_000, help="of the model (default %(default)s)")
    words.add_argument("--repeats", type=int, default=9, help="default %(default)s")
    words.add_argument("--json", action="store_true", help="rows as JSON on standard output and nothing else there")
    arguments = words.parse_args()
    if min(arguments.parameters, arguments.repeats) < 1:
        words.error("--parameters and --repeats must be at least 1")
    torch.set_num_threads(1)
    rows = measure(arguments.parameters, arguments.repeats, Console(stderr=True))
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows, Console(width=100))


def measure(parameters: int, repeats: int, progress: Console) -> list[dict[str, Any]]:
    """One row for each variant."""
    sums, generator = [torch.zeros(parameters, dtype=torch.float64)], np.random.default_rng()
    variants: dict[str, Work] = {
        "torch_normal": lambda: torch.normal(0.0, 1.0, (parameters,)),
        "numpy_generator": lambda: generator.standard_normal(parameters),
        "fedscan_gaussian": lambda: SecretStream().gaussian(parameters),
        "fedscan": lambda: add_noise(sums, 1.0, SecretStream(), sensitivity=1.0),
    }
    # Loads and sizes what stays; before anything large, because freed memory would hide a peak.
    add_noise([torch.zeros(2**18)], 1.0, SecretStream(), sensitivity=1.0)
    memory = {name: peak(work) / (4 * parameters) for name, work in variants.items()}
    variants["densenet121_step"] = densenet121_step()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in track(range(repeats + 1), "measuring", console=progress, transient=True):
        for name, work in variants.items():
            began = time.process_time()
            work()
            if repeat:  # the first warms up
                seconds[name].append(time.process_time() - began)
    base = seconds["torch_normal"]
    return [
        {
            "variant": name,
            "parameters": parameters,
            "time_ratio": round(statistics.median(t / b for t, b in zip(times, base, strict=True)), 3),
            "cpu_seconds": round(statistics.median(times), 4),
            "memory_ratio": round(memory[name], 3) if name in memory else None,
        }
        for name, times in seconds.items()
    ]


def densenet121_step() -> Work:
    """An ordinary step of the largest classifier of the zoo."""
    module = registry.build("densenet121", registry.ModelShape(1, (64, 64), 1), seed=0).module
    x_B, y_B = torch.rand(32, 1, 64, 64), torch.arange(32) % 2
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        tasks.loss_rows(module(x_B), y_B).mean().backward()
        optimizer.step()

    return step


def peak(work: Work) -> int:
    """Bytes by which `work` raises the resident memory at its highest, in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        before = high_water()
        work()
        os.write(write, str(high_water() - before).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        found = int(pipe.read())
    os.waitpid(child, 0)
    return found


def high_water() -> int:
    """VmHWM in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table for people."""
    table = Table("variant", "time / torch.normal", "CPU s", "peak memory / parameters")
    for row in rows:
        memory = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        table.add_row(row["variant"], f"{row['time_ratio']:.2f}", f"{row['cpu_seconds']:.4f}", memory)
    console.print(table)
    found = {row["variant"]: row["cpu_seconds"] for row in rows}
    share = found["fedscan"] / found["densenet121_step"]
    console.print(
        f"{rows[0]['parameters']} parameters; noise is {share:.1%} of the DenseNet-121 step.", highlight=False
    )


if __name__ == "__main__":
    main()
