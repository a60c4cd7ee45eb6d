"""A site's durable record of what its patients' privacy has cost: committed and fsynced before any noise is drawn.

Guarantee: as long as the ledger and its counter are kept, all that leaves the site is (budget epsilon, budget delta)-DP
for adding or removing one patient, over all runs ever admitted, also when a run is chosen after looking at the answers
of earlier ones or runs go on side by side. A run's plan (all training steps and the evaluation) is admitted whole, at
the gate that was fixed when the ledger opened:

- "sum": the plans' (epsilon_i, delta_i), each priced by PLD, add up to at most the budget. Basic composition, which
  anybody can check by adding up the decimals in the rows, holds for interactive mechanisms used concurrently and chosen
  adaptively (Rogers et al. 2016, arXiv 1605.08294; Vadhan and Wang 2021, arXiv 2105.14427).
- "rdp": the plans' Renyi DP at one order, fixed when the ledger opened, adds up to at most what that order allows for
  the budget (`fedscan_core.rdp`). It counts steps and not runs: room for more runs, each a little dearer.

Stopping early is free and refunds nothing. A budget never refills. A yearly limit inside it only refuses more: what it
frees again after a year is never more than what the budget has left.

"Budget" is the newest that the ledger holds: a hospital may raise it (`raise_budget`), which is a row like any other.
From then on it promises less, and of everything that ever left. Whoever raises after looking at answers has promised,
from the start, no more than the largest budget they would have raised to.

One answer per question: a reservation belongs to (run, round, hash of the input). The same question again is answered
from the persisted bytes; the same round with another input is refused; a crash between reservation and persisted
bytes burns the round.
"""

import dataclasses
import json
import math
import sqlite3
from dataclasses import dataclass
from importlib.metadata import version
from secrets import token_hex
from typing import Any, Literal

from fedscan_client.dp import ledger_file, ledger_gate
from fedscan_client.dp.ledger_file import Book, Row
from fedscan_core import accounting, rdp
from fedscan_core.accounting import ADJACENCY, UNIT, Event, GaussianQuery, PoissonGaussian, SitePlan
from fedscan_core.errors import BudgetError, ConfigError, RecordDamaged

Answer = Literal["new", "answered", "burned"]
Gate = Literal["sum", "rdp"]

OLD = "ledger.jsonl"  # what the first version kept


