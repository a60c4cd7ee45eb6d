"""Commands for hospital IT. `fedscan agent ledger`: what the site's patients' privacy has cost, and what is left.

Nothing here changes a ledger or waits for an agent that is at work on it.
"""

import json
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fedscan_client import site
from fedscan_client.dp import ledger
from fedscan_client.site import Site
from fedscan_core import accounting, config_file, policy, rdp
from fedscan_core.accounting import Event, GaussianQuery, SitePlan
from fedscan_core.errors import PrivacyError

_STATES = {"settled": "answered", "reserved": "no answer"}  # under way, or burned by a crash


def show_ledger(folder: Path, run: Path | None, as_json: bool) -> int:
    """Prints the ledger of a site's folder and what one more run would cost; returns the exit code.

    Args:
        folder: the site's, with site.toml.
        run: RUN.toml of the run to price; None: the last admitted run again.
        as_json: only JSON on standard output.

    Raises:
        ConfigError: no site.toml or RUN.toml, or one that cannot be read.
        RecordDamaged: the ledger was changed, is gone, or is an older copy.
    """
    told = report(site.load(folder), run)
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        _show(told, Console(highlight=False))
    return 0


def report(here: Site, run: Path | None = None) -> dict[str, Any]:
    """What `fedscan agent ledger --json` prints; nothing in it depends on patients. See `show_ledger` for the errors.

    `reserved` is what the admitted plans hold of the budget, whole; `spent`: the part whose noise may have been drawn.
    Epsilon is for adding or removing one patient unless its name says `replace_one`.
    """
    budget = ledger.Budget(here.policy.max_epsilon, here.policy.max_delta)
    unopened = ledger.constants(budget, here.patients_declared, here.policy.gate)
    booked: dict[str, Any]
    if here.ledger.exists() or here.book.counter.exists():
        booked = ledger.summary(here.book)
    else:
        nothing = {"epsilon": 0.0, "delta": 0.0, "share": 0.0}
        booked = {"ledger_id": None, "gate": here.policy.gate, "order": unopened["order"], "rows": 0, "head": ""}
        booked |= {
            "budget": {"epsilon": budget.epsilon, "delta": budget.delta},
            "reserved": nothing,
            "raised": [],
            "runs": {},
        }
    entries = booked.pop("runs")
    told = {"site": here.name, **booked, "spent": _spent(booked, entries)}
    told["runs"] = [_run(run_id, entry) for run_id, entry in entries.items()]
    of, plan, refused = "", None, None
    if run is not None:
        wanted = config_file.load(run)
        of = str(run)
        try:
            plan = accounting.plan_for(wanted, here.patients_declared)
            refused = policy.refusal(here.policy, wanted, plan)
        except PrivacyError as error:
            told["one_more_run"] = {"of": of, "fits": False, "reason": str(error)}
    elif entries:
        last = list(entries)[-1]
        of, plan = f"{last} again", SitePlan(**entries[last]["plan"])
    if plan is not None and math.isinf(plan.epsilon):
        told["one_more_run"] = {"of": of, "fits": refused is None, "reason": refused or "it is not charged: no privacy"}
    elif plan is not None:
        more = ledger.one_more(here.book, plan, unopened, here.policy.epsilon_per_year)
        told["one_more_run"] = {"of": of, **_price(plan), **more}
        if refused is not None:
            told["one_more_run"] |= {"fits": False, "reason": refused}
    return told


def _price(plan: SitePlan) -> dict[str, Any]:
    return {
        "epsilon": plan.epsilon,
        "epsilon_replace_one": accounting.replace_one(plan.events(), plan.delta),
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_rate": plan.sampling_rate,
        "steps": plan.steps,
    }


