"""The server's state after a round, written so that a crash leaves the last whole one. No pickle.

checkpoints/round-000012.safetensors    model/NAME, average/NAME, optimizer/NAME; metadata: round, config_sha256
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedscan_core.errors import FolderError
from fedscan_core.files import write_atomic
from fedscan_core.wire import Arrays

FOLDER = "checkpoints"
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """`round` rounds are done; `average` is the model that would be released now."""

    round: int
    model: Arrays
    average: Arrays
    optimizer: Arrays


def write(run_folder: Path, state: Checkpoint, config_sha256: str) -> None:
    """Writes the state and drops all but the last KEEP checkpoints."""
    parts = {"model": state.model, "average": state.average, "optimizer": state.optimizer}
    arrays = {f"{part}/{n}": np.asarray(a, order="C") for part, all_ in parts.items() for n, a in all_.items()}
    path = run_folder / FOLDER / f"round-{state.round:06d}.safetensors"
    write_atomic(path, save(arrays, metadata={"round": str(state.round), "config_sha256": config_sha256}))
    for old in sorted(path.parent.glob("round-*.safetensors"))[:-KEEP]:
        old.unlink()


def latest(run_folder: Path, config_sha256: str) -> Checkpoint | None:
    """The newest readable checkpoint, or None.

    Raises:
        FolderError: it belongs to a run with another configuration.
    """
    for path in sorted((run_folder / FOLDER).glob("round-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError):
            continue  # a damaged newest one: the one before it is whole
        if metadata["config_sha256"] != config_sha256:
            raise FolderError(
                f"{run_folder} holds a run with another configuration than its run.toml says now.",
                remedy="Put the old run.toml back, or start a new run in another folder.",
            )
        part = {p: {n.removeprefix(f"{p}/"): a for n, a in arrays.items() if n.startswith(f"{p}/")} for p in _PARTS}
        return Checkpoint(int(metadata["round"]), part["model"], part["average"], part["optimizer"])
    return None


_PARTS = ("model", "average", "optimizer")
