"""Renyi DP against 60 digits and another program; the filter's allowance against the conversion it inverts."""

import decimal
import math
from decimal import Decimal

import dp_accounting
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_core import rdp

RATES = [1e-4, 0.01, 0.064, 0.3, 0.9, 1.0]


def exact(q: float, sigma: float, order: int) -> float:
    """log E[((1 - q) + q L)^order] / (order - 1): the sum as it stands in the paper, in decimals of 80 digits."""
    with decimal.localcontext(prec=80, Emax=10**9, Emin=-(10**9)):
        qq, ss = Decimal(q), Decimal(sigma)
        total = Decimal(0)
        for k in range(order + 1):
            chosen = math.comb(order, k) * qq**k if k else Decimal(1)
            left = (1 - qq) ** (order - k) if k < order else Decimal(1)
            total += chosen * left * (k * (k - 1) / (2 * ss * ss)).exp()
        return float(total.ln() / (order - 1))


@settings(max_examples=60)
@given(q=st.sampled_from(RATES), sigma=st.floats(0.3, 30), order=st.sampled_from([2, 3, 7, 32, 128, 512]))
def test_a_step_is_exact_and_never_below(q, sigma, order):
    truth = exact(q, sigma, order)
    (value,) = rdp.sampled_gaussian(q, sigma, (order,))
    assert truth <= value <= truth * (1 + 2e-9)


@pytest.mark.parametrize("q", [1e-8, 1e-4, 1.0])
@pytest.mark.parametrize("sigma", [1e-200, 1e-3, 1e3, 1e200])
def test_extreme_steps_are_numbers_or_infinite(q, sigma):
    curve = rdp.sampled_gaussian(q, sigma)
    assert all(value > 0 for value in curve)  # false for NaN
    assert curve == tuple(sorted(curve))
    assert (curve[0] == math.inf) == (sigma == 1e-200)


def test_without_noise_it_is_infinite():
    assert set(rdp.sampled_gaussian(0.5, 0.0)) == {math.inf}


def test_another_program_agrees():
    theirs = dp_accounting.rdp.RdpAccountant(orders=rdp.ORDERS)
    theirs.compose(dp_accounting.PoissonSampledDpEvent(0.064, dp_accounting.GaussianDpEvent(1.0)), 1)
    assert rdp.sampled_gaussian(0.064, 1.0) == pytest.approx(theirs._rdp, rel=1e-6)


def test_orders_that_do_not_converge_elsewhere_are_not_used():
    """Fractional orders need series; dp-accounting drops those that fail, which is no upper bound."""
    assert all(isinstance(order, int) and order >= 2 for order in rdp.ORDERS)


def test_sums_are_rounded_up():
    tenth = math.nextafter(0.1, 0)  # three of them are below 0.3 in decimals
    (total,) = rdp.add((tenth,), (tenth,), (tenth,))
    assert total > 3 * tenth
    assert rdp.add((0.1, math.inf), times=(10**6,))[0] > 1e5 and rdp.add((0.1, math.inf), times=(7,))[1] == math.inf


@given(
    epsilon=st.floats(0.5, 60),
    delta=st.sampled_from([1e-4, 1e-5, 1e-8]),
    order=st.sampled_from([2, 3, 4, 9, 64]),
)
def test_what_an_order_allows_is_within_the_budget_and_is_all_of_it(epsilon, delta, order):
    allowed = rdp.allowance(epsilon, delta, order)
    if allowed > 0:
        assert rdp.to_epsilon([allowed], delta, [order]) <= epsilon * (1 + 1e-8)
        # delta of an (order, rho)-RDP mechanism, Canonne, Kamath, Steinke 2020, proposition 12
        spent = math.exp((order - 1) * (allowed - epsilon)) / (order - 1) * (1 - 1 / order) ** order
        assert delta * (1 - 1e-4) < spent <= delta


@pytest.mark.parametrize(("epsilon", "order"), [(2.0, 10), (8.0, 4), (20.0, 3), (50.0, 2)])
def test_the_order_of_a_budget_lets_most_gaussian_steps_through(epsilon, order):
    assert rdp.filter_order(epsilon, 1e-5) == order
    steps = {o: rdp.allowance(epsilon, 1e-5, o) / rdp.sampled_gaussian(1.0, 4.65, (o,))[0] for o in rdp.ORDERS}
    assert max(steps.values()) == pytest.approx(steps[order], rel=1e-6)


def test_a_filter_of_one_run_costs_little_more_than_its_price():
    """The order is fixed for the budget, so a budget-filling Gaussian run needs no more than 10 % more epsilon."""
    from fedscan_core.accounting import PoissonGaussian, epsilon

    allowed = rdp.allowance(8.0, 1e-5, 4)
    steps = int(allowed / rdp.sampled_gaussian(1.0, 5.0, (4,))[0])
    assert 7.2 < epsilon([PoissonGaussian(1.0, 5.0, steps)], 1e-5) < 8.0