def _run(run_id: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A run's price, and what it had come to after each round: by Renyi DP, an upper bound never above the price."""
    plan = SitePlan(**entry["plan"])
    rounds = [
        {
            "round": number,
            "what": "training" if row["steps_reserved"] else "evaluation",
            "state": _STATES[row["state"]],
            "steps": row["steps_reserved"],
            "epsilon_so_far": min(plan.epsilon, accounting.renyi_epsilon(_done(plan, row), plan.delta)),
        }
        for number, row in entry["rounds"].items()
    ]
    spent = rounds[-1]["epsilon_so_far"] if rounds else 0.0
    return {"run_id": run_id, "admitted": entry["admitted"], **_price(plan), "spent": spent, "rounds": rounds}


def _done(plan: SitePlan, row: dict[str, Any]) -> tuple[Event, ...]:
    """What a run had reserved when this row was written."""
    queries = (GaussianQuery(plan.evaluation_noise, row["queries_so_far"]),) if row["queries_so_far"] else ()
    return (*plan.events(row["steps_so_far"]), *queries)


def _spent(booked: dict[str, Any], entries: dict[str, Any]) -> dict[str, float]:
    """What has been reserved round by round, over all runs, at the ledger's gate."""
    begun = [
        (SitePlan(**entry["plan"]), list(entry["rounds"].values())[-1]) for entry in entries.values() if entry["rounds"]
    ]
    if booked["gate"] == "sum":
        epsilons = [min(plan.epsilon, accounting.renyi_epsilon(_done(plan, row), plan.delta)) for plan, row in begun]
        return {"epsilon": math.fsum(epsilons), "delta": math.fsum(plan.delta for plan, _ in begun)}
    curves = [accounting.renyi(_done(plan, row), (booked["order"],)) for plan, row in begun]
    if not curves:
        return {"epsilon": 0.0, "delta": 0.0, "rdp": 0.0}
    total, delta = rdp.add(*curves), booked["budget"]["delta"]
    return {"epsilon": rdp.to_epsilon(total, delta, [booked["order"]]), "delta": delta, "rdp": total[0]}


# --------------------------------------------------------------------------------------------------------------- table


def _show(told: dict[str, Any], console: Console) -> None:
    opened = f"ledger {told['ledger_id']}, {told['rows']} rows, chain whole" if told["rows"] else "no ledger yet"
    rule = "plans add up" if told["gate"] == "sum" else f"Renyi DP at order {told['order']} adds up"
    console.print(f"{told['site']}: {opened}. Gate {told['gate']}: {rule}.", soft_wrap=True)
    table = Table("", *(_right(name) for name in ("epsilon", "delta", "share")), title="Budget", title_justify="left")
    for name, share in (("budget", 1.0), ("reserved", told["reserved"]["share"]), ("spent", None)):
        held = told[name]
        table.add_row(name, f"{held['epsilon']:.3f}", f"{held['delta']:.1e}", "" if share is None else f"{share:.1%}")
    console.print(table)
    for up in told["raised"]:
        to = f"to epsilon {up['epsilon']:g}, delta {up['delta']:g}"
        console.print(f"The budget was raised on {up['utc'][:10]} {to}, by {up['by']}.", soft_wrap=True)
    if told["runs"]:
        _show_runs(told["runs"], console)
    more = told.get("one_more_run")
    if more is None:
        console.print("What a run would cost: --run RUN.toml", soft_wrap=True)
        return
    if "epsilon" in more:
        console.print(
            f"One more run ({more['of']}) costs epsilon {more['epsilon']:.3f} for adding or removing one patient "
            f"({more['epsilon_replace_one']:.3f} for replacing one) at delta {more['delta']:.1e}, noise "
            f"{more['noise_multiplier']:.3g}: {more['share']:.1%} of the budget.",
            soft_wrap=True,
        )
    console.print("It fits." if more["fits"] else f"It would be refused: {more['reason']}", soft_wrap=True)
    if not more["fits"] and more.get("noise_that_fits"):
        console.print(f"Training noise of {more['noise_that_fits']:.3g} would fit the budget.", soft_wrap=True)


def _show_runs(runs: list[dict[str, Any]], console: Console) -> None:
    names = ("add/remove", "replace *", "delta", "noise", "rate", "steps", "spent")
    table = Table(
        Column("run", overflow="fold"),
        *(_right(name) for name in names),
        title="Runs: epsilon for adding or removing one patient, and for replacing one",
        title_justify="left",
    )
    for run in runs:
        prices = [f"{run[key]:.3f}" for key in ("epsilon", "epsilon_replace_one")]
        shape = [
            f"{run['delta']:.1e}",
            f"{run['noise_multiplier']:.3g}",
            f"{run['sampling_rate']:.3g}",
            str(run["steps"]),
        ]
        table.add_row(run["run_id"], *prices, *shape, f"{run['spent']:.3f}")
    console.print(table)
    console.print("* one patient replaced by another, priced with dp-accounting's REPLACE_ONE", soft_wrap=True)
    table = Table(
        Column("run", overflow="fold"), "rounds", "what", "state", _right("steps"), _right("spent after them")
    )
    table.title, table.title_justify = "Rounds", "left"
    for run in runs:
        for first, last, group in _stretches(run["rounds"]):
            span = str(first) if first == last else f"{first} to {last}"
            if group[0]["what"] == "evaluation":
                span = ""
            steps = sum(row["steps"] for row in group)
            so_far = f"{group[-1]['epsilon_so_far']:.3f}"
            table.add_row(run["run_id"], span, group[0]["what"], group[0]["state"], str(steps), so_far)
    console.print(table)


def _stretches(rounds: list[dict[str, Any]]) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """Neighbouring rounds of one state as one."""
    for _, group in groupby(rounds, key=lambda row: (row["what"], row["state"])):
        rows = list(group)
        yield rows[0]["round"], rows[-1]["round"], rows


def _right(name: str) -> Column:
    return Column(name, justify="right")
