"""The machine: whose folder it is, disk, memory, GPU."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedscan_client.check.finding import Finding, fail, ok, warn

GIB = 2**30
DISK_FAILS, DISK_WARNS = 1 * GIB, 5 * GIB
MEMORY_FAILS, MEMORY_WARNS = 1.5 * GIB, 4 * GIB  # PyTorch and Flower alone take about 1 GiB


def look(folder: Path) -> Iterator[Finding]:
    """The findings on folder, disk and memory."""
    yield _folder(folder)
    yield _disk(folder)
    yield _memory()


def _folder(folder: Path) -> Finding:
    status, user = folder.stat(), os.geteuid()
    if user == 0 and status.st_uid != 0:
        return warn(
            "folder",
            f"{folder} belongs to user {status.st_uid}, and this check runs as root, who may read everything.",
            f"Check it as the agent's own user: sudo -u '#{status.st_uid}' fedscan agent check {folder}",
        )
    if status.st_uid != user:
        return fail(
            "folder", f"{folder} belongs to user {status.st_uid}, not to this one ({user}).", "Run this as that user."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        return fail("folder", f"{folder} cannot be written.", f"chmod 700 {folder}; is the disk mounted read-only?")
    if status.st_mode & 0o077:
        return warn("folder", f"Other users of this machine may look into {folder}.", f"chmod 700 {folder}")
    return ok("folder", f"{folder}, of this user only")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    words = f"{free / GIB:.1f} GiB free at {folder}"
    remedy = "Free some, or move the site's folder to a larger disk: a full one stops ingest and every round."
    if free < DISK_FAILS:
        return fail("disk", f"Only {words}.", remedy)
    return warn("disk", f"Only {words}.", remedy) if free < DISK_WARNS else ok("disk", words)


def _memory() -> Finding:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = f"{size / GIB:.1f} GiB, {os.cpu_count()} processors"
    remedy = "Give the machine at least 4 GiB: the agent keeps a run's cohort in memory."
    if size < MEMORY_FAILS:
        return fail("memory", f"Only {words}.", remedy)
    return warn("memory", f"Only {words}.", remedy) if size < MEMORY_WARNS else ok("memory", words)


def gpu() -> Finding:
    """Whether there is a GPU, and whether PyTorch can use it; loads PyTorch. Training takes place on the processor."""
    import torch

    there = any(Path("/dev").glob("nvidia[0-9]*"))
    if torch.cuda.is_available():
        return ok("gpu", f"{torch.cuda.get_device_name(0)}; this version trains on the processor all the same")
    if there:
        return ok("gpu", "a GPU that this PyTorch cannot use; training takes place on the processor, none is needed")
    return ok("gpu", "none; none is needed, training takes place on the processor")
