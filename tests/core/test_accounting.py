"""Prices against closed forms and plain numerical integrals, and what a plan may and may not claim."""

import dataclasses
import math

import dp_accounting
import numpy as np
import opacus
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedscan_core import accounting, rdp
from fedscan_core.accounting import (
    GaussianQuery,
    PoissonGaussian,
    SitePlan,
    calibrate,
    epsilon,
    epsilon_so_far,
    plan_fault,
    plan_for,
    renyi_epsilon,
    replace_one,
)
from fedscan_core.config import RunConfig
from fedscan_core.errors import PrivacyError

DELTA = 1e-5
KNOWN = PoissonGaussian(0.1, 1.0, 100)


def run_config(**sections):
    """A run of 20 rounds; patients_per_step 64."""
    return RunConfig.model_validate(
        {"train": {"rounds": 20, "patients_per_step": 64} | sections.pop("train", {}), **sections}
    )


def slow_epsilon(q: float, sigma: float, steps: int, delta: float, grid: float = 1e-3) -> float:
    """The privacy loss of one step on a fine grid, convolved with itself, in both directions of add or remove."""
    size = 2**17
    x = np.linspace(-12 * sigma, 12 * sigma + 1, 400_001)
    without, with_it = norm.pdf(x, 0, sigma), (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma)
    worst = 0.0
    for above, below in ((with_it, without), (without, with_it)):
        cell = np.rint((np.log(above) - np.log(below)) / grid).astype(int) % size
        mass = np.bincount(cell, weights=above * (x[1] - x[0]), minlength=size)
        total = np.fft.irfft(np.fft.rfft(mass) ** steps, n=size)
        loss = np.where(np.arange(size) < size // 2, np.arange(size), np.arange(size) - size) * grid
        low, high = 0.0, 60.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            over = loss > middle
            spent = float((total[over] * -np.expm1(middle - loss[over])).sum())
            low, high = (middle, high) if spent > delta else (low, middle)
        worst = max(worst, high)
    return worst


def gaussian_delta(eps: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 1.0, 100), (0.02, 0.7, 300), (0.5, 3.0, 50)])
def test_pld_is_the_plain_integral(q, sigma, steps):
    plain = slow_epsilon(q, sigma, steps, DELTA)
    assert epsilon([PoissonGaussian(q, sigma, steps)], DELTA) == pytest.approx(plain, abs=5e-3)


def test_add_or_remove_and_not_replace():
    """Replacing costs much more; a price of it, or of half the noise, would not be this one."""
    replace = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-2)
    replace.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)), 100)
    price = epsilon([KNOWN], DELTA)
    assert round(price, 1) == 7.0
    assert replace.get_epsilon(DELTA) > 1.4 * price


