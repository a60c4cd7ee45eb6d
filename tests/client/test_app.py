"""The app as the server meets it, through Flower's messages: what it answers, what it charges, what it never says."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import load_file

from fedscan.grid import InlineGrid
from fedscan_client import cohort, evaluate, site, train
from fedscan_client.app import make_app
from fedscan_client.audit import log
from fedscan_client.dp import ledger, ledger_file
from fedscan_core import accounting, config, wire
from fedscan_core.order import Order
from fedscan_core.wire import Request
from fedscan_models import registry

# "canary" is in every patient's id and every picture's name; the rest are in every path of a site.
INSIDE = ("canary", ".png", ".jsonl", ".sqlite", ".toml", "pytest-of", "Error")


def tell(here, kind, record):
    """One message to one site; the reply's records."""
    open_site = here if callable(here) else lambda context: here
    grid = InlineGrid(make_app(open_site), 1)
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(record, node, kind)])
    assert not reply.has_error()
    return reply.content


def ask(here, kind, run, *, round_=0, model=None, run_id="demo"):
    """A well-formed request and its reply. Nothing of the site's inside may be in it."""
    record = tell(here, kind, wire.request_record(Request(Order(run_id, config.for_sites(run)), round_, model)))
    text = repr(record.config_records)
    assert not [word for word in INSIDE if word in text] and set(record) <= {"status", "plan", "update", "histogram"}
    reply = wire.read_reply(record)
    assert reply.site == "unknown" or reply.anchor == log.anchor(here.folder)
    return dataclasses.replace(reply, anchor="")


def weights(run, seed=0):
    changed = run.model_copy(update={"train": run.train.model_copy(update={"seed": seed})})
    return {n: t.numpy() for n, t in registry.for_run(changed).module.state_dict().items()}


def kinds(here):
    return [row["state"] for row in rows(here)]


def rows(here):
    with ledger_file.reading(here.book) as db:
        return ledger_file.find(db, "1 ORDER BY seq")


def released(here):
    return [row for row in log.read(here.folder) if row["event"] == "release"]


@pytest.fixture
def run(make_run):
    """Three private rounds and a private evaluation."""
    return make_run()


@pytest.fixture
def here(make_site, tmp_path, run):
    """A site that has declared for the run."""
    here = make_site(tmp_path / "north")
    assert ask(here, "query", run).status == "ok"
    return here


def test_declare_seals_the_plan_that_follows_from_public_values(here, run):
    reply = ask(here, "query", run)
    assert (reply.site, reply.status, reply.reason) == ("north", "ok", "")
    assert reply.plan == accounting.plan_for(run, 20)
    assert kinds(here) == ["opened", "admitted"]  # asked twice, charged once
    assert ledger.summary(here.book)["reserved"]["epsilon"] == reply.plan.epsilon


@pytest.mark.parametrize(
    ("policy", "sections", "words"),
    [
        ({"research_cohort": False}, {"privacy": {"enabled": False}}, "only with privacy"),
        ({"research_cohort": False}, {"privacy": {"unit": "image"}}, "not single images"),
        ({"max_epsilon": 1.0}, {}, "this site allows 1"),
        ({"max_delta": 1e-9}, {}, "this site allows 1e-09"),
        ({"min_noise_multiplier": 1.1}, {}, "floor is 1.1"),
        ({}, {"privacy": {"delta": 0.009}, "train": {"rounds": 3}}, "this site allows 0.001"),
        (
            {},
            {
                "privacy": {"noise_multiplier": None, "target_epsilon": 0.02},
                "train": {"rounds": 9999},
                "evaluation": {"private": False},
            },
            "multiplier",
        ),
    ],
)
def test_declare_refuses_with_a_reason_fit_for_a_researcher(make_site, make_run, tmp_path, policy, sections, words):
    here = make_site(tmp_path / "north", **policy)
    reply = ask(here, "query", make_run(**sections))
    assert reply.status == "refused" and words in reply.reason and reply.plan is None
    assert not here.ledger.exists()
    assert not (here.folder / "site.log").exists()


