#!/usr/bin/env python3
"""De-identification: what survives, and how fast, beside dicognito, dicom-anonymizer and deid.

    scripts/bench/deid.py [--files 30] [--size 512] [--json]

Everything is synthetic and written here. Two tables:

- leaks: files with canaries in every place an identity can hide (`deid_canaries.py`): eleven kinds of object, then a CT
  image with a canary in every text, UID and binary element of pydicom's dictionary, at the top and nested. Counted are
  the canaries found in the bytes a tool wrote. Ours refuses reports, documents, waveforms and plans ("refused") and is
  told that a person released the ultrasound.
- speed: CT images of --size with as many elements as a GE scanner writes (258, most of them private); each file goes
  through every tool in turn (parse, de-identify, write, in memory), so slow moments of the machine hit all alike. CPU
  time, medians over the files; time_ratio is the median of a tool's time over ours.

dicom-anonymizer runs with its newest table. deid runs with its own recipe and with one made of that same table. Tools
that are not installed are named as missing: pip install "fedscan[bench]".
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deid_canaries as canaries
import pydicom
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedscan_client.intake.deid import deidentify
from fedscan_client.intake.records import Refused

sys.path.remove(str(Path(__file__).resolve().parent))  # this file has the name of a package that it compares with

Tool = Callable[[bytes], bytes]  # a file to a file
REQUIRED = {"dicognito": "dicognito", "dicom-anonymizer": "dicomanonymizer", "deid": "deid", "deid, table": "deid"}


def main() -> None:
    """Parses, measures, prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--files", type=int, default=30, help="images for the speed table (default %(default)s)")
    words.add_argument("--size", type=int, default=512, help="rows and columns of them (default %(default)s)")
    words.add_argument("--only", nargs="+", metavar="TOOL", help="these tools instead of all that are installed")
    words.add_argument("--json", action="store_true", help="results as JSON on standard output and nothing else there")
    arguments = words.parse_args()
    if min(arguments.files, arguments.size) < 1:
        words.error("--files and --size must be at least 1")
    found, missing = tools(arguments.only)
    progress = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, quiet():
        results = {
            "missing": missing,
            "leaks": leaks(found, Path(folder), progress),
            "speed": speed(found, Path(folder), arguments.files, arguments.size, progress),
        }
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        show(results, list(found), Console(width=120))


def tools(only: list[str] | None) -> tuple[dict[str, Tool], list[str]]:
    """The tools that can run, and the names of those that are not installed."""
    makers: dict[str, Callable[[], Tool]] = {
        "fedscan": lambda: ours,
        "dicognito": dicognito,
        "dicom-anonymizer": dicom_anonymizer,
        "deid": lambda: deid(None),
        "deid, table": lambda: deid(recipe()),
    }
    wanted = [name for name in makers if only is None or name in only]
    missing = [name for name in wanted if name in REQUIRED and importlib.util.find_spec(REQUIRED[name]) is None]
    if "deid, table" in wanted and importlib.util.find_spec("dicomanonymizer") is None:
        missing.append("deid, table")
    with quiet():
        return {name: makers[name]() for name in wanted if name not in missing}, sorted(set(missing))


def ours(source: bytes) -> bytes:
    """Reads, de-identifies as if released, writes."""
    return written(deidentify(pydicom.dcmread(io.BytesIO(source)), bytes(32), released=True), enforce_file_format=True)


def dicognito() -> Tool:
    """Dicognito with a fixed seed."""
    from dicognito.anonymizer import Anonymizer

    anonymizer = Anonymizer(seed="bench")

    def run(source: bytes) -> bytes:
        ds = pydicom.dcmread(io.BytesIO(source))
        anonymizer.anonymize(ds)
        return written(ds)

    return run


def dicom_anonymizer() -> Tool:
    """dicom-anonymizer with the table of 2026c."""
    from dicomanonymizer import simpledicomanonymizer as module

    def rules() -> dict[Any, Any]:
        return module.initialize_actions("dicomfields_2026c")

    def run(source: bytes) -> bytes:
        target = io.BytesIO()
        module.anonymize_dicom_file(io.BytesIO(source), target, base_rules_gen=rules)
        return target.getvalue()

    return run