@given(sigma=st.floats(1, 50), steps=st.integers(1, 200), delta=st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_without_sampling_it_is_the_exact_gaussian(sigma, steps, delta):
    mu = math.sqrt(steps) / sigma
    price = epsilon([PoissonGaussian(1.0, sigma, steps)], delta)
    assert gaussian_delta(price, mu) <= delta * (1 + 1e-6)
    assert price < 1e-9 or gaussian_delta(price * (1 - 1e-4), mu) > delta
    assert epsilon([GaussianQuery(sigma, steps)], delta) == price


def test_the_exact_gaussian_meets_the_grid():
    almost = epsilon([PoissonGaussian(1 - 1e-9, 2.0, 9)], DELTA)
    assert epsilon([PoissonGaussian(1.0, 2.0, 9)], DELTA) == pytest.approx(almost, rel=1e-3)


def test_composition_adds_up_whatever_the_order():
    query = GaussianQuery(4.0)
    both = epsilon([KNOWN, query], DELTA)
    assert both == pytest.approx(epsilon([query, KNOWN], DELTA), rel=1e-6)
    assert max(epsilon([KNOWN], DELTA), epsilon([query], DELTA)) < both
    assert both < epsilon([KNOWN], DELTA / 2) + epsilon([query], DELTA / 2)
    halves = [PoissonGaussian(0.1, 1.0, 50)] * 2
    assert epsilon(halves, DELTA) == pytest.approx(epsilon([KNOWN], DELTA), abs=1e-3)


def test_edges():
    assert epsilon([], DELTA) == 0.0
    assert epsilon([KNOWN, GaussianQuery(0.0)], DELTA) == math.inf
    assert epsilon([PoissonGaussian(0.1, 1e-200, 1)], DELTA) == math.inf
    assert 0 <= epsilon([GaussianQuery(1e9)], DELTA) < 1e-4
    # A grid for the loss of tiny noise must fit into memory; the coarser one stays an upper bound near the truth.
    sigma = 0.05
    whole = epsilon([PoissonGaussian(1.0, sigma, 30)], DELTA)
    assert whole < epsilon([PoissonGaussian(1 - 1e-9, sigma, 30)], DELTA) < 1.001 * whole


@pytest.mark.parametrize(
    "event",
    [
        PoissonGaussian(0.0, 1.0, 1),
        PoissonGaussian(1.1, 1.0, 1),
        PoissonGaussian(0.1, 1.0, 0),
        PoissonGaussian(0.1, -1.0, 1),
        PoissonGaussian(0.1, math.nan, 1),
        PoissonGaussian(math.nan, 1.0, 1),
        GaussianQuery(math.inf),
        GaussianQuery(1.0, 0),
    ],
)
def test_events_out_of_range_have_no_price(event):
    with pytest.raises(PrivacyError):
        epsilon([event], DELTA)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")  # of Opacus
@settings(max_examples=12)
@given(
    q=st.sampled_from([0.01, 0.064, 0.3, 1.0]),
    sigma=st.floats(0.6, 6),
    steps=st.integers(1, 300),
    query=st.sampled_from([0.0, 3.0, 20.0]),
    delta=st.sampled_from([1e-5, 1e-7]),
)
def test_no_accountant_finds_more_than_we_report(q, sigma, steps, query, delta):
    """PLD lies above the lower end of Opacus' PRV interval and below Renyi DP; Renyi DP above that of the others."""
    events: tuple[accounting.Event, ...] = (PoissonGaussian(q, sigma, steps),)
    events += (GaussianQuery(query),) if query else ()
    price, renyi = epsilon(events, delta), renyi_epsilon(events, delta)
    assert 0 <= price <= renyi
    history = [(sigma, q, steps), *([(query, 1.0, 1)] if query else [])]
    if price < 25:  # its grid grows with epsilon, and it goes down for the smallest ones
        prv = opacus.accountants.PRVAccountant()
        prv.history = list(history)
        middle = prv.get_epsilon(delta, eps_error=0.1, delta_error=delta / 1000)
        assert middle - 0.2 <= price <= middle + 0.02 * max(1.0, price)
    theirs = opacus.accountants.RDPAccountant()
    theirs.history = list(history)
    assert renyi >= theirs.get_epsilon(delta, alphas=rdp.ORDERS) * (1 - 1e-9)
    google = dp_accounting.rdp.RdpAccountant(orders=rdp.ORDERS)
    for noise, rate, count in history:
        google.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), count)
    assert renyi == pytest.approx(google.get_epsilon(delta), rel=1e-6) and renyi >= google.get_epsilon(delta) * (
        1 - 1e-9
    )


@given(sigma=st.floats(1, 50), steps=st.integers(1, 100))
def test_replacing_a_patient_doubles_the_sensitivity_where_nobody_is_sampled(sigma, steps):
    price = replace_one([PoissonGaussian(1.0, sigma, steps), GaussianQuery(2 * sigma)], DELTA)
    assert price == epsilon([PoissonGaussian(1.0, sigma / 2, steps), GaussianQuery(sigma)], DELTA)


def test_replacing_a_patient_is_dp_accountings_replace_one_and_below_a_group_of_two():
    price, single = replace_one([KNOWN], DELTA), epsilon([KNOWN], DELTA)
    theirs = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-3)
    theirs.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)), 100)
    assert price == pytest.approx(theirs.get_epsilon(DELTA), abs=1e-6) and price > 1.4 * single
    # remove one, then add one: D(e1 + e1) <= delta1 (1 + e^e1)
    group = min(2 * e for d in np.logspace(-12, -6, 25) if d * (1 + math.exp(e := epsilon([KNOWN], d))) <= DELTA)
    assert price <= group


def test_renyi_of_a_plan_adds_up_at_each_order():
    events = (KNOWN, GaussianQuery(4.0, 3))
    curve = accounting.renyi(events, (2, 5))
    step = rdp.sampled_gaussian(0.1, 1.0, (2, 5))
    for total, one, order in zip(curve, step, (2, 5), strict=True):
        assert total == pytest.approx(100 * one + 3 * order / 32, rel=1e-8) and total > 100 * one + 3 * order / 32
    assert accounting.renyi(()) == (0.0,) * len(rdp.ORDERS) and renyi_epsilon((), DELTA) == 0
    assert accounting.renyi((GaussianQuery(0.0),)) == (math.inf,) * len(rdp.ORDERS)
    with pytest.raises(PrivacyError):
        accounting.renyi((PoissonGaussian(0.0, 1.0, 1),))


