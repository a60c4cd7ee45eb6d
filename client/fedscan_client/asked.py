"""What a run asks of this site, in plain words: for the people who approve it."""

import math
from collections.abc import Iterator
from typing import Any

from fedscan_client import budget
from fedscan_client.approvals import Asked
from fedscan_client.dp import ledger
from fedscan_client.site import Site
from fedscan_core import accounting, config, policy
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError, FedscanError

_LABELS = 20  # shown of a run's labels


def facts(here: Site, asked: Asked) -> dict[str, Any]:
    """Everything that `words` says, fit for JSON; nothing in it depends on patients.

    Raises:
        ConfigError: the run is another version's.
        RecordDamaged: the ledger was changed, is gone, or is an older copy.
    """
    run, order = config.from_server(asked.order.config), asked.order
    told: dict[str, Any] = {
        "run_id": asked.run_id,
        "state": asked.state,
        "decided": {"by": asked.by, "utc": asked.decided, "reason": asked.reason},
        "asked": {"launcher": order.launcher, "came": asked.came, "valid_until": order.valid_until},
        "signature": _signature(here, asked),
        "study": run.study.model_dump(),
        "task": {"kind": run.task.kind, "labels": list(run.task.labels), "modality": run.task.modality},
        "model": run.model.name,
        "training": {"rounds": run.train.rounds, "steps": run.train.rounds * run.train.local_steps},
        "cohort": {"site": here.name, "patients_declared": here.patients_declared},
    }
    told |= {"cost": None, "leaves": None}
    try:
        plan = accounting.plan_for(run, here.patients_declared)
        told["leaves"] = leaves(run)
    except FedscanError as error:  # no plan, or no such network
        return told | {"refused": str(error)}
    told["refused"] = policy.refusal(here.policy, run, plan, order)
    if told["refused"] is None and run.privacy.enabled:
        told["refused"] = budget.over(here, asked.run_id, plan)
    return told | {"cost": _cost(here, asked, run, plan)}


def _signature(here: Site, asked: Asked) -> str:
    """Whether the launcher whom the policy names signed it: yes, no, or unchecked where it names nobody."""
    if not here.policy.launchers:
        return "unchecked"
    from fedscan_core.order import signed_by

    key = here.policy.launchers.get(asked.order.launcher)
    return "yes" if key and signed_by(asked.order, key) else "no"


def _cost(here: Site, asked: Asked, run: RunConfig, plan: SitePlan) -> dict[str, Any]:
    left, delta_left = budget.remaining(here)
    charged = False
    if here.ledger.exists():
        charged = asked.run_id in ledger.summary(here.book)["runs"]
    cost: dict[str, Any] = {"private": run.privacy.enabled, "charged": charged, "unit": run.privacy.unit}
    cost |= {"left": left, "delta_left": delta_left, "lifetime": here.policy.max_epsilon}
    if run.privacy.enabled:
        cost |= {"epsilon": plan.epsilon, "delta": plan.delta, "noise_multiplier": plan.noise_multiplier}
        if here.policy.gate == "sum" and not charged:
            cost["left_after"] = max(0.0, left - plan.epsilon)
            cost["last"] = delta_left - plan.delta < plan.delta * (1 - 1e-9)
    return cost


def purpose(asked: Asked) -> str:
    """What the run says it is for; "?" where its order is another version's."""
    try:
        return printable(config.from_server(asked.order.config).study.purpose)
    except ConfigError:
        return "?"


def leaves(run: RunConfig) -> dict[str, Any]:
    """What goes out in all: numbers in one update, bytes of it, how many updates, and numbers in the histogram."""
    from fedscan_models import histograms, registry

    numbers = sum(p.numel() for p in registry.for_run(run).module.parameters() if p.requires_grad)
    shape = histograms.shape(run) if run.evaluation.private and run.privacy.enabled else ()
    return {
        "numbers": numbers,
        "bytes_each": 4 * numbers,
        "updates": run.train.rounds,
        "histogram_numbers": math.prod(shape) if shape else 0,
        "noised": run.privacy.enabled,
    }


def words(told: dict[str, Any]) -> Iterator[str]:
    """`facts` in sentences, one paragraph each; what strangers wrote cannot steer a terminal."""
    return (printable(text) for text in _words(told))