def written(ds: Any, **options: Any) -> bytes:
    """The bytes of a dataset's file."""
    target = io.BytesIO()
    ds.save_as(target, **options)
    return target.getvalue()


def recipe() -> str:
    """The basic profile as a recipe of deid: dicom-anonymizer's table, tag by tag."""
    from dicomanonymizer.dicom_anonymization_databases import dicomfields_2026c as fields

    tags = {
        name: [tag for tag in getattr(fields, name) if len(tag) == 2] for name in dir(fields) if name.endswith("_TAGS")
    }
    blank = {tag for name in ("Z_TAGS", "Z_D_TAGS", "D_TAGS") for tag in tags[name]}
    lines = ["FORMAT dicom", "%header"]
    for tag in sorted({tag for name in tags if name != "ALL_TAGS" for tag in tags[name]}):
        lines.append(f"{'BLANK' if tag in blank else 'REMOVE'} ({tag[0]:04X},{tag[1]:04X})")
    return "\n".join(lines) + "\n"


def deid(text: str | None) -> Tool:
    """Deid with a recipe, None: its own; private elements removed."""
    from deid.config import DeidRecipe
    from deid.dicom import replace_identifiers

    if text is None:
        made = DeidRecipe()
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".dicom") as file:
            file.write(text)
            file.flush()
            made = DeidRecipe(deid=file.name)

    def run(source: bytes) -> bytes:
        (ds,) = replace_identifiers([pydicom.dcmread(io.BytesIO(source))], deid=made, save=False, remove_private=True)
        return written(ds)

    return run


def leaks(found: dict[str, Tool], folder: Path, progress: Console) -> list[dict[str, Any]]:
    """One row for each file: its canaries, and for each tool how many survive, "refused", or the kind of error."""
    planted = canaries.corpus(folder)
    planted["dictionary"] = canaries.dictionary_file(folder / "dictionary.dcm")
    rows = []
    for name, plants in track(planted.items(), "leaks", console=progress, transient=True):
        row: dict[str, Any] = {"file": name, "canaries": len(plants.where)}
        for tool, run in found.items():
            try:
                row[tool] = len(plants.surviving(run((folder / f"{name}.dcm").read_bytes())))
            except Refused:
                row[tool] = "refused"
            except Exception as error:  # other people's programs: what they do on these files is the result
                row[tool] = type(error).__name__
        rows.append(row)
    return rows


def speed(found: dict[str, Tool], folder: Path, files: int, size: int, progress: Console) -> list[dict[str, Any]]:
    """One row for each tool."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in track(range(files + 1), "speed", console=progress, transient=True):
        path = folder / "speed.dcm"
        canaries.save(canaries.scanner_image(size, number), path)
        source = path.read_bytes()
        for name, run in found.items():
            began = time.process_time()
            run(source)
            if number:  # the first warms up
                seconds[name].append(time.process_time() - began)
    base = seconds["fedscan"] if "fedscan" in seconds else next(iter(seconds.values()))
    return [
        {
            "tool": name,
            "files": files,
            "size": size,
            "files_per_cpu_second": round(1 / statistics.median(times), 1),
            "time_ratio": round(statistics.median(t / b for t, b in zip(times, base, strict=True)), 2),
        }
        for name, times in seconds.items()
    ]


@contextlib.contextmanager
def quiet():
    """The tools print and warn about every element."""
    os.environ["MESSAGELEVEL"] = "QUIET"
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def show(results: dict[str, Any], found: list[str], console: Console) -> None:
    """The tables for people."""
    table = Table("file", "canaries", *found, title="canaries that survive")
    for row in results["leaks"]:
        table.add_row(row["file"], str(row["canaries"]), *(str(row[name]) for name in found))
    console.print(table)
    table = Table(
        "tool", "files / CPU s", "time / fedscan's", title=f"CT, {results['speed'][0]['size']} x that, one at a time"
    )
    for row in results["speed"]:
        table.add_row(row["tool"], f"{row['files_per_cpu_second']:.0f}", f"{row['time_ratio']:.2f}")
    console.print(table)
    for name in results["missing"]:
        console.print(f"missing: {name} (not installed)", highlight=False)


if __name__ == "__main__":
    main()