def test_declare_refuses_beyond_the_lifetime_budget(make_site, run, tmp_path):
    price = accounting.plan_for(run, 20).epsilon
    here = make_site(tmp_path / "north", max_epsilon=1.5 * price)
    assert ask(here, "query", run).status == "ok"
    reply = ask(here, "query", run, run_id="second")
    assert reply.status == "refused" and "is left" in reply.reason and kinds(here) == ["opened", "admitted"]


def test_train_answers_with_exactly_the_trainable_parameters(make_site, make_run, tmp_path):
    run = make_run(model={"name": "cnn", "trainable": "head"})
    here = make_site(tmp_path / "north")
    ask(here, "query", run)
    record = tell(here, "train", wire.request_record(Request(Order("demo", config.for_sites(run)), 1, weights(run))))
    assert set(record) == {"status", "update"}
    update = wire.read_reply(record).update
    assert update is not None
    assert {n: a.shape for n, a in update.items()} == {"head.weight": (1, 128), "head.bias": (1,)}
    assert all(a.dtype == np.float32 and np.isfinite(a).all() and a.any() for a in update.values())


def test_the_same_question_gets_the_same_bytes_and_no_second_charge(here, run):
    first = ask(here, "train", run, round_=1, model=weights(run))
    book = rows(here)
    second = ask(here, "train", run, round_=1, model=weights(run))
    assert first.status == second.status == "ok"
    assert wire.fingerprint(first.update) == wire.fingerprint(second.update)
    assert rows(here) == book and kinds(here) == ["opened", "admitted", "reserved", "settled"]
    assert [r["sha256"] for r in released(here)] == [wire.fingerprint(first.update)] * 2
    assert released(here)[0]["bytes"] == wire.nbytes(first.update) and released(here)[0]["what"] == "update"
    assert rows(here)[-1]["output"] == wire.fingerprint(first.update)


def test_the_same_round_with_another_model_is_refused(here, run):
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "ok"
    reply = ask(here, "train", run, round_=1, model=weights(run, seed=1))
    assert (reply.status, reply.reason, reply.update) == ("failed", "", None)
    assert len(released(here)) == 1


def test_two_rounds_and_an_older_one(here, run):
    first = ask(here, "train", run, round_=1, model=weights(run)).update
    second = ask(here, "train", run, round_=2, model=weights(run)).update
    assert not any((first[n] == second[n]).all() for n in first)  # fresh noise
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "failed"  # gone, and never made anew
    assert ask(here, "train", run, round_=2, model=weights(run)).status == "ok"
    assert len(list((here.folder / "outbox").glob("*/*"))) == 1


@pytest.mark.parametrize("round_", [-1, 0, 4, 10**6])
def test_a_round_that_is_none_of_the_runs_is_not_answered(here, run, round_):
    assert ask(here, "train", run, round_=round_, model=weights(run)).status == "failed"
    assert kinds(here) == ["opened", "admitted"]


def test_nothing_is_trained_before_a_plan_is_sealed(make_site, make_run, tmp_path):
    run, here = make_run(), make_site(tmp_path / "north")
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "failed"
    assert not here.ledger.exists() or kinds(here) == []


def test_a_configuration_that_changed_since_is_refused(here, make_run):
    """Otherwise the server could have more steps than the plan pays for."""
    more = make_run(train={"local_steps": 50})
    assert ask(here, "train", more, round_=1, model=weights(more)).status == "failed"
    assert kinds(here) == ["opened", "admitted"]


def test_a_declared_size_that_changed_since_is_refused(here, run):
    grown = here.model_copy(update={"patients_declared": 2000})  # lower rate, less noise for a target epsilon
    assert ask(grown, "train", run, round_=1, model=weights(run)).status == "failed"
    assert kinds(here) == ["opened", "admitted"]


@pytest.mark.parametrize("sections", [{"privacy": {"enabled": False}}, {"privacy": {"unit": "image"}}])
def test_a_deployed_site_does_not_train_without_the_guarantee_whatever_it_is_sent(
    make_site, make_run, tmp_path, sections
):
    here, run = make_site(tmp_path / "north", research_cohort=False), make_run(**sections)
    for kind, round_ in (("query", 0), ("train", 1), ("evaluate", 0)):
        reply = ask(here, kind, run, round_=round_, model=weights(run))
        assert reply.status == ("refused" if kind == "query" else "failed")
        assert reply.update is None and reply.histogram is None
    assert not here.ledger.exists()


