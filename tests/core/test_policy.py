"""The hospital's veto: each rule refuses what it names and nothing more."""

import dataclasses
import json
import math
from datetime import date, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedscan_core import order as orders
from fedscan_core import policy as policies
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import ConfigError
from fedscan_core.order import Order
from fedscan_core.policy import Policy, from_public, public, refusal

POLICY = Policy(max_epsilon=5.0, max_delta=1e-5, min_noise_multiplier=0.5)
PLAN = SitePlan(100, 1e-5, 5.0, 0.1, 0.5, 30, 0.0)  # at every limit: still allowed


def test_what_keeps_to_every_limit_is_allowed(make_run):
    assert refusal(POLICY, make_run(), PLAN) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 5.001}, "epsilon 5.001, this site allows 5"),
        ({"epsilon": math.inf}, "epsilon inf, this site allows 5"),
        ({"delta": 1.1e-5}, "delta 1.1e-05, this site allows 1e-05"),
        ({"noise_multiplier": 0.499}, "noise 0.499, this site's floor is 0.5"),
        ({"evaluation_noise": 0.499}, "noise 0.499, this site's floor is 0.5"),
    ],
)
@pytest.mark.parametrize("research", [False, True])
def test_a_plan_beyond_a_limit_is_refused_with_the_limit(make_run, changes, words, research):
    policy = dataclasses.replace(POLICY, research_cohort=research)
    reason = refusal(policy, make_run(), dataclasses.replace(PLAN, **changes))
    assert reason is not None and words in reason


def test_a_deployed_site_never_switches_privacy_off(make_run):
    run = make_run(privacy={"enabled": False})
    none = dataclasses.replace(PLAN, epsilon=math.inf, noise_multiplier=0.0)
    assert "only with privacy" in str(refusal(POLICY, run, none))
    assert "only with privacy" in str(refusal(POLICY, run, PLAN))  # whatever the plan says
    assert refusal(dataclasses.replace(POLICY, research_cohort=True), run, none) is None


def test_a_deployed_site_protects_patients_not_images(make_run):
    run = make_run(privacy={"unit": "image"})
    assert "patients, not single images" in str(refusal(POLICY, run, PLAN))
    assert refusal(dataclasses.replace(POLICY, research_cohort=True), run, PLAN) is None


def test_a_deployed_site_refuses_the_engine_that_holds_only_for_trained_weights(make_run):
    run = make_run(privacy={"engine": "opacus"})
    assert "bound for any weights" in str(refusal(POLICY, run, PLAN))
    assert refusal(dataclasses.replace(POLICY, research_cohort=True), run, PLAN) is None


def test_a_policy_that_says_nothing_is_that_of_a_deployed_site(make_run):
    assert not Policy(1.0, 1e-5).research_cohort
    assert refusal(Policy(100.0, 1.0), make_run(), dataclasses.replace(PLAN, noise_multiplier=0.29)) is not None


@pytest.mark.parametrize("limit", ["max_epsilon", "max_delta", "min_noise_multiplier"])
def test_a_limit_that_is_no_number_lets_nothing_through(make_run, limit):
    assert refusal(Policy(**{**dataclasses.asdict(POLICY), limit: math.nan}), make_run(), PLAN) is not None


DAY = date(2026, 6, 1)


@pytest.mark.parametrize(
    ("allows", "asks", "words"),
    [
        ({"max_rounds": 2}, {}, "3 rounds, this site allows 2"),
        ({"max_steps": 5}, {"train": {"local_steps": 2}}, "6 training steps, this site allows 5"),
        ({"tasks": ("segmentation",)}, {}, "tasks are segmentation, not 'classification'"),
        ({"models": ("scatter", "resnet18")}, {}, "models are scatter, resnet18, not 'cnn'"),
        ({"purposes": ("triage", "screening")}, {"study": {"purpose": "marketing"}}, "purposes are triage, screening"),
        ({"purposes": ("triage",)}, {}, "study.purpose must be one of them"),
        ({"ethics_approval": "EK 12/26"}, {"study": {"ethics_approval": "EK 13/26"}}, "ethics_approval = 'EK 12/26'"),
        ({"data_use_agreement": "DUA-7"}, {}, "data_use_agreement = 'DUA-7'"),
        ({"evaluation": False}, {"evaluation": {"private": True}}, "answers no evaluation"),
        ({"groups": ("sex",)}, {"evaluation": {"groups": ["sex", "age"]}}, "no evaluation by age"),
        ({"valid_until": DAY - timedelta(1)}, {}, "policy ended on 2026-05-31"),
        ({"epsilon_per_year": 4.0}, {}, "epsilon 5, this site allows 4"),
        ({"epsilon_per_year": math.nan}, {}, "this site allows nan"),
    ],
)
def test_each_key_refuses_what_it_names_and_nothing_else(make_run, allows, asks, words):
    policy = dataclasses.replace(POLICY, **allows)
    assert words in str(refusal(policy, make_run(**asks), PLAN, today=DAY))
    assert refusal(POLICY, make_run(**asks), PLAN, today=DAY) is None  # it is that key


