"""Every strategy against a plain loop from its paper's formula."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from fedscan_core.config import Aggregation
from fedscan_core.errors import WireError
from fedscan_core.wire import Arrays
from fedscan_server import aggregate
from fedscan_server.aggregate import LIMIT, STRATEGIES, RunningSum, apply_step, averaged, check_update

SITES = st.lists(
    st.tuples(st.lists(st.floats(-1000, 1000, width=32), min_size=3, max_size=3), st.integers(1, 5000)),
    min_size=1,
    max_size=8,
)


def summed(updates, weights):
    total = RunningSum()
    for update, weight in zip(updates, weights, strict=True):
        total.add({"w": np.array(update, np.float32)}, weight)
    return total


@settings(max_examples=40)
@given(SITES)
def test_the_mean_is_the_weighted_mean_of_the_sites_that_answered(sites):
    whole = sum(size for _, size in sites) + 77  # 77 patients of a site that dropped out
    total = summed([u for u, _ in sites], [size / whole for _, size in sites])
    share = [size / sum(size for _, size in sites) for _, size in sites]
    plain = [math.fsum(s * u[i] for s, (u, _) in zip(share, sites, strict=True)) for i in range(3)]
    # A grid of 2^-44 and weights as small as 1 patient in 40 000.
    np.testing.assert_allclose(total.mean()["w"], plain, rtol=1e-12, atol=1e-8)
    assert total.sites == len(sites)


@settings(max_examples=40)
@given(SITES, st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_no_bit(sites, dice: random.Random):
    whole = math.fsum(size for _, size in sites)
    pairs = [(u, size / whole) for u, size in sites]
    first = summed(*zip(*pairs, strict=True)).mean()["w"]
    dice.shuffle(pairs)
    assert summed(*zip(*pairs, strict=True)).mean()["w"].tobytes() == first.tobytes()


def test_the_order_changes_no_bit_where_a_float_sum_of_the_weights_would():
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    one = summed([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [0.1, 0.2, 0.3]).mean()["w"]
    two = summed([[7, 8, 9], [4, 5, 6], [1, 2, 3]], [0.3, 0.2, 0.1]).mean()["w"]
    assert one.tobytes() == two.tobytes()


def test_the_largest_updates_do_not_overflow():
    most = np.nextafter(np.float32(LIMIT), np.float32(0))
    total = summed([[most, -most, 0]] * 3, [1 / 3] * 3)
    np.testing.assert_allclose(total.mean()["w"], [most, -most, 0], rtol=1e-9)


def plain_rounds(strategy, settings, model, deltas):
    """One number at a time: Hsu et al. 2019, section 4.2; Reddi et al. 2021, algorithm 2."""
    b1, b2, tau, rate = settings.momentum, settings.beta_2, settings.tau, settings.server_learning_rate
    out = []
    for x, series in zip(model, zip(*deltas, strict=True), strict=True):
        m, v = 0.0, tau**2 if strategy in ("fedadam", "fedyogi") else 0.0
        for delta in series:
            if strategy in ("fedavg", "fedprox"):
                step = delta
            elif strategy == "fedavgm":
                v = b1 * v + delta
                step = v
            else:
                m = b1 * m + (1 - b1) * delta
                square = delta**2
                if strategy == "fedadam":
                    v = b2 * v + (1 - b2) * square
                else:
                    if v and abs(v - square) <= 1e-9 * v:
                        reject()  # a tie: its sign is rounding's
                    v = v - (1 - b2) * square * ((v > square) - (v < square))
                step = m / (math.sqrt(v) + tau)
            x = x + rate * step
        out.append(x)
    return out


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi"])
@settings(max_examples=40)
@given(
    deltas=st.lists(st.lists(st.floats(-2, 2), min_size=2, max_size=2), min_size=1, max_size=6),
    momentum=st.floats(0, 0.95),
    beta_2=st.floats(0, 0.999),
    tau=st.floats(1e-3, 0.5),
    rate=st.floats(0.01, 2),
)
def test_strategies_follow_their_papers_over_several_rounds(strategy, deltas, momentum, beta_2, tau, rate):
    settings = Aggregation(strategy=strategy, momentum=momentum, beta_2=beta_2, tau=tau, server_learning_rate=rate)
    model: Arrays = {"w": np.array([0.5, -1.5])}
    state: Arrays = {}
    for delta in deltas:
        step, state = STRATEGIES[strategy](settings, state, {"w": np.array(delta)})
        model = apply_step(settings, model, step)
    np.testing.assert_allclose(model["w"], plain_rounds(strategy, settings, [0.5, -1.5], deltas), rtol=1e-9, atol=1e-9)


def test_every_strategy_of_the_configuration_is_there():
    assert set(STRATEGIES) == set(Aggregation.model_fields["strategy"].annotation.__args__)  # type: ignore[union-attr]


def test_a_step_keeps_types_and_leaves_frozen_parameters():
    model: Arrays = {"w": np.ones(2, np.float32), "frozen": np.array([3], np.int64)}
    after = apply_step(Aggregation(server_learning_rate=0.5), model, {"w": np.array([2.0, 4.0])})
    assert after["w"].dtype == np.float32 and after["w"].tolist() == [2.0, 3.0]
    assert after["frozen"] is model["frozen"] and model["w"].tolist() == [1.0, 1.0]


def released(models, **how):
    average = models[0]
    for number, model in enumerate(models[1:], start=1):
        average = averaged(average, model, round_=number, rounds=len(models) - 1, **how)
    return average


def some_models(rounds, seed=0):
    rng = np.random.default_rng(seed)
    return [{"w": rng.normal(size=4), "n": np.array([i])} for i in range(rounds + 1)]


@pytest.mark.parametrize("rounds", [1, 2, 7, 10])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_the_tail_average_is_the_plain_mean_of_the_last_models(rounds, share):
    models = some_models(rounds)
    tail = models[-max(1, round(share * rounds)) :]
    got = released(models, ema=0.0, tail_share=share)
    np.testing.assert_allclose(got["w"], np.mean([m["w"] for m in tail], axis=0), rtol=1e-12)
    assert got["n"].tolist() == [rounds]  # whole numbers are not averaged


def test_the_running_average_is_the_plain_recursion():
    models = some_models(30)
    plain = models[0]["w"]
    for t, model in enumerate(models[1:], start=1):
        keep = min(0.7, (1 + t) / (10 + t))
        plain = keep * plain + (1 - keep) * model["w"]
    np.testing.assert_allclose(released(models, ema=0.7, tail_share=0.0)["w"], plain, rtol=1e-12)
    far = [{"w": np.full(4, 1e6)}, *[{"w": np.ones(4)}] * 100]
    np.testing.assert_allclose(released(far, ema=0.9, tail_share=0.0)["w"], 1, rtol=1e-2)  # the start is forgotten


def test_without_averaging_the_last_model_is_released():
    models = some_models(3)
    assert released(models, ema=0.0, tail_share=0.0) is models[-1]


GLOBAL = {"w": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32), "frozen": np.zeros(2, np.float32)}
TRAINABLE = frozenset({"w", "b"})
GOOD = {"w": np.full((2, 3), 0.5, np.float32), "b": np.array(-0.5, np.float32)}


def spoiled(value):
    w = GOOD["w"].copy()
    w[1, 2] = value
    return w


def test_a_good_update_passes_as_it_is():
    assert check_update(GOOD, GLOBAL, TRAINABLE) is GOOD
    check_update(GOOD | {"w": spoiled(-np.nextafter(np.float32(LIMIT), np.float32(0)))}, GLOBAL, TRAINABLE)


@pytest.mark.parametrize(
    ("update", "word"),
    [
        (None, "other parameters"),
        ({}, "other parameters"),
        ({"w": GOOD["w"]}, "other parameters"),
        (GOOD | {"frozen": GLOBAL["frozen"]}, "other parameters"),
        (GOOD | {"x": GOOD["b"]}, "other parameters"),
        (GOOD | {"w": GOOD["w"].T}, "'w' of the update has another shape"),
        (GOOD | {"w": GOOD["w"].reshape(6)}, "another shape"),
        (GOOD | {"b": GOOD["b"].reshape(1)}, "'b' of the update has another shape"),
        (GOOD | {"w": GOOD["w"].astype(np.float64)}, "another shape or type"),
        (GOOD | {"w": GOOD["w"].astype(object)}, "another shape or type"),
        (GOOD | {"w": np.full((2, 3), "a")}, "another shape or type"),
        (GOOD | {"w": spoiled(np.nan)}, "not finite"),
        (GOOD | {"w": spoiled(-np.inf)}, "not finite"),
        (GOOD | {"b": np.array(np.inf, np.float32)}, "'b' of the update is not finite"),
        (GOOD | {"w": spoiled(LIMIT)}, "exceeds 65536"),
        (GOOD | {"w": spoiled(-LIMIT)}, "exceeds 65536"),
    ],
)
def test_other_updates_are_refused(update, word):
    with pytest.raises(WireError, match=word):
        check_update(update, GLOBAL, TRAINABLE)


@settings(max_examples=40)
@given(st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 10**15), min_size=1, max_size=9))
def test_public_weights_add_up_to_one_and_a_claim_of_millions_is_clamped(declared):
    uniform, shares = aggregate.weights(declared, "uniform"), aggregate.weights(declared, "declared")
    for found in (uniform, shares):
        assert found.keys() == declared.keys() and math.isclose(math.fsum(found.values()), 1.0, rel_tol=1e-12)
    assert len(set(uniform.values())) == 1
    low = sorted(declared.values())[(len(declared) - 1) // 2]
    for name, size in declared.items():
        expected = min(size, 10 * low) / sum(min(other, 10 * low) for other in declared.values())
        assert math.isclose(shares[name], expected, rel_tol=1e-9)


def test_weights_of_ordinary_sizes_are_the_shares():
    assert aggregate.weights({"a": 120, "b": 60, "c": 30}, "declared") == {"a": 120 / 210, "b": 60 / 210, "c": 30 / 210}


def test_an_update_may_be_as_long_as_its_bound_and_no_longer():
    model = {"a": np.zeros(3, np.float32), "b": np.zeros((2, 2), np.float32)}
    update = {"a": np.array([3, 0, 0], np.float32), "b": np.array([[0, 4], [0, 0]], np.float32)}
    assert aggregate.norm(update) == 5.0
    assert aggregate.check_update(update, model, frozenset("ab"), 5.0) is update
    with pytest.raises(WireError, match="longer than clip, steps, noise"):
        aggregate.check_update(update, model, frozenset("ab"), 4.999)
