"""An attack on our own training: canary patients through the real `train_round`, and what the weights give away.

A smoke test, not a proof: it catches lies (a clip that does not clip, noise that is missing or repeats), it cannot show
that there are none. Synthetic patients only: no image and no ledger is touched.

Black box: patients go in, final weights come out. Everything between is the code that a hospital runs, with the run's
privacy settings (engine, clip, images per patient, views, sampling rate, steps in rounds) and the sigma that the
accountant seals for it. The networks are the audit's own, and so are optimizer and learning rate (plain descent):
all of them public, whatever the guarantee is worth must hold for any of them. Three probes:

- canaries: a linear network with one weight per canary patient, who moves nothing but that weight, as far as the clip
  lets them. Half are in, each by a fair coin. From the weights the audit guesses who; `audit_bounds` says what that is
  worth, as a lower bound on epsilon beside the claimed one.
- nobody: a small convolutional network at a site without patients, and twice at one whose only patient is never
  sampled. Every tensor must have moved by noise of the claimed size, and differently each time.
- layers: the same network and one patient with large gradients in every layer; together they may move by C a step.

False alarms: an honest pipeline fails with probability at most 1/1000; each check has its share (`LEVELS`).
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedscan import audit_bounds, audit_probes
from fedscan.audit_probes import Changes, with_train
from fedscan_core import accounting
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError

NOTE = "Synthetic patients only; a smoke test, not a proof."
# Probability that an honest pipeline fails a check; they add up to 1/1000.
LEVELS = {
    "one-run bound": 5e-4,
    "Gaussian bound": 1e-4,
    "noise with patients": 1e-4,
    "noise without patients": 1e-4,
    "fresh noise": 1e-4,
    "all layers clipped": 1e-4,
}
_LAYER_STEPS = 100  # the layers probe needs no more

Watch = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class Check:
    """One question asked of the weights. `p_value` is an honest pipeline's; below `level` the check has failed."""

    name: str
    p_value: float
    level: float
    found: str
    expected: str

    @property
    def passed(self) -> bool:
        """Whether an honest pipeline could have given this."""
        return self.p_value > self.level


