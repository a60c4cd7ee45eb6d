"""The audit's mathematics, against simulated honest runs: false alarms as often as promised, bounds below the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from fedscan import audit_bounds
from fedscan_core import accounting

RUNS = 20_000


def published_p_value(m, r, v, eps, delta):
    """Steinke, Nasr and Jagielski 2023, appendix D, as printed."""
    q = 1 / (1 + math.exp(-eps))
    beta = stats.binom.sf(v - 1, r, q)
    alpha = total = 0.0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, q)
        alpha = max(alpha, total / i)
    return min(beta + alpha * delta * 2 * m, 1)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("guesses", "right"), [(10, 10), (80, 61), (80, 80), (200, 120), (200, 0)])
def test_one_run_p_value_is_the_published_one(epsilon, guesses, right):
    for delta in (0.0, 1e-5, 1e-3):
        found = audit_bounds.one_run_p_value(500, guesses, right, epsilon, delta)
        assert found == pytest.approx(1.0 if right == 0 else published_p_value(500, guesses, right, epsilon, delta))


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5])
def test_one_run_false_alarms_by_the_worst_mechanism(epsilon):
    """Randomised response meets the theorem with equality: no more alarms than the level, and nearly as many."""
    guesses = 400
    right = np.random.default_rng(1).binomial(guesses, 1 / (1 + math.exp(-epsilon)), RUNS)
    values = np.array([audit_bounds.one_run_p_value(1000, guesses, v, epsilon, 0.0) for v in range(guesses + 1)])
    for level in (0.1, 0.01):
        alarms = (values[right] <= level).sum()
        assert stats.binom.sf(alarms - 1, RUNS, level) > 1e-4
        assert alarms > 0.5 * level * RUNS
    bounds = [audit_bounds.one_run_epsilon(1000, guesses, v, 0.0, 0.01) for v in range(guesses + 1)]
    assert (np.array(bounds)[right] > epsilon).mean() < 0.013
    assert np.median(np.array(bounds)[right]) > 0.5 * epsilon - 0.15


@pytest.mark.parametrize("separation", [0.7, 1.7, 4.0])
def test_the_number_of_guesses_is_the_best_for_the_plan(separation):
    """No other share of the canaries gives a better bound over simulated runs, but for the dice."""
    rng = np.random.default_rng(6)
    bounds = {}
    for share in audit_bounds._GUESS_SHARES:
        guesses, found = 2 * round(share * 500), []
        for _ in range(10):
            inside = rng.random(1000) < 0.5
            right = audit_bounds.right_guesses(rng.standard_normal(1000) + separation * inside, inside, guesses)
            found.append(audit_bounds.one_run_epsilon(1000, guesses, right, 1e-6, 1e-3))
        bounds[guesses] = np.mean(found)
    assert max(bounds.values()) > 0
    assert bounds[audit_bounds.guesses_for(1000, separation, 1e-6, 1e-3)] > max(bounds.values()) - 0.1


def test_right_guesses_are_counted():
    score, inside = np.array([5.0, -1, 4, 0, -3, 2]), np.array([True, True, True, False, False, False])
    assert audit_bounds.right_guesses(score, inside, 2) == 2  # 5 is in, -3 is out
    assert audit_bounds.right_guesses(score, inside, 4) == 3  # -1 is in
    assert audit_bounds.right_guesses(score, inside, 6) == 4


LAWS = [
    (audit_bounds.GaussianLaw(250, 250, 1.0, 16), 4.0),
    (audit_bounds.GaussianLaw(40, 60, 0.05, 3), 1.5),
    (audit_bounds.GaussianLaw(260, 240, 0.25, 40), 0.7),
]


def honest_ratios(law, sigma, runs, seed=0):
    """R of honest runs, from the law of the scores: tests/app/test_audit_probes.py shows that the real ones have it."""
    rng = np.random.default_rng(seed)
    count = rng.binomial(law.steps, law.rate, (runs, law.canaries_in))
    noise = sigma * math.sqrt(law.steps)
    out = noise * rng.standard_normal((runs, law.canaries_out))
    inside = count + noise * rng.standard_normal((runs, law.canaries_in))
    return (inside.mean(1) - out.mean(1)) / out.std(1, ddof=1)


def critical_ratio(law, sigma, level):
    return audit_bounds._solve(lambda ratio: law.p_value(ratio, sigma) <= level, 1e-6, 1e6)


@pytest.mark.parametrize(("law", "sigma"), LAWS, ids=["rate 1", "few", "sampled"])
def test_gaussian_false_alarms_over_simulated_honest_runs(law, sigma):
    ratios = honest_ratios(law, sigma, RUNS)
    for level in (0.1, 0.01, 0.001):
        critical = critical_ratio(law, sigma, level)
        alarms = int((ratios >= critical).sum())
        assert stats.binom.sf(alarms - 1, RUNS, level) > 1e-4, f"{alarms} alarms of {RUNS} at {level}"
        assert stats.binom.cdf(alarms, RUNS, 0.7 * level) > 1e-3, "the bound gives power away"


@pytest.mark.parametrize(("law", "sigma"), LAWS, ids=["rate 1", "few", "sampled"])
def test_gaussian_bound_is_below_the_truth_where_its_check_passes(law, sigma):
    truth = accounting.epsilon((accounting.PoissonGaussian(law.rate, sigma, law.steps),), 1e-5)
    level = 0.05
    ratios = honest_ratios(law, sigma, 12, seed=1)
    ratios[0] = ratios.max() * 1.5  # at least one alarm
    for ratio in ratios:
        bound, passed = law.epsilon(ratio, 1e-5, level), law.p_value(ratio, sigma) > level
        assert bound <= truth * 1.002 if passed else bound >= truth * 0.998


def test_gaussian_p_value_at_rate_one_is_student_s_noncentral_t():
    law, sigma = audit_bounds.GaussianLaw(300, 200, 1.0, 9), 2.0
    a = math.sqrt(1 / 300 + 1 / 200)
    for ratio in (1.0, 1.5, 1.9):
        expected = stats.nct.sf(ratio / a, 199, 3 / sigma / a)
        assert law.p_value(ratio, sigma) == pytest.approx(expected, rel=1e-6)


def test_gaussian_bound_approaches_the_truth_with_many_canaries():
    law, sigma = audit_bounds.GaussianLaw(10**6, 10**6, 1.0, 16), 4.0
    truth = accounting.epsilon((accounting.PoissonGaussian(1.0, sigma, 16),), 1e-5)
    assert 0.97 * truth < law.epsilon(1.0, 1e-5, 1e-4) < truth


@pytest.mark.parametrize("ratio", [math.inf, 1e9, 0.0, -3.0])
def test_gaussian_bound_of_the_extremes(ratio):
    law = audit_bounds.GaussianLaw(100, 100, 0.5, 10)
    assert law.p_value(ratio, 1.0) == pytest.approx(0.0 if ratio > 1 else 1.0)
    bound = law.epsilon(ratio, 1e-5, 1e-4)
    assert bound > 100 if ratio > 1 else bound == 0.0


def test_a_ratio_without_spread_or_with_nonsense_is_infinite():
    inside = np.array([True, False, False])
    assert audit_bounds.ratio(np.array([1.0, 0.0, 0.0]), inside) == math.inf
    assert audit_bounds.ratio(np.array([1.0, 0.0, math.nan]), inside) == math.inf


def test_seen_influence_is_what_is_seen():
    """Nine of ten simulated runs with this much influence raise the alarm, half that excess does not."""
    law, sigma = audit_bounds.GaussianLaw(250, 250, 1.0, 16), 4.0
    factor = law.seen_influence(sigma, 1e-4)
    critical = critical_ratio(law, sigma, 1e-4)
    for influence, low, high in ((factor, 0.87, 0.93), ((1 + factor) / 2, 0.0, 0.2)):
        caught = (honest_ratios(law, sigma / influence, 4000) >= critical).mean()
        assert low < caught < high


def rejections(p_values, level):
    return float((np.asarray(p_values) <= level).mean())


def test_noise_checks_have_their_level():
    rng, runs = np.random.default_rng(3), 3000
    values = 2.5 * rng.standard_normal((runs, 60))
    for centred in (False, True):
        p = [audit_bounds.level_p_value(v + 7 * centred, 2.5, centred=centred) for v in values]
        assert 0.035 < rejections(p, 0.05) < 0.066
    pairs = zip(values, rng.standard_normal((runs, 60)), strict=True)
    p = [audit_bounds.correlation_p_value(audit_bounds.correlation(x, y), 60) for x, y in pairs]
    assert 0.035 < rejections(p, 0.05) < 0.066


@pytest.mark.parametrize("spread", [True, False])
def test_energy_has_its_level_in_every_direction(spread):
    rng = np.random.default_rng(4)
    shift = np.full(60, 1 / math.sqrt(60)) if spread else np.eye(60)[0]
    changes = 3.0 * shift + 0.5 * rng.standard_normal((3000, 60))
    assert 0.035 < rejections([audit_bounds.energy_p_value(c, 0.5, 3.0) for c in changes], 0.05) < 0.066
    assert rejections([audit_bounds.energy_p_value(c - 1.5 * shift, 0.5, 3.0) for c in changes], 0.05) < 0.01
    assert rejections([audit_bounds.energy_p_value(c + 5 * shift, 0.5, 3.0) for c in changes], 1e-4) > 0.99


def test_noise_that_is_missing_repeated_or_not_finite_has_no_chance():
    noise = np.random.default_rng(5).standard_normal(5000)
    assert audit_bounds.level_p_value(0.9 * noise, 1.0) < 1e-6
    assert audit_bounds.level_p_value(math.sqrt(2) * noise, 1.0) < 1e-6
    assert audit_bounds.level_p_value(0 * noise, 1.0) == 0.0
    assert audit_bounds.level_p_value(noise * math.nan, 1.0) == 0.0
    assert audit_bounds.energy_p_value(noise * math.inf, 1.0, 1.0) == 0.0
    for other in (noise, 0 * noise, noise * math.nan):
        assert audit_bounds.correlation_p_value(audit_bounds.correlation(noise, other), 5000) < 1e-12
    assert 0.85 < audit_bounds.seen_noise(5000, 1e-4) < 0.97
