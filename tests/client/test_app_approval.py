"""A person's approval as the server meets it: pending, approved, refused, revoked in the middle of a round."""

import dataclasses
import stat
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from fedscan.grid import InlineGrid
from fedscan_client import app, approvals, site, train
from fedscan_client.audit import log
from fedscan_client.dp import ledger
from fedscan_core import config, wire
from fedscan_core import order as orders
from fedscan_core.order import Order
from fedscan_core.wire import Reply, Request
from fedscan_models import registry

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def ask(here, kind, order, *, round_=0, model=None):
    grid = InlineGrid(app.make_app(lambda context: here), 1)
    record = wire.request_record(Request(order, round_, model))
    (reply,) = grid.send_and_receive([Message(record, next(iter(grid.get_node_ids())), kind)])
    return dataclasses.replace(wire.read_reply(reply.content), anchor="")


def weights(run):
    return {n: t.numpy() for n, t in registry.for_run(run).module.state_dict().items()}


def events(here, *names):
    return [record for record in log.read(here.folder) if record["event"] in names]


def runs_charged(here):
    return list(ledger.summary(here.book)["runs"]) if here.ledger.exists() else []


@pytest.fixture
def run(make_run):
    """Three private rounds."""
    return make_run(study={"purpose": "triage"})


@pytest.fixture
def order(run):
    """Its order, signed by ana."""
    now = datetime.now(UTC)
    times = {"issued": now.isoformat(timespec="seconds"), "valid_until": (now + timedelta(days=9)).isoformat()}
    return orders.sign(Order("run-1", config.for_sites(run), "ana", **times), KEY)


@pytest.fixture
def here(make_site, tmp_path):
    """A site where a person approves each run."""
    return make_site(tmp_path / "north", approval="manual")


FAILED = Reply("north", "failed")


def test_a_run_waits_uncharged_until_a_person_approves_it(here, run, order):
    for _ in range(2):
        assert ask(here, "query", order) == Reply("north", "pending", approvals.PENDING)
    assert not here.ledger.exists() and approvals.state(here, "run-1") == "pending"
    assert ask(here, "train", order, round_=1, model=weights(run)) == FAILED
    assert ask(here, "evaluate", order, model=weights(run)) == FAILED
    assert not here.ledger.exists()
    assert len(events(here, "request")) == 1  # asked again and again, noted once
    approvals.approve(here, "run", "A. Meier")
    assert ask(here, "query", order).status == "ok" and runs_charged(here) == ["run-1"]
    assert ask(here, "train", order, round_=1, model=weights(run)).status == "ok"
    (record,) = events(here, "approval")
    assert (record["decision"], record["by"], record["run_id"]) == ("approved", "A. Meier", "run-1")


def test_a_refusal_is_told_with_its_reason_and_charges_nothing(here, order):
    ask(here, "query", order)
    approvals.refuse(here, "run-1", "A. Meier", "our ethics vote does not cover it")
    told = ask(here, "query", order)
    assert told == Reply("north", "refused", "this site refused the run: our ethics vote does not cover it")
    assert not here.ledger.exists()


def test_after_a_revocation_nothing_more_leaves_or_is_charged(here, make_run, order):
    run = make_run(evaluation={"private": True})
    order = orders.sign(dataclasses.replace(order, config=config.for_sites(run)), KEY)
    ask(here, "query", order)
    approvals.approve(here, "run-1", "A. Meier")
    ask(here, "query", order)
    model = weights(run)
    assert ask(here, "train", order, round_=1, model=model).status == "ok"
    approvals.revoke(here, "run-1", "B. Schmidt", "stop")
    charged = ledger.summary(here.book)
    for round_ in (1, 2):  # not even the answer that was given before
        assert ask(here, "train", order, round_=round_, model=model) == FAILED
    assert ask(here, "evaluate", order, model=model) == FAILED
    assert ask(here, "query", order) == Reply("north", "refused", "this site withdrew from the run: stop")
    assert len(events(here, "release")) == 1 and runs_charged(here) == ["run-1"]  # what was charged stays charged
    assert ledger.summary(here.book) == charged  # no round was begun, and none burned


def test_while_it_is_paused_nothing_made_of_data_leaves(here, run, order):
    """`pause` returns before the node has ended: a training that was under way must not get out."""
    ask(here, "query", order)
    approvals.approve(here, "run-1", "A. Meier")
    ask(here, "query", order)
    (here.folder / site.PAUSED).touch()
    assert ask(here, "train", order, round_=1, model=weights(run)) == FAILED and not events(here, "release")
    (here.folder / site.PAUSED).unlink()
    assert ask(here, "train", order, round_=1, model=weights(run)).status == "ok"  # kept, charged once, now let out


