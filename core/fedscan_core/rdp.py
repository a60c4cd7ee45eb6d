"""Renyi DP of the Gaussian mechanism and of its Poisson-sampled form, and the filter that adds it up over runs.

Unit: the patient. Adjacency: adding or removing one. Every value is rounded up, every allowance down.

A filter (Feldman and Zrnic 2020, arXiv 2008.11193, theorem 4.3) lets parameters of later mechanisms be chosen after
looking at earlier answers: whatever is chosen, if the Renyi DP at one order, fixed beforehand, adds up to at most B,
then all answers together are (order, B)-RDP. Only one order decides. A filter that goes on while any of several orders
has room would let an analyst pick the order after looking; its delta multiplies by their number.
"""

import functools
import math
import sys
from collections.abc import Sequence

# Whole orders: each value is a finite sum of positive terms, so nothing has to converge. What overflows is infinite.
ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 192, 256, 512)
_ERROR = 1e-9  # relative; the sums below are exact to about 1e-12 (tests/core/test_rdp.py, against 60 digits)


@functools.lru_cache(maxsize=1024)
def sampled_gaussian(
    sampling_rate: float, noise_multiplier: float, orders: tuple[int, ...] = ORDERS
) -> tuple[float, ...]:
    """Renyi DP of one step at whole orders, rounded up (Mironov, Talwar, Zhang 2019, arXiv 1908.10530, section 3.3).

    Args:
        sampling_rate: every patient is taken with this probability, in (0, 1].
        noise_multiplier: standard deviation over the L2 sensitivity, 0 or above.
        orders: whole numbers from 2.

    Returns:
        One value for each order; inf without noise and where the sum overflows.
    """
    if noise_multiplier == 0:
        return tuple(math.inf for _ in orders)
    return tuple(_up(_sampled(sampling_rate, noise_multiplier, order)) for order in orders)


def _sampled(q: float, sigma: float, order: int) -> float:
    if q == 1.0:
        return order / (2 * sigma) / sigma
    # E[(1 - q + q L)^a] - 1 = sum_k C(a, k) (1-q)^(a-k) q^k (E[L^k] - 1): positive terms only, so small ones survive.
    terms = []
    for k in range(2, order + 1):
        moment = max(k * (k - 1) / (2 * sigma) / sigma, sys.float_info.min)
        if moment == math.inf:
            return math.inf
        # log(e^m - 1); for large m it is m + log(1 - e^-m)
        log_moment = math.log(math.expm1(moment)) if moment < 30 else moment + math.log1p(-math.exp(-moment))
        terms.append(math.log(math.comb(order, k)) + (order - k) * math.log1p(-q) + k * math.log(q) + log_moment)
    high = max(terms)
    log_sum = high + math.log(math.fsum(math.exp(term - high) for term in terms))
    # log(1 + e^s) / (a - 1)
    return (math.log1p(math.exp(log_sum)) if log_sum < 30 else log_sum + math.log1p(math.exp(-log_sum))) / (order - 1)


def add(*curves: Sequence[float], times: Sequence[int] | None = None) -> tuple[float, ...]:
    """Composition: the curves' sum at each order, each taken so many times, rounded up."""
    counts = times if times is not None else [1] * len(curves)
    return tuple(
        math.nextafter(
            math.fsum(math.nextafter(n * v, math.inf) for n, v in zip(counts, values, strict=True)), math.inf
        )
        for values in zip(*curves, strict=True)
    )


def to_epsilon(curve: Sequence[float], delta: float, orders: Sequence[int] = ORDERS) -> float:
    """The smallest epsilon over the orders (Canonne, Kamath, Steinke 2020, arXiv 2004.00010, proposition 12)."""
    return max(0.0, min(_up(value + _conversion(order, delta)) for value, order in zip(curve, orders, strict=True)))


def allowance(epsilon: float, delta: float, order: int) -> float:
    """The largest Renyi DP at this order that is (epsilon, delta)-DP, rounded down; below 0 where there is none."""
    value = epsilon - _conversion(order, delta)
    return value - _ERROR * abs(value) if math.isfinite(value) else -math.inf


def filter_order(epsilon: float, delta: float) -> int:
    """The order at which a filter of this lifetime budget lets most unsampled Gaussian steps through."""
    best: int = max(ORDERS, key=lambda order: allowance(epsilon, delta, order) / order)
    return best


def _conversion(order: int, delta: float) -> float:
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _up(value: float) -> float:
    return math.nextafter(value + _ERROR * abs(value), math.inf)
