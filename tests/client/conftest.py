"""A small hospital whose images lie in a table."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedscan_client.cohort import COLUMNS, TABLE, Patients, forget
from fedscan_client.intake.sources.settings import Table
from fedscan_client.site import Site
from fedscan_client.site import save as save_site
from fedscan_core.policy import Policy

Row = tuple[str, str, str, int]  # patient, label, split, seed of the picture


def _default_rows() -> list[Row]:
    """Ten patients with one to three images each, by turns ill; the last three are for the test."""
    rows = []
    for number in range(10):
        for image in range(1 + number % 3):
            split = "train" if number < 7 else "test"
            rows.append((f"canary-{number:03d}", ("well", "ill")[number % 2], split, 10 * number + image))
    return rows


def _make_site(folder: Path, *, rows: Sequence[Row] | None = None, name: str = "north", **policy: Any) -> Site:
    """Writes pictures, cohort.csv and site.toml; a research cohort that approves by itself, unless said otherwise."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for patient, label, split, seed in _default_rows() if rows is None else rows:
            pixels = np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8)
            Image.fromarray(pixels).save(pictures / f"canary-file-{seed}.png")
            table.writerow([f"canary-file-{seed}.png", "", patient, label, split, "", ""])
    given: dict[str, Any] = {"max_epsilon": 100.0, "max_delta": 1e-3, "research_cohort": True}
    given |= {"approval": "auto-within-policy", **policy}
    source = {"source": Table(kind="table", folder=pictures)}
    site = Site(name=name, patients_declared=20, source=source, policy=Policy(**given), folder=folder)
    save_site(site)
    return site


@pytest.fixture(autouse=True)
def _fresh_memory() -> None:
    """No cohort of another test is kept in memory."""
    forget()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tester's own proxy has no part in any test."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake(fake_coordinator: dict[str, Any], tmp_path: Path) -> Iterator[Any]:
    """A coordinator's edge, pretended, over real HTTPS; see tests/conftest.py."""
    with fake_coordinator["coordinator"](tmp_path / "centre") as it:
        yield it


@pytest.fixture(scope="session")
def make_site() -> Callable[..., Site]:
    """See `_make_site`."""
    return _make_site


@pytest.fixture(scope="session")
def make_patients() -> Callable[..., Patients]:
    """Patients with `sizes` images each of the given shape: pixels and labels from a seed."""

    def make(sizes: Sequence[int], shape: tuple[int, ...] = (1, 16, 16), *, labels: int = 2, seed: int = 0) -> Patients:
        import torch

        rng = np.random.default_rng(seed)
        inputs = torch.from_numpy(rng.random((sum(sizes), *shape), np.float32))
        targets = torch.from_numpy(rng.integers(0, labels, sum(sizes)))
        ids = tuple(f"p{i}" for i in range(len(sizes)))
        return Patients(inputs, targets, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), ids)

    return make
