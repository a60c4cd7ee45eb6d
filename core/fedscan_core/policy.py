"""The hospital's veto: what a run may ask of this site, decided by `site.toml` alone.

A refusal is text the researcher may read; it depends on the policy and the request, never on patients.
"""

from dataclasses import dataclass
from typing import Literal

from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig


@dataclass(frozen=True)
class Policy:
    """What the hospital allows.

    `research_cohort` marks phantom or public images: only there may a run switch privacy off or protect images
    instead of patients. `max_epsilon` and `max_delta` are the ledger's lifetime budget, `gate` how runs are charged to
    it: "sum" adds up their (epsilon, delta), "rdp" their Renyi DP, which leaves room for more runs. None of the three
    can be changed once the ledger is open.
    """

    max_epsilon: float
    max_delta: float
    min_noise_multiplier: float = 0.3
    research_cohort: bool = False
    gate: Literal["sum", "rdp"] = "sum"


def refusal(policy: Policy, run: RunConfig, plan: SitePlan) -> str | None:
    """Why this site will not take part, or None."""
    if not policy.research_cohort:
        if not run.privacy.enabled:
            return "this site trains only with privacy enabled"
        if run.privacy.unit != "patient":
            return "this site protects patients, not single images (privacy.unit)"
        if run.privacy.engine == "opacus":
            # Per-row hooks run all patients in one batch; weights chosen by a malicious server can blow its rounding up
            # until one patient moves the sum by more than C (tests/client/dp/test_engine.py).
            return "this site wants a bound for any weights: privacy.engine = 'bookkeeping' or 'loop'"
    if not run.privacy.enabled:
        return None
    if not plan.epsilon <= policy.max_epsilon:  # "not": a limit that is no number lets nothing through
        return f"the run asks for epsilon {plan.epsilon:.4g}, this site allows {policy.max_epsilon:g}"
    if not plan.delta <= policy.max_delta:
        return f"the run asks for delta {plan.delta:g}, this site allows {policy.max_delta:g}"
    noise = min(plan.noise_multiplier, plan.evaluation_noise or plan.noise_multiplier)
    if not noise >= policy.min_noise_multiplier:
        return f"the run adds noise {noise:.3g}, this site's floor is {policy.min_noise_multiplier:g}"
    return None
