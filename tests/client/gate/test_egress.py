"""Nothing leaves but what the run declares, and what left is in the audit log before it can be sent."""

import dataclasses
import json
import math

import numpy as np
import pytest

from fedscan_client.audit import log
from fedscan_client.audit.verify import verify
from fedscan_client.gate import egress
from fedscan_core import accounting, config, wire
from fedscan_core.errors import ConfigError, PrivacyError, RecordDamaged
from fedscan_core.order import Order
from fedscan_core.wire import Reply, Request, fingerprint
from fedscan_models import registry

ALLOWED = {"head.weight": ((2, 3), "<f4"), "head.bias": ((2,), "<f4")}


def update(**changes):
    arrays = {"head.weight": np.ones((2, 3), "<f4"), "head.bias": np.ones(2, "<f4")}
    arrays.update({name.replace("_", "."): value for name, value in changes.items()})
    return {name: array for name, array in arrays.items() if array is not None}


def test_what_is_allowed_passes():
    egress.check(update(), ALLOWED)
    egress.check({}, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"head_bias": None},
        {"count": np.float32(3)},
        {"count": np.ones(1, "<f4")},
        {"head_bias": np.ones((2, 1), "<f4")},
        {"head_bias": np.ones(3, "<f4")},
        {"head_bias": np.ones(2, "<f8")},  # twice the bits of what was noised
        {"head_bias": np.ones(2, ">f4")},
        {"head_bias": np.ones(2, "<i4")},
    ],
    ids=["missing", "extra scalar", "extra", "shape", "length", "float64", "big endian", "int"],
)
def test_another_name_shape_or_type_is_refused(changes):
    with pytest.raises(PrivacyError, match="names, shapes and types"):
        egress.check(update(**changes), ALLOWED)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    arrays = update()
    arrays["head.weight"][1, 2] = value
    with pytest.raises(PrivacyError, match="finite"):
        egress.check(arrays, ALLOWED)


@pytest.fixture(scope="module")
def run(make_run):
    return make_run(model={"name": "cnn", "trainable": "head"}, evaluation={"private": True})


@pytest.fixture
def here(make_site, tmp_path):
    return make_site(tmp_path / "north")


def request(run, round_=1):
    return Request(Order("demo", config.for_sites(run)), round_)


def good(run, kind):
    """The reply that a site may give."""
    if kind == "query":
        return Reply("north", "ok", plan=accounting.plan_for(run, 20))
    what = {"train": "update", "evaluate": "histogram"}[kind]
    shapes = egress.declared(config.for_sites(run), what)
    arrays = {name: np.ones(shape, dtype) for name, (shape, dtype) in shapes.items()}
    if kind == "train":
        return Reply("north", "ok", update=arrays)
    return Reply("north", "ok", histogram=arrays["histogram"])


def events(here):
    return [record["event"] for record in log.read(here.folder)[1:]]


def test_what_a_run_declares_is_its_trained_parameters_and_its_histogram(run, make_run):
    text = config.for_sites(run)
    assert egress.declared(text, "update") == {"head.weight": ((1, 128), "<f4"), "head.bias": ((1,), "<f4")}
    assert egress.declared(text, "histogram") == {"histogram": ((1, 1, 2, run.evaluation.bins), "<f8")}
    whole = egress.declared(config.for_sites(make_run()), "update")
    assert set(whole) == {name for name, _ in registry.for_run(make_run()).module.named_parameters()} > {"head.bias"}
    with pytest.raises(ConfigError):
        egress.declared("[]", "update")


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_an_answer_is_in_the_log_and_carries_its_anchor(here, run, kind):
    reply = good(run, kind)
    sent = wire.read_reply(egress.answer(here, kind, request(run), reply))
    assert sent.anchor == log.anchor(here.folder) and sent.status == "ok"
    records = log.read(here.folder)[1:]
    told = {"event": "answer", "kind": kind, "run_id": "demo", "round": 1, "status": "ok", "reason": ""}
    assert {name: value for name, value in records[-1].items() if name != "utc"} == told
    assert len(records) == (1 if kind == "query" else 2)
    if kind != "query":
        arrays = reply.update or {"histogram": reply.histogram}
        plan = accounting.plan_for(run, 20)
        assert {name: value for name, value in records[0].items() if name != "utc"} == {
            "event": "release",
            "run_id": "demo",
            "round": 1,
            "what": "update" if kind == "train" else "histogram",
            "arrays": len(arrays),
            "bytes": wire.nbytes(arrays),
            "sha256": fingerprint(arrays),
            "epsilon_of_run": plan.epsilon,
            "delta_of_run": plan.delta,
        }


