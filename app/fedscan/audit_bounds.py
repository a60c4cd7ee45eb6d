"""The audit's mathematics: what an attack's success says about epsilon, with exact false-alarm rates. No torch.

Every p-value here is that of an honest pipeline: under the plan as claimed, P(p <= a) <= a for every a. Two of them
become lower bounds on epsilon by asking which claims they refute.

Sources: Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846) for one run; Nasr et al. 2023 (arXiv 2302.07956) for
auditing a Gaussian mechanism by the law of its score instead of by counting.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from fedscan_core import accounting

_GUESS_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # of the canaries
_LEAST_NOISE = 0.05  # bounds stop here: "this epsilon or more"

Grid = NDArray[np.float64]


# -------------------------------------------------------------------------------------------------------------- one run


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """P(as many right guesses or more) under (epsilon, delta)-DP, at most (Steinke et al. 2023, theorem 5.2).

    Assumed: each canary was in by its own fair coin; each guess saw only the output. Nothing about the mechanism.

    Args:
        canaries: m.
        guesses: r; for the other canaries the attacker said nothing.
        right: v, of r.
        epsilon: claimed, for adding or removing one canary.
        delta: claimed.
    """
    if right <= 0:
        return 1.0
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, chance))
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    alpha = float(np.max(below / np.arange(1, right + 1)))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def guesses_for(canaries: int, separation: float, delta: float, level: float) -> int:
    """How many guesses promise the highest bound where scores are N(0, 1) out and N(separation, 1) in.

    Decided from the public plan, before any score is seen, so that one choice needs no correction for several.
    """

    def promised(guesses: int) -> tuple[float, int]:
        cut = _solve_for_upper_half(guesses / (2 * canaries), separation)
        inside, outside = special.ndtr(separation - cut), special.ndtr(-cut)
        right = int(guesses * inside / (inside + outside)) if inside else guesses // 2
        return one_run_epsilon(canaries, guesses, right, delta, level), guesses

    return max(promised(2 * max(1, round(share * canaries / 2))) for share in _GUESS_SHARES)[1]


def _solve_for_upper_half(share: float, separation: float) -> float:
    """The score above which this share of all canaries lies, half of them being in."""
    low, high = -40.0, 40.0 + separation
    for _ in range(60):
        middle = (low + high) / 2
        above = (special.ndtr(-middle) + special.ndtr(separation - middle)) / 2
        low, high = (middle, high) if above > share else (low, middle)
    return low


def right_guesses(score: ArrayLike, inside: ArrayLike, guesses: int) -> int:
    """How many are right where the highest scores are guessed to be in, as many of the lowest to be out."""
    ordered = np.asarray(inside, dtype=bool)[np.argsort(np.asarray(score), kind="stable")]
    half = guesses // 2
    return int(ordered[-half:].sum() + (~ordered[:half]).sum())


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, level: float) -> float:
    """The largest epsilon refuted at `level`: a bound, above the truth with at most this probability. 0 if none."""

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, right, epsilon, delta) <= level

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < 64 and refuted(high):
        low, high = high, high * 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------------------- Gaussian


@dataclass(frozen=True)
class GaussianLaw:
    """The law of R = (mean score of canaries in - mean score of those out) / standard deviation of those out.

    Score of a canary: the sum over all steps of its own coordinate of the noisy sums. In units of C it is
    N(0, T sigma^2) for a canary that is out, and that plus the number of steps which sampled it for one that is in,
    where each step adds at most 1. So mean in minus mean out is Binomial(n_in T, q) / n_in + N(0, T sigma^2 a^2) with
    a^2 = 1/n_in + 1/n_out, the deviation is an independent chi, and R / a is a mixture over that binomial of noncentral
    t variables with n_out - 1 degrees of freedom. No asymptotics, for any rate q.

    Assumed, besides the fair coins: Gaussian noise, independent between steps and coordinates, and Poisson sampling at
    the claimed rate. That is what an honest pipeline does, so for it a bound from R is above the truth with probability
    `level` at most. R is the pipeline's noise multiplier upside down; what is refuted is every sigma above the one that
    explains it, at this rate and number of steps. At rate 1 the released weights are exactly sqrt(T)/sigma-GDP and the
    epsilon of the refuted sigma is a lower bound on theirs. At other rates they are far from Gaussian, and it is the
    price of the cheapest pipeline *of this kind* that explains R: enough to call a claim false, not a bound for
    mechanisms of another kind.
    """

    canaries_in: int
    canaries_out: int
    rate: float
    steps: int

    def p_value(self, ratio: float, noise_multiplier: float, influence: float = 1.0) -> float:
        """P(R >= ratio) where one patient moves a step by `influence` times C; rounded up where q < 1."""
        a = math.sqrt(1 / self.canaries_in + 1 / self.canaries_out)
        count_N, weight_N = self._participations()
        shift_N = influence * count_N / (self.canaries_in * math.sqrt(self.steps) * noise_multiplier * a)
        root, density = _chi(self.canaries_out - 1)
        tail = special.ndtr(shift_N[:, None] - ratio / a * root)  # P(Z + shift >= t chi / sqrt(df)), given chi
        return float(min(1.0, weight_N @ tail @ density))

    def _participations(self) -> tuple[Grid, Grid]:
        """How often canaries were sampled in all, and with what probability; cells are taken at their upper end."""
        trials = self.canaries_in * self.steps
        if self.rate == 1:
            return np.array([float(trials)]), np.array([1.0])
        middle, spread = trials * self.rate, 9 * math.sqrt(trials * self.rate * (1 - self.rate)) + 9
        ends = np.unique(np.linspace(max(0.0, middle - spread), min(trials, middle + spread), 101).round())
        below = stats.binom.cdf(ends, trials, self.rate)
        below[-1] = 1.0
        return ends, np.diff(below, prepend=0.0)

    def noise_multiplier(self, ratio: float, level: float) -> float:
        """The largest sigma that R does not refute at `level`; from 0.05 to 1000."""
        low, high = math.log(_LEAST_NOISE), math.log(1000.0)
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if self.p_value(ratio, math.exp(middle)) > level else (low, middle)
        return math.exp(low)

    def epsilon(self, ratio: float, delta: float, level: float) -> float:
        """Lower bound on epsilon at `delta`; see the class for what it assumes."""
        sigma = self.noise_multiplier(ratio, level)
        if sigma > 900:
            return 0.0
        return accounting.epsilon((accounting.PoissonGaussian(self.rate, sigma, self.steps),), delta)

    def seen_influence(self, noise_multiplier: float, level: float, power: float = 0.9) -> float:
        """How many times C a patient must move each step to be caught with this probability, by this bound."""
        critical = _solve(lambda r: self.p_value(r, noise_multiplier) <= level, 1e-6, 1e6)
        return _solve(lambda f: self.p_value(critical, noise_multiplier, f) >= power, 1e-3, 1e6)


@functools.lru_cache(maxsize=16)
def _chi(df: int) -> tuple[Grid, Grid]:
    """Nodes of chi / sqrt(df) and their probabilities, for integrals by Gauss and Legendre over all but 1e-18."""
    node, weight = np.polynomial.legendre.leggauss(200)
    low, high = float(special.gammaincinv(df / 2, 1e-18)), float(special.gammainccinv(df / 2, 1e-18))
    half_chi2 = low + (high - low) * (node + 1) / 2
    return np.sqrt(2 * half_chi2 / df), stats.gamma.pdf(half_chi2, df / 2) * weight * (high - low) / 2


def ratio(score: Grid, inside: NDArray[np.bool_]) -> float:
    """R of `GaussianLaw`; infinite where the canaries that are out have no spread, or a score is not finite."""
    if not np.isfinite(score).all():
        return math.inf
    spread = float(score[~inside].std(ddof=1))
    difference = float(score[inside].mean() - score[~inside].mean())
    return difference / spread if spread > 0 else math.inf


# ------------------------------------------------------------------------------------------------------ noise and clip


def level_p_value(noise: ArrayLike, deviation: float, *, centred: bool = False) -> float:
    """Two-sided p-value of "these are independent N(0, deviation^2) values", by their sum of squares (chi squared).

    Less spread is noise that is missing. More is noise that repeats: T equal steps have T times the variance of T
    independent ones, and whoever subtracts two of them has removed it.
    """
    values = np.asarray(noise, dtype=np.float64) / deviation
    if not np.isfinite(values).all():
        return 0.0
    df = values.size - centred
    square = float(((values - values.mean() * centred) ** 2).sum())
    return float(min(1.0, 2 * min(stats.chi2.cdf(square, df), stats.chi2.sf(square, df))))


def seen_noise(values: int, level: float, power: float = 0.9) -> float:
    """The noise, as a share of the claimed, that `level_p_value` of so many values catches with this probability."""
    return math.sqrt(float(stats.chi2.ppf(level / 2, values) / stats.chi2.ppf(power, values)))


def energy_p_value(change: ArrayLike, deviation: float, shift: float) -> float:
    """P(|change|^2 as large) where change is N(shift vector, deviation^2 I) with a shift vector of at most this norm.

    Exact for the norm itself (noncentral chi squared), whatever the direction: below it the tail is lighter.
    """
    values = np.asarray(change, dtype=np.float64) / deviation
    if not np.isfinite(values).all():
        return 0.0
    return float(stats.ncx2.sf(float((values**2).sum()), values.size, (shift / deviation) ** 2))


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Of two series; 1 where one of them is constant or not finite, which noise never is."""
    x, y = (np.asarray(side, dtype=np.float64) for side in (first, second))
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or x.std() == 0 or y.std() == 0:
        return 1.0
    return float(np.corrcoef(x, y)[0, 1])


def correlation_p_value(r: float, values: int) -> float:
    """Two-sided p-value of "two series of so many independent Gaussian values" (Student's t)."""
    r = min(abs(r), 1 - 1e-15)
    return float(2 * stats.t.sf(r * math.sqrt((values - 2) / (1 - r * r)), values - 2))


def _solve(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest value from which on `holds`, by bisection of the logarithm."""
    for _ in range(36):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
