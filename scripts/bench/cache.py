#!/usr/bin/env python3
"""What reading an image from the encrypted cache costs beside reading the same array from a plain `.npy` file.

    scripts/bench/cache.py [--images 40] [--repeats 15] [--folder DIR] [--json]

Three sizes: a tiny radiograph (64 x 64 float32), a slice (512 x 512 int16), a volume (128 x 256 x 256 int16). Both
sides read the same images, one after the other, in turn image by image; each repeat's time is over all images, and
ratio is the median over the repeats of ours over np.load's in the same repeat. Variants:

- npy: np.load of a plain file, allow_pickle=False;
- opened: `cache.open_patient` once, then `values` of each image, as training reads;
- each: `cache.read_values` image by image: key and index are opened every time.

States: cold: each file is dropped from the page cache before it is read (posix_fadvise), wall-clock time; DIR should be
on the disk that matters (default: a temporary folder). warm: files are in the page cache and the arrays are kept until
the repeat ends, as a cohort keeps them; CPU time. reused: warm, but each array is dropped at once, so that the next one
lies in memory that the process already has: then plain reading is one copy, and the cipher cannot hide behind it.
"""

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedscan_client.intake import cache
from fedscan_client.keys import SiteKey

SIZES = {"tiny": ((64, 64), "<f4"), "slice": ((512, 512), "<i2"), "volume": ((128, 256, 256), "<i2")}
PID = "a" * 32


def main() -> None:
    """Parses, measures, prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--images", type=int, default=40, help="of each size, volumes a quarter (default %(default)s)")
    words.add_argument("--repeats", type=int, default=15, help="default %(default)s")
    words.add_argument("--folder", type=Path, help="where the files are written, and removed again")
    words.add_argument("--json", action="store_true", help="rows as JSON on standard output and nothing else there")
    arguments = words.parse_args()
    if min(arguments.images, arguments.repeats) < 1:
        words.error("--images and --repeats must be at least 1")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(Path(folder), arguments.images, arguments.repeats, Console(stderr=True))
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows, Console(width=100))


def measure(folder: Path, images: int, repeats: int, progress: Console) -> list[dict[str, Any]]:
    """One row for each size, temperature and variant."""
    key = SiteKey(os.urandom(32), os.urandom(32))
    rows = []
    for size, (shape, dtype) in SIZES.items():
        count = max(1, images // 4) if size == "volume" else images
        here = folder / size
        rng = np.random.default_rng(0)
        arrays = [rng.integers(-1000, 3000, shape).astype(dtype) for _ in range(min(count, 4))]  # a few are enough
        here.mkdir()
        plain = [here / f"{number}.npy" for number in range(count)]
        for number, path in enumerate(plain):
            np.save(path, arrays[number % len(arrays)])
        entries = (cache.Entry(str(n), "", "ill", "", "", None, {}, "") for n in range(count))
        cache.write_patient(here, key, PID, ((it, arrays[n % len(arrays)]) for n, it in enumerate(entries)))
        os.sync()
        for state in ("cold", "warm", "reused"):
            times = rounds(here, key, plain, state, repeats, progress)
            for variant, seconds in times.items():
                ratios = [ours / base for ours, base in zip(seconds, times["npy"], strict=True)]
                rows.append(
                    {
                        "size": size,
                        "bytes": arrays[0].nbytes,
                        "state": state,
                        "variant": variant,
                        "ratio": round(statistics.median(ratios), 3),
                        "milliseconds": round(1e3 * statistics.median(seconds) / count, 4),
                        "images": count,
                    }
                )
    return rows


def rounds(
    here: Path, key: SiteKey, plain: list[Path], state: str, repeats: int, progress: Console
) -> dict[str, list[float]]:
    """Variant -> seconds over all images, one number for each repeat."""
    opened = cache.open_patient(here, key, PID)
    files = [here / "patients" / PID / opened._images[entry.id].file for entry in opened.patient.entries]
    entries = opened.patient.entries
    read: dict[str, tuple[list[Path], Callable[[int], Any]]] = {
        "npy": (plain, lambda number: np.load(plain[number], allow_pickle=False)),
        "opened": (files, lambda number: opened.values(entries[number])),
        "each": (files, lambda number: cache.read_values(here, key, PID, entries[number])),
    }
    for number in range(len(plain)):
        assert np.array_equal(read["npy"][1](number), read["opened"][1](number))
    clock = time.perf_counter if state == "cold" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in read}
    for _ in track(range(repeats), f"{here.name}, {state}", console=progress, transient=True):
        spent, kept = dict.fromkeys(read, 0.0), []
        ctypes.CDLL(None).malloc_trim(0)
        for number in range(len(plain)):
            for name, (paths, work) in read.items():
                if state == "cold":
                    drop(paths[number])
                began = clock()
                array = work(number)
                spent[name] += clock() - began
                if state == "warm":
                    kept.append(array)
                del array
        for name, seconds in spent.items():
            times[name].append(seconds)
    return times


def drop(path: Path) -> None:
    """Takes a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table for people."""
    table = Table("size", "state", "variant", "time / np.load", "ms an image")
    for row in rows:
        table.add_row(
            f"{row['size']} ({row['bytes'] / 1024:.0f} KiB)",
            row["state"],
            row["variant"],
            f"{row['ratio']:.2f}",
            f"{row['milliseconds']:.3f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
