#!/usr/bin/env python3
"""What the hospital's door costs beside plain reading: images per second of `ingest` and of pydicom.

    scripts/bench/ingest.py [--patients 60] [--slices 120] [--repeats 3] [--folder DIR] [--json]

Two hospitals are written first: phantom radiographs (128 x 128, one file an image), and CT series of 512 x 512 slices.
Each repeat takes every hospital in anew, in a fresh site, and reads the same files with pydicom, in turn. Variants:

- dcmread: `pydicom.dcmread(path).pixel_array` of every file;
- ingest: headers, consent, de-identification, pixels, volumes, encrypted cache, everything on disk (fsync);
- again: the same ingest once more, nothing new.

wall and cpu: images per second, medians over the repeats; ratio: median of its time over dcmread's in the same repeat.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from rich.console import Console
from rich.table import Table

from fedscan.phantom import draw_hospital, write_consent, write_csv
from fedscan.phantom_headers import Person, demographics, instance, mrn, study_uid
from fedscan_client import consent, keys
from fedscan_client.intake.ingest import ingest
from fedscan_client.intake.sources.settings import Folder
from fedscan_client.site import Intake, Site
from fedscan_core.policy import Policy

CT = "1.2.840.10008.5.1.4.1.1.2"


def main() -> None:
    """Parses, measures, prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--patients", type=int, default=60, help="of the radiographs (default %(default)s)")
    words.add_argument("--slices", type=int, default=120, help="of the CT series (default %(default)s)")
    words.add_argument("--repeats", type=int, default=3, help="default %(default)s")
    words.add_argument("--folder", type=Path, help="where the files are written, and removed again")
    words.add_argument("--json", action="store_true", help="rows as JSON on standard output and nothing else there")
    arguments = words.parse_args()
    if arguments.patients < 8 or arguments.slices < 2 or arguments.repeats < 1:
        words.error("at least 8 patients, 2 slices and 1 repeat")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        draw_hospital(folder / "radiographs", name="Bench", patients=arguments.patients, seed=0, image_size=128)
        draw_ct(folder / "ct", arguments.slices)
        rows = [row for kind in ("radiographs", "ct") for row in measure(folder / kind, arguments.repeats)]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("images", "variant", "files", "images/s wall", "images/s CPU", "time / dcmread (wall)", "(CPU)")
    for row in rows:
        figures = [f"{row[name]:.0f}" for name in ("files", "wall", "cpu")]
        table.add_row(row["images"], row["variant"], *figures, f"{row['ratio_wall']:.1f}", f"{row['ratio_cpu']:.1f}")
    Console(width=110).print(table)


def draw_ct(folder: Path, slices: int) -> None:
    """One patient's CT series."""
    person = Person("Bench", 0, 0, "F", 50, "Acme", 0)
    base, rng = demographics(person), np.random.default_rng(0)
    (folder / "dicom").mkdir(parents=True)
    for number in range(slices):
        ds = instance(base, person, 0, number, rng.integers(0, 4096, (512, 512)).astype(np.uint16), inverted=False)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CT
        ds.Modality, ds.RescaleType = "CT", "HU"
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, number], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = ["0.7", "0.7"], "1"
        ds.save_as(folder / "dicom" / f"{number:04d}", enforce_file_format=True)
    write_csv(folder / "labels.csv", ("study_uid", "label"), [(study_uid(person, 0), "0")])
    write_consent(folder / "consent.csv", [(mrn("Bench", 0, 0), "permit", "2020-11-02")], date.today())


def measure(hospital: Path, repeats: int) -> list[dict[str, Any]]:
    """One row for each variant."""
    files = sorted(path for path in (hospital / "dicom").rglob("*") if path.is_file())
    taken: dict[str, list[tuple[float, float]]] = {"dcmread": [], "ingest": [], "again": []}
    accepted = 0
    for repeat in range(repeats):
        site = Site(
            name="bench",
            patients_declared=1,
            source={"source": Folder(kind="folder", folder=hospital / "dicom", settle_seconds=0)},
            consent=consent.Settings(kind="register", path=hospital / "consent.csv"),
            intake=Intake(labels=hospital / "labels.csv"),
            policy=Policy(1.0, 1e-5),
            folder=hospital / f"site-{repeat}",
        )
        keys.create(site.folder, site.key)
        taken["dcmread"].append(timed(lambda: [pydicom.dcmread(path).pixel_array for path in files]))
        for variant in ("ingest", "again"):
            taken[variant].append(timed(lambda site=site: ingest(site)))
        accepted = ingest(site).instances("accepted")
    rows = []
    for variant, times in taken.items():
        count = len(files) if variant == "dcmread" else accepted
        wall, cpu = (statistics.median(count / pair[it] for pair in times) for it in (0, 1))
        # By the image: of the files read, some belong to patients who are not permitted.
        per = len(files) / count
        ratios = [
            statistics.median(ours[it] * per / plain[it] for ours, plain in zip(times, taken["dcmread"], strict=True))
            for it in (0, 1)
        ]
        rows.append(
            {"images": hospital.name, "variant": variant, "files": len(files), "accepted": count, "wall": wall}
            | {"cpu": cpu, "ratio_wall": ratios[0], "ratio_cpu": ratios[1]}
        )
    return rows


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