def test_calibration_takes_the_price_that_a_gate_hands_in():
    def events(noise):
        return [PoissonGaussian(0.1, noise, 100)]

    by_renyi = calibrate(events, 8.0, DELTA, renyi_epsilon)
    assert renyi_epsilon(events(by_renyi), DELTA) <= 8.0 < renyi_epsilon(events(by_renyi * (1 - 1.5e-3)), DELTA)
    assert by_renyi > calibrate(events, 8.0, DELTA)


@settings(max_examples=25)
@given(
    q=st.sampled_from([0.003, 0.05, 0.3, 1.0]),
    sigma=st.floats(0.6, 5),
    steps=st.integers(1, 400),
    share=st.floats(0.01, 1),
)
def test_spent_so_far_is_an_upper_bound_and_never_above_the_plan(q, sigma, steps, share):
    plan = SitePlan(1000, DELTA, math.inf, q, sigma, steps, 0.0)
    done = math.ceil(share * steps)
    price = epsilon(plan.events(done), DELTA)
    assert epsilon_so_far(plan, done) >= price
    sealed = dataclasses.replace(plan, epsilon=epsilon(plan.events(), DELTA))
    shown = [epsilon_so_far(sealed, n) for n in (0, max(1, done // 2), done, steps)]
    assert shown[0] == 0 and shown == sorted(shown)
    assert price <= shown[2] + 1e-9 and shown[3] <= sealed.epsilon


def test_the_live_bound_is_not_far_off():
    plan = SitePlan(1000, DELTA, math.inf, 0.1, 1.0, 100, 0.0)
    assert 1.05 < epsilon_so_far(plan, 100) / epsilon(plan.events(), DELTA) < 1.25


@pytest.mark.parametrize("target", [0.3, 2.0, 8.0, 300.0])
@pytest.mark.parametrize(("q", "steps"), [(0.05, 40), (1.0, 25)])
def test_calibration_is_the_smallest_noise_to_a_thousandth(target, q, steps):
    def events(noise):
        return [PoissonGaussian(q, noise, steps)]

    sigma = calibrate(events, target, DELTA)
    assert epsilon(events(sigma), DELTA) <= target < epsilon(events(sigma * (1 - 1.5e-3)), DELTA)


def test_calibration_where_delta_alone_would_cover_much_noise():
    """At noise 100 one rare step costs nothing at all: its epsilon is 0, which has no logarithm."""
    plan = plan_for(run_config(train={"rounds": 1, "patients_per_step": 1}), 1000)
    assert plan.noise_multiplier < 1 and 7.9 < plan.epsilon <= 8


@pytest.mark.parametrize(("size", "delta"), [(500, 1e-5), (50_000, 1 / 500_000), (10_000, 1e-5), (10_001, 1 / 100_010)])
def test_delta_auto(size, delta):
    plan = plan_for(run_config(privacy={"enabled": False}), size)
    assert plan.delta == delta and plan.epsilon == math.inf and plan.noise_multiplier == 0


def test_rate_and_steps_are_the_runs():
    run = run_config(train={"rounds": 7, "local_steps": 3, "patients_per_step": 64}, privacy={"enabled": False})
    assert [plan_for(run, n).sampling_rate for n in (640, 64, 20)] == [0.1, 1.0, 1.0]
    assert plan_for(run, 20).steps == 21
    everybody = run_config(train={"patients_per_step": "all"}, privacy={"enabled": False})
    assert plan_for(everybody, 640).sampling_rate == 1.0


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_training_and_evaluation_together_stay_below_the_target(share):
    alone = plan_for(run_config(evaluation={"private": False}), 640)
    plan = plan_for(run_config(evaluation={"budget_share": share}), 640)  # private by default
    assert plan.events() == (PoissonGaussian(0.1, plan.noise_multiplier, 20), GaussianQuery(plan.evaluation_noise))
    assert plan.epsilon == epsilon(plan.events(), plan.delta) and 7.98 < plan.epsilon <= 8
    assert epsilon(plan.events()[1:], plan.delta) == pytest.approx(8 * share, rel=2e-3)
    assert plan.noise_multiplier > alone.noise_multiplier and alone.evaluation_noise == 0
    assert len(plan.events(5)) == 1 and plan.events(0) == ()


def test_given_noise_is_taken_and_priced():
    plan = plan_for(run_config(privacy={"noise_multiplier": 1.3}, evaluation={"private": True}), 640)
    assert plan.noise_multiplier == plan.evaluation_noise == 1.3
    assert plan.epsilon == epsilon([PoissonGaussian(0.1, 1.3, 20), GaussianQuery(1.3)], plan.delta)


@pytest.mark.parametrize(
    ("run", "size", "word"),
    [
        (run_config(), 0, "declared cohort of 0"),
        (run_config(privacy={"delta": 2e-3}), 500, "delta 0.002 is not below"),
        (run_config(privacy={"target_epsilon": 0.04}), 500, r"Private evaluation: .* below 0\.01.*private = false"),
        (
            run_config(
                privacy={"target_epsilon": 0.02}, train={"patients_per_step": "all"}, evaluation={"private": False}
            ),
            500,
            "above 100",
        ),
    ],
)
def test_what_cannot_be_promised_is_refused(run, size, word):
    with pytest.raises(PrivacyError, match=word) as caught:
        plan_for(run, size)
    assert caught.value.remedy
    with pytest.raises(PrivacyError, match=r"below 0\.01"):
        calibrate(lambda noise: [GaussianQuery(noise)], 0.0099, DELTA)


HONEST = [
    (run_config(evaluation={"private": False}), 640),
    (run_config(evaluation={"private": False}), 30),
    (run_config(evaluation={"groups": ["sex", "age"]}), 640),
    (run_config(privacy={"noise_multiplier": 1.3}, evaluation={"private": True}), 640),
    (run_config(privacy={"delta": 1e-6, "unit": "image"}), 640),
    (run_config(privacy={"enabled": False}, evaluation={"private": True}), 640),
]


@pytest.mark.parametrize(("run", "size"), HONEST)
def test_every_honest_plan_is_accepted(run, size):
    plan = plan_for(run, size)
    assert plan_fault(run, plan) is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"patients_declared": 0}, "size or delta"),
        ({"delta": 0.0}, "size or delta"),
        ({"delta": math.nan}, "size or delta"),
        ({"delta": 1 / 640}, "size or delta"),
        ({"delta": 1e-4}, "delta is above"),
        ({"patients_declared": 700}, "another rate"),
        ({"sampling_rate": 0.05}, "another rate"),
        ({"steps": 19}, "other steps"),
        ({"unit": "image"}, "another unit"),
        ({"adjacency": "replace_one"}, "another unit"),
        ({"evaluation_noise": 0.0}, "evaluation queries"),
        ({"evaluation_noise": -4.0}, "out of range"),
        ({"evaluation_noise": math.nan}, "out of range"),
        ({"evaluation_noise": 0.5}, "more epsilon than it claims"),
        ({"noise_multiplier": math.inf}, "out of range"),
        ({"noise_multiplier": 0.0}, "more epsilon than it claims"),
        ({"noise_multiplier": 0.6}, "more epsilon than it claims"),
        ({"noise_multiplier": 1e-9}, "more epsilon than it claims"),
        ({"epsilon": 7.0}, "more epsilon than it claims"),
        ({"epsilon": math.nan}, "more epsilon than it claims"),
        ({"noise_multiplier": 0.6, "epsilon": 20.0}, "above the run's target"),
    ],
)
def test_every_lie_is_named(changes, word):
    run, size = HONEST[2]
    lie = dataclasses.replace(plan_for(run, size), **changes)
    assert word in str(plan_fault(run, lie))


