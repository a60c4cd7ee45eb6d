"""Privacy accounting: frozen events that say what was done, and functions that price them. No torch.

Unit: the patient. Adjacency: adding or removing one patient. Every price is an upper bound:

- `epsilon` composes by privacy loss distributions (PLD; Koskela et al. 2020, Doroshenko et al. 2022, through
  `dp_accounting`, pessimistic estimate): tight, some hundredths of a second.
- `renyi` and `renyi_epsilon` compose by Renyi DP at fixed orders (`fedscan_core.rdp`): 8 to 24 % above, instant, for
  live views and for ledgers whose gate is an RDP filter.
- `replace_one` is the price of exchanging one patient for another, which is higher: always said by its name.

Assumed: each event's parameters were fixed before the first was run (a sealed plan), the noise is Gaussian, sampling is
independent per patient. Stopping a plan early costs less than its price and needs no new one.

>>> plan = (PoissonGaussian(sampling_rate=0.1, noise_multiplier=1.0, steps=100),)
>>> round(epsilon(plan, delta=1e-5), 1)
7.0
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedscan_core import rdp
from fedscan_core.config import MAX_NOISE_MULTIPLIER, MIN_EPSILON, RunConfig
from fedscan_core.errors import PrivacyError

UNIT = "patient"
ADJACENCY = "add_or_remove_one"
_INTERVAL = 1e-3  # PLD grid where sigma >= 0.7: within 0.001 of 1e-4 in research/dp.md section 3, ten times faster
_MIN_NOISE = 0.01  # below this a price is inf: beyond any use, and its grid would not fit into memory


@dataclass(frozen=True)
class PoissonGaussian:
    """Steps that each sample every patient independently, sum clipped gradients, and add Gaussian noise.

    Guarantee: one step is the Poisson-subsampled Gaussian mechanism with L2 sensitivity 1 in units of the clipping
    norm. `sampling_rate` is public, in (0, 1]; `noise_multiplier` is the noise's standard deviation over the clipping
    norm.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int


@dataclass(frozen=True)
class GaussianQuery:
    """Answers computed over the whole cohort with L2 sensitivity 1 and Gaussian noise of this standard deviation."""

    noise_multiplier: float
    count: int = 1


Event = PoissonGaussian | GaussianQuery


@dataclass(frozen=True)
class SitePlan:
    """A site's sealed plan for one run: public constants only, fixed before the first step.

    `patients_declared` is typed by a person, constant for the ledger, never computed from the data outwardly.
    """

    patients_declared: int
    delta: float
    epsilon: float
    sampling_rate: float
    noise_multiplier: float
    steps: int
    evaluation_noise: float  # standard deviation of the private histogram's noise; 0 = no private evaluation
    unit: str = UNIT
    adjacency: str = ADJACENCY

    def events(self, steps: int | None = None) -> tuple[Event, ...]:
        """What the plan does in all, or in its first `steps` training steps."""
        done = self.steps if steps is None else steps
        events: list[Event] = [PoissonGaussian(self.sampling_rate, self.noise_multiplier, done)] if done else []
        if self.evaluation_noise and steps is None:
            events.append(GaussianQuery(self.evaluation_noise))
        return tuple(events)


def epsilon(events: Sequence[Event], delta: float) -> float:
    """Epsilon of the composition at `delta`, by PLD. 0 for no events; inf where a noise is below 0.01.

    Raises:
        PrivacyError: an event with parameters out of range.
    """
    return _epsilon(tuple(events), delta, False)


def replace_one(events: Sequence[Event], delta: float) -> float:
    """As `epsilon`, for exchanging one patient for another (dp-accounting's REPLACE_ONE; unsampled: sensitivity 2)."""
    return _epsilon(tuple(events), delta, True)


