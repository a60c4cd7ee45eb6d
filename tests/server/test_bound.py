"""How long an honest update can be: the bound holds for the client's own training, and not by a mile."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client import train
from fedscan_client.dp import noise
from fedscan_core.accounting import SitePlan, plan_for
from fedscan_core.config import RunConfig
from fedscan_server import aggregate, bound


def run_config(steps=1, clip=0.1, sigma=1.0, patients="all", mu=0.0, strategy="fedavg", enabled=True, **settings_):
    tree = {
        "privacy": {"noise_multiplier": sigma, "clip": clip, "enabled": enabled},
        "train": {"local_steps": steps, "patients_per_step": patients, **settings_},
        "aggregation": {"strategy": strategy, "proximal_mu": mu},
    }
    return RunConfig.model_validate(tree)


class Flat(torch.nn.Module):
    """A model whose gradient, clipped, is whatever a test wants: `train._clipped_sums` is replaced."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor(weights, dtype=torch.float32))


@st.composite
def honest(draw):
    """A run, a plan, start weights, and for each step the direction into which all patients pull."""
    adam = draw(st.booleans())
    run = run_config(
        steps=draw(st.integers(1, 6)),
        clip=draw(st.sampled_from(["auto", 1e-3, 0.1, 5.0])),
        sigma=draw(st.sampled_from([0.3, 1.0, 20.0])),
        patients=draw(st.sampled_from(["all", 1, 7])),
        strategy=draw(st.sampled_from(["fedavg", "fedprox"])),
        mu=draw(st.floats(0, 2)),
        optimizer="adam" if adam else "sgd",
        learning_rate=draw(st.sampled_from([1e-3, 0.1, 10.0])),
        momentum=draw(st.sampled_from([0.0, 0.9])),
        weight_decay=draw(st.sampled_from([0.0, 0.01, 0.5])),
    )
    size = draw(st.integers(1, 40))
    entries = draw(st.integers(1, 30))
    weights = draw(st.lists(st.floats(-100, 100, width=32), min_size=entries, max_size=entries))
    seed, steady = draw(st.integers(0, 2**32 - 1)), draw(st.booleans())
    wanted = run.train.patients_per_step
    rate = 1.0 if wanted == "all" else min(1.0, wanted / size)
    plan = SitePlan(size, 1e-6, 8.0, rate, run.privacy.noise_multiplier or 0.0, run.train.local_steps, 0.0)
    return run, plan, weights, seed, steady


def trained(run, plan, weights, sums):
    """The client's own update, where `sums` stands for the clipped sum over patients of each step."""
    module, real = Flat(weights), train._clipped_sums
    train._clipped_sums = lambda *_: [torch.tensor(sums())]
    try:
        return train.train_round(module, SimpleNamespace(), run, plan, round_=1, site="ash")  # type: ignore[arg-type]
    finally:
        train._clipped_sums = real


@settings(max_examples=25)
@given(honest())
def test_honest_updates_pass(drawn):
    """All but the sum over patients is the client's code; every patient pulls one way, as hard as the clip lets."""
    run, plan, weights, seed, steady = drawn
    rng = np.random.default_rng(seed)
    clip = 1.0 if run.privacy.clip == "auto" else run.privacy.clip
    direction = rng.normal(size=len(weights))

    def sums():
        way = direction if steady else rng.normal(size=len(weights))
        sampled = rng.binomial(4 * plan.patients_declared, plan.sampling_rate)  # four times as many as it declares
        return way / np.linalg.norm(way) * clip * sampled

    update = trained(run, plan, weights, sums)
    longest = bound.longest(run, plan, len(weights), float(np.linalg.norm(weights)))
    assert aggregate.norm(update) <= longest < math.inf


@pytest.mark.parametrize(
    ("signs", "most", "settings_"),
    [
        ([1] * 4, 1.05, {"momentum": 0.0}),
        ([1] * 4, 1.05, {"momentum": 0.9}),
        ([1, -1, 1], 1.6, {"strategy": "fedprox", "mu": 2.0, "learning_rate": 5.0}),  # it is pulled back and beyond
        ([1], 1.05, {"weight_decay": 0.5, "learning_rate": 3.0}),
    ],
)
def test_the_worst_that_patients_can_do_comes_close_to_the_bound(signs, most, settings_):
    """So many patients that the noise is nothing: momentum, pull and decay must be in the bound, and not twice."""
    run = run_config(steps=len(signs), sigma=0.3, clip=1.0, **({"learning_rate": 1.0, "weight_decay": 0.0} | settings_))
    plan, next_sign = plan_for(run, 1000), iter(signs)
    weights = [1000.0 if run.train.weight_decay else 0.0]
    update = trained(run, plan, weights, lambda: np.array([next(next_sign) * 4000.0]))
    assert aggregate.norm(update) <= bound.longest(run, plan, 1, weights[0]) < most * aggregate.norm(update)


def gradient_only(sampled, run, plan, entries):
    """What one step of SGD at rate 1 can move: the sum of `sampled` patients and a typical noise vector."""
    clip = run.privacy.clip
    return clip * (sampled + plan.noise_multiplier * math.sqrt(entries)) / (plan.sampling_rate * plan.patients_declared)


def test_the_bound_is_what_clip_noise_and_steps_imply_and_little_more():
    run = run_config(learning_rate=1.0)
    plan = plan_for(run, 100)
    typical = gradient_only(bound.COHORT * 100, run, plan, 100_000)
    assert typical < bound.longest(run, plan, 100_000, 1.0) < 1.05 * typical
    noisy = dataclasses.replace(plan, noise_multiplier=50.0)
    typical = gradient_only(bound.COHORT * 100, run, noisy, 100_000)
    assert typical < bound.longest(run, noisy, 100_000, 1.0) < 1.05 * typical
    ten = bound.longest(run_config(learning_rate=1.0, steps=10), plan, 100_000, 0.0)
    assert ten == pytest.approx(10 * bound.longest(run, plan, 100_000, 0.0), rel=1e-3)
    low = plan_for(run_config(patients=50), 10_000)  # of 40 000 patients 200 are expected, and not 40 000
    assert bound.longest(run, low, 1, 0.0) < 0.1 * (200 + 300) / 50


def test_adams_step_has_a_bound_without_any_of_the_data():
    run = run_config(optimizer="adam", learning_rate=0.01)
    plan = plan_for(run, 100)
    assert bound.longest(run, plan, 10_000, 0.0) == pytest.approx(0.01 * 100, rel=2e-3)  # the first step: the sign
    assert bound.longest(run_config(optimizer="adam", enabled=False), plan, 4, 0.0) < math.inf


def test_without_a_clip_there_is_no_bound():
    run = run_config(enabled=False)
    assert bound.longest(run, plan_for(run, 100), 10, 1.0) == math.inf


def test_a_bound_beyond_all_numbers_is_infinite():
    run = run_config(steps=100, learning_rate=1e6, weight_decay=1.0)
    assert bound.longest(run, plan_for(run, 100), 10, 1.0) == math.inf


def test_the_noise_the_client_adds_is_below_what_the_bound_allows_for():
    for entries in (1, 3, 1000):
        drawn = noise.add_noise([torch.zeros(entries, dtype=torch.float64)], 2.0, noise.SecretStream(), sensitivity=1.0)
        assert float(drawn[0].norm()) < 2.0 * (math.sqrt(entries) + math.sqrt(2 * bound.X))
