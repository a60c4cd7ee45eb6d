"""The run folder: what a run leaves behind, and nothing about a patient.

run.toml            the resolved configuration
rounds.jsonl        one line a round: sites, drop-outs, bytes, released metrics
summary.json        the run as a whole, written at the end
model.safetensors   the released model
checkpoints/        the server's state, for --resume
log.txt             what the terminal showed, and the logs of Flower
"""

import json
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from fedscan_core.errors import FolderError
from fedscan_core.files import write_atomic
from fedscan_core.wire import Arrays

ROUNDS, SUMMARY, MODEL, RUN = "rounds.jsonl", "summary.json", "model.safetensors", "run.toml"


def create(folder: Path) -> None:
    """Makes the run folder.

    Raises:
        FolderError: it is not empty, is a file, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = next(folder.iterdir(), None)
    except (FileExistsError, NotADirectoryError):
        raise FolderError(f"{folder} is a file, not a folder.", remedy="Give another --out.") from None
    except OSError as error:
        raise FolderError(f"{folder} cannot be made: {error.strerror}.", remedy="Give another --out.") from None
    if taken is not None:
        known = (folder / RUN).exists()
        raise FolderError(
            f"{folder} is not empty" + (" (it holds a run)." if known else "."),
            remedy=f"Go on with it by --resume {folder}, or give another --out." if known else "Give another --out.",
        )
    if not os.access(folder, os.W_OK):
        raise FolderError(f"{folder} cannot be written.", remedy="Check its permissions, or give another --out.")


def add_round(folder: Path, record: dict[str, Any]) -> None:
    """Appends one round; what a crash left half written, `keep_rounds` dropped before."""
    with (folder / ROUNDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(_plain(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_rounds(folder: Path, last: int) -> list[dict[str, Any]]:
    """Cuts rounds.jsonl back to what the checkpoint knows, and returns it."""
    kept = [record for record in read_rounds(folder) if record["round"] <= last]
    write_atomic(folder / ROUNDS, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of rounds.jsonl."""
    records: list[dict[str, Any]] = []
    path = folder / ROUNDS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json."""
    write_atomic(folder / SUMMARY, (json.dumps(_plain(summary), indent=2) + "\n").encode())


def read_summary(folder: Path) -> dict[str, Any]:
    """Reads summary.json.

    Raises:
        FolderError: it is not there or damaged.
    """
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise FolderError(f"{folder / SUMMARY} cannot be read.", remedy="Was the run finished?") from None
    return summary


def write_model(folder: Path, model: Arrays, about: dict[str, str]) -> None:
    """Writes the released model."""
    write_atomic(folder / MODEL, save(model, metadata=about))


def _plain(value: Any) -> Any:
    """JSON has no infinity: an unbounded epsilon is written as null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of what computed the run."""
    packages = ("fedscan", "torch", "flwr", "opacus", "numpy", "dp-accounting")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "source tree"
    return found