@functools.lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float, replace: bool) -> float:
    if not events:
        return 0.0
    for event in events:
        _check(event)
    if any(event.noise_multiplier < _MIN_NOISE for event in events):
        return math.inf
    if all(isinstance(event, GaussianQuery) or event.sampling_rate == 1.0 for event in events):
        # Without sampling the whole is one Gaussian mechanism: exact, no grid.
        counts = [event.count if isinstance(event, GaussianQuery) else event.steps for event in events]
        mu = math.sqrt(sum(n / e.noise_multiplier**2 for n, e in zip(counts, events, strict=True)))
        return _gaussian_epsilon(2 * mu if replace else mu, delta)
    import dp_accounting
    from dp_accounting import pld

    # One step's loss is about 1 / (2 sigma^2): where that is large the grid is as much coarser. Still an upper bound.
    widest = max(1.0, *(0.5 / event.noise_multiplier**2 for event in events))
    relation = dp_accounting.NeighboringRelation
    accountant = pld.PLDAccountant(
        relation.REPLACE_ONE if replace else relation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=_INTERVAL * widest,
    )
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        if isinstance(event, GaussianQuery):
            accountant.compose(gaussian, event.count)
        else:
            accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.steps)
    return float(accountant.get_epsilon(delta))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism, sensitivity mu, unit noise (Balle and Wang 2018, theorem 8), rounded up."""
    from scipy.special import log_ndtr

    def log_delta(eps: float) -> float:
        first, second = float(log_ndtr(mu / 2 - eps / mu)), eps + float(log_ndtr(-mu / 2 - eps / mu))
        # Where the two cancel to nothing, the first alone is an upper bound.
        return first + math.log1p(-math.exp(second - first)) if second - first < -1e-12 else first

    low, high = 0.0, 1.0
    while log_delta(high) > math.log(delta):
        low, high = high, high * 2
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if log_delta(middle) > math.log(delta) else (low, middle)
    return high


def renyi(events: Sequence[Event], orders: tuple[int, ...] = rdp.ORDERS) -> tuple[float, ...]:
    """Renyi DP of the composition at these orders, rounded up; 0 for no events, inf without noise.

    Raises:
        PrivacyError: an event with parameters out of range.
    """
    for event in events:
        _check(event)
    curves = [
        rdp.sampled_gaussian(getattr(event, "sampling_rate", 1.0), event.noise_multiplier, orders)  # query: everybody
        for event in events
    ]
    times = [event.count if isinstance(event, GaussianQuery) else event.steps for event in events]
    return rdp.add(*curves, times=times) if curves else (0.0,) * len(orders)


def renyi_epsilon(events: Sequence[Event], delta: float) -> float:
    """Epsilon of the composition at `delta`, by Renyi DP. 0 for no events."""
    return rdp.to_epsilon(renyi(events), delta) if events else 0.0


def epsilon_so_far(plan: SitePlan, steps: int) -> float:
    """An upper bound on what the first `steps` steps of a plan have cost; instant, never above the plan's price."""
    return min(plan.epsilon, renyi_epsilon(plan.events(steps), plan.delta)) if steps > 0 else 0.0


def plan_for(run: RunConfig, patients_declared: int) -> SitePlan:
    """The sealed plan of a site with this declared cohort: its rate, its own sigma, its epsilon and delta.

    The target epsilon covers training and evaluation together: the evaluation's noise alone costs
    `evaluation.budget_share` of it, then sigma is the smallest for which both together stay at or below the target.

    Raises:
        PrivacyError: the target is below 0.01 or needs a noise multiplier above 100, or the declared size is no use.
    """
    if patients_declared < 1:
        raise PrivacyError(f"A declared cohort of {patients_declared} patients.", remedy="Declare at least 1 patient.")
    delta = _delta(run, patients_declared)
    if delta >= 1 / patients_declared:
        raise PrivacyError(
            f"delta {delta:g} is not below 1/{patients_declared}: it would allow giving one patient away whole.",
            remedy='Set privacy.delta = "auto".',
        )
    rate = _rate(run, patients_declared)
    steps = run.train.rounds * run.train.local_steps
    if not run.privacy.enabled:
        return SitePlan(patients_declared, delta, math.inf, rate, 0.0, steps, 0.0, unit=run.privacy.unit)
    target = run.privacy.target_epsilon
    if target is None:
        assert run.privacy.noise_multiplier is not None  # config: one of both
        sigma = run.privacy.noise_multiplier
        query = sigma if run.evaluation.private else 0.0
    else:
        query = _evaluation_noise(target * run.evaluation.budget_share, delta) if run.evaluation.private else 0.0
        sigma = calibrate(
            lambda noise: SitePlan(patients_declared, delta, 0.0, rate, noise, steps, query).events(), target, delta
        )
    plan = SitePlan(patients_declared, delta, 0.0, rate, sigma, steps, query, unit=run.privacy.unit)
    return dataclasses.replace(plan, epsilon=epsilon(plan.events(), delta))


def plan_fault(run: RunConfig, plan: SitePlan) -> str | None:
    """What makes a site's plan another one than the run's, or None: the server's check of a claim it publishes.

    Compares with what follows from the run and the declared size, and prices the plan again, without calibrating anew.
    A site may add somewhat more noise than the run asks for; it may not claim less epsilon than its noise costs, nor
    so much noise that the server's bound on the length of its updates means nothing.
    """
    if plan.patients_declared < 1 or not 0 < plan.delta < 1 / plan.patients_declared:
        return "its declared size or delta is out of range"
    if plan.delta > _delta(run, plan.patients_declared):
        return "its delta is above the run's"
    rate = _rate(run, plan.patients_declared)
    steps = run.train.rounds * run.train.local_steps
    if (plan.sampling_rate, plan.steps, plan.unit, plan.adjacency) != (rate, steps, run.privacy.unit, ADJACENCY):
        return "it samples at another rate, takes other steps or protects another unit than the run"
    if not run.privacy.enabled:
        return None if plan.noise_multiplier == 0 and plan.epsilon == math.inf else "it claims privacy in a run without"
    if not all(0 <= noise <= 2 * MAX_NOISE_MULTIPLIER for noise in (plan.noise_multiplier, plan.evaluation_noise)):
        return "its noise is out of range"
    if (plan.evaluation_noise > 0) != run.evaluation.private:
        return "it answers another number of evaluation queries than the run"
    least = run.privacy.noise_multiplier or 0.0
    if plan.noise_multiplier < least or 0 < plan.evaluation_noise < least:
        return "it adds less noise than the run"
    price = epsilon(plan.events(), plan.delta) if plan.noise_multiplier > 0 else math.inf
    if not price <= plan.epsilon * (1 + 1e-9):
        return "its noise costs more epsilon than it claims"
    target = run.privacy.target_epsilon
    if target is not None and plan.epsilon > target:
        return "its epsilon is above the run's target"
    much = plan.noise_multiplier > 4 * least if target is None else plan.noise_multiplier > 1 and price < target / 4
    return "it adds many times the noise that the run needs" if much else None


