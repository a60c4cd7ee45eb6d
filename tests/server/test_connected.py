"""Some runtimes connect their nodes one by one: the run waits for as many as it was promised."""

from pathlib import Path
from typing import Any

import pytest

from fedscan_core.config import RunConfig
from fedscan_core.errors import RunFailed
from fedscan_core.order import Order
from fedscan_server.rounds import Job
from fedscan_server.rounds_declare import connected


class SlowGrid:
    """One more node at every look."""

    looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return list(range(self.looks))


def look(grid: Any, job: Job) -> list[int]:
    return connected(grid, job)


def test_it_waits_for_all_of_them():
    assert look(SlowGrid(), Job(RunConfig(), Order("r", "{}"), Path(), sites=4, poll=0.0)) == [0, 1, 2, 3]


def test_it_goes_on_with_those_there_when_time_is_over():
    assert look(SlowGrid(), Job(RunConfig(), Order("r", "{}"), Path(), sites=100, timeout=0.0)) == [0]


def test_it_can_be_stopped():
    job = Job(RunConfig(), Order("r", "{}"), Path(), sites=10**9)
    job.stop.set()
    with pytest.raises(RunFailed, match="stopped"):
        look(SlowGrid(), job)
