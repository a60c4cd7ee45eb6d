"""The hospital's veto: each rule refuses what it names and nothing more."""

import dataclasses
import math

import pytest

from fedscan_core.accounting import SitePlan
from fedscan_core.policy import Policy, refusal

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
