"""The hospital's veto: what a run may ask of this site, decided by `site.toml` alone.

It is checked three times: when a run is submitted (against what the site publishes of its policy), when it arrives at
the site, and at every round. A refusal is text the researcher may read; it depends on the policy, the request and the
day, never on patients.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from pydantic import TypeAdapter, ValidationError

from fedscan_core import order as orders
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError
from fedscan_core.order import Order

Group = Literal["sex", "age"]


@dataclass(frozen=True)
class Policy:
    """What the hospital allows. Where a list is empty, or a limit is left out, the site asks nothing of that kind.

    Attributes:
        max_epsilon, max_delta: the ledger's lifetime budget. It never refills; it is raised by a command of its own.
        min_noise_multiplier: the floor of the noise of training and evaluation.
        research_cohort: the images are phantom or public: only there may a run switch privacy off, protect images
            instead of patients, or use an engine whose bound holds for trained weights only.
        gate: how runs are charged: "sum" adds up their (epsilon, delta), "rdp" their Renyi DP, which leaves room for
            more runs. It never changes once the ledger is open.
        max_rounds, max_steps: of one run; steps are all training steps, rounds times local steps.
        tasks, models: kinds of task and names of models, as RUN.toml writes them.
        purposes: words of which [study] purpose must be one.
        launchers: who may launch, by name, each with the OpenSSH text of their Ed25519 public key. Named, a run needs
            that person's signature; empty, whom the coordinator lets through.
        ethics_approval, data_use_agreement: what [study] must name, word for word, until `agreement_until`.
        evaluation, groups: whether the site answers the private evaluation, and by which attributes.
        approval: whether a person here must approve each run.
        valid_until: the last day on which anything is done at all.
        epsilon_per_year: of the runs admitted within 365 days, a rate limit inside the lifetime budget.
        two_people: what two named people must agree on.
    """

    max_epsilon: float
    max_delta: float
    min_noise_multiplier: float = 0.3
    research_cohort: bool = False
    gate: Literal["sum", "rdp"] = "sum"
    max_rounds: int | None = None
    max_steps: int | None = None
    tasks: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    purposes: tuple[str, ...] = ()
    launchers: Mapping[str, str] = field(default_factory=dict)
    ethics_approval: str = ""
    data_use_agreement: str = ""
    agreement_until: date | None = None
    evaluation: bool = True
    groups: tuple[Group, ...] = ("sex", "age")
    approval: Literal["manual", "auto-within-policy"] = "manual"
    valid_until: date | None = None
    epsilon_per_year: float | None = None
    two_people: tuple[Literal["budget", "quarantine"], ...] = ()


def refusal(
    policy: Policy, run: RunConfig, plan: SitePlan | None, order: Order | None = None, today: date | None = None
) -> str | None:
    """Why this site will not take part, all reasons in one line, or None.

    Args:
        policy: the site's.
        run: what is asked.
        plan: what follows from the run and the site's declared size. None before it is made, which takes seconds for a
            long run: then nothing that follows from it is looked at.
        order: who asks; None where nobody has signed yet: then who may launch is not looked at.
        today: default the day it is.
    """
    reasons = [*_doors(policy, run), *_limits(policy, run, plan), *_study(policy, run, today or date.today())]
    if order is not None:
        reasons += _launcher(policy, order)
    return "; ".join(reasons) or None


def _doors(policy: Policy, run: RunConfig) -> Iterator[str]:
    """What is for research only."""
    if policy.research_cohort:
        return
    if not run.privacy.enabled:
        yield "this site trains only with privacy enabled"
    if run.privacy.unit != "patient":
        yield "this site protects patients, not single images (privacy.unit)"
    if run.privacy.engine == "opacus":
        # Per-row hooks run all patients in one batch; weights chosen by a malicious server can blow its rounding up
        # until one patient moves the sum by more than C (tests/client/dp/test_engine.py).
        yield "this site wants a bound for any weights: privacy.engine = 'bookkeeping' or 'loop'"


def _limits(policy: Policy, run: RunConfig, plan: SitePlan | None) -> Iterator[str]:
    if run.privacy.enabled and plan is not None:
        allowed = policy.max_epsilon if policy.epsilon_per_year is None else policy.epsilon_per_year
        allowed = min(allowed, policy.max_epsilon)
        # "not": a limit that is no number lets nothing through
        if not (plan.epsilon <= policy.max_epsilon and plan.epsilon <= allowed):
            yield f"the run asks for epsilon {plan.epsilon:.4g}, this site allows {allowed:g}"
        if not plan.delta <= policy.max_delta:
            yield f"the run asks for delta {plan.delta:g}, this site allows {policy.max_delta:g}"
        noise = min(plan.noise_multiplier, plan.evaluation_noise or plan.noise_multiplier)
        if not noise >= policy.min_noise_multiplier:
            yield f"the run adds noise {noise:.3g}, this site's floor is {policy.min_noise_multiplier:g}"
    rounds, steps = run.train.rounds, run.train.rounds * run.train.local_steps
    if policy.max_rounds is not None and not rounds <= policy.max_rounds:
        yield f"the run takes {rounds} rounds, this site allows {policy.max_rounds}"
    if policy.max_steps is not None and not steps <= policy.max_steps:
        yield f"the run takes {steps} training steps, this site allows {policy.max_steps}"
    if policy.tasks and run.task.kind not in policy.tasks:
        yield f"this site's tasks are {_list(policy.tasks)}, not '{run.task.kind}'"
    if policy.models and run.model.name not in policy.models:
        yield f"this site's models are {_list(policy.models)}, not '{run.model.name}'"
    if run.evaluation.private and run.privacy.enabled:
        if not policy.evaluation:
            yield "this site answers no evaluation: evaluation.private = false"
        elif unwanted := [group for group in run.evaluation.groups if group not in policy.groups]:
            yield f"this site answers no evaluation by {_list(unwanted)} (evaluation.groups)"


def _study(policy: Policy, run: RunConfig, today: date) -> Iterator[str]:
    study = run.study
    if policy.valid_until is not None and today > policy.valid_until:
        yield f"this site's policy ended on {policy.valid_until}"
    if policy.purposes and study.purpose not in policy.purposes:
        yield f"this site's purposes are {_list(policy.purposes)}: study.purpose must be one of them"
    for key in ("ethics_approval", "data_use_agreement"):
        wanted = getattr(policy, key)
        if wanted and getattr(study, key) != wanted:
            yield f"the run must name study.{key} = '{wanted}'"
    if policy.agreement_until is not None and today > policy.agreement_until:
        yield f"this site's ethics approval or agreement ended on {policy.agreement_until}"


def _launcher(policy: Policy, order: Order) -> Iterator[str]:
    if not policy.launchers:
        return
    key = policy.launchers.get(order.launcher)
    if key is None:
        yield f"at this site only {_list(sorted(policy.launchers))} may launch"
    elif not orders.signed_by(order, key):
        yield f"the order is not signed with the key by which this site knows {order.launcher}"


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


# ---------------------------------------------------------------------------------------------------------- published


def public(policy: Policy, name: str, patients_declared: int, remaining: tuple[float, float]) -> dict[str, Any]:
    """What the site publishes of itself, fit for JSON: its whole policy, its declared size, what is left to spend.

    Args:
        policy: the site's.
        name: the site's.
        patients_declared: typed by a person.
        remaining: epsilon and delta that the ledger would still admit now; they follow from the plans admitted so far.
    """
    told: dict[str, Any] = {"site": name, "patients_declared": patients_declared}
    told["remaining"] = {"epsilon": remaining[0], "delta": remaining[1]}
    for it in dataclasses.fields(Policy):
        value = getattr(policy, it.name)
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = dict(value)
        elif isinstance(value, date):
            value = value.isoformat()
        told[it.name] = value
    return told


def from_public(tree: Mapping[str, Any]) -> tuple[Policy, int]:
    """The policy that `public` wrote, and the declared size; of the budget only what is left counts.

    The site decides again on arrival: what a coordinator checks with this saves a researcher a wait, no more.

    Raises:
        ConfigError: another version's, or a value that is none.
    """
    rest = {key: value for key, value in tree.items() if key not in ("site", "patients_declared", "remaining")}
    try:
        policy = _POLICY.validate_python(rest)
        declared = _SIZE.validate_python(tree["patients_declared"])
        left = _LEFT.validate_python(tree["remaining"])
        sound = set(left) == {"epsilon", "delta"} and all(value >= 0 for value in left.values()) and declared >= 0
        unknown = sorted(set(rest) - {it.name for it in dataclasses.fields(Policy)})
        wrong = fault(policy) or "".join(unknown)[:60] or ("" if sound else "remaining or patients_declared")
    except (ValidationError, KeyError) as error:
        said = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else str(error)
        wrong = said[:60] or "it"
    if wrong:
        raise ConfigError(f"A site's public policy is none: {wrong}.", remedy="Install the same fedscan version.")
    epsilon, delta = min(policy.max_epsilon, left["epsilon"]), min(policy.max_delta, left["delta"])
    return dataclasses.replace(policy, max_epsilon=epsilon, max_delta=delta), declared


def fault(policy: Policy) -> str | None:
    """The key of the policy that cannot mean what a person meant, with why, or None; types are right already."""
    for key in ("max_rounds", "max_steps"):
        if (most := getattr(policy, key)) is not None and most < 1:
            return f"{key} must be at least 1"
    if policy.epsilon_per_year is not None and not 0 <= policy.epsilon_per_year < math.inf:
        return "epsilon_per_year is no number from 0"
    for name, key in policy.launchers.items():
        if not _is_key(key):
            return f"launchers.{name} is no Ed25519 public key (a line that begins with ssh-ed25519)"
    texts = (*policy.tasks, *policy.models, *policy.purposes, *policy.launchers)
    for text in (*texts, policy.ethics_approval, policy.data_use_agreement):
        if not text.isprintable() or len(text) > 200:
            return "a text is longer than 200 characters, or holds one that cannot be printed"
    if policy.agreement_until is not None and not (policy.ethics_approval or policy.data_use_agreement):
        return "agreement_until says when something ends: name ethics_approval or data_use_agreement"
    return None


def _is_key(text: str) -> bool:
    """Whether a text is the OpenSSH form of an Ed25519 public key."""
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        return False
    return isinstance(key, Ed25519PublicKey)


_POLICY = TypeAdapter(Policy)
_SIZE = TypeAdapter(int)
_LEFT = TypeAdapter(dict[str, float])
