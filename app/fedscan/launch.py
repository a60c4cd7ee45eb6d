"""What a run would meet at the hospitals, worked out before anything is sent; then the signed order that asks for it.

The sites' policies are public and so are their declared sizes: everything here follows from them and from RUN.toml.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save

from fedscan import people
from fedscan.profiles import Profile
from fedscan_core import accounting, config, order, policy, wire
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError, PrivacyError
from fedscan_core.order import Order
from fedscan_server import app as server_app

INIT = "init.safetensors"  # what model.init becomes: a file in the coordinator's run folder
ROUND_SECONDS = 3.0  # Flower's polling interval; of two sites on loopback scripts/bench/round.py found a median of 3.1
_LINK_BYTES = 125e6  # a second, at the coordinator: 1 Gbit/s
_SLACK = timedelta(days=7)  # for interruptions: an order that ran out ends its run


@dataclass(frozen=True)
class Prospect:
    """What one site would do, by its public policy.

    Attributes:
        plan: what it would spend, by its declared size; None where the run has no plan for that size.
        refusal: why it would refuse, or None.
        policy: as the site publishes it.
    """

    name: str
    online: bool
    last_seen: str
    patients_declared: int
    plan: SitePlan | None
    refusal: str | None
    policy: dict[str, Any]

    @property
    def approval(self) -> str:
        """Either manual, where a person there must approve each run, or auto-within-policy."""
        return str(self.policy.get("approval", "manual"))


@dataclass(frozen=True)
class Prospects:
    """The run as a whole. `faults`: why it would not start. Bytes are those of one site's model and update."""

    run: RunConfig
    order: Order
    sites: tuple[Prospect, ...]
    parameters: int
    bytes_down: int
    bytes_up: int
    faults: tuple[str, ...]

    @property
    def willing(self) -> tuple[Prospect, ...]:
        """The sites that would not refuse."""
        return tuple(site for site in self.sites if site.refusal is None)

    @property
    def least_minutes(self) -> float:
        """A lower bound: polling and a link of 1 Gbit/s at the coordinator; training comes on top, and approvals."""
        moved = (self.bytes_down + self.bytes_up) * len(self.willing)
        exchanges = self.run.train.rounds + 1 + (self.run.evaluation.private and self.run.privacy.enabled)
        return exchanges * max(ROUND_SECONDS, moved / _LINK_BYTES) / 60


def deployed(run: RunConfig) -> tuple[RunConfig, bytes]:
    """The run as it is sent, and its start weights as safetensors (b"" where they are random).

    Where images lie on this machine, and how many hospitals it pretends, is nobody's business and left out.

    Raises:
        ConfigError: the network or the file of model.init cannot be had.
    """
    model, _ = server_app.initial_model(run)
    clean = run.model_copy(update={"data": config.Data(), "simulation": config.Simulation()})
    if run.model.init == "random":
        return clean, b""
    return clean.model_copy(update={"model": run.model.model_copy(update={"init": INIT})}), save(model)


def make_order(run: RunConfig, profile: Profile, key: Ed25519PrivateKey, now: datetime) -> Order:
    """The signed order of a new run, valid for as long as it may take by its own limits, and a week more.

    Args:
        run: from `deployed`.
        profile: who launches, and where.
        key: the profile's.
        now: with a time zone.
    """
    limit = timedelta(hours=run.federation.approval_hours, minutes=run.federation.round_minutes) + _SLACK
    limit += timedelta(minutes=run.federation.round_minutes) * run.train.rounds
    issued = now.astimezone(UTC).replace(microsecond=0)
    until = issued + min(limit, order.LONGEST)
    told = Order(
        order.new_run_id(run.name), config.for_sites(run), profile.person, issued.isoformat(), until.isoformat()
    )
    return order.sign(told, key)


def look(run: RunConfig, signed: Order, enrolled: Sequence[people.Site], role: str, now: datetime) -> Prospects:
    """What each site would do, and what it would cost.

    Args:
        run: from `deployed`, or as it was read.
        signed: from `make_order`: sites may admit only certain launchers.
        enrolled: every site of the coordinator.
        role: the launcher's.
        now: policies end on dates.

    Raises:
        ConfigError: federation.sites names a site that is not enrolled.
    """
    known = {site.name: site for site in enrolled}
    for name in run.federation.sites:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Enrolled: {', '.join(known) or 'nobody yet'}."
            raise ConfigError(f"federation.sites: no site '{name}' is enrolled here.", remedy=hint)
    asked = [known[name] for name in dict.fromkeys(run.federation.sites)] or list(enrolled)
    prospects = tuple(_prospect(run, signed, site, now) for site in asked)
    shape, trainable = server_app.initial_model(run.model_copy(update={"model": _random(run)}))
    willing = sum(site.refusal is None for site in prospects)
    faults = []
    if willing < run.aggregation.min_sites:
        faults.append(
            f"{willing} of {len(prospects)} sites would take part; aggregation.min_sites asks for "
            f"{run.aggregation.min_sites}"
        )
    if role == "viewer":
        faults.append("you are a viewer at this coordinator, and viewers do not launch")
    return Prospects(
        run,
        signed,
        prospects,
        sum(array.size for array in shape.values()),
        wire.nbytes(shape),
        wire.nbytes({name: shape[name] for name in trainable}),
        tuple(faults),
    )


def _random(run: RunConfig) -> config.Model:
    return run.model.model_copy(update={"init": "random"})


def _prospect(run: RunConfig, signed: Order, site: people.Site, now: datetime) -> Prospect:
    try:
        allowed, patients = policy.from_public(site.policy)
    except ConfigError as error:
        return Prospect(site.name, site.online, site.last_seen, 0, None, f"its policy: {error.message}", site.policy)
    plan, refusal = None, None
    try:
        plan = accounting.plan_for(run, patients)
        refusal = policy.refusal(allowed, run, plan, order=signed, today=now.date())
    except PrivacyError as error:
        refusal = f"there is no plan for its {patients} patients: {error.message}"
    return Prospect(site.name, site.online, site.last_seen, patients, plan, refusal, site.policy)


def as_json(found: Prospects, profile: Profile) -> dict[str, Any]:
    """For scripts: everything that the page shows. An epsilon without bound is null."""
    run = found.run
    return {
        "coordinator": profile.coordinator,
        "address": profile.address,
        "launcher": profile.person,
        "run": run.name,
        "run_id": found.order.run_id,
        "study": run.study.model_dump(),
        "valid_until": found.order.valid_until,
        "privacy_enabled": run.privacy.enabled,
        "model": run.model.name,
        "parameters": found.parameters,
        "rounds": run.train.rounds,
        "bytes_down_per_round": found.bytes_down,
        "bytes_up_per_round": found.bytes_up,
        "minutes_at_least": round(found.least_minutes, 2),
        "min_sites": run.aggregation.min_sites,
        "willing": len(found.willing),
        "would_start": not found.faults,
        "faults": list(found.faults),
        "sites": [
            {
                "name": site.name,
                "online": site.online,
                "last_seen": site.last_seen,
                "patients_declared": site.patients_declared,
                "refusal": site.refusal,
                "approval": site.approval,
                "plan": _plain(site.plan),
                "policy": site.policy,
            }
            for site in found.sites
        ],
    }


def _plain(plan: SitePlan | None) -> dict[str, Any] | None:
    """JSON has no infinity."""
    if plan is None:
        return None
    values = asdict(plan).items()
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values}