@pytest.mark.parametrize("status", ["ok", "failed", "refused", "pending"])
def test_the_anchor_changes_with_every_answer_whatever_it_is(here, run, status):
    reply = good(run, "query") if status == "ok" else Reply("north", status, "why" if status != "failed" else "")
    anchors = {wire.read_reply(egress.answer(here, "query", request(run), reply)).anchor for _ in range(3)}
    assert len(anchors) == 3 and all(len(anchor) == 64 for anchor in anchors)
    assert verify(here.folder, list(anchors)).whole and events(here) == ["answer"] * 3


def changes(run):
    """Replies that may not leave: kind and reply."""
    train, query, evaluate = good(run, "train"), good(run, "query"), good(run, "evaluate")
    more = dataclasses.replace
    update = train.update
    return [
        ("train", more(train, update={**update, "count": np.ones(1, "<f4")})),
        ("train", more(train, update={name: update[name] for name in list(update)[:1]})),
        ("train", more(train, update={name: array.astype("<f8") for name, array in update.items()})),
        ("train", more(train, update={name: array * math.nan for name, array in update.items()})),
        ("train", more(train, update={})),
        ("train", more(train, histogram=evaluate.histogram)),
        ("train", more(train, plan=query.plan)),
        ("train", more(train, reason="canary-003")),
        ("train", more(train, status="failed")),
        ("train", more(train, status="pending")),
        ("train", more(train, site="south")),
        ("train", more(train, anchor="0" * 64)),
        ("train", query),
        ("train", Reply("north", "ok")),
        ("train", Reply("north", "failed", "canary-003")),
        ("evaluate", more(evaluate, histogram=evaluate.histogram[0])),
        ("evaluate", train),
        ("query", train),
        ("query", more(query, plan=more(query.plan, patients_declared=7))),
        ("query", more(query, plan=more(query.plan, sampling_rate=0.123))),
        ("query", more(query, plan=more(query.plan, noise_multiplier=0.5))),
        ("query", more(query, status="refused", reason="no")),
        ("other", query),
    ]


def test_a_reply_with_more_or_less_than_it_may_hold_does_not_leave_and_is_not_logged(here, run):
    for kind, reply in changes(run):
        with pytest.raises(PrivacyError):
            egress.answer(here, kind, request(run), reply)
    with pytest.raises(PrivacyError):
        egress.answer(here, "train", None, good(run, "train"))
    assert log.read(here.folder) == []


def test_a_run_without_privacy_is_logged_as_one(here, make_run):
    run = make_run(privacy={"enabled": False})
    egress.answer(here, "train", request(run), good(run, "train"))
    assert log.read(here.folder)[1]["epsilon_of_run"] == "inf"


def test_where_the_log_cannot_be_written_nothing_leaves_but_the_constant(here, run):
    log.append(here.folder, "start")
    (path,) = log.files(here.folder / "audit")
    path.write_bytes(path.read_bytes().replace(b"start", b"stArt"))
    before, noted = path.read_bytes(), list[str]()
    with pytest.raises(RecordDamaged):
        egress.answer(here, "train", request(run), good(run, "train"))
    sent = wire.read_reply(egress.failed(here, "train", request(run), noted.append))
    assert sent == Reply("north", "failed") and path.read_bytes() == before
    assert len(noted) == 1 and "log-000001.jsonl" in noted[0]


def test_a_message_that_could_not_be_read_gets_a_logged_constant(here):
    sent = wire.read_reply(egress.failed(here, "train", None, pytest.fail))
    assert dataclasses.replace(sent, anchor="") == Reply("north", "failed")
    assert json.dumps(log.read(here.folder)[-1]["run_id"]) == '""'
