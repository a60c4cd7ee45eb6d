"""Runs go on, stop and end without anybody asking."""

import asyncio
import dataclasses
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.server.edge.conftest import Flower, submission

from fedscan_core import order, policy
from fedscan_core.errors import FedscanError
from fedscan_server import tracking
from fedscan_server.coordinator import people, sites
from fedscan_server.coordinator.control import RunStatus
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.edge import fleet, runs, watchdog
from fedscan_server.edge.context import Edge
from fedscan_server.edge.requestlog import RequestLog

OVER = RunStatus("finished", "failed")


@pytest.fixture
def run(coordinator: Coordinator, flower: Flower) -> Path:
    """A run that was taken and started."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from fedscan_core import node_key

    key, site = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
    public = policy.public(policy.Policy(max_epsilon=8.0, max_delta=1e-5), "north", 100, (8.0, 1e-5))
    sites.redeem(coordinator, sites.invite(coordinator, "north", 1).token, node_key.public_text(site), public)
    invited = people.invite(coordinator, "ada", "researcher", 1)
    person, _ = people.redeem(coordinator, invited.token, order.public_text(key))
    sent: dict[str, Any] = submission(key)
    path = runs.folder(coordinator, runs.take(coordinator, person, sent["order"], sent["run"], b""))
    runs.start(coordinator, path)
    return path


def later(minutes: float) -> datetime:
    return datetime.now(UTC) + timedelta(minutes=minutes)


def state(path: Path) -> str:
    return str(tracking.read_state(path)["state"])


def test_a_run_that_goes_on_is_left_alone(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    watchdog.look_at_run(coordinator, run, later(60))
    assert flower.started == [run.name] and runs.read_launch(run).flower == (1,)


def test_one_that_was_never_started_is(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    runs.write_launch(run, dataclasses.replace(runs.read_launch(run), flower=(), started=""))
    watchdog.look_at_run(coordinator, run)
    assert len(flower.started) == 2 and runs.read_launch(run).restarts == 0


def test_a_lost_run_is_started_again_five_times(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    for tries in range(20):
        flower.status[len(flower.started)] = OVER
        watchdog.look_at_run(coordinator, run, later(60 * (tries + 1)))
    assert len(flower.started) == 6
    assert state(run) == "failed" and "operator" in tracking.read_state(run)["reason"]


def test_but_not_at_once(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    flower.status[1] = OVER
    watchdog.look_at_run(coordinator, run)
    assert len(flower.started) == 1
    watchdog.look_at_run(coordinator, run, later(0.25))
    assert len(flower.started) == 2


def test_a_new_round_starts_the_count_anew(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    for tries in range(9):
        tracking.add_round(run, {"round": tries + 1})
        flower.status[len(flower.started)] = OVER
        watchdog.look_at_run(coordinator, run, later(60 * (tries + 1)))
    assert len(flower.started) == 10 and runs.read_launch(run).restarts == 1 and state(run) == "waiting"


def test_flower_forgot_it(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    flower.status[1] = RunStatus("unknown")
    watchdog.look_at_run(coordinator, run, later(1))
    assert len(flower.started) == 2


def test_what_is_final_stays(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    for how in tracking.FINAL:
        tracking.set_state(run, how, "why")
        flower.status[1] = OVER
        watchdog.look_at_run(coordinator, run, later(60))
        assert state(run) == how and len(flower.started) == 1


def test_an_order_that_ran_out_ends_its_run(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    flower.status[1] = OVER
    watchdog.look_at_run(coordinator, run, later(3 * 24 * 60))
    assert state(run) == "failed" and "no longer valid" in tracking.read_state(run)["reason"]


def test_stop_has_a_grace(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    runs.stop(run)
    watchdog.look_at_run(coordinator, run)
    assert (flower.stopped, state(run)) == ([], "waiting")
    watchdog.look_at_run(coordinator, run, later(3))
    assert (flower.stopped, state(run)) == ([1], "stopped")


def test_stop_of_a_lost_run_needs_no_restart(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    runs.stop(run)
    flower.status[1] = OVER
    watchdog.look_at_run(coordinator, run)
    assert (flower.started, state(run)) == ([run.name], "stopped")


def test_resume_forgets_the_restarts(coordinator: Coordinator, flower: Flower, run: Path) -> None:
    runs.write_launch(run, dataclasses.replace(runs.read_launch(run), restarts=5))
    tracking.set_state(run, "failed", "why")
    runs.resume(coordinator, run)
    assert runs.read_launch(run).restarts == 0
    watchdog.look_at_run(coordinator, run)
    assert len(flower.started) == 2


def test_one_damaged_run_does_not_hide_the_others(
    coordinator: Coordinator, flower: Flower, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = coordinator.runs / "a-damaged"
    damaged.mkdir()
    (damaged / "launch.json").write_text("{")
    flower.status[1] = OVER
    flower.online = {7}
    old = dataclasses.replace(runs.read_launch(run), started="2020-01-01T00:00:00+00:00")
    runs.write_launch(run, old)

    async def look() -> frozenset[int]:
        edge = Edge(coordinator, fleet.client(1), RequestLog(coordinator.logs))
        await watchdog.look(edge)
        flower.away = True
        with pytest.raises(FedscanError):
            await watchdog.look(edge)
        edge.log.close()
        return edge.online

    assert asyncio.run(look()) == {7}
    assert len(flower.started) == 2 and "a-damaged" in capsys.readouterr().err


def test_a_half_taken_run_is_no_run(coordinator: Coordinator, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Ed25519PrivateKey.generate()
    person = people.Person("ada", "researcher", order.public_text(key))
    sent = submission(key)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="space"):
        runs.take(coordinator, person, sent["order"], sent["run"], b"")
    assert runs.every(coordinator) == [run] and [p.name for p in coordinator.runs.iterdir()] == [run.name]