@dataclass(frozen=True)
class Budget:
    """What a ledger may ever spend."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Release:
    """What one release does to the data; every field is public. `steps` counts training steps: 0 for a query.

    `sensitivity` is what the noise is measured in: the clipping norm with its margin, or 1. The released sum is divided
    by `divisor`.
    """

    mechanism: Literal["poisson_gauss", "gaussian"]
    sampling_rate: float
    noise_multiplier: float
    sensitivity: float
    divisor: float
    steps: int


def constants(budget: Budget, patients_declared: int, gate: Gate) -> Row:
    """What a ledger is opened with, as its first row holds it.

    Raises:
        ConfigError: a budget that is no budget.
    """
    if not (0 <= budget.epsilon < math.inf and 0 <= budget.delta < 1) or (gate == "rdp" and budget.delta == 0):
        raise ConfigError(
            f"A lifetime budget of epsilon {budget.epsilon:g} and delta {budget.delta:g}.",
            remedy="policy.max_epsilon is a number from 0, policy.max_delta lies between 0 and 1.",
        )
    return {
        "state": "opened",
        "epsilon": _decimal(budget.epsilon),
        "delta": _decimal(budget.delta),
        "gate": gate,
        "orders": rdp.ORDERS,
        "order": rdp.filter_order(budget.epsilon, budget.delta) if gate == "rdp" else None,
        "patients_declared": patients_declared,
        "unit": UNIT,
        "adjacency": ADJACENCY,
    }


def open_ledger(book: Book, budget: Budget, patients_declared: int, gate: Gate = "sum") -> None:
    """Creates the ledger, or checks all of the one there, and that it has this budget, gate and declared size.

    Raises:
        RecordDamaged: it was changed, is an older copy or another version's, was opened with other constants, or its
            budget was not raised to this one.
        FolderError: another agent holds it, or it cannot be written.
    """
    old = book.ledger.with_name(OLD)
    if old.exists():
        raise RecordDamaged(
            f"{old} is the ledger of an earlier version, which this one does not read.",
            remedy="Subtract what its plans spent from policy.max_epsilon and policy.max_delta, then rename it.",
        )
    wanted = constants(budget, patients_declared, gate)
    with ledger_file.writing(book, create=True) as db:
        ledger_file.check(db)
        if ledger_file.head(db)[0] == 0:
            ledger_file.append(db, {**wanted, "ledger_id": token_hex(8)})
            return
        opened = _opened(db)
    words = {"epsilon": "epsilon", "delta": "delta", "gate": "the gate", "patients_declared": "a declared size of"}
    for key, word in words.items():
        if opened[key] != wanted[key]:
            raise RecordDamaged(
                f"{book.ledger} was opened with {word} {opened[key]}, not {wanted[key]}.",
                remedy="Put the old value back into site.toml. Only the budget can change, and only upwards: "
                "fedscan agent budget raise",
            )


def raise_budget(book: Book, budget: Budget, by: str) -> None:
    """Writes a larger budget into an open ledger; the gate, and under "rdp" its order, stay. Once more is free.

    Args:
        book: the ledger.
        budget: the whole new one; neither epsilon nor delta below the old.
        by: who decided, by name.

    Raises:
        ConfigError: a budget that is none, or below the one held.
        RecordDamaged, FolderError: as `open_ledger`.
    """
    with ledger_file.writing(book) as db:
        ledger_file.check(db)
        held = _opened(db)
        wanted = constants(budget, held["patients_declared"], held["gate"])
        if (wanted["epsilon"], wanted["delta"]) == (held["epsilon"], held["delta"]):
            return
        if budget.epsilon < float(held["epsilon"]) or budget.delta < float(held["delta"]):
            raise ConfigError(
                f"The ledger's budget is epsilon {held['epsilon']} and delta {held['delta']}: it is only ever raised.",
                remedy="To allow less from now on, set policy.epsilon_per_year or policy.valid_until.",
            )
        ledger_file.append(db, {"state": "raised", "epsilon": wanted["epsilon"], "delta": wanted["delta"], "by": by})


def admit(book: Book, run_id: str, plan: SitePlan, config_sha: str, per_year: float | None = None) -> None:
    """Charges a run's sealed plan to the ledger, once; a second call with the same plan is free.

    Args:
        book: the ledger.
        run_id: the run, for ever.
        plan: what it will do in all.
        config_sha: digest of the run's whole configuration. It is sealed with the plan: a server that could change
            it between rounds could take more steps than the plan pays for.
        per_year: epsilon that the plans admitted within 365 days may add up to, with this one.

    Raises:
        BudgetError: over budget or the yearly limit, or the run was admitted with another plan or configuration.
        RecordDamaged: there is no ledger, it was changed, or it is an older copy.
    """
    with ledger_file.writing(book) as db:
        wanted = _plain(plan)
        for row in ledger_file.find(db, "state = 'admitted' AND run_id = ?", run_id):
            if (row["plan"], row["config"]) != (wanted, config_sha):
                raise BudgetError(f"Run {run_id} was admitted with another plan.", remedy="Start it under a new name.")
            return
        opened, before = _opened(db), _admitted(db)
        reason = ledger_gate.over(opened, before, plan) or ledger_gate.over_year(per_year, before, plan)
        if reason is not None:
            raise BudgetError(reason, remedy="Ask for a smaller target_epsilon, or ask the site for more.")
        curve = accounting.renyi(plan.events(), tuple(opened["orders"]))
        ledger_file.append(
            db,
            {
                "state": "admitted",
                "run_id": run_id,
                "config": config_sha,
                "plan": wanted,
                "epsilon": _decimal(plan.epsilon),
                "delta": _decimal(plan.delta),
                "unit": plan.unit,
                "adjacency": plan.adjacency,
                "orders": opened["orders"],
                "rdp": [_decimal(value) for value in curve],
                "accountant": {"name": "dp-accounting PLD", "version": version("dp-accounting")},
            },
        )


def reserve(
    book: Book, run_id: str, round_: int, *, plan: SitePlan, config_sha: str, input_sha: str, release: Release
) -> Answer:
    """Books one release. Only after "new" may noise be drawn.

    Returns:
        "new": go ahead; "answered": the bytes persisted for this very question go out again; "burned": a crash came
        between reservation and answer, and this round gives nothing.

    Raises:
        RecordDamaged: the run was not admitted with this plan and this configuration, the plan does not pay for the
            release, a broken chain, or the same round with another input. (A declared size or an accountant that
            changed meanwhile makes another plan, with less noise perhaps than was paid for.)
    """
    with ledger_file.writing(book) as db:
        admitted = ledger_file.find(db, "state = 'admitted' AND run_id = ?", run_id)
        if not admitted or (admitted[0]["plan"], admitted[0]["config"]) != (_plain(plan), config_sha):
            raise RecordDamaged(
                f"Run {run_id} was not admitted with this plan and this configuration.",
                remedy="The server must ask for the plan first.",
            )
        mine = ledger_file.find(db, "run_id = ? AND round = ? ORDER BY seq", run_id, round_)
        if mine:
            if mine[0]["input"] != input_sha:
                raise RecordDamaged(
                    f"Round {round_} of run {run_id} was asked before with another model.",
                    remedy="One answer per question.",
                )
            return "answered" if mine[-1]["state"] == "settled" else "burned"
        last = ledger_file.find(db, "run_id = ? AND state = 'reserved' ORDER BY seq DESC LIMIT 1", run_id)
        steps, queries = _pays_for(plan, release, last[0] if last else None)
        ledger_file.append(
            db,
            {
                "state": "reserved",
                "run_id": run_id,
                "round": round_,
                "input": input_sha,
                "plan": admitted[0]["seq"],
                "unit": plan.unit,
                "adjacency": plan.adjacency,
                "delta": _decimal(plan.delta),
                "mechanism": release.mechanism,
                "q": _number(release.sampling_rate),
                "sigma": _number(release.noise_multiplier),
                "C": _number(release.sensitivity),
                "divisor": _number(release.divisor),
                "steps_reserved": release.steps,
                "steps_so_far": steps,
                "queries_so_far": queries,
            },
        )
        return "new"


def settle(book: Book, run_id: str, round_: int, output_sha: str) -> None:
    """Records that the noisy bytes are on disk, before they are sent.

    Raises:
        RecordDamaged: the round was not reserved, or is settled already.
    """
    with ledger_file.writing(book) as db:
        rows = ledger_file.find(db, "run_id = ? AND round = ?", run_id, round_)
        if [row["state"] for row in rows] != ["reserved"]:
            raise RecordDamaged(f"Round {round_} of run {run_id} is not waiting for its answer.")
        record = {"state": "settled", "run_id": run_id, "round": round_, "reserved": rows[0]["seq"]}
        ledger_file.append(db, {**record, "steps_released": rows[0]["steps_reserved"], "output": output_sha})


def answer_of(book: Book, run_id: str, round_: int) -> str | None:
    """Digest of what was persisted as this round's answer, or None."""
    with ledger_file.writing(book) as db:
        rows = ledger_file.find(db, "run_id = ? AND round = ? AND state = 'settled'", run_id, round_)
    return str(rows[0]["output"]) if rows else None


