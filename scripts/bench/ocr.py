#!/usr/bin/env python3
"""How much burned-in text the second alarm finds: eight invented lines on drawn frames, by contrast.

    scripts/bench/ocr.py [--textures 4] [--json]

Frames of 480 x 640 with one line of text, 16 pixels high, at full contrast (255), in mid grey (128) and in low contrast
(40 above the background): on black beside a sector of speckle, as ultrasound has it, and on smooth texture with
noise, as a chest radiograph has it. `found` is how many frames raised the alarm, `clean` how many of the same frames
without text did. Needs tesseract.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedscan_client.intake import ocr

LINES = (
    "MUSTER ERIKA 1961-03-04",
    "Jansen, P.",
    "ID 4711-0815",
    "St. Anna Hospital",
    "DOB 12.08.1957",
    "Dr. Okafor",
    "Acc# 00219934",
    "F 067Y",
)
CONTRASTS = (255, 128, 40)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--textures", type=int, default=4, help="different frames for each line (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    arguments = parser.parse_args()
    frames = {"ultrasound": _ultrasound, "radiograph": _radiograph}
    told: list[dict[str, Any]] = []
    for kind, draw in frames.items():
        clean = [draw(seed) for seed in range(arguments.textures)]
        begin = time.perf_counter()
        false = sum(ocr.alarm(frame) for frame in clean)
        for contrast in CONTRASTS:
            jobs = [_with_text(frame, line, contrast) for frame in clean for line in LINES]
            found = sum(ocr.alarm(job) for job in track(jobs, f"{kind} {contrast}", console=Console(stderr=True)))
            told.append({"frames": kind, "contrast": contrast, "found": found, "of": len(jobs)})
        seconds = (time.perf_counter() - begin) / (len(clean) * (1 + len(LINES) * len(CONTRASTS)))
        for row in told[-len(CONTRASTS) :]:
            row |= {"clean_alarms": false, "clean": len(clean), "seconds": round(seconds, 2)}
    if arguments.json:
        print(json.dumps(told, indent=2))
        return
    table = Table("frames", "contrast", "found", "alarms on clean", "s a frame")
    for row in told:
        of = (f"{row['found']}/{row['of']}", f"{row['clean_alarms']}/{row['clean']}", f"{row['seconds']:.2f}")
        table.add_row(row["frames"], str(row["contrast"]), *of)
    Console().print(table)


def _ultrasound(seed: int) -> NDArray[np.float32]:
    """[480, 640]: a sector of multiplicative speckle on black."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:480, :640].astype(np.float32)
    inside = (np.abs(x - 320) < 0.6 * (y - 60)) & (np.hypot(x - 320, y - 60) < 400)
    return np.where(inside, np.clip(60 * rng.rayleigh(1, y.shape), 0, 255), 0).astype(np.float32)


def _radiograph(seed: int) -> NDArray[np.float32]:
    """[480, 640]: smooth shapes of 40 to 215 with noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.random((12, 16)).astype(np.float32))
    smooth = np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC))
    return np.clip(40 + 175 * smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.float32)


def _with_text(frame: NDArray[np.float32], line: str, contrast: int) -> NDArray[np.float32]:
    mask = Image.new("L", (640, 480))
    ImageDraw.Draw(mask).text((24, 18), line, fill=255, font_size=16)
    ink = np.asarray(mask, np.float32) / 255
    # Devices write a fixed grey; low contrast is taken above the mean of what is below the line.
    value = contrast if contrast > 100 else min(255.0, float(frame[18:36, 24:240].mean()) + contrast)
    return (frame * (1 - ink) + value * ink).astype(np.float32)


if __name__ == "__main__":
    main()
