"""One federation for all tests of this folder: a coordinator and three sites, tapped; agents start when asked for."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # lab, planted, proxies, wiretap: this folder's own tools

from lab import Lab, free_port
from planted import Planted, plant
from proxies import Tap

SITES = ("north", "south", "west")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs minutes and processes of its own."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            if not item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.deployed)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(900))


@dataclass
class Federation:
    """The running federation, what was planted in it, and what its tap has seen."""

    lab: Lab
    planted: dict[str, Planted]
    tap: Tap


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites of phantoms; at "west" a person approves each run."""
    root = tmp_path_factory.mktemp("federation")
    lab = Lab(root, bind_port=free_port())
    try:
        lab.coordinate("--name", "The coordinator")
        pki = lab.state / "pki"
        tap = Tap((lab.address, lab.bind_port), pki / "server.crt", pki / "server.key", pki / "ca.crt", lab.port)
        lab.log_in()
        planted = {}
        for number, name in enumerate(SITES):
            hospital = lab.draw(name, seed=number)
            planted[name] = plant(hospital, f"ZZ{name.upper()}")
            lab.enrol(name)
            lab.settle(name, hospital, approval="manual" if name == "west" else "auto-within-policy")
        for name in SITES:
            lab.start_agent(name)
        lab.await_online(*SITES)
        yield Federation(lab, planted, tap)
    finally:
        lab.close()
