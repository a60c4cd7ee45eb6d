"""How long an honest update can be: what the clip, the steps and the noise imply.

A site's update is w_S - w_0 after S local steps. Before the optimizer sees it, the gradient of a step is

    g = (sum over sampled patients of clipped gradients + noise) / (rate * declared size)

with each patient's part at most C long (C is 1 for automatic clipping) and noise of standard deviation sigma C an entry
over d entries. Three facts bound it; each of the last two fails with probability at most exp(-X) a step, X = 60:

- n sampled patients give a sum of at most n C (triangle inequality).
- Of N patients, each sampled with rate q, n <= min(N, qN + sqrt(2 qN X) + 2X/3) (Bernstein's inequality, with the
  variance bounded by qN).
- A Gaussian vector of d entries is at most sigma C (sqrt(d) + sqrt(2X)) long (Laurent and Massart 2000, lemma 1:
  chi^2_d <= d + 2 sqrt(dX) + 2X).

N is the site's true cohort, which the server must not know. It is taken to be at most COHORT times the declared size:
a site with more patients than that is to declare a larger cohort, or some of its updates may be dropped.

From |g| <= G the optimizers of `fedscan_client.train` follow step by step; a = |w_0|, the length of what is trained:

- SGD: |v| <= momentum |v| + G + decay (a + D) + mu D, D <- D + rate |v|, mu FedProx's pull towards w_0.
- Adam (AdamW): an entry moves by rate * |m^| / sqrt(v^), at most rate R_t whatever the gradients are: by Cauchy
  R_t = (1-b1) / (1-b1^t) * sqrt((1-b2^t) / (1-b2) * sum_{j<t} (b1^2/b2)^j). The decay adds rate * decay * (a + D).

Rounding to float32 moves each entry of the weights by 2^-24 of itself a few times a step; SLACK covers it. Everything
used is public: the bound costs no privacy. Without privacy there is no clip, and SGD's update has no bound.
"""

import math

from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig

X = 60.0  # exp(-60) = 1e-26 a step and fact: an honest site is not dropped in a lifetime of runs
COHORT = 4.0  # most patients at a site for each that it declares
SLACK = 1e-3
_FLOAT32 = 2.0**-21  # relative error of the weights in one step: eight roundings
_BETA_1, _BETA_2 = 0.9, 0.999  # torch's defaults, which the client uses


def longest(run: RunConfig, plan: SitePlan, entries: int, start: float) -> float:
    """The L2 norm that an honest update of one round does not exceed.

    Args:
        run: the experiment.
        plan: the site's plan: its declared size, rate and noise.
        entries: d, how many numbers are trained.
        start: a, the L2 norm of what is trained in this round's global model.

    Returns:
        The bound; infinite where there is none, which is SGD without privacy.
    """
    train = run.train
    gradient = _gradient(run, plan, entries)
    pull = run.aggregation.proximal_mu if run.aggregation.strategy == "fedprox" else 0.0
    moved = velocity = ratio = 0.0
    for step in range(1, train.local_steps + 1):
        shrink = train.weight_decay * (start + moved)
        if train.optimizer == "adam":
            ratio += (_BETA_1**2 / _BETA_2) ** (step - 1)
            moved += train.learning_rate * (_adam(step, ratio) * math.sqrt(entries) + shrink)
        else:
            velocity = train.momentum * velocity + gradient + shrink + pull * moved
            moved += train.learning_rate * velocity
        moved += _FLOAT32 * (start + moved)
        if moved == math.inf:
            return moved
    return moved * (1 + SLACK)


def _gradient(run: RunConfig, plan: SitePlan, entries: int) -> float:
    """G: how long the gradient that the optimizer gets can be."""
    if not run.privacy.enabled:
        return math.inf
    clip = 1.0 if run.privacy.clip == "auto" else run.privacy.clip
    cohort = COHORT * plan.patients_declared
    mean = plan.sampling_rate * cohort
    sampled = min(cohort, mean + math.sqrt(2 * mean * X) + 2 * X / 3)
    noise = plan.noise_multiplier * (math.sqrt(entries) + math.sqrt(2 * X))
    return clip * (sampled + noise) * (1 + SLACK) / (plan.sampling_rate * plan.patients_declared)


def _adam(step: int, ratio: float) -> float:
    """R_t, where `ratio` is the sum over j < t of (b1^2/b2)^j."""
    return (1 - _BETA_1) / (1 - _BETA_1**step) * math.sqrt((1 - _BETA_2**step) / (1 - _BETA_2) * ratio)