def _delta(run: RunConfig, patients_declared: int) -> float:
    return min(1e-5, 1 / (10 * patients_declared)) if run.privacy.delta == "auto" else run.privacy.delta


def _rate(run: RunConfig, patients_declared: int) -> float:
    wanted = run.train.patients_per_step
    return 1.0 if wanted == "all" else min(1.0, wanted / patients_declared)


@functools.lru_cache(maxsize=256)
def _evaluation_noise(target: float, delta: float) -> float:
    try:
        return calibrate(lambda noise: (GaussianQuery(noise),), target, delta)
    except PrivacyError as error:
        raise PrivacyError(
            f"Private evaluation: {error.message}",
            remedy="Raise evaluation.budget_share or target_epsilon, or set evaluation.private = false.",
        ) from None


def calibrate(
    events: Callable[[float], Sequence[Event]],
    target: float,
    delta: float,
    price: Callable[[Sequence[Event], float], float] = epsilon,
) -> float:
    """The smallest noise multiplier (to 0.1 %) at which `events(noise)` costs at most `target` at `delta`.

    Args:
        events: what is done with this noise.
        target: epsilon.
        delta: handed to the price.
        price: of events at delta, falling with the noise; a gate that charges otherwise than by PLD hands in its own.

    Raises:
        PrivacyError: target below 0.01, or more noise than 100 would be needed.
    """
    if target < MIN_EPSILON:
        raise PrivacyError(
            f"A target epsilon of {target:g} is below {MIN_EPSILON}: only noise would be left.",
            remedy="Ask for more, or for fewer queries.",
        )
    remedy = "Plan fewer steps (train.rounds, train.local_steps), fewer patients per step, or a larger target_epsilon."

    def over(log_noise: float) -> float:
        cost = price(events(math.exp(log_noise)), delta)  # 0 where delta alone covers it
        return math.log(max(cost, 1e-6 * target)) - math.log(target)

    low, high = math.log(0.02), math.log(MAX_NOISE_MULTIPLIER)
    at_high = over(high)
    if at_high > 0:
        raise PrivacyError(
            f"Epsilon {target:g} at delta {delta:g} needs a noise multiplier above {MAX_NOISE_MULTIPLIER:g}.",
            remedy=remedy,
        )
    # False position (Illinois) on log epsilon over log sigma, nearly a line: a handful of prices instead of dozens.
    first = math.log(0.5)
    at_first = over(first)
    low, at_low = (first, at_first) if at_first > 0 else (low, None)
    if at_first <= 0:
        high, at_high, at_low = first, at_first, over(low)
        if at_low <= 0:
            return math.exp(low)
    assert at_low is not None
    side = 0
    while high - low > 1e-3:
        guess = low + (high - low) * at_low / (at_low - at_high) if math.isfinite(at_low) else (low + high) / 2
        guess = min(max(guess + 2e-4, low + 1e-4), high - 1e-4)
        at = over(guess)
        if at > 0:
            low, at_low = guess, at
            at_high = at_high / 2 if side == 1 else at_high
            side = 1
        else:
            high, at_high = guess, at
            if at > -1e-3:
                break
            at_low = at_low / 2 if side == -1 else at_low
            side = -1
    return math.exp(high)


def _check(event: Event) -> None:
    if not event.noise_multiplier >= 0 or not math.isfinite(event.noise_multiplier):
        raise PrivacyError(f"A noise multiplier of {event.noise_multiplier}.", remedy="It must be 0 or above.")
    if isinstance(event, GaussianQuery) and event.count < 1:
        raise PrivacyError(f"{event} is out of range.", remedy="The count starts from 1.")
    if isinstance(event, PoissonGaussian) and not (0 < event.sampling_rate <= 1 and event.steps >= 1):
        raise PrivacyError(f"{event} is out of range.", remedy="The rate lies in (0, 1], steps from 1.")
