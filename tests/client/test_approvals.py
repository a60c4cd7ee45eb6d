"""The file of runs: decisions last, a stopped one never holds without its record, strangers fill no disk."""

import dataclasses
import sqlite3
import stat

import pytest

from fedscan_client import approvals
from fedscan_client.approvals import Refused
from fedscan_client.audit import log
from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.order import Order

ORDER = Order("run-1", '{"name": "demo"}', "ana")


@pytest.fixture
def here(make_site, tmp_path):
    """A site that approves by hand."""
    return make_site(tmp_path / "north", rows=[], approval="manual")


@pytest.fixture
def auto(here):
    """The same, where the policy is enough."""
    return here.model_copy(update={"policy": dataclasses.replace(here.policy, approval="auto-within-policy")})


def may(here, order=ORDER):
    try:
        approvals.check(here, order)
    except Refused:
        return False
    return True


def test_a_run_without_a_decision_stands_as_the_policy_says_today(here, auto):
    assert approvals.state(here, "run-1") is None and not may(here) and not may(auto)
    assert approvals.note_request(here, ORDER).state == "pending" and not may(here)
    assert approvals.state(auto, "run-1") == "approved" and may(auto)
    approvals.refuse(here, "run-1", "A. Meier", "no")
    assert not may(auto)  # a person's word goes before the policy's
    approvals.approve(here, "run-1", "B. Schmidt")
    assert may(here) and approvals.get(here, "run-1").by == "B. Schmidt"


@pytest.mark.parametrize("field", ["config", "launcher", "issued", "valid_until", "signature"])
def test_an_approval_is_for_exactly_one_order(here, field):
    approvals.note_request(here, ORDER)
    approvals.approve(here, "run-1", "A. Meier")
    changed = {"issued": "2021-01-01T00:00:00+00:00", "valid_until": "2998-01-01T00:00:00+00:00"}
    other = dataclasses.replace(ORDER, **{field: changed.get(field, "other")})
    assert may(here) and not may(here, other)
    with pytest.raises(Refused, match="another order"):
        approvals.note_request(here, other)
    assert approvals.get(here, "run-1").order == ORDER


def test_an_order_that_ran_out_stands_no_more(here):
    old = dataclasses.replace(ORDER, valid_until="2021-01-01T00:00:00+00:00")
    approvals.note_request(here, old)
    assert approvals.state(here, "run-1") == "expired" and not may(here, old)
    approvals.revoke(here, "run-1", "A. Meier")
    assert approvals.state(here, "run-1") == "revoked"


def test_a_coordinator_that_invents_runs_fills_no_disk(here, auto, monkeypatch):
    monkeypatch.setattr(approvals, "MOST_PENDING", 2)
    for number in range(2):
        approvals.note_request(here, dataclasses.replace(ORDER, run_id=f"r{number}"))
    with pytest.raises(Refused, match="too many"):
        approvals.note_request(here, dataclasses.replace(ORDER, run_id="r2"))
    assert approvals.note_request(here, dataclasses.replace(ORDER, run_id="r0")).state == "pending"  # one that waits
    approvals.refuse(here, "r0", "A. Meier", "no")
    assert approvals.note_request(here, dataclasses.replace(ORDER, run_id="r2")).state == "pending"


@pytest.mark.parametrize("decision", ["approved", "revoked"])
def test_a_decision_killed_at_any_write_holds_only_with_its_record(here, at_every_write, decision):
    approvals.note_request(here, ORDER)
    moments, seen = 0, set()
    decide = {"approved": approvals.approve, "revoked": approvals.revoke}[decision]
    for _ in at_every_write(lambda: decide(here, "run-1", "A. Meier")):
        state = approvals.state(here, "run-1")
        logged = [record["decision"] for record in log.read(here.folder) if record["event"] == "approval"]
        assert state == "pending" or logged[-1:] == [state]
        seen.add(state)
        moments += 1
    assert approvals.state(here, "run-1") == decision and moments > 2 and "pending" in seen


def test_the_file_is_the_owners_and_a_damaged_one_lets_nothing_out(here):
    approvals.note_request(here, ORDER)
    approvals.approve(here, "run-1", "A. Meier")
    path = here.folder / approvals.FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in here.folder.glob("runs.sqlite*"):
        path.write_bytes(b"x" * 4096)
    for call in (lambda: may(here), lambda: approvals.every(here), lambda: approvals.note_request(here, ORDER)):
        with pytest.raises(FolderError):
            call()


def test_a_newer_versions_file_is_left_alone(here):
    approvals.note_request(here, ORDER)
    with sqlite3.connect(here.folder / approvals.FILE) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(FolderError, match="newer version"):
        approvals.state(here, "run-1")


@pytest.mark.parametrize("reason", ["x" * 501, "a\x1b[2J"])
def test_a_reason_that_researchers_read_can_be_printed(here, reason):
    approvals.note_request(here, ORDER)
    with pytest.raises(ConfigError, match="reason"):
        approvals.refuse(here, "run-1", "A. Meier", reason)
    assert approvals.state(here, "run-1") == "pending"


def test_an_id_that_begins_like_anothers_is_not_taken(here):
    approvals.note_request(here, dataclasses.replace(ORDER, run_id="chest-0a1b2c"))
    for other in ("chest", "chest-0a1b2c3d"):
        with pytest.raises(Refused, match="begins like"):
            approvals.note_request(here, dataclasses.replace(ORDER, run_id=other))
    assert approvals.note_request(here, dataclasses.replace(ORDER, run_id="chest-0a1b2d")).state == "pending"
    assert len(approvals.every(here)) == 2