def printable(text: str) -> str:
    """The text with a blank for everything that cannot be printed."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _words(told: dict[str, Any]) -> Iterator[str]:
    study, asked = told["study"], told["asked"]
    signed = {"yes": "signed with the key this site knows", "no": "NOT signed with a key this site knows"}
    who = signed.get(told["signature"], "vouched for by the coordinator only: site.toml names no launchers")
    yield f"Run {told['run_id']}: {told['state']}{_decision(told)}."
    yield f"Who: {asked['launcher']}, {who}. It asked on {asked['came'][:16]} UTC; valid until " + (
        f"{asked['valid_until'][:16]} UTC. Contact: {_quoted(study['contact'])}."
    )
    yield f"Purpose: {_quoted(study['purpose'])}. Question: {_quoted(study['question'])}"
    yield (
        f"Ethics approval: {_quoted(study['ethics_approval'], 'none named')}. "
        f"Data-use agreement: {_quoted(study['data_use_agreement'], 'none named')}."
    )
    task, training, cohort = told["task"], told["training"], told["cohort"]
    kind = f"{_quoted(task['modality'])} images" if task["modality"] else "images"
    labels = [_quoted(label[:60]) for label in task["labels"][:_LABELS]] + ["..."] * (len(task["labels"]) > _LABELS)
    yield (
        f"What: {task['kind']} of {kind} as {', '.join(labels)}; model {told['model']}, {training['rounds']} "
        f"rounds, {training['steps']} training steps here. Nobody's code runs here but this installation's."
    )
    yield (
        f"On whom: the patients of site {cohort['site']} whom its consent register permits, declared as "
        f"{cohort['patients_declared']}. Images never leave."
    )
    yield _cost_words(told["cost"])
    if told["leaves"]:
        yield _leaving_words(told["leaves"])
    if told["refused"]:
        yield f"This site's own rules refuse it, whoever approves: {told['refused']}"


def _quoted(text: str, otherwise: str = "none given") -> str:
    """What a stranger wrote, marked as such: without blanks that push it onto a line that looks like ours."""
    visible = "".join(" " if letter in "\u2800\u3164\uffa0\u115f\u1160" else letter for letter in printable(text))
    words = " ".join(visible.split()).replace('"', "'")
    return f'"{words}"' if words else otherwise


def _decision(told: dict[str, Any]) -> str:
    decided = told["decided"]
    if not decided["by"]:
        return ""
    return f" by {decided['by']} on {decided['utc'][:10]}" + (f" ({decided['reason']})" if decided["reason"] else "")


def _cost_words(cost: dict[str, Any] | None) -> str:
    if cost is None:
        return "Cost: it has no plan at this site."
    if not cost["private"]:
        return "Cost: NO PRIVACY. What leaves shows the images it was made from. Only for phantoms and public images."
    of = f"epsilon {cost['epsilon']:.3g} at delta {cost['delta']:.2g}, noise {cost['noise_multiplier']:.3g}"
    who = "each patient" if cost["unit"] == "patient" else "each single IMAGE, not each patient"
    if cost["charged"]:
        return f"Cost: {of}, for {who}; it is charged already. Left of the lifetime budget: {cost['left']:.3g}."
    after = f", and {cost['left_after']:.3g} after it" if "left_after" in cost else ""
    return (
        f"Cost: {of}, for {who}; charged for ever when it starts, also if it stops early. Of the lifetime budget of "
        f"{cost['lifetime']:g}, {cost['left']:.3g} is left now{after}."
    ) + (" Its delta is the last that fits: no further run like it would." if cost.get("last") else "")


def _leaving_words(leaves: dict[str, Any]) -> str:
    noised = "noised" if leaves["noised"] else "exact, without noise,"
    said = (
        f"What leaves the building: {leaves['updates']} times {leaves['numbers']:,} {noised} numbers "
        f"({_size(leaves['bytes_each'])} each, summed over patients)"
    )
    if leaves["histogram_numbers"]:
        said += f", and once a noised histogram of {leaves['histogram_numbers']} numbers"
    return f"{said}. No image, name, count or score of anybody."


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