@pytest.mark.parametrize("run, size", [HONEST[2], HONEST[3]])
@pytest.mark.parametrize("noise", [20.0, 199.0, 1e7, 1e300])
def test_noise_that_would_make_the_bound_on_updates_void_is_refused(run, size, noise):
    plan = dataclasses.replace(plan_for(run, size), noise_multiplier=noise)
    assert plan_fault(run, plan) in ("its noise is out of range", "it adds many times the noise that the run needs")


def test_no_claim_ends_the_server_s_loop():
    run, size = run_config(), 640
    plan = plan_for(run, size)
    for noise in (5e-324, 1e-300, 1e-3, 1e300, 1.7e308):
        for query in (5e-324, 1e-9, 1e308):
            assert plan_fault(run, dataclasses.replace(plan, noise_multiplier=noise, evaluation_noise=query))


def test_more_noise_is_welcome_and_less_than_the_run_says_is_not():
    run, size = HONEST[3]
    plan = plan_for(run, size)
    assert plan_fault(run, dataclasses.replace(plan, noise_multiplier=2.6)) is None
    for less in (
        dataclasses.replace(plan, noise_multiplier=1.2, epsilon=99.0),
        dataclasses.replace(plan, evaluation_noise=1.2, epsilon=99.0),
    ):
        assert plan_fault(run, less) == "it adds less noise than the run"
    run, size = HONEST[5]
    claims = dataclasses.replace(plan_for(run, size), epsilon=1.0)
    assert "claims privacy" in str(plan_fault(run, claims))
