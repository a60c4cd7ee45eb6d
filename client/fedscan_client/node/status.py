"""What `fedscan agent status` tells, and pause, resume and stop: they speak with the agent through its files alone."""

import contextlib
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from fedscan_client import connection as connections
from fedscan_client import door
from fedscan_client import site as sites
from fedscan_client.audit import log
from fedscan_client.node.start import FOLDER, PAUSED
from fedscan_core.errors import FedscanError, FolderError
from fedscan_core.files import sync_folder


def running(site: Path) -> int | None:
    """The pid of the agent that serves this site, or None. The lock tells, not the number in the file."""
    try:
        descriptor = os.open(site / FOLDER / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(ValueError):
            return int(os.pread(descriptor, 20, 0))
        return None  # it is starting
    finally:
        os.close(descriptor)
    return None


def report(folder: Path, *, ask: bool = True) -> dict[str, Any]:
    """The state of a site's agent. Nothing in it depends on patients.

    Args:
        folder: the site's.
        ask: also ask the coordinator what it sees.

    Returns:
        site, coordinator, address, state ("running", "paused", "stopped"), pid, parts (what was last said of agent,
        supernode, executor and policy, with the time), seen (online, last_seen) or seen_problem.

    Raises:
        ConfigError: no site.toml, or the site is not enrolled.
    """
    here = sites.load(folder.absolute())
    connection = connections.load(here.folder)
    pid = running(here.folder)
    paused = (here.folder / PAUSED).exists()
    told: dict[str, Any] = {"site": here.name, "coordinator": connection.coordinator, "address": connection.address}
    told |= {"state": "stopped" if pid is None else "paused" if paused else "running", "pid": pid, "paused": paused}
    try:
        told["parts"] = json.loads((here.folder / FOLDER / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told["parts"] = {}
    if ask:
        try:
            about = door.about(here.folder)
            told["seen"] = {"online": about["online"], "last_seen": about.get("last_seen", "")}
        except FedscanError as error:
            told["seen_problem"] = str(error)
    return told


def pause(folder: Path) -> bool:
    """From now on no release leaves, and within a second the site is silent, also after a restart, until `resume`.

    False: it was paused already.

    Raises:
        ConfigError: no site.toml.
        FolderError: the folder cannot be written.
    """
    here = sites.load(folder.absolute())
    try:
        os.close(os.open(here.folder / PAUSED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    except OSError as error:
        raise FolderError(
            f"{here.folder} cannot be written: {error.strerror}.", remedy="Use its owner's account."
        ) from None
    sync_folder(here.folder)
    log.append(here.folder, "pause")
    return True


def resume(folder: Path) -> bool:
    """Ends a pause. False: there was none. Errors as `pause`."""
    here = sites.load(folder.absolute())
    if not (here.folder / PAUSED).exists():
        return False
    log.append(here.folder, "resume")  # first: no answer leaves before the log says why it could
    try:
        (here.folder / PAUSED).unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise FolderError(
            f"{here.folder} cannot be written: {error.strerror}.", remedy="Use its owner's account."
        ) from None
    sync_folder(here.folder)
    return True


def stop(folder: Path, seconds: float = 60.0) -> bool:
    """Tells the agent to stop and waits until it has. False: none was running.

    Raises:
        ConfigError: no site.toml.
        FolderError: it may not be stopped by this account, or has not stopped within `seconds`.
    """
    here = sites.load(folder.absolute())
    pid = running(here.folder)
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise FolderError(f"Process {pid} belongs to another account.", remedy="Use that account, or root.") from None
    end = time.monotonic() + seconds
    while running(here.folder) == pid:
        if time.monotonic() > end:
            raise FolderError(f"Process {pid} has not stopped within {seconds:g} s.", remedy=f"kill -9 {pid}")
        time.sleep(0.1)
    return True
