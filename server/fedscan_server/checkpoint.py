"""The server's state after a round, written so that a crash leaves the last whole one. No pickle.

checkpoints/round-000012.safetensors    model/NAME, average/NAME, optimizer/NAME; metadata: round, config_sha256, sha256

`sha256` is over all the rest: a file that a disk or a hand changed is not gone on with. The one before it is: sites
give the same answers to the same questions, so its round is done again to the same model.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedscan_core import wire
from fedscan_core.errors import FolderError
from fedscan_core.wire import Arrays
from fedscan_server.tracking import PLAIN, Disk

FOLDER = "checkpoints"
KEEP = 2
_PARTS = ("model", "average", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """`round` rounds are done; `average` is the model that would be released now."""

    round: int
    model: Arrays
    average: Arrays
    optimizer: Arrays


def write(run_folder: Path, state: Checkpoint, config_sha256: str, disk: Disk = PLAIN) -> None:
    """Writes the state and drops all but the last KEEP checkpoints."""
    parts = {"model": state.model, "average": state.average, "optimizer": state.optimizer}
    arrays = {f"{part}/{n}": np.asarray(a, order="C") for part, all_ in parts.items() for n, a in all_.items()}
    about = {"round": str(state.round), "config_sha256": config_sha256}
    path = run_folder / FOLDER / f"round-{state.round:06d}.safetensors"
    disk.write(path, save(arrays, metadata={**about, "sha256": _digest(arrays, about)}))
    for old in sorted(path.parent.glob("round-*.safetensors"))[:-KEEP]:
        old.unlink()


def latest(run_folder: Path, config_sha256: str, disk: Disk = PLAIN) -> Checkpoint | None:
    """The newest whole checkpoint, or None where none was written yet.

    Raises:
        FolderError: it belongs to a run with another configuration, or there are some and all are damaged.
    """
    found = sorted((run_folder / FOLDER).glob("round-*.safetensors"), reverse=True)
    for path in found:
        try:
            arrays, about = _open(disk.read(path))
        except (SafetensorError, OSError, ValueError, KeyError, FolderError):
            continue  # a damaged newest one: the one before it is whole
        if about["config_sha256"] != config_sha256:
            raise FolderError(
                f"{run_folder} holds a run with another configuration than its run.toml says now.",
                remedy="Put the old run.toml back, or start a new run in another folder.",
            )
        part = {p: {n.removeprefix(f"{p}/"): a for n, a in arrays.items() if n.startswith(f"{p}/")} for p in _PARTS}
        return Checkpoint(int(about["round"]), part["model"], part["average"], part["optimizer"])
    if found:
        raise FolderError(
            f"None of the checkpoints in {run_folder / FOLDER} is whole.",
            remedy="Put them back from a backup (with their key, if they are encrypted), or start a new run.",
        )
    return None


def _open(data: bytes) -> tuple[Arrays, dict[str, str]]:
    arrays: Arrays = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about: dict[str, str] = header["__metadata__"]
    if about.pop("sha256") != _digest(arrays, about):
        raise ValueError("not what was written")
    return arrays, about


def _digest(arrays: Arrays, about: dict[str, str]) -> str:
    text = "|".join((about["round"], about["config_sha256"], wire.fingerprint(arrays)))
    return hashlib.sha256(text.encode()).hexdigest()
