"""People's door: tokens, roles, and runs from launch to archive."""

import base64
import dataclasses
import hashlib
import io
import json
import tarfile
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save
from tests.server.edge.conftest import PREFIX, Live, submission, until

from fedscan_core import order, policy
from fedscan_server import tracking
from fedscan_server.coordinator import people, sites, vault
from fedscan_server.edge import people_door, runs
from fedscan_server.tracking import Progress


@pytest.fixture
def ada(live: Live) -> tuple[Ed25519PrivateKey, dict[str, str]]:
    live.site("north")
    return live.person("ada")


def launch(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]], **values: Any) -> str:
    answer = live.http.post(f"{PREFIX}/runs", json=submission(ada[0], **values), headers=ada[1])
    assert answer.status_code == 200, answer.text
    return str(answer.json()["run_id"])


def test_a_token_is_needed_and_known(live: Live) -> None:
    _, token = live.person("ada", "viewer")
    assert live.http.get(f"{PREFIX}/sites", headers=token).status_code == 200
    for wrong in ("", "Bearer", "Bearer x", "Basic " + token["authorization"][7:], token["authorization"][:-1]):
        assert live.http.get(f"{PREFIX}/sites", headers={"authorization": wrong}).status_code == 401, wrong
    twice = [("authorization", token["authorization"]), ("authorization", "Bearer " + "A" * 43)]
    assert live.http.get(f"{PREFIX}/sites", headers=twice).status_code == 400
    people.remove(live.c, "ada")
    assert live.http.get(f"{PREFIX}/sites", headers=token).status_code == 401


def test_guesses_are_slowed_down(live: Live) -> None:
    _, token = live.person()
    wrong = {"authorization": "Bearer " + "A" * 43}
    answers = [live.http.get(f"{PREFIX}/runs", headers=wrong).status_code for _ in range(22)]
    assert answers == [401] * 20 + [429] * 2
    assert live.http.get(f"{PREFIX}/runs", headers={**token, "x-forwarded-for": "192.0.2.9"}).status_code == 200