def one_more(book: Book, plan: SitePlan, unopened: Row, per_year: float | None = None) -> dict[str, Any]:
    """What one more run with this plan would take: its share of the budget, whether it fits, and with which noise.

    Charges nothing. `noise_that_fits` is the smallest training noise multiplier that would be admitted, or None.

    Args:
        book: the ledger.
        plan: of the run.
        unopened: the `constants` of a ledger that is not there yet.
        per_year: see `admit`.
    """
    opened, admitted = _as_it_is(book, unopened)
    reason = ledger_gate.over(opened, admitted, plan) or ledger_gate.over_year(per_year, admitted, plan)
    noise = plan.noise_multiplier if reason is None else ledger_gate.least_noise(opened, admitted, plan)
    share = ledger_gate.share_of(opened, plan)
    return {"share": share, "fits": reason is None, "reason": reason or "", "noise_that_fits": noise}


def remaining(book: Book, unopened: Row, per_year: float | None = None) -> tuple[float, float]:
    """Epsilon and delta that are left now, of the budget and of the yearly limit; see `ledger_gate.left`."""
    return ledger_gate.left(*_as_it_is(book, unopened), per_year)


def over(book: Book, run_id: str, plan: SitePlan, unopened: Row, per_year: float | None = None) -> str | None:
    """Why `admit` would refuse the plan for want of budget, in public words, or None; charges nothing."""
    opened, before = _as_it_is(book, unopened)
    if any(row["run_id"] == run_id for row in before):
        return None
    return ledger_gate.over(opened, before, plan) or ledger_gate.over_year(per_year, before, plan)