@dataclass(frozen=True)
class Report:
    """What the audit found. Epsilons are at `delta`, for the training steps that were run (`steps` of the plan's)."""

    plan: SitePlan
    steps: int
    canaries: int
    claimed_epsilon: float
    one_run_epsilon: float
    one_run_reach: float  # the bound if every guess had been right
    gaussian_epsilon: float
    seen_influence: float
    seen_noise: float
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values; for --json and audit.json. An infinite epsilon is null."""
        tree = dataclasses.asdict(self)
        for part in (tree, tree["plan"]):
            part.update({k: None for k, v in part.items() if isinstance(v, float) and not math.isfinite(v)})
        tree["checks"] = [{**dataclasses.asdict(check), "passed": check.passed} for check in self.checks]
        return {"passed": self.passed, "note": NOTE, **tree}


def audit(
    run: RunConfig,
    *,
    canaries: int = 2000,
    patients_declared: int | None = None,
    seconds: float = 75.0,
    watch: Watch = lambda done, total: None,
) -> Report:
    """Runs the three probes.

    Args:
        run: the experiment whose privacy settings are put to the test.
        canaries: canary patients; half of them take part.
        patients_declared: declared cohort of the site that is imitated, default simulation.patients.
        seconds: how long the canaries may take, about. Where the plan's steps would take longer, fewer are run, whole
            rounds if possible, and compared with what is claimed for as many.
        watch: told about progress.

    Raises:
        ConfigError: a run without privacy, or too few or too many canaries.
        PrivacyError: as `accounting.plan_for`.
    """
    if not run.privacy.enabled:
        raise ConfigError("This run has no privacy: there is no claim to audit.", remedy="Set privacy.enabled = true.")
    if not 100 <= canaries <= 20_000:
        raise ConfigError(f"{canaries} canaries are not between 100 and 20000.", remedy="Correct --canaries.")
    began = time.monotonic()
    plan = accounting.plan_for(run, run.simulation.patients if patients_declared is None else patients_declared)
    run = _shortened(run, plan, canaries, seconds)
    steps = run.train.rounds * run.train.local_steps
    layer_run = with_train(run, rounds=1, local_steps=min(steps, _LAYER_STEPS))
    total = 4 * steps + layer_run.train.local_steps
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        watch(done, total)

    tell(0)
    score, inside = audit_probes.canary_scores(run, plan, canaries, tell)
    report_canaries, numbers = _judge_canaries(score, inside, plan, steps)
    nobody = audit_probes.nobody_changes(run, plan, tell)
    patient = audit_probes.layer_change(layer_run, plan, tell)
    checks = (*report_canaries, *_judge_noise(nobody, plan, steps), _judge_layers(patient, plan, layer_run))
    return Report(plan, steps, canaries, **numbers, checks=checks, seconds=time.monotonic() - began)


def _shortened(run: RunConfig, plan: SitePlan, canaries: int, seconds: float) -> RunConfig:
    """The run with as many of its steps as fit into the time, from how long one step takes."""
    once = with_train(run, rounds=1, local_steps=1)
    took = []
    for _ in range(2):  # the first one also warms up
        began = time.monotonic()
        audit_probes.canary_scores(once, plan, canaries)
        took.append(time.monotonic() - began)
    fits = max(1, int(seconds / max(took[-1], 1e-6)))
    rounds = min(run.train.rounds, fits // run.train.local_steps)
    return with_train(run, rounds=rounds) if rounds else with_train(run, rounds=1, local_steps=fits)


# ------------------------------------------------------------------------------------------------------------- verdicts


def _judge_canaries(
    score: np.ndarray, inside: np.ndarray, plan: SitePlan, steps: int
) -> tuple[tuple[Check, ...], dict[str, float]]:
    claimed, canaries = accounting.epsilon(plan.events(steps), plan.delta), len(score)
    one_run, gaussian, noise = LEVELS["one-run bound"], LEVELS["Gaussian bound"], LEVELS["noise with patients"]
    separation = math.sqrt(steps) * plan.sampling_rate / plan.noise_multiplier
    guesses = audit_bounds.guesses_for(canaries, separation, plan.delta, one_run)
    right = audit_bounds.right_guesses(score, inside, guesses)
    law = audit_bounds.GaussianLaw(int(inside.sum()), int((~inside).sum()), plan.sampling_rate, steps)
    ratio = audit_bounds.ratio(score, inside)
    deviation = math.sqrt(steps) * plan.noise_multiplier
    numbers = {
        "claimed_epsilon": claimed,
        "one_run_epsilon": audit_bounds.one_run_epsilon(canaries, guesses, right, plan.delta, one_run),
        "one_run_reach": audit_bounds.one_run_epsilon(canaries, guesses, guesses, plan.delta, one_run),
        "gaussian_epsilon": law.epsilon(ratio, plan.delta, gaussian),
        "seen_influence": law.seen_influence(plan.noise_multiplier, gaussian),
        "seen_noise": audit_bounds.seen_noise(sum(p.numel() for p in audit_probes.Layers(1.0).parameters()), 1e-5),
    }
    checks = (
        Check(
            "one-run bound",
            audit_bounds.one_run_p_value(canaries, guesses, right, claimed, plan.delta),
            one_run,
            f"epsilon >= {numbers['one_run_epsilon']:.2f} ({right} of {guesses} right)",
            f"<= {claimed:.2f}",
        ),
        Check(
            "Gaussian bound",
            law.p_value(ratio, plan.noise_multiplier),
            gaussian,
            f"epsilon >= {numbers['gaussian_epsilon']:.2f}",
            f"<= {claimed:.2f}",
        ),
        Check(
            "noise with patients",
            audit_bounds.level_p_value(score[~inside], deviation, centred=True),
            noise,
            f"{score[~inside].std() / deviation:.3f} of planned",
            "1",
        ),
    )
    return checks, numbers


def _judge_noise(nobody: tuple[Changes, Changes, Changes], plan: SitePlan, steps: int) -> tuple[Check, Check]:
    """Tensor by tensor and all together, each site by itself: noise that one tensor or one site lacks stands out."""
    deviation = math.sqrt(steps) * plan.noise_multiplier
    whole = [np.concatenate(list(change.values())) for change in nobody]
    parts = [*whole, *(part for change in nobody for part in change.values())]
    p_values = [audit_bounds.level_p_value(part, deviation) for part in parts]
    p_value, level = min(1.0, len(parts) * min(p_values)), LEVELS["noise without patients"]
    shown = np.concatenate(whole) if p_value > level else parts[int(np.argmin(p_values))]
    found = f"{_spread(shown) / deviation:.3f} of planned, in {shown.size} weights"
    correlation = audit_bounds.correlation(*whole[1:])
    return (
        Check("noise without patients", p_value, level, found, "1"),
        Check(
            "fresh noise",
            audit_bounds.correlation_p_value(correlation, whole[0].size),
            LEVELS["fresh noise"],
            f"two runs correlate {correlation:.3f}",
            "0",
        ),
    )


def _spread(values: np.ndarray) -> float:
    return math.sqrt(float(np.mean(values**2)))


def _judge_layers(change: Changes, plan: SitePlan, run: RunConfig) -> Check:
    steps = run.train.local_steps
    deviation = math.sqrt(steps) * plan.noise_multiplier
    whole = np.concatenate(list(change.values()))
    moved = _spread(whole) / deviation
    expected = math.sqrt(1 + steps**2 / (whole.size * deviation**2))
    p_value = audit_bounds.energy_p_value(whole, deviation, float(steps))
    level = LEVELS["all layers clipped"]
    most = max(change, key=lambda name: float(np.mean(change[name] ** 2)))
    where = f", most in {most}" if not p_value > level else ""
    found = f"moved {moved:.4g} times the noise{where}"
    return Check("all layers clipped", p_value, level, found, f"<= about {expected:.3f}")