def test_one_person_cannot_fill_the_disk_with_runs(live: Live, ada: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST_OPEN", 2)
    first = launch(live, ada)
    launch(live, ada)
    answer = live.http.post(f"{PREFIX}/runs", json=submission(ada[0]), headers=ada[1])
    assert answer.status_code == 409 and "not over" in answer.json()["error"]
    tracking.set_state(live.c.runs / first, "stopped")
    launch(live, ada)


def test_roles(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    run_id = launch(live, ada)
    _, bob = live.person("bob", "researcher")
    eve_key, eve = live.person("eve", "viewer")
    _, op = live.person("op", "operator")
    assert live.http.post(f"{PREFIX}/runs", json=submission(eve_key, "eve"), headers=eve).status_code == 403
    assert live.http.get(f"{PREFIX}/runs/{run_id}", headers=eve).status_code == 200
    for who, status in ((eve, 403), (bob, 403), (op, 200), (ada[1], 200)):
        assert live.http.post(f"{PREFIX}/runs/{run_id}/stop", json={}, headers=who).status_code == status
    for who, status in ((eve, 403), (bob, 403)):
        assert live.http.post(f"{PREFIX}/runs/{run_id}/resume", json={}, headers=who).status_code == status


def test_sites_are_listed_without_revoked_ones(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    live.site("south")
    live.edge.online = frozenset({live.flower.nodes["south"]})
    told = live.http.get(f"{PREFIX}/sites", headers=ada[1]).json()["sites"]
    assert [(site["name"], site["online"]) for site in told] == [("north", False), ("south", True)]
    assert told[0]["policy"]["patients_declared"] == 100 and told[0].keys() == {"name", "online", "last_seen", "policy"}
    sites.revoke(live.c, "north")
    live.edge.forget_roster()
    assert [s["name"] for s in live.http.get(f"{PREFIX}/sites", headers=ada[1]).json()["sites"]] == ["south"]


def test_a_run_is_taken_once_and_started(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    sent = submission(ada[0])
    first = live.http.post(f"{PREFIX}/runs", json=sent, headers=ada[1])
    assert first.status_code == 200
    run_id = first.json()["run_id"]
    assert live.http.post(f"{PREFIX}/runs", json=sent, headers=ada[1]).json() == {"run_id": run_id}
    assert live.flower.started == [run_id]
    path = live.c.runs / run_id
    assert (path / "order.json").read_text() == sent["order"] and path.stat().st_mode & 0o777 == 0o700
    assert {p.name for p in path.iterdir()} == {"run.toml", "order.json", "launch.json"}
    told = live.http.get(f"{PREFIX}/runs", headers=ada[1]).json()["runs"]
    assert [(r["run_id"], r["name"], r["launcher"], r["state"], r["round"]) for r in told] == [
        (run_id, "demo", "ada", "waiting", 0)
    ]
    one = live.http.get(f"{PREFIX}/runs/{run_id}", headers=ada[1]).json()
    assert one["summary"] is None and one["progress_lines"] == 0 and one["run"] == sent["run"]
    other = submission(ada[0], train={"rounds": 7})
    forged = order.from_text(other["order"])
    clash = order.sign(order.Order(**{**vars(forged), "run_id": run_id}), ada[0])
    answer = live.http.post(f"{PREFIX}/runs", json={**other, "order": order.to_text(clash)}, headers=ada[1])
    assert answer.status_code == 409 and (path / "order.json").read_text() == sent["order"]


def test_while_flower_is_away_a_run_waits(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    live.flower.away = True
    run_id = launch(live, ada)
    assert live.flower.started == [] and runs.read_launch(live.c.runs / run_id).flower == ()


def test_what_is_not_taken(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    key, token = ada
    good = submission(key)

    def altered(by: Ed25519PrivateKey = key, **fields: str) -> str:
        return order.to_text(order.sign(order.Order(**{**vars(order.from_text(good["order"])), **fields}), by))

    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    cases: list[tuple[dict[str, Any], int]] = [
        ({"order": altered(Ed25519PrivateKey.generate())}, 403),
        ({"order": altered(launcher="bob")}, 403),
        ({"order": altered(issued=later)}, 400),
        ({"order": altered(valid_until="2026-01-01T00:00:00+00:00")}, 400),
        ({"order": altered(valid_until="2099-01-01T00:00:00+00:00")}, 400),
        ({"order": altered(run_id="demo")}, 400),
        ({"order": altered(run_id="other-0123456789ab")}, 400),
        ({"order": altered(run_id="demo-0123456789AB")}, 400),
        ({"order": altered(run_id="../../etc/demo-0123456789ab")}, 400),
        ({"order": json.dumps({**json.loads(good["order"]), "signature": ""})}, 403),
        ({"order": good["order"].replace("Z", "z").replace("demo", "dem0")}, 403),
        ({"order": "{}"}, 400),
        ({"order": "[" * 100_000}, 400),
        ({"run": submission(key, train={"rounds": 3})["run"]}, 400),
        ({"run": "a = " + "[" * 50_000}, 400),
        ({"run": "name = 1"}, 400),
        ({"run": "#" * 300_000}, 413),
        ({"init": "!"}, 400),
        ({"init": base64.b64encode(b"weights").decode()}, 400),
        ({"init": 1}, 400),
    ]
    for change, status in cases:
        answer = live.http.post(f"{PREFIX}/runs", json={**good, **change}, headers=token)
        assert answer.status_code == status, (change, answer.text[:300])
    assert list(live.c.runs.iterdir()) == [] and live.flower.started == []


def test_the_sites_policies_are_asked(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    live.site("strict", policy.Policy(max_epsilon=8.0, max_delta=1e-5, max_rounds=2))
    for values, words in (
        ({"aggregation": {"min_sites": 2}}, "strict: "),
        ({"federation": {"sites": ["strict"]}}, "strict: "),
        ({"federation": {"sites": ["nowhere"]}}, "nowhere"),
        ({"privacy": {"enabled": False}}, "privacy"),
    ):
        answer = live.http.post(f"{PREFIX}/runs", json=submission(ada[0], **values), headers=ada[1])
        assert answer.status_code == 409 and words in answer.json()["error"], answer.text
    assert launch(live, ada) in live.flower.started


def test_start_weights_are_kept(
    live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSCAN_VAULT_KEY", "ab" * 32)
    weights = save({"w": np.zeros(3, np.float32)})
    run_id = launch(live, ada, init=weights, model={"init": "init.safetensors"})
    path = live.c.runs / run_id / "init.safetensors"
    assert vault.read(path) == weights and path.read_bytes() != weights
    answer = live.http.post(f"{PREFIX}/runs", json=submission(ada[0], init=weights), headers=ada[1])
    assert answer.status_code == 400, "the run does not say that it has some"


def test_progress_is_waited_for(
    live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people_door, "_POLL_SECONDS", 0.6)
    monkeypatch.setattr(people_door, "_LOOK_SECONDS", 0.05)
    run_id = launch(live, ada)
    begin = time.monotonic()
    told = live.http.get(f"{PREFIX}/runs/{run_id}/progress?after=0", headers=ada[1]).json()
    assert told == {"next": 0, "lines": [], "state": "waiting"} and time.monotonic() - begin > 0.5
    for number in (1, 2, 3):
        tracking.add_progress(live.c.runs / run_id, Progress("round", number, 9, 1, 1))
    told = live.http.get(f"{PREFIX}/runs/{run_id}/progress?after=1", headers=ada[1]).json()
    assert told["next"] == 3 and [line["round"] for line in told["lines"]] == [2, 3]
    tracking.set_state(live.c.runs / run_id, "failed", "why")
    begin = time.monotonic()
    told = live.http.get(f"{PREFIX}/runs/{run_id}/progress?after=3", headers=ada[1]).json()
    assert told == {"next": 3, "lines": [], "state": "failed"} and time.monotonic() - begin < 0.5
    for query in ("after=-1", "after=x", "after=1&x=1", "after=1&after=x", "after=99999999999", "after=%D9%A1"):
        answer = live.http.get(f"{PREFIX}/runs/{run_id}/progress?{query}", headers=ada[1])
        assert answer.status_code == 400, query
    until(lambda: live.edge.people_busy._now == {})


def test_stop_and_resume(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    run_id = launch(live, ada)
    path = live.c.runs / run_id
    assert live.http.post(f"{PREFIX}/runs/{run_id}/resume", json={}, headers=ada[1]).status_code == 409
    assert live.http.post(f"{PREFIX}/runs/{run_id}/stop", json={}, headers=ada[1]).status_code == 200
    assert (path / "stop").exists()
    tracking.set_state(path, "stopped", "on request")
    assert live.http.post(f"{PREFIX}/runs/{run_id}/resume", json={}, headers=ada[1]).json()["state"] == "waiting"
    assert not (path / "stop").exists() and live.flower.started == [run_id, run_id]
    tracking.set_state(path, "finished")
    assert live.http.post(f"{PREFIX}/runs/{run_id}/stop", json={}, headers=ada[1]).status_code == 200
    assert not (path / "stop").exists()
    assert live.http.post(f"{PREFIX}/runs/{run_id}/resume", json={}, headers=ada[1]).status_code == 409


def test_a_run_whose_order_ran_out_is_not_resumed(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    run_id = launch(live, ada)
    path = live.c.runs / run_id
    late = dataclasses.replace(runs.read_order(path), valid_until="2026-01-01T00:00:00+00:00")
    (path / "order.json").write_text(order.to_text(late))
    tracking.set_state(path, "failed", "a disk was full")
    answer = live.http.post(f"{PREFIX}/runs/{run_id}/resume", json={}, headers=ada[1])
    assert answer.status_code == 409 and "no longer valid" in answer.json()["error"]
    assert live.flower.started == [run_id] and tracking.read_state(path)["state"] == "failed"


def test_the_archive_holds_what_was_learned(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    run_id = launch(live, ada)
    path = live.c.runs / run_id
    for name in ("model.safetensors", "summary.json", "rounds.jsonl", "log.txt", "odd.txt"):
        (path / name).write_text('{"round": 1}\n' if name != "summary.json" else "{}")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "1").write_text("secret")
    answer = live.http.get(f"{PREFIX}/runs/{run_id}/archive", headers=ada[1])
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["fedscan-sha256"] == hashlib.sha256(answer.content).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        names, members = set(tar.getnames()), list(tar)
    assert names == {f"{run_id}/{name}" for name in ("run.toml", "model.safetensors", "summary.json", "rounds.jsonl")}
    assert all(member.isreg() and member.uid == 0 and member.mode == 0o600 for member in members)
    until(lambda: live.edge.archiving._value == 2)


def test_runs_that_are_not(live: Live, ada: tuple[Ed25519PrivateKey, dict[str, str]]) -> None:
    run_id = launch(live, ada)
    for path in ("x", "%2e%2e", f"{run_id}%2f..", f"{run_id}/order.json", f"{run_id}%00", ".new-x"):
        assert live.http.get(f"{PREFIX}/runs/{path}", headers=ada[1]).status_code == 404, path
    (live.c.runs / run_id / "run.toml").write_text("damaged")
    told = live.http.get(f"{PREFIX}/runs", headers=ada[1]).json()["runs"]
    assert told[0]["run_id"] == run_id and told[0]["reason"] == "damaged folder"
    answer = live.http.get(f"{PREFIX}/runs/{run_id}", headers=ada[1])
    assert answer.status_code == 500 and str(live.c.folder) not in answer.text
