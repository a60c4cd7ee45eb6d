"""Small research tables, drawn once: most of these tests only need something that trains in a second."""

import csv
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedscan.phantom import phantom_table
from fedscan_core import config_file

SMALL = {
    "name": "small",
    "task": {"labels": ["0", "1"], "image_size": 16},
    "train": {"rounds": 3, "patients_per_step": "all", "learning_rate": 1.0},
    "evaluation": {"every": 0},
}


@pytest.fixture(scope="session")
def drawn_table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    phantom_table(folder, patients=60, sites=3, seed=3, image_size=32)
    return folder


@pytest.fixture
def table(drawn_table, tmp_path):
    """A copy that a test may spoil; `edit` rewrites its rows."""
    folder = tmp_path / "images"
    shutil.copytree(drawn_table, folder)
    return folder


@pytest.fixture
def edit(table):
    def rewrite(change, columns=None):
        """`change(row)` returns the row to keep, or None to drop it."""
        path = table / "metadata.csv"
        with path.open(newline="") as file:
            rows = [kept for row in csv.DictReader(file) if (kept := change(dict(row)))]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns or list(rows[0]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return rows

    return rewrite


@pytest.fixture
def run_for():
    """A small RunConfig; keyword arguments are sections, merged into the small ones."""

    def build(**sections):
        tree: dict[str, Any] = {**SMALL}
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
        return config_file.parse(tree)

    return build


@pytest.fixture(scope="session")
def fake_edge():
    """The names of fake_edge.py."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fake_edge.py")))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of a researcher's profiles; no proxy of this machine is in the way."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "config" / "fedscan"


@pytest.fixture
def edge(fake_edge, tmp_path, home):
    """A coordinator that answers over HTTPS on a port of its own."""
    with fake_edge.serving(tmp_path) as serving:
        yield serving


@pytest.fixture
def invite(edge, fake_edge, tmp_path):
    """The path of a person's invitation to `edge`."""
    from fedscan_core import invite

    path, until = tmp_path / "invite-ada.toml", "2099-01-01T00:00:00+00:00"
    fingerprint = invite.ca_fingerprint(edge.ca)
    words = invite.Invite("person", "ada", edge.address, "Trial", fake_edge.TOKEN, until, edge.ca, fingerprint)
    invite.write(path, words)
    return path
