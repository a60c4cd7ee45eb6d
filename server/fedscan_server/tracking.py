"""The run folder: what a run leaves behind, and nothing about a patient.

run.toml            the resolved configuration
rounds.jsonl        one line a round: sites, drop-outs, bytes, released metrics
summary.json        the run as a whole, written at the end
model.safetensors   the released model
checkpoints/        the server's state, for --resume
log.txt             what the terminal showed, and the logs of Flower

A deployed run has three more: state.json (where it stands), progress.jsonl (what a live view shows, a line a step), and
for a while `stop`, which somebody else made to end the run.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.numpy import save

from fedscan_core.errors import FolderError
from fedscan_core.files import write_atomic
from fedscan_core.wire import Arrays

ROUNDS, SUMMARY, MODEL, RUN = "rounds.jsonl", "summary.json", "model.safetensors", "run.toml"
STATE, PROGRESS, STOP, LOG = "state.json", "progress.jsonl", "stop", "log.txt"

State = Literal["waiting", "running", "finished", "failed", "stopped"]
FINAL: tuple[State, ...] = ("finished", "failed", "stopped")


@dataclass(frozen=True)
class Progress:
    """What a live view shows. `phase`: declare, round, evaluate, done (simulation has prepare before them)."""

    phase: str
    round: int
    rounds: int
    sites_done: int
    sites: int
    epsilon_low: float = 0.0
    epsilon_high: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Disk:
    """How models and the summary are read and written: as they are, or encrypted at rest where a coordinator asks."""

    read: Callable[[Path], bytes] = Path.read_bytes
    write: Callable[[Path, bytes], None] = write_atomic


PLAIN = Disk()


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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process works on a run folder; the lock dies with the process.

    Raises:
        FolderError: another one does.
    """
    with os.fdopen(os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o600), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(
                f"Another process is working on {folder}.", remedy="Wait for it, or stop it first."
            ) from None
        yield


def add_round(folder: Path, record: dict[str, Any]) -> None:
    """Appends one round; what a crash left half written, `keep_rounds` dropped before."""
    _append(folder / ROUNDS, record)


def keep_rounds(folder: Path, last: int) -> list[dict[str, Any]]:
    """Cuts rounds.jsonl back to what the checkpoint knows, and returns it."""
    kept = [record for record in read_rounds(folder) if record["round"] <= last]
    write_atomic(folder / ROUNDS, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of rounds.jsonl."""
    return _lines(folder / ROUNDS)


def set_state(folder: Path, state: State, reason: str = "") -> None:
    """Writes where a deployed run stands, and why in words that may be shown to a researcher."""
    record = {"state": state, "reason": reason, "utc": _now()}
    write_atomic(folder / STATE, (json.dumps(record) + "\n").encode())


def read_state(folder: Path) -> dict[str, Any]:
    """{"state", "reason", "utc"}; a run that has not begun is waiting.

    Raises:
        FolderError: the file is there and damaged.
    """
    path = folder / STATE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record.keys() != {"state", "reason", "utc"} or record["state"] not in get_args(State):
            raise ValueError
    except FileNotFoundError:
        return {"state": "waiting", "reason": "", "utc": ""}
    except (OSError, ValueError, AttributeError):
        raise FolderError(f"{path} cannot be read.", remedy="Look into the run's log.txt.") from None
    return record


def ask_to_stop(folder: Path) -> None:
    """Ends a deployed run between two messages; it stays resumable."""
    write_atomic(folder / STOP, b"")


def forget_stop(folder: Path) -> None:
    """Takes the wish to stop back, before a resume."""
    (folder / STOP).unlink(missing_ok=True)


def add_progress(folder: Path, progress: Progress) -> None:
    """Appends one step as a line: the fields of `Progress` and "utc"."""
    _append(folder / PROGRESS, {"utc": _now(), **dataclasses.asdict(progress)}, sync=False)


def read_progress(folder: Path, after: int = 0) -> list[dict[str, Any]]:
    """The steps from line `after` on (from 0)."""
    return _lines(folder / PROGRESS, after)


def progress_of(line: dict[str, Any]) -> Progress:
    """The step that `add_progress` wrote; an epsilon that JSON could not hold is infinite."""
    known = {name: line[name] for name in (f.name for f in dataclasses.fields(Progress)) if name in line}
    for name in ("epsilon_low", "epsilon_high"):
        known[name] = math.inf if known.get(name, 0.0) is None else known.get(name, 0.0)
    return Progress(**known | {"notes": tuple(known.get("notes", ()))})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _append(path: Path, record: dict[str, Any], *, sync: bool = True) -> None:
    """One line at the end of a file (0600 when new); what a crash left half written before it is cut off."""
    data = (json.dumps(_plain(record)) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        size = _whole(file.seek(0, os.SEEK_END), file)
        file.truncate(size)
        file.seek(size)
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _whole(size: int, file: Any) -> int:
    """Where the last whole line ends."""
    while size:
        first = max(0, size - 4096)
        file.seek(first)
        found = file.read(size - first).rfind(b"\n")
        if found >= 0:
            return int(first + found + 1)
        size = first
    return 0


def _lines(path: Path, after: int = 0) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    text = path.read_bytes() if path.exists() else b""
    for line in text[: text.rfind(b"\n") + 1].split(b"\n")[after:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def write_summary(folder: Path, summary: dict[str, Any], disk: Disk = PLAIN) -> None:
    """Writes summary.json."""
    disk.write(folder / SUMMARY, (json.dumps(_plain(summary), indent=2) + "\n").encode())


def read_summary(folder: Path, disk: Disk = PLAIN) -> dict[str, Any]:
    """Reads summary.json.

    Raises:
        FolderError: it is not there or damaged.
    """
    try:
        summary: dict[str, Any] = json.loads(disk.read(folder / SUMMARY))
    except (OSError, ValueError):
        raise FolderError(f"{folder / SUMMARY} cannot be read.", remedy="Was the run finished?") from None
    return summary


def write_model(folder: Path, model: Arrays, about: dict[str, str], disk: Disk = PLAIN) -> None:
    """Writes the released model."""
    disk.write(folder / MODEL, save(model, metadata=about))


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
