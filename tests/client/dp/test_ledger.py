"""The ledger never spends more than it was opened with, and gives one answer per question."""

import dataclasses
import fcntl
import json
import math
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedscan_client.dp.ledger import Budget, admit, open_ledger, reserve, settle, summary
from fedscan_core import auditlog
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import BudgetError, RecordDamaged

PLAN = SitePlan(100, 1e-5, 2.0, 0.1, 1.5, 30, 4.0)
CONFIG = {"config_sha": "c" * 64}
ASKED: dict[str, Any] = {"plan": PLAN, **CONFIG, "input_sha": "i" * 64}


def plan(epsilon=2.0, delta=1e-5, **changes):
    return dataclasses.replace(PLAN, epsilon=epsilon, delta=delta, **changes)


@pytest.fixture
def path(tmp_path):
    """A ledger of (8, 1e-4) with one admitted run, "a"."""
    open_ledger(tmp_path / "ledger.jsonl", Budget(8.0, 1e-4), 640)
    admit(tmp_path / "ledger.jsonl", "a", PLAN, **CONFIG)
    return tmp_path / "ledger.jsonl"


def test_one_answer_per_question(path):
    assert reserve(path, "a", 1, **ASKED) == "new"
    settle(path, "a", 1, "o" * 64)
    for _ in range(2):
        assert reserve(path, "a", 1, **ASKED) == "answered"
    with pytest.raises(RecordDamaged, match="another model"):
        reserve(path, "a", 1, **{**ASKED, "input_sha": "j" * 64})
    assert reserve(path, "a", 2, **{**ASKED, "input_sha": "j" * 64}) == "new"
    assert [r["kind"] for r in auditlog.read(path)] == ["open", "plan", "reserve", "settle", "reserve"]


def test_a_crash_between_reservation_and_answer_burns_the_round(path):
    assert reserve(path, "a", 1, **ASKED) == "new"
    for _ in range(2):
        assert reserve(path, "a", 1, **ASKED) == "burned"
    with pytest.raises(RecordDamaged):  # and another question is no way round it
        reserve(path, "a", 1, **{**ASKED, "input_sha": "j" * 64})
    assert reserve(path, "a", 2, **ASKED) == "new"


def test_rounds_of_two_runs_are_two_things(path):
    admit(path, "b", PLAN, **CONFIG)
    assert reserve(path, "a", 1, **ASKED) == "new"
    settle(path, "a", 1, "o" * 64)
    assert reserve(path, "b", 1, **ASKED) == "new"
    assert reserve(path, "b", 1, **ASKED) == "burned"


@pytest.mark.parametrize(
    ("run_id", "changed"),
    [
        ("b", {}),
        ("a", {"config_sha": "d" * 64}),  # more steps in a round than the plan pays for
        ("a", {"plan": plan(noise_multiplier=0.5)}),  # less noise than was paid for
        ("a", {"plan": plan(patients_declared=1000, sampling_rate=0.01)}),
    ],
    ids=["no plan", "configuration", "noise", "declared size"],
)
def test_a_reservation_needs_the_sealed_plan_and_configuration(path, run_id, changed):
    with pytest.raises(RecordDamaged, match="not admitted"):
        reserve(path, run_id, 1, **{**ASKED, **changed})
    assert [r["kind"] for r in auditlog.read(path)] == ["open", "plan"]


def test_a_plan_is_charged_once_and_never_exchanged(path):
    admit(path, "a", PLAN, **CONFIG)
    assert len(auditlog.read(path)) == 2
    for other, sha in ((plan(epsilon=1.0), "c" * 64), (plan(noise_multiplier=0.5), "c" * 64), (PLAN, "d" * 64)):
        with pytest.raises(BudgetError, match="another plan"):
            admit(path, "a", other, sha)
    assert len(auditlog.read(path)) == 2


def test_over_budget_is_refused_in_public_words(path):
    admit(path, "b", plan(epsilon=5.0), **CONFIG)
    with pytest.raises(BudgetError, match="of 8, 1 is left") as caught:
        admit(path, "c", plan(epsilon=1.01), **CONFIG)
    assert str(path) not in str(caught.value) and caught.value.remedy
    admit(path, "c", plan(epsilon=1.0), **CONFIG)
    with pytest.raises(BudgetError):
        admit(path, "d", plan(epsilon=1e-3), **CONFIG)


def test_delta_is_a_budget_too(path):
    admit(path, "b", plan(epsilon=0.1, delta=9e-5), **CONFIG)
    with pytest.raises(BudgetError, match="delta"):
        admit(path, "c", plan(epsilon=0.1, delta=1e-6), **CONFIG)


@pytest.mark.parametrize("bad", [{"epsilon": math.inf}, {"epsilon": math.nan}, {"delta": math.nan}])
def test_a_price_that_is_no_number_is_refused(path, bad):
    with pytest.raises(BudgetError):
        admit(path, "b", plan(**bad), **CONFIG)


@given(
    wishes=st.lists(
        st.tuples(st.sampled_from("abcdef"), st.floats(0.001, 6), st.floats(1e-9, 6e-5)), min_size=1, max_size=12
    )
)
def test_the_sum_over_all_plans_ever_admitted_stays_within_the_budget(wishes):
    with tempfile.TemporaryDirectory() as folder:
        path, spent, delta_spent, seen = Path(folder) / "ledger.jsonl", 0.0, 0.0, set()
        for name, epsilon, delta in wishes:
            open_ledger(path, Budget(8.0, 1e-4), 640)
            fits = spent + epsilon <= 8.0 and delta_spent + delta <= 1e-4
            try:
                admit(path, name, plan(epsilon, delta), **CONFIG)
            except BudgetError:
                assert name in seen or not fits  # refused only with cause
                continue
            if name not in seen:  # a second call is free only for the same plan
                spent, delta_spent = spent + epsilon, delta_spent + delta
                seen.add(name)
        told = summary(path)["committed"]
        assert told["epsilon"] == pytest.approx(spent) and told["delta"] == pytest.approx(delta_spent)
        assert spent <= 8.0 + 1e-8 and delta_spent <= 1e-4 * (1 + 1e-8)


