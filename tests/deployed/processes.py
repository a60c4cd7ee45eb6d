"""Finding and ending the processes of a federation by what they are, as a crash would."""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

# What a process is, by words of its command line.
KINDS = {
    "agent": ("fedscan.cli", "agent", "start"),
    "supernode": ("fedscan_client.node.supernode",),
    "executor": ("fedscan_client.node.executor",),
    "task": ("multiprocessing.forkserver",),
    "superlink": ("fedscan_server.coordinator.superlink",),
    "superexec": ("coordinator.superexec",),
    "serverapp": ("flwr-serverapp",),
    "edge": ("fedscan_server.edge",),
}


@dataclass(frozen=True)
class Process:
    """A running process."""

    pid: int
    parent: int
    words: tuple[str, ...]


def running() -> list[Process]:
    """Every process of this machine that can be seen, threads not counted."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if words:
                    found.append(Process(int(folder.name), parent, tuple(words)))
    return found


def below(root: int) -> list[Process]:
    """A process and everything that descends from it."""
    everything = running()
    family, grown = {root}, True
    while grown:
        more = {one.pid for one in everything if one.parent in family} - family
        grown = bool(more)
        family |= more
    return [one for one in everything if one.pid in family]


def of_kind(kind: str, root: int) -> list[Process]:
    """The processes of this kind among `root` and its descendants."""
    return [
        one
        for one in below(root)
        if all(any(part in word for word in one.words) for part in KINDS[kind]) and _real(kind, one)
    ]


def kill(kind: str, root: int) -> int:
    """SIGKILL to all of this kind below `root`; how many there were."""
    found = of_kind(kind, root)
    for one in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    return len(found)


def _real(kind: str, one: Process) -> bool:
    return kind != "task" or "spawn_main" in " ".join(one.words) or "forkserver" in " ".join(one.words)