def summary(book: Book) -> dict[str, Any]:
    """Checks the whole ledger and tells what is in it: budget, what is reserved of it, and each run's rounds.

    Raises:
        RecordDamaged: there is none, it was changed, or it is an older copy.
    """
    with ledger_file.reading(book) as db:
        opened, admitted, (seq, head) = _opened(db), _admitted(db), ledger_file.head(db)
        booked = ledger_file.find(db, "round IS NOT NULL ORDER BY seq")
        raises = [
            {"utc": row["utc"], "epsilon": float(row["epsilon"]), "delta": float(row["delta"]), "by": row["by"]}
            for row in ledger_file.find(db, _RAISED)
        ]
    runs: dict[str, dict[str, Any]] = {}
    for row in admitted:
        price = {"epsilon": float(row["epsilon"]), "delta": float(row["delta"])}
        runs[row["run_id"]] = {**price, "plan": row["plan"], "admitted": row["utc"], "rounds": {}}
    for row in booked:
        rounds = runs[row["run_id"]]["rounds"]
        if row["state"] == "reserved":
            kept = {key: row[key] for key in ("mechanism", "steps_reserved", "steps_so_far", "queries_so_far", "utc")}
            rounds[row["round"]] = {"state": "reserved", **kept}
        else:
            rounds[row["round"]]["state"] = "settled"
    budget = {"epsilon": float(opened["epsilon"]), "delta": float(opened["delta"])}
    constant = ("ledger_id", "gate", "order", "unit", "adjacency", "patients_declared")
    return {
        **{key: opened[key] for key in constant},
        "rows": seq,
        "head": head,
        "budget": budget,
        "reserved": ledger_gate.reserved(opened, admitted),
        "raised": raises,
        "runs": runs,
    }


_RAISED = "state = 'raised' ORDER BY seq"


def _opened(db: sqlite3.Connection) -> Row:
    """The ledger's constants, with the budget as it was last raised."""
    rows = ledger_file.find(db, "seq = 1")
    if not rows:
        raise RecordDamaged("The ledger holds nothing.", remedy="A run must be admitted first.")
    raised = ledger_file.find(db, _RAISED)
    return rows[0] | {key: raised[-1][key] for key in ("epsilon", "delta")} if raised else rows[0]


def _as_it_is(book: Book, unopened: Row) -> tuple[Row, list[Row]]:
    """Constants and admitted plans; those of `unopened` where there is no ledger yet."""
    if not (book.ledger.exists() or book.counter.exists()):
        return unopened, []
    with ledger_file.reading(book) as db:
        return _opened(db), _admitted(db)


def _admitted(db: sqlite3.Connection) -> list[Row]:
    return ledger_file.find(db, "state = 'admitted' ORDER BY seq")


def _pays_for(plan: SitePlan, release: Release, last: Row | None) -> tuple[int, int]:
    """The run's training steps and queries with this release, where its plan pays for them.

    Raises:
        RecordDamaged: it does not.
    """
    steps, queries = (last["steps_so_far"], last["queries_so_far"]) if last else (0, 0)
    if release.mechanism == "poisson_gauss":
        steps += release.steps
        asked: Event = PoissonGaussian(release.sampling_rate, release.noise_multiplier, plan.steps)
        enough = release.steps >= 1 and steps <= plan.steps
    else:
        queries += 1
        asked = GaussianQuery(release.noise_multiplier)
        paid = sum(event.count for event in plan.events() if isinstance(event, GaussianQuery))
        enough = release.steps == 0 and queries <= paid
    if not enough or asked not in plan.events():
        raise RecordDamaged("The run's plan does not pay for this release.", remedy="It is sealed: start a new run.")
    return steps, queries


def _plain(plan: SitePlan) -> Row:
    """As it comes back from the file."""
    plain: Row = json.loads(json.dumps(dataclasses.asdict(plan)))
    return plain


def _decimal(value: float) -> str:
    return repr(float(value))


def _number(value: float) -> dict[str, str]:
    """As people write it, and to the last bit."""
    return {"decimal": _decimal(value), "hex": float(value).hex()}