@pytest.mark.parametrize(
    ("kind", "round_", "where", "what"),
    [
        ("query", 0, accounting, "plan_for"),
        ("train", 1, cohort, "load_patients"),
        ("train", 1, train, "train_round"),
        ("evaluate", 0, evaluate, "noisy_histogram"),
    ],
)
def test_the_text_of_an_error_stays_at_the_site(here, run, monkeypatch, kind, round_, where, what):
    def fail(*args, **kwargs):
        raise ValueError(f"patient canary-003 of {here.folder}/pictures/canary-file-1.png")

    monkeypatch.setattr(where, what, fail)
    reply = ask(here, kind, run, round_=round_, model=weights(run))
    assert reply == wire.Reply("north", "failed")
    assert "canary-003" in (here.folder / "site.log").read_text()


def test_a_site_that_cannot_be_opened_does_not_say_where_it_lies(run, tmp_path):
    """Flower would send the text of an error that leaves the app."""
    reply = ask(lambda context: site.load(tmp_path / "canary"), "query", run)
    assert (reply.status, reply.reason) == ("failed", "")


@pytest.mark.parametrize("change", ["protocol", "extra", "run id", "config"])
def test_a_message_that_is_malformed_is_not_answered(here, run, change):
    record = wire.request_record(Request(Order("demo", config.for_sites(run)), 1, weights(run)))
    if change == "protocol":
        record.config_records["run"]["protocol"] = wire.PROTOCOL + 1
    elif change == "extra":
        record["code"] = record["run"]
    elif change == "run id":
        record.config_records["run"]["run_id"] = "../../escape"
    else:
        record.config_records["run"]["config"] = json.dumps({"name": "demo", "canary": 1})
    reply = wire.read_reply(tell(here, "train", record))
    assert reply == wire.Reply("north", "failed", anchor=log.anchor(here.folder))
    assert kinds(here) == ["opened", "admitted"]