@pytest.mark.parametrize("other", [Budget(9.0, 1e-4), Budget(7.0, 1e-4), Budget(8.0, 2e-4)])
def test_a_lifetime_budget_never_changes(path, other):
    before = path.read_bytes()
    with pytest.raises(RecordDamaged, match="opened with"):
        open_ledger(path, other, 640)
    open_ledger(path, Budget(8.0, 1e-4), 640)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("how", ["edit", "remove", "garbage"])
def test_damage_is_refused_by_every_door(path, line, how):
    reserve(path, "a", 1, **ASKED)
    settle(path, "a", 1, "o" * 64)
    lines = path.read_bytes().splitlines(keepends=True)
    if how == "edit":
        record = json.loads(lines[line])
        record.update(epsilon=80.0) if line == 0 else record.update(run_id="z")
        lines[line] = json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    elif how == "remove":
        del lines[line]
    else:
        lines[line] = b"\x00\xff\n"
    path.write_bytes(b"".join(lines))
    doors = (
        lambda: open_ledger(path, Budget(8.0, 1e-4), 640),
        lambda: admit(path, "b", PLAN, **CONFIG),
        lambda: reserve(path, "a", 2, **ASKED),
        lambda: summary(path),
    )
    for door in doors:
        with pytest.raises(RecordDamaged):
            door()
    assert path.read_bytes() == b"".join(lines)


def test_a_torn_last_line_was_never_acted_on(path):
    """Its write did not return, so no noise was drawn: the round may be asked again."""
    reserve(path, "a", 1, **ASKED)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert reserve(path, "a", 1, **ASKED) == "new"
    assert path.read_bytes() == whole


@pytest.mark.parametrize("call", ["open", "plan", "reserve", "settle"])
def test_every_entry_is_on_disk_before_the_call_returns(tmp_path, monkeypatch, call):
    """The last thing done to the ledger's file is an fsync, with the entry in it."""
    path = tmp_path / "ledger.jsonl"
    synced: list[bytes] = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            synced.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    steps = {
        "open": lambda: open_ledger(path, Budget(8.0, 1e-4), 640),
        "plan": lambda: admit(path, "a", PLAN, **CONFIG),
        "reserve": lambda: reserve(path, "a", 1, **ASKED),
        "settle": lambda: settle(path, "a", 1, "o" * 64),
    }
    for name, step in steps.items():
        synced.clear()
        step()
        if name == call:
            break
    assert synced and synced[-1] == path.read_bytes() and f'"kind":"{call}"'.encode() in synced[-1]


def test_every_look_and_entry_is_made_under_the_lock(tmp_path, monkeypatch):
    """From the look at what is spent to the entry: two processes would both find room for their plan."""
    path, held = tmp_path / "ledger.jsonl", []

    def watched(real):
        def call(*args):
            with (tmp_path / "ledger.jsonl.lock").open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.append(False)
                except BlockingIOError:
                    held.append(True)
            return real(*args)

        return call

    with auditlog.exclusive(path):
        pass
    monkeypatch.setattr(auditlog, "read", watched(auditlog.read))
    monkeypatch.setattr(auditlog, "append", watched(auditlog.append))
    open_ledger(path, Budget(8.0, 1e-4), 640)
    admit(path, "a", PLAN, **CONFIG)
    reserve(path, "a", 1, **ASKED)
    settle(path, "a", 1, "o" * 64)
    assert held == [True] * 7


def _try_to_admit(path, number):
    try:
        admit(Path(path), f"run-{number}", plan(epsilon=3.0), **CONFIG)
        return 1
    except BudgetError:
        return 0


def test_two_processes_cannot_spend_the_same_budget(tmp_path):
    path = tmp_path / "ledger.jsonl"
    open_ledger(path, Budget(8.0, 1e-3), 640)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        admitted = pool.starmap(_try_to_admit, [(str(path), n) for n in range(8)])
    assert sum(admitted) == 2 and summary(path)["committed"]["epsilon"] == 6.0


def test_summary_counts_what_was_reserved_and_settled(path):
    admit(path, "b", plan(epsilon=1.0), **CONFIG)
    reserve(path, "a", 1, **ASKED)
    settle(path, "a", 1, "o" * 64)
    reserve(path, "a", 2, **ASKED)
    told = summary(path)
    assert told["budget"] == {"epsilon": 8.0, "delta": 1e-4}
    assert told["committed"] == {"epsilon": 3.0, "delta": 2e-5}
    assert told["runs"]["a"] == {"epsilon": 2.0, "delta": 1e-5, "reserved": 2, "settled": 1}
    assert told["runs"]["b"]["reserved"] == 0


def test_the_ledger_is_for_its_owner_only(path):
    assert path.stat().st_mode & 0o077 == 0


def test_the_declared_size_is_constant_for_a_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    open_ledger(path, Budget(8.0, 1e-4), 640)
    with pytest.raises(RecordDamaged, match="640 declared patients, not 641"):
        open_ledger(path, Budget(8.0, 1e-4), 641)
