"""The arithmetic of a ledger's gate, on rows as they are in the file: is there room, how much is reserved, and left.

All sums are on the side of privacy: the rows' decimals add exactly, Renyi DP is rounded up, and what an order allows is
rounded down.
"""

import dataclasses
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

from fedscan_core import accounting, rdp
from fedscan_core.accounting import Event, SitePlan
from fedscan_core.errors import PrivacyError

Row = dict[str, Any]

YEAR = timedelta(days=365)


def over(opened: Row, admitted: Sequence[Row], plan: SitePlan) -> str | None:
    """Why the plan does not fit beside those admitted, in public words, or None."""
    if opened["gate"] == "sum":
        epsilon, delta = _sums(admitted)
        # "not": a price that is no number lets nothing through
        fits = 0 <= plan.epsilon < math.inf and 0 <= plan.delta < math.inf
        fits = fits and epsilon + Fraction(repr(float(plan.epsilon))) <= Fraction(opened["epsilon"])
        if fits and delta + Fraction(repr(float(plan.delta))) <= Fraction(opened["delta"]):
            return None
        left = float(Fraction(opened["epsilon"]) - epsilon)
        return (
            f"The run asks for epsilon {plan.epsilon:.3g}; of {float(opened['epsilon']):g}, {left:.3g} is left "
            f"(delta: {plan.delta:g} of {float(opened['delta']):g} in all)."
        )
    if not 0 < plan.delta < 1 or not plan.epsilon >= 0:
        return f"The run asks for epsilon {plan.epsilon:g} at delta {plan.delta:g}, which are out of range."
    cost, spent, allowed = _cost(opened, plan.events()), spent_rdp(opened, admitted), allowed_rdp(opened)
    if rdp.add((spent,), (cost,))[0] <= allowed:
        return None
    return (
        f"The run's Renyi DP at order {opened['order']} is {cost:.3g}; of the {max(0.0, allowed):.3g} that epsilon "
        f"{opened['epsilon']} at delta {opened['delta']} allows in all, {max(0.0, allowed - spent):.3g} is left."
    )


def over_year(per_year: float | None, admitted: Sequence[Row], plan: SitePlan) -> str | None:
    """Why the plan is too much for one year (None: no such limit), in public words, or None."""
    if per_year is None:
        return None
    spent, fits = _within_a_year(admitted), plan.epsilon < math.inf and 0 <= per_year < math.inf  # not for a NaN
    if fits and spent + Fraction(repr(float(plan.epsilon))) <= Fraction(repr(float(per_year))):
        return None
    return (
        f"The run asks for epsilon {plan.epsilon:.3g}; of the {per_year:g} that this site gives within {YEAR.days} "
        f"days, {max(0.0, per_year - float(spent)):.3g} is left."
    )


def left(opened: Row, admitted: Sequence[Row], per_year: float | None = None) -> tuple[float, float]:
    """Epsilon and delta that one more run could have now.

    Under "sum" exactly; under "rdp" what the order that decides still allows, read as an epsilon at the whole delta.
    """
    epsilon, delta = _sums(admitted)
    if opened["gate"] == "sum":
        free, rest = float(Fraction(opened["epsilon"]) - epsilon), float(Fraction(opened["delta"]) - delta)
    else:
        rest, room = float(opened["delta"]), allowed_rdp(opened) - spent_rdp(opened, admitted)
        free = rdp.to_epsilon([room], rest, [opened["order"]]) if room > 0 else 0.0
    if per_year is not None:
        free = min(free, per_year - float(_within_a_year(admitted)))
    return max(0.0, min(free, float(opened["epsilon"]))), max(0.0, rest)


def reserved(opened: Row, admitted: Sequence[Row]) -> dict[str, float]:
    """What the admitted plans hold of the budget: (epsilon, delta), their share, and under "rdp" the curve's value.

    A fixed order turns even a small Renyi DP into an epsilon well above 0: under "rdp" the share says more.
    """
    if opened["gate"] == "sum":
        epsilon, delta = _sums(admitted)
        share = max(_share(epsilon, Fraction(opened["epsilon"])), _share(delta, Fraction(opened["delta"])))
        return {"epsilon": float(epsilon), "delta": float(delta), "share": share}
    spent, delta_ = spent_rdp(opened, admitted), float(opened["delta"])
    epsilon_ = rdp.to_epsilon([spent], delta_, [opened["order"]]) if admitted else 0.0
    share_ = _share(spent, allowed_rdp(opened))
    return {"epsilon": epsilon_, "delta": delta_, "share": share_, "rdp": spent, "rdp_allowed": allowed_rdp(opened)}


def share_of(opened: Row, plan: SitePlan) -> float:
    """What the plan alone takes of the whole budget, 1 = all."""
    if opened["gate"] == "sum":
        return max(_share(plan.epsilon, float(opened["epsilon"])), _share(plan.delta, float(opened["delta"])))
    return _share(_cost(opened, plan.events()), allowed_rdp(opened))


def least_noise(opened: Row, admitted: Sequence[Row], plan: SitePlan) -> float | None:
    """The smallest training noise multiplier (to 0.1 %) with which the plan would fit; None: none below 100."""

    def filtered(events: Sequence[Event], delta: float) -> float:
        total = rdp.add((spent_rdp(opened, admitted),), (_cost(opened, events),))
        return rdp.to_epsilon(total, delta, [opened["order"]])

    epsilon, delta = _sums(admitted)
    by_sum = opened["gate"] == "sum"
    if by_sum and delta + Fraction(repr(float(plan.delta))) > Fraction(opened["delta"]):
        return None
    try:
        return accounting.calibrate(
            lambda noise: dataclasses.replace(plan, noise_multiplier=noise).events(),
            float(Fraction(opened["epsilon"]) - epsilon) if by_sum else float(opened["epsilon"]),
            plan.delta if by_sum else float(opened["delta"]),
            accounting.epsilon if by_sum else filtered,
        )
    except PrivacyError:
        return None


def spent_rdp(opened: Row, admitted: Sequence[Row]) -> float:
    """Renyi DP of all admitted plans at the order that decides."""
    index = opened["orders"].index(opened["order"])
    return rdp.add(*[(float(row["rdp"][index]),) for row in admitted])[0] if admitted else 0.0


def allowed_rdp(opened: Row) -> float:
    """Renyi DP at the order that decides which is still (budget epsilon, budget delta)-DP."""
    return rdp.allowance(float(opened["epsilon"]), float(opened["delta"]), opened["order"])


def _cost(opened: Row, events: Sequence[Event]) -> float:
    return accounting.renyi(events, (opened["order"],))[0]


def _within_a_year(admitted: Sequence[Row]) -> Fraction:
    since = (datetime.now(UTC) - YEAR).isoformat(timespec="seconds")
    return _sums([row for row in admitted if row["utc"] >= since])[0]


def _sums(admitted: Sequence[Row]) -> tuple[Fraction, Fraction]:
    epsilon = sum((Fraction(row["epsilon"]) for row in admitted), Fraction(0))
    return epsilon, sum((Fraction(row["delta"]) for row in admitted), Fraction(0))


def _share(part: float | Fraction, whole: float | Fraction) -> float:
    return float(part) / float(whole) if whole > 0 else float(part > 0)