def test_a_crash_burns_the_round_and_not_the_run(here, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_round", lambda *args, **kwargs: 1 / 0)
        assert ask(here, "train", run, round_=1, model=weights(run)).status == "failed"
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "failed"
    assert kinds(here) == ["opened", "admitted", "reserved"] and not released(here)
    assert ask(here, "train", run, round_=2, model=weights(run)).status == "ok"


def test_what_may_not_leave_is_stopped_at_the_door(here, run, monkeypatch):
    real = train.train_round
    monkeypatch.setattr(
        train, "train_round", lambda *args, **kwargs: {**real(*args, **kwargs), "count": np.ones(1, "<f4")}
    )
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "failed"
    assert kinds(here)[-1] == "reserved" and not (here.folder / "outbox").exists()


def test_an_image_that_cannot_be_decoded_does_not_stop_a_round(here, run):
    (here.table / "canary-file-10.png").write_bytes(b"no picture")
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "ok"
    assert "canary-file-10" in (here.folder / "site.log").read_text()


def test_a_site_without_any_patient_answers_like_another(make_site, run, tmp_path):
    here = make_site(tmp_path / "north", rows=[])
    assert ask(here, "query", run).status == "ok"
    update = ask(here, "train", run, round_=1, model=weights(run)).update
    assert update is not None and all(a.any() for a in update.values())
    assert ask(here, "evaluate", run, model=weights(run)).status == "ok"


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_damaged_ledger_stops_everything_and_says_nothing(here, run, kind):
    here.ledger.write_bytes(here.ledger.read_bytes().replace(b'"round', b'"rounD').replace(b"100.0", b"200.0"))
    reply = ask(here, kind, run, round_=int(kind == "train"), model=weights(run))
    assert reply == wire.Reply("north", "failed")
    assert "ledger.sqlite" in (here.folder / "site.log").read_text()


def test_another_lifetime_budget_is_not_taken(here, run):
    rich = here.model_copy(update={"policy": dataclasses.replace(here.policy, max_epsilon=1000.0)})
    assert ask(rich, "query", run) == wire.Reply("north", "failed")


@pytest.mark.parametrize(("kind", "module"), [("train", train), ("evaluate", evaluate)])
def test_the_reservation_is_on_disk_before_noise_is_drawn(here, run, monkeypatch, kind, module):
    seen = []

    class Watched(module.SecretStream):  # type: ignore[misc,name-defined]
        def __init__(self):
            seen.append(rows(here)[-1])
            super().__init__()

    monkeypatch.setattr(module, "SecretStream", Watched)
    round_ = int(kind == "train")
    assert ask(here, kind, run, round_=round_, model=weights(run)).status == "ok"
    assert [(r["state"], r["run_id"], r["round"]) for r in seen] == [("reserved", "demo", round_)]


def test_the_answer_is_on_disk_before_it_is_settled_and_settled_before_it_is_sent(here, run, monkeypatch):
    steps, settle, append = [], ledger.settle, log.append_all

    def settling(path, run_id, round_, output_sha):
        (answer,) = (here.folder / "outbox").glob("*/*")
        assert wire.fingerprint(load_file(answer)) == output_sha
        steps.append("settle")
        settle(path, run_id, round_, output_sha)

    def recording(folder, records):
        assert kinds(here)[-1] == "settled"
        steps.extend(event for event, _ in records)
        return append(folder, records)

    monkeypatch.setattr(ledger, "settle", settling)
    monkeypatch.setattr(log, "append_all", recording)
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "ok"
    assert steps == ["settle", "release", "answer"]


def test_an_answer_that_was_lost_is_not_made_again(here, run):
    assert ask(here, "train", run, round_=1, model=weights(run)).status == "ok"
    shutil.rmtree(here.folder / "outbox")
    assert ask(here, "train", run, round_=1, model=weights(run)) == wire.Reply("north", "failed")


def test_the_private_evaluation_is_answered_once(here, run):
    first = ask(here, "evaluate", run, model=weights(run))
    again = ask(here, "evaluate", run, model=weights(run))
    assert first.status == "ok" and first.histogram.shape == (1, 1, 2, run.evaluation.bins)
    assert first.histogram.tobytes() == again.histogram.tobytes()
    assert released(here)[0]["sha256"] == wire.fingerprint({"histogram": first.histogram})
    assert ask(here, "evaluate", run, model=weights(run, seed=1)).status == "failed"
    for round_ in (1, -1):
        assert ask(here, "evaluate", run, round_=round_, model=weights(run)).status == "failed"
    assert kinds(here) == ["opened", "admitted", "reserved", "settled"]


def test_a_run_without_private_evaluation_has_none(make_site, make_run, tmp_path):
    here, run = make_site(tmp_path / "north"), make_run(evaluation={"private": False})
    ask(here, "query", run)
    assert ask(here, "evaluate", run, model=weights(run)).status == "failed"
    assert kinds(here) == ["opened", "admitted"]


def test_a_run_without_privacy_repeats_itself_and_touches_no_ledger(make_site, make_run, tmp_path):
    run = make_run(privacy={"enabled": False}, train={"patients_per_step": 10, "rounds": 3, "augmentation": "flip"})
    updates = []
    for folder in ("one", "two"):
        here = make_site(tmp_path / folder)
        reply = ask(here, "query", run)
        assert reply.status == "ok" and reply.plan.noise_multiplier == 0
        updates.append(ask(here, "train", run, round_=1, model=weights(run)).update)
        assert not here.ledger.exists()
        assert ask(here, "evaluate", run, model=weights(run)).status == "failed"
    assert wire.fingerprint(updates[0]) == wire.fingerprint(updates[1])


def test_two_runs_at_once_each_get_their_own_bytes_again(here, run):
    asked = {"model": weights(run), "round_": 1}
    for run_id in ("first", "second"):
        assert ask(here, "query", run, run_id=run_id).status == "ok"
    one = ask(here, "train", run, run_id="first", **asked).update
    assert ask(here, "train", run, run_id="second", **asked).status == "ok"
    again = ask(here, "train", run, run_id="first", **asked).update
    assert all((one[name] == again[name]).all() for name in one)


def test_a_release_without_privacy_is_recorded_too(here, make_run):
    run = make_run(privacy={"enabled": False})
    assert ask(here, "query", run, run_id="bare").status == "ok"
    update = ask(here, "train", run, round_=1, model=weights(run), run_id="bare").update
    assert [record["sha256"] for record in released(here)] == [wire.fingerprint(update)]