def test_the_server_writes_no_lines_into_the_site_s_log(here, order):
    grid = InlineGrid(app.make_app(lambda context: here), 1)
    record = wire.request_record(Request(order, 1))
    record["x\n2026-01-01T00:00:00+00:00 all is well\x1b[2J" + "y" * 9999] = record["run"]
    (reply,) = grid.send_and_receive([Message(record, next(iter(grid.get_node_ids())), "train")])
    assert wire.read_reply(reply.content).status == "failed"
    path = here.folder / "site.log"
    (line,) = path.read_text().splitlines()
    assert "unknown records" in line and line.isprintable() and len(line) < 2100
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("private", [True, False])
def test_a_revocation_in_the_middle_of_a_round_holds_back_its_answer(here, make_run, order, monkeypatch, private):
    run = make_run(privacy={"enabled": private}, evaluation={"private": False})
    order = orders.sign(dataclasses.replace(order, config=config.for_sites(run)), KEY)
    ask(here, "query", order)
    approvals.approve(here, "run-1", "A. Meier")
    ask(here, "query", order)
    real = train.train_round

    def slow(*args, **kwargs):
        approvals.revoke(here, "run-1", "A. Meier")  # while it trains
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "train_round", slow)
    assert ask(here, "train", order, round_=1, model=weights(run)) == FAILED
    assert not events(here, "release")


def test_nobody_decides_while_a_release_is_recorded(here, order, monkeypatch):
    """The two exclude each other, so the log shows no release after a revocation."""
    approvals.note_request(here, order)
    approvals.approve(here, "run-1", "A. Meier")
    monkeypatch.setattr(approvals, "_WAIT", 0.05)
    with approvals.releasing(here, order), pytest.raises(Exception, match="locked"):
        approvals.revoke(here, "run-1", "A. Meier")
    approvals.revoke(here, "run-1", "A. Meier")
    with pytest.raises(approvals.Refused), approvals.releasing(here, order):
        raise AssertionError


def test_what_the_policy_or_the_budget_refuses_asks_nobody(make_site, run, order, tmp_path):
    strict = make_site(tmp_path / "a", approval="manual", purposes=("screening",))
    assert "purposes are screening" in ask(strict, "query", order).reason
    poor = make_site(tmp_path / "b", approval="manual", max_epsilon=100.0, max_delta=5e-6)
    assert ask(poor, "query", order).status == "refused"
    spent = make_site(tmp_path / "c", approval="manual", epsilon_per_year=4.0)
    assert "epsilon" in ask(spent, "query", order).reason
    assert [approvals.every(here) for here in (strict, poor, spent)] == [[], [], []]


def test_a_budget_that_is_spent_asks_nobody(here, run, order):
    approvals.note_request(here, order)
    approvals.approve(here, "run-1", "A. Meier")
    narrow = dataclasses.replace(here.policy, epsilon_per_year=1.5 * ask(here, "query", order).plan.epsilon)
    second = orders.sign(dataclasses.replace(order, run_id="run-2"), KEY)
    told = ask(here.model_copy(update={"policy": narrow}), "query", second)
    assert told.status == "refused" and "within 365 days" in told.reason
    assert approvals.state(here, "run-2") is None


def test_a_policy_that_became_stricter_counts_at_the_next_round(make_site, run, order, tmp_path):
    here = make_site(tmp_path / "north")
    assert ask(here, "query", order).status == "ok"
    model = weights(run)
    assert ask(here, "train", order, round_=1, model=model).status == "ok"
    today = datetime.now(UTC).date()
    for change in (
        {"approval": "manual"},  # nobody has approved it
        {"max_rounds": 2},
        {"models": ("scatter",)},
        {"valid_until": today - timedelta(days=2)},
        {"launchers": {"ana": orders.public_text(OTHER)}},
    ):
        strict = here.model_copy(update={"policy": dataclasses.replace(here.policy, **change)})
        assert ask(strict, "train", order, round_=2, model=model) == FAILED
    assert ask(here, "train", order, round_=2, model=model).status == "ok"


def test_only_what_the_named_launcher_signed_is_run(make_site, run, order, tmp_path):
    here = make_site(tmp_path / "north", launchers={"ana": orders.public_text(KEY)})
    unsigned = dataclasses.replace(order, signature="")
    forged = orders.sign(dataclasses.replace(order, run_id="run-2"), OTHER)
    bob = orders.sign(dataclasses.replace(order, launcher="bob"), KEY)
    changed = dataclasses.replace(order, valid_until="2099-01-01T00:00:00+00:00")
    for bad in (unsigned, forged, bob, changed):
        assert ask(here, "query", bad).status == "refused"
        assert ask(here, "train", bad, round_=1, model=weights(run)) == FAILED
    assert approvals.every(here) == [] and not here.ledger.exists()
    assert ask(here, "query", order).status == "ok"


