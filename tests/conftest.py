"""Settings that every test needs before the first heavy import."""

import os
import runpy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Flower and Ray read these when they are imported: no test calls home.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest
from hypothesis import settings

from fedscan_core.config import RunConfig

# Time limits per example fail on busy machines and say nothing about the code. In CI the examples
# are the same every time: a failure there is the change's, not the dice's.
settings.register_profile("fedscan", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fedscan")


def _make_run(**sections: Any) -> RunConfig:
    """A quick run on 16 x 16 pictures with the cnn; a section's keys are laid over these."""
    tree: dict[str, Any] = {
        "name": "demo",
        "task": {"labels": ["well", "ill"], "image_size": [16, 16]},
        "model": {"name": "cnn"},
        "privacy": {"noise_multiplier": 1.0},
        "train": {"rounds": 3, "local_steps": 1, "patients_per_step": "all"},
    }
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return RunConfig.model_validate(tree)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunConfig]:
    """See `_make_run`."""
    return _make_run


@pytest.fixture(scope="session")
def leaks() -> Callable[[Path, Iterable[bytes]], list[str]]:
    """See client/intake/leaks.py."""
    found: Callable[[Path, Iterable[bytes]], list[str]] = _load("client/intake/leaks.py")["leaks"]
    return found


@pytest.fixture(scope="session")
def at_every_write() -> Callable[..., Iterator[int]]:
    """See client/kills.py."""
    found: Callable[..., Iterator[int]] = _load("client/kills.py")["at_every_write"]
    return found


@pytest.fixture(scope="session")
def fake_coordinator() -> dict[str, Any]:
    """See client/fake_coordinator.py: `coordinator`, `proxy`."""
    return _load("client/fake_coordinator.py")


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """As `tmp_path`, in memory where that exists: for tests that write very often."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def _load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parent / name))
