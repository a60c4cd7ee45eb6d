"""SIGKILL at every boundary and at random moments of training: what leaves is charged, and the file is always whole.

By default at a sample, evenly over the boundaries of each kind; with `-m slow` at every one. What is written is what
matters here, not what is computed: only the model's last layer is trained, which is quick.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fedscan_core import accounting, config

SAMPLE, ALL = (5, 24), (1, 130)  # of each kind of boundary every so many; random kills


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(ALL, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param(SAMPLE, id="sample"),
    ],
)
def told(request, make_site, make_run):
    """What crash.py found: boundaries of a new site's first rounds, then random moments of a long life."""
    shared = Path("/dev/shm")  # SQLite's own fsyncs cost nothing there, and a SIGKILL does not need them
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        yield _killed(Path(name), make_site, make_run, *request.param)


def _killed(folder, make_site, make_run, every, kills):
    model, train = {"name": "cnn", "trainable": "head"}, {"rounds": 6, "local_steps": 2}
    run = make_run(evaluation={"private": True}, model=model, train=train)
    rows = [
        ("one", "ill", "train", 1),
        ("two", "well", "train", 2),
        ("two", "well", "train", 3),
        ("t", "ill", "test", 4),
    ]
    make_site(folder / "site", rows=rows, max_epsilon=1e6, max_delta=0.5)
    (folder / "run.json").write_text(config.for_sites(run))
    script = Path(__file__).with_name("crash.py")
    command = [sys.executable, str(script), str(folder / "site"), str(folder / "run.json"), str(every), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return run, json.loads(done.stdout)


def by_round(records, key):
    found = defaultdict(list)
    for record in records:
        if key in record:
            found[record["run"], record["round"]].append(record[key])
    return found


def booked(look, state):
    rows = [row for row in look["rows"] if row["state"] == state]
    return {(row["run_id"], row.get("round")): row for row in rows}


def test_enough_was_killed_and_everywhere(told):
    _, report = told
    killed = [look for look in report["told"] if look["status"] is not None and os.WIFSIGNALED(look["status"])]
    assert all(os.WTERMSIG(look["status"]) == signal.SIGKILL for look in killed)
    where = [look["where"] for look in killed if look["how"] == "boundary"]
    names, kills = Counter(report["boundaries"]), len(killed) - len(where)
    assert (len(where) == len(report["boundaries"]) >= 120 and kills == ALL[1]) or (
        len(where) >= 35 and kills == SAMPLE[1]
    )
    for name, count in Counter(where).items():
        assert count >= min(names.pop(name), 2)
    assert not names  # every kind was met
    names = Counter(report["boundaries"])
    for when in ("before", "after"):  # an answer's file, its settling, the counter, the record of what left
        assert min(names[f"{when} {what}"] for what in ("fsync", "replace")) >= 8 and names[f"{when} urandom"] >= 2
    assert names["before COMMIT"] >= 8 and names["before INSERT INTO rows"] >= 7


def test_nothing_left_that_was_not_charged_first(told):
    for look in told[1]["told"]:
        reserved, settled = booked(look, "reserved"), booked(look, "settled")
        assert settled.keys() <= reserved.keys()
        outputs = {key: row["output"] for key, row in settled.items()}
        for record in look["released"]:
            assert record["sha256"] == outputs[record["run_id"], record["round"]]
        for key, sent in by_round(look["seen"], "sent").items():
            assert set(sent) == {outputs[key]}  # identical bytes, however often it was asked
        for key in by_round(look["seen"], "noise"):
            assert key in reserved  # committed before the first key was drawn


def test_no_round_draws_noise_twice_and_no_plan_is_overspent(told):
    run, report = told
    plan = accounting.plan_for(run, 20)
    for look in report["told"]:
        noise = by_round(look["seen"], "noise")
        for (_, round_), drawn in noise.items():
            assert len(drawn) <= (run.train.local_steps if round_ else 1)
        steps: Counter[str] = Counter()
        for (run_id, _), row in booked(look, "reserved").items():
            steps[run_id] += row["steps_reserved"]
            assert row["steps_so_far"] <= plan.steps and (run_id, None) in booked(look, "admitted")
        assert max(steps.values(), default=0) <= plan.steps


def test_a_burned_round_is_never_answered_and_the_next_one_is(told):
    """After a kill at a boundary the server asks everything again: each round is answered, or burned and skipped."""
    burned, asked = 0, 0
    for look in told[1]["told"]:
        if look["how"] != "again":
            continue
        reserved, settled = booked(look, "reserved"), booked(look, "settled")
        assert reserved.keys() == {("r0", 1), ("r0", 2)}
        lost = reserved.keys() - settled.keys()
        assert len(lost) <= 1
        sent = by_round(look["seen"], "sent")
        assert sent.keys() == settled.keys() and not lost & sent.keys()
        burned, asked = burned + len(lost), asked + 1
    assert burned * 6 >= asked >= 35


def test_answers_are_given_again_after_a_kill(told):
    """Sent before the kill, and again after it: the same bytes, as the test above has seen."""
    looks = [look for look in told[1]["told"] if look["how"] == "again"]
    # by the child, and twice by the server's second attempt
    again = [look for look in looks if len(by_round(look["seen"], "sent")["r0", 1]) >= 3]
    assert len(again) * 6 >= len(looks) >= 35
    last, kills = told[1]["told"][-1], sum(look["how"] == "random" for look in told[1]["told"])
    assert any(len(sent) > 1 for sent in by_round(last["seen"], "sent").values())
    assert len(booked(last, "admitted")) * 26 >= kills and len(booked(last, "reserved")) * 2.6 >= kills
    errors = {record["error"] for record in last["seen"] if "error" in record}
    assert errors  # rounds past the plan's end, and burned ones
    assert not [error for error in errors if "damaged" in error or "changed" in error or "older" in error]


def test_the_ledger_was_never_behind_its_counter_and_never_damaged(told):
    """`look` opens the ledger after each kill, which checks every row and the counter: it never refused."""
    long = [look for look in told[1]["told"] if look["how"] == "random"]
    lengths = [len(look["rows"]) for look in long]
    assert lengths == sorted(lengths) and lengths[-1] * 1.3 > len(long) >= SAMPLE[1]
    for before, after in itertools.pairwise(long):
        assert after["rows"][: len(before["rows"])] == before["rows"]