def test_stale_and_replayed_orders_are_refused(make_site, run, order, tmp_path):
    here, now = make_site(tmp_path / "north"), datetime.now(UTC)

    def at(issued, until, run_id="old"):
        times = {"issued": (now + issued).isoformat(), "valid_until": (now + until).isoformat()}
        return orders.sign(dataclasses.replace(order, run_id=run_id, **times), KEY)

    day = timedelta(days=1)
    for bad, words in (
        (at(-9 * day, -day), "no longer valid"),
        (at(day, 3 * day), "from the future"),
        (at(-day, 200 * day), "more than 180 days"),
    ):
        assert words in ask(here, "query", bad).reason
    assert ask(here, "query", order).status == "ok"
    again = at(-day, 5 * day, "run-1")  # another order under an id that is known
    assert "another order came" in ask(here, "query", again).reason
    assert ask(here, "train", again, round_=1, model=weights(run)) == FAILED
    (here.folder / site.RETIRED).touch()
    assert ask(here, "query", order) == Reply("north", "refused", "this site has left the federation")
    assert ask(here, "train", order, round_=1, model=weights(run)) == FAILED


def test_a_change_of_the_policy_is_in_the_log_once(here, order):
    for _ in range(2):
        ask(here, "query", order)
    changed = here.model_copy(update={"policy": dataclasses.replace(here.policy, max_rounds=9)})
    for _ in range(2):
        ask(changed, "query", order)
    assert [record["policy"]["max_rounds"] for record in events(here, "policy")] == [None, 9]


# ------------------------------------------------------------------------------------------------- doors for research

DOORS: dict[str, dict[str, Any]] = {
    "no privacy": {"privacy": {"enabled": False}},
    "image unit": {"privacy": {"unit": "image"}},
    "engine for trained weights": {"privacy": {"engine": "opacus"}},
    "infinite epsilon": {"privacy": {"noise_multiplier": 1e-9}},
}


@pytest.mark.parametrize("door", DOORS)
def test_each_door_for_research_is_shut_at_a_hospital(make_site, make_run, order, tmp_path, door):
    here = make_site(tmp_path / "north", research_cohort=False, min_noise_multiplier=0.0)
    run = make_run(**DOORS[door])
    order = orders.sign(dataclasses.replace(order, config=config.for_sites(run)), KEY)
    told = ask(here, "query", order)
    assert told.status == "refused" and "consent" not in told.reason  # it is this door that is shut
    with pytest.MonkeyPatch.context() as patch:  # even if it had been let in once
        patch.setattr(approvals, "check", lambda *args: None)
        assert ask(here, "train", order, round_=1, model=weights(run)) == FAILED
        assert ask(here, "evaluate", order, model=weights(run)) == FAILED
    assert not here.ledger.exists() and not events(here, "release")


@pytest.mark.parametrize("door", ["no privacy", "image unit", "engine for trained weights"])
def test_the_doors_are_open_where_the_hospital_marked_the_cohort(make_site, make_run, order, tmp_path, door):
    here, run = make_site(tmp_path / "north"), make_run(**DOORS[door])
    assert ask(here, "query", dataclasses.replace(order, config=config.for_sites(run))).status == "ok"


def test_infinite_epsilon_is_charged_to_no_ledger_anywhere(make_site, make_run, order, tmp_path):
    here, run = make_site(tmp_path / "north", min_noise_multiplier=0.0), make_run(**DOORS["infinite epsilon"])
    told = ask(here, "query", dataclasses.replace(order, config=config.for_sites(run)))
    assert told.status == "refused" and "epsilon inf" in told.reason


def test_a_seed_makes_no_noise_repeatable(make_site, make_run, order, tmp_path):
    """With privacy there is no door for seeds: the same run with the same seed gives other noise."""
    run, updates = make_run(train={"seed": 7}), []
    for name in ("a", "b"):
        here = make_site(tmp_path / name, name="north")
        asked = dataclasses.replace(order, config=config.for_sites(run))
        assert ask(here, "query", asked).status == "ok"
        updates.append(ask(here, "train", asked, round_=1, model=weights(run)).update)
    assert all(np.mean(updates[0][name] == updates[1][name]) < 0.01 for name in updates[0])