def test_what_the_keys_name_is_allowed(make_run):
    policy = dataclasses.replace(
        POLICY,
        max_rounds=3,
        max_steps=3,
        tasks=("classification",),
        models=("cnn",),
        purposes=("triage", "screening"),
        ethics_approval="EK 12/26",
        data_use_agreement="DUA-7",
        agreement_until=DAY,  # the last day counts
        groups=("age",),
        valid_until=DAY,
        epsilon_per_year=5.0,
    )
    study = {"purpose": "screening", "ethics_approval": "EK 12/26", "data_use_agreement": "DUA-7"}
    run = make_run(study=study, evaluation={"groups": ["age"]})
    assert refusal(policy, run, PLAN, today=DAY) is None
    assert "agreement ended on 2026-06-01" in str(refusal(policy, run, PLAN, today=DAY + timedelta(1)))


def test_a_site_without_evaluation_takes_runs_that_ask_for_none(make_run):
    policy = dataclasses.replace(POLICY, evaluation=False, groups=())
    assert refusal(policy, make_run(evaluation={"private": False, "groups": ["sex"]}), PLAN) is None


def test_all_reasons_are_told_at_once(make_run):
    policy = dataclasses.replace(POLICY, max_rounds=1, models=("scatter",), max_epsilon=1.0)
    reason = str(refusal(policy, make_run(privacy={"unit": "image"}), PLAN))
    assert reason.count("; ") == 3


KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
NAMED = dataclasses.replace(POLICY, launchers={"ana": orders.public_text(KEY)})


def test_only_a_named_launcher_with_their_own_key_may_launch(make_run):
    order = Order("run-1", "{}", "ana")
    assert refusal(NAMED, make_run(), PLAN, orders.sign(order, KEY)) is None
    changed = dataclasses.replace(orders.sign(order, KEY), config="{ }")
    for bad in (order, orders.sign(order, OTHER), changed):
        assert "not signed with the key by which this site knows ana" in str(refusal(NAMED, make_run(), PLAN, bad))
    somebody = orders.sign(dataclasses.replace(order, launcher="bob"), KEY)
    assert "only ana may launch" in str(refusal(NAMED, make_run(), PLAN, somebody))
    assert refusal(NAMED, make_run(), PLAN) is None  # nobody has signed yet: a dry run
    assert refusal(POLICY, make_run(), PLAN, order) is None  # whom the coordinator lets through


def test_what_is_published_says_everything_and_counts_what_is_left(make_run):
    policy = dataclasses.replace(NAMED, purposes=("triage",), valid_until=DAY, two_people=("budget",), max_rounds=7)
    told = json.loads(json.dumps(public(policy, "north", 400, (1.25, 1e-6)), allow_nan=False))
    assert set(told) == {it.name for it in dataclasses.fields(Policy)} | {"site", "patients_declared", "remaining"}
    read, declared = from_public(told)
    assert declared == 400 and read == dataclasses.replace(policy, max_epsilon=1.25, max_delta=1e-6)
    assert "epsilon 5, this site allows 1.25" in str(refusal(read, make_run(), PLAN, today=DAY))
    assert from_public(public(policy, "north", 400, (99.0, 1.0)))[0] == policy  # never more than the policy


@pytest.mark.parametrize(
    "change",
    [
        {"max_epsilon": None},
        {"max_rounds": "many"},
        {"max_rounds": 0},
        {"approval": "sometimes"},
        {"launchers": {"ana": "ssh-ed25519 AAAA"}},
        {"launchers": {"ana": "ecdsa-sha2-nistp384 AAAA"}},
        {"launchers": ["ana"]},
        {"purposes": ["tri\x1b[2Jage"]},
        {"ethics_approval": "x" * 201},
        {"valid_until": "soon"},
        {"patients_declared": -1},
        {"patients_declared": 1.5},
        {"remaining": {"epsilon": 1.0}},
        {"remaining": {"epsilon": -1.0, "delta": 0.0}},
        {"remaining": {"epsilon": math.nan, "delta": 0.0}},
        {"remaining": 3.0},
        {"epsilon_per_year": math.nan},
        {"agreement_until": "2027-01-01"},
        {"more": 1},
    ],
)
def test_what_a_site_publishes_wrongly_is_refused_by_name(change):
    with pytest.raises(ConfigError, match="public policy is none"):
        from_public({**public(POLICY, "north", 400, (1.0, 1e-6)), **change})


@given(
    epsilon=st.floats(0, 20),
    delta=st.floats(0, 1e-3),
    noise=st.floats(0, 3),
    rounds=st.integers(1, 9),
    year=st.floats(0, 20),
)
def test_the_strictest_wins(make_run, epsilon, delta, noise, rounds, year):
    """A policy with two limits refuses whatever either of them refuses."""
    run = make_run(train={"rounds": 5})
    whole = Policy(epsilon, delta, noise, max_rounds=rounds, epsilon_per_year=year)
    allowed = (epsilon >= 5.0, delta >= 1e-5, noise <= 0.5, rounds >= 5, year >= 5.0)
    assert (refusal(whole, run, PLAN) is None) == all(allowed)


def test_a_fault_names_its_key():
    assert policies.fault(NAMED) is None and policies.fault(POLICY) is None
    wrong = dataclasses.replace(POLICY, launchers={"ana": orders.public_text(KEY)[:-9]})
    assert "launchers.ana" in str(policies.fault(wrong))
