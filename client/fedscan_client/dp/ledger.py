"""A site's durable record of what its patients' privacy has cost: written and fsynced before any noise is drawn.

Guarantee: as long as the file is kept, the sum of (epsilon_i, delta_i) over all plans ever admitted stays at or below
the lifetime budget fixed when the ledger was opened; so all that leaves the site is (budget epsilon, budget delta)-DP
for adding or removing one patient. A plan (all training steps and the evaluation of one run) is admitted whole, by
basic composition over plans, which anybody can check by adding up; inside a plan the price is
`fedscan_core.accounting`'s. Stopping early is free and refunds nothing.

One answer per question: a reservation belongs to (run, round, hash of the input). The same question again is answered
from the persisted bytes; the same round with another input is refused; a crash between reservation and persisted
bytes burns the round.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedscan_core import auditlog
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import BudgetError, RecordDamaged

Answer = Literal["new", "answered", "burned"]
_SLACK = 1e-9  # float addition of budgets


@dataclass(frozen=True)
class Budget:
    """What a ledger may ever spend."""

    epsilon: float
    delta: float


def open_ledger(path: Path, budget: Budget, patients_declared: int) -> None:
    """Creates the ledger, or checks that the one there has this budget and this declared cohort size.

    Raises:
        RecordDamaged: the chain is broken, or it was opened with another budget or declared size.
    """
    with auditlog.exclusive(path):
        records = auditlog.read(path)
        if not records:
            opened = {"kind": "open", "gate": "sum", "patients_declared": patients_declared}
            auditlog.append(path, {**opened, **dataclasses.asdict(budget)})
        elif Budget(records[0]["epsilon"], records[0]["delta"]) != budget:
            raise RecordDamaged(
                f"{path} was opened with epsilon {records[0]['epsilon']:g}, not {budget.epsilon:g}.",
                remedy="A lifetime budget never changes; put the old value back.",
            )
        elif records[0]["patients_declared"] != patients_declared:
            raise RecordDamaged(
                f"{path} was opened for {records[0]['patients_declared']} declared patients, not {patients_declared}.",
                remedy="The declared size is constant for a ledger: one that follows the cohort would tell about it.",
            )


def admit(path: Path, run_id: str, plan: SitePlan, config_sha: str) -> None:
    """Charges a run's sealed plan to the ledger, once; a second call with the same plan is free.

    Args:
        path: the ledger.
        run_id: the run, for ever.
        plan: what it will do in all.
        config_sha: digest of the run's whole configuration. It is sealed with the plan: a server that could change
            it between rounds could take more steps than the plan pays for.

    Raises:
        BudgetError: over budget, or the run was admitted with another plan or configuration.
    """
    with auditlog.exclusive(path):
        records = auditlog.read(path)
        plans = {record["run_id"]: record["plan"] for record in records if record["kind"] == "plan"}
        sealed = {record["run_id"]: record["config"] for record in records if record["kind"] == "plan"}
        wanted = dataclasses.asdict(plan)
        if run_id in plans:
            if (plans[run_id], sealed[run_id]) != (wanted, config_sha):
                raise BudgetError(f"Run {run_id} was admitted with another plan.", remedy="Start it under a new name.")
            return
        budget = Budget(records[0]["epsilon"], records[0]["delta"])
        spent = math.fsum(p["epsilon"] for p in plans.values())
        epsilon = math.fsum([spent, plan.epsilon])
        delta = math.fsum([*(p["delta"] for p in plans.values()), plan.delta])
        if not (epsilon <= budget.epsilon + _SLACK and delta <= budget.delta * (1 + _SLACK)):
            raise BudgetError(
                f"The run asks for epsilon {plan.epsilon:.3g}; of {budget.epsilon:g}, {budget.epsilon - spent:.3g} "
                f"is left (delta: {plan.delta:g} of {budget.delta:g} in all).",
                remedy="Ask for a smaller target_epsilon, or ask the site for more.",
            )
        auditlog.append(path, {"kind": "plan", "run_id": run_id, "config": config_sha, "plan": wanted})


def reserve(path: Path, run_id: str, round_: int, *, plan: SitePlan, config_sha: str, input_sha: str) -> Answer:
    """Books one release. Only after "new" may noise be drawn.

    Returns:
        "new": go ahead; "answered": the bytes persisted for this very question go out again; "burned": a crash came
        between reservation and answer, and this round gives nothing.

    Raises:
        RecordDamaged: the run was not admitted with this plan and this configuration, a broken chain, or the same round
            with another input. (A declared size or an accountant that changed meanwhile makes another plan, with less
            noise perhaps than was paid for.)
    """
    with auditlog.exclusive(path):
        records = [record for record in auditlog.read(path) if record.get("run_id") == run_id]
        sealed = {"kind": "plan", "run_id": run_id, "config": config_sha, "plan": dataclasses.asdict(plan)}
        if sealed not in records:
            raise RecordDamaged(
                f"Run {run_id} was not admitted with this plan and this configuration.",
                remedy="The server must ask for the plan first.",
            )
        mine = [record for record in records if record.get("round") == round_]
        if not mine:
            auditlog.append(path, {"kind": "reserve", "run_id": run_id, "round": round_, "input": input_sha})
            return "new"
        if any(record["kind"] == "reserve" and record["input"] != input_sha for record in mine):
            raise RecordDamaged(
                f"Round {round_} of run {run_id} was asked before with another model.",
                remedy="One answer per question.",
            )
        return "answered" if any(record["kind"] == "settle" for record in mine) else "burned"


def settle(path: Path, run_id: str, round_: int, output_sha: str) -> None:
    """Records that the noisy bytes are on disk, before they are sent."""
    with auditlog.exclusive(path):
        auditlog.append(path, {"kind": "settle", "run_id": run_id, "round": round_, "output": output_sha})


def summary(path: Path) -> dict[str, Any]:
    """Budget, what is committed, and per run how many rounds were reserved and settled."""
    records = auditlog.read(path)
    runs: dict[str, dict[str, Any]] = {}
    for record in records[1:]:
        run = runs.setdefault(record["run_id"], {"epsilon": 0.0, "delta": 0.0, "reserved": 0, "settled": 0})
        if record["kind"] == "plan":
            run.update(epsilon=record["plan"]["epsilon"], delta=record["plan"]["delta"])
        else:
            run["reserved" if record["kind"] == "reserve" else "settled"] += 1
    opened = records[0]
    return {
        "budget": {"epsilon": opened["epsilon"], "delta": opened["delta"]},
        "committed": {
            "epsilon": math.fsum(run["epsilon"] for run in runs.values()),
            "delta": math.fsum(run["delta"] for run in runs.values()),
        },
        "runs": runs,
    }
