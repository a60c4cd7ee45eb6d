"""Updates in, next global model out: a running sum over sites, then one small function per strategy.

Everything here is post-processing of what the sites released, with public weights: it costs no privacy. Model arrays
are dicts of numpy arrays by name; only trainable parameters appear in an update, the others stay as they are.

- fedavg: McMahan et al. 2017, arXiv 1602.05629 (fedprox is the same at the server)
- fedavgm: Hsu, Qi, Brown 2019, arXiv 1909.06335
- fedadam, fedyogi: Reddi et al. 2021, arXiv 2003.00295, algorithm 2
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from fedscan_core.config import Aggregation
from fedscan_core.errors import WireError
from fedscan_core.wire import Arrays

# Updates are summed as whole multiples of 2^-44: whole numbers add up to the same sum in any order of arrival, so a run
# does not depend on who answers first. Weights add up to 1, so nothing overflows below LIMIT.
_GRID = 2.0**44
LIMIT = 2.0**16
CLAMP = 10  # a declared size counts for at most this many times the sites' median


def weights(declared: Mapping[str, int], kind: str) -> dict[str, float]:
    """Public shares of the sites, adding up to 1.

    Args:
        declared: site -> declared cohort size.
        kind: "uniform", or "declared" for shares by size. Sizes are what sites say of themselves, so each is clamped to
            CLAMP times their (lower) median: a site that claims a million patients does not own the model.
    """
    if kind == "uniform":
        return dict.fromkeys(declared, 1 / len(declared))
    most = CLAMP * statistics.median_low(declared.values())
    clamped = {name: float(min(size, most)) for name, size in declared.items()}
    return {name: size / math.fsum(clamped.values()) for name, size in clamped.items()}


@dataclass
class RunningSum:
    """The weighted sum of the updates so far; memory does not grow with the number of sites."""

    total: dict[str, np.ndarray] = field(default_factory=dict)
    weight: Fraction = Fraction(0)  # exact: a float sum would depend on the order
    sites: int = 0

    def add(self, update: Arrays, weight: float) -> None:
        """Adds weight * update; 0 < weight <= 1 is the site's public share."""
        for name, array in update.items():
            term = np.rint(array.astype(np.float64) * (weight * _GRID)).astype(np.int64)
            if name in self.total:
                self.total[name] += term
            else:
                self.total[name] = term
        self.weight += Fraction(weight)
        self.sites += 1

    def mean(self) -> Arrays:
        """The weighted mean over the sites that were added, float64."""
        return {name: total / (_GRID * float(self.weight)) for name, total in self.total.items()}


def check_update(update: Arrays | None, model: Arrays, trainable: frozenset[str], longest: float = math.inf) -> Arrays:
    """Returns a site's update if it is exactly the trainable part of the model, finite and within bounds.

    Args:
        update: name -> array, as it came.
        model: this round's global model.
        trainable: the names of what is trained.
        longest: L2 norm that an honest update does not exceed; see `fedscan_server.bound`.

    Raises:
        WireError: otherwise; the run drops this update, records why, and goes on.
    """
    if update is None or frozenset(update) != trainable:
        raise WireError("the update has other parameters than the model's trainable ones")
    for name, array in update.items():
        if array.shape != model[name].shape or array.dtype != model[name].dtype:
            raise WireError(f"parameter '{name}' of the update has another shape or type")
        if not np.isfinite(array).all():
            raise WireError(f"parameter '{name}' of the update is not finite")
        if array.size and float(np.abs(array).max()) >= LIMIT:
            raise WireError(f"parameter '{name}' of the update exceeds {LIMIT:g}")
    if longest < math.inf and norm(update) > longest:
        raise WireError("the update is longer than clip, steps, noise and the declared cohort allow")
    return update


def norm(arrays: Arrays) -> float:
    """The L2 norm of all arrays together."""
    return math.sqrt(math.fsum(float(np.square(array, dtype=np.float64).sum()) for array in arrays.values()))


# A strategy maps (settings, state, mean update) to (step, new state). State is a flat dict of float64 arrays, so that
# it is checkpointed as it is; it starts empty.
State = dict[str, np.ndarray]
Strategy = Callable[[Aggregation, State, Arrays], tuple[Arrays, State]]


def fedavg(settings: Aggregation, state: State, mean: Arrays) -> tuple[Arrays, State]:
    """Step = mean update."""
    return mean, state


def fedavgm(settings: Aggregation, state: State, mean: Arrays) -> tuple[Arrays, State]:
    """Heavy-ball momentum: v <- momentum * v + mean; step = v."""
    velocity = {f"v/{n}": settings.momentum * state.get(f"v/{n}", 0.0) + m for n, m in mean.items()}
    return {n: velocity[f"v/{n}"] for n in mean}, velocity


def fedadam(settings: Aggregation, state: State, mean: Arrays) -> tuple[Arrays, State]:
    """M <- b1 m + (1-b1) d; v <- b2 v + (1-b2) d^2; step = m / (sqrt(v) + tau). v starts at tau^2."""
    return _adaptive(settings, state, mean, lambda v, d2: settings.beta_2 * v + (1 - settings.beta_2) * d2)


def fedyogi(settings: Aggregation, state: State, mean: Arrays) -> tuple[Arrays, State]:
    """As fedadam, with v <- v - (1-b2) d^2 sign(v - d^2)."""
    return _adaptive(settings, state, mean, lambda v, d2: v - (1 - settings.beta_2) * d2 * np.sign(v - d2))


def _adaptive(
    settings: Aggregation,
    state: State,
    mean: Arrays,
    second: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[Arrays, State]:
    new: State = {}
    step: Arrays = {}
    for name, d in mean.items():
        m = settings.momentum * state.get(f"m/{name}", 0.0) + (1 - settings.momentum) * d
        v = second(state.get(f"s/{name}", np.full_like(d, settings.tau**2)), d * d)
        new[f"m/{name}"], new[f"s/{name}"] = m, v
        step[name] = m / (np.sqrt(v) + settings.tau)
    return step, new


STRATEGIES: dict[str, Strategy] = {
    "fedavg": fedavg,
    "fedprox": fedavg,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
}


def apply_step(settings: Aggregation, model: Arrays, step: Arrays) -> Arrays:
    """The next global model: model + server_learning_rate * step, in the model's own types."""
    return {
        name: (array + settings.server_learning_rate * step[name]).astype(array.dtype) if name in step else array
        for name, array in model.items()
    }


def averaged(average: Arrays, model: Arrays, *, ema: float, tail_share: float, round_: int, rounds: int) -> Arrays:
    """The model to release after a round: the running or tail average of the global models, or the last one.

    Args:
        average: what this function returned after the round before; before round 1 the start model.
        model: this round's global model.
        ema: decay of the running average; early on it is min(ema, (1 + t) / (10 + t)), so that the start is forgotten.
        tail_share: share of the rounds, at the end, whose plain mean is released.
        round_: this round, from 1.
        rounds: all of them.
    """
    if ema:
        keep = min(ema, (1 + round_) / (10 + round_))
    elif tail_share:
        first = rounds - max(1, round(tail_share * rounds))  # rounds after this one are averaged
        if round_ <= first + 1:
            return model
        keep = (round_ - first - 1) / (round_ - first)
    else:
        return model
    return {
        name: (keep * average[name].astype(np.float64) + (1 - keep) * array).astype(array.dtype)
        if np.issubdtype(array.dtype, np.floating)
        else array
        for name, array in model.items()
    }
