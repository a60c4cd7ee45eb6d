"""The audit's probes: its own networks and synthetic patients, put through the real `train_round`.

Black box: patients go in, the final weights come out. Nothing here looks at a gradient, a mask or a noise. What comes
back is every tensor's total movement in units of C, which for an honest pipeline is N(0, steps sigma^2) in every entry
plus, for each step that sampled a patient, a vector of norm at most 1.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedscan_client.cohort import Patients
from fedscan_client.dp import engine
from fedscan_client.train import train_round
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig

_IMAGES = 4  # of a canary patient
_GAIN = 1e6  # gradient of a canary in units of C: far above any clip

Changes = dict[str, np.ndarray]  # parameter -> what it moved by, flat
Tell = Callable[[int], None]  # so many more steps are done


def canary_scores(
    run: RunConfig, plan: SitePlan, canaries: int, tell: Tell = lambda steps: None
) -> tuple[np.ndarray, np.ndarray]:
    """(score, inside): each canary's total of noisy sums along its gradient, in units of C, and its coin."""
    inside = np.random.default_rng().random(canaries) < 0.5
    network = Dirac(canaries, _GAIN * engine.sensitivity(run.privacy.clip))
    patients = _canary_patients(np.flatnonzero(inside), run)
    change = _train(network, patients, run, plan, tell, scale=1.0)["linear.weight"]
    sign = np.where(np.arange(canaries) % 2 == 0, 1.0, -1.0)  # label 0 pushes the weight up its gradient, 1 down
    return -sign * change, inside


def nobody_changes(run: RunConfig, plan: SitePlan, tell: Tell = lambda steps: None) -> tuple[Changes, Changes, Changes]:
    """What every tensor moved by, in units of C: without patients, and twice with one never sampled (rate 1e-9)."""
    scale = _layer_scale(plan)
    nobody = Patients(torch.zeros(0, 1, 16, 16), torch.zeros(0, dtype=torch.int64), np.array([0]), ())
    rare = dataclasses.replace(plan, sampling_rate=1e-9)
    without = _train(Layers(_GAIN), nobody, run, plan, tell, scale=scale)
    never, again = (_train(Layers(_GAIN), _layer_patient(run), run, rare, tell, scale=scale) for _ in range(2))
    return without, never, again


def layer_change(run: RunConfig, plan: SitePlan, tell: Tell = lambda steps: None) -> Changes:
    """What every tensor moved by, in units of C, with one patient who takes part in every step (rate 1)."""
    gain = _GAIN * engine.sensitivity(run.privacy.clip)
    always = dataclasses.replace(plan, sampling_rate=1.0)
    return _train(Layers(gain), _layer_patient(run), run, always, tell, scale=_layer_scale(plan))


def _train(
    network: nn.Module,
    patients: Patients,
    run: RunConfig,
    plan: SitePlan,
    tell: Tell,
    *,
    scale: float,
) -> Changes:
    """All rounds through the real `train_round`; returns each tensor's noisy sums, added up, in units of C.

    The learning rate undoes the public divisor and C, so that a step moves a weight by `scale` times its noisy sum.
    """
    rate = scale * plan.sampling_rate * plan.patients_declared / engine.sensitivity(run.privacy.clip)
    run = with_train(run, optimizer="sgd", learning_rate=rate, momentum=0.0, weight_decay=0.0)
    run = run.model_copy(update={"aggregation": run.aggregation.model_copy(update={"strategy": "fedavg"})})
    start = {name: p.detach().double().clone() for name, p in network.named_parameters()}
    for round_ in range(1, run.train.rounds + 1):
        train_round(network, patients, run, plan, round_=round_, site="audit")
        tell(run.train.local_steps)
    with torch.no_grad():
        return {name: ((p.double() - start[name]) / scale).flatten().numpy() for name, p in network.named_parameters()}


def with_train(run: RunConfig, **train: Any) -> RunConfig:
    """The run with other values in its train section."""
    return run.model_copy(update={"train": run.train.model_copy(update=train)})


# ---------------------------------------------------------------------------------------------------- networks and data


class Steep(nn.Module):
    """A factor on the gradient that leaves the value at 0: no logit ever saturates, however steep.

    The loss's slope at 0 is 1/2, so a row's gradient is gain / 2 times that of what went in, up or down by its label.
    """

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """0, with a slope."""
        return self.gain * (x - x.detach())


class Dirac(nn.Module):
    """One weight for each canary; the input is the canary's number, [B, 1, 1, 1], made one-hot inside.

    A picture of one pixel is the same however it is mirrored or moved, so views of a canary stay that canary.
    """

    numbers_M: Tensor

    def __init__(self, canaries: int, gain: float) -> None:
        super().__init__()
        self.linear = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.register_buffer("numbers_M", torch.arange(canaries, dtype=torch.float32))
        self.steep = Steep(gain)

    def forward(self, x_B111: Tensor) -> Tensor:
        """[B, 1, 1, 1] -> [B, 1]."""
        one_hot_BM = x_B111.flatten(1) == self.numbers_M  # defined for any input: engines try networks on noise
        logit_B1: Tensor = self.steep(self.linear(one_hot_BM.to(x_B111.dtype)))
        return logit_B1


class Layers(nn.Module):
    """Two convolutions with group norm, and a linear layer: [B, 1, 16, 16] -> [B, 1]. Always the same start weights."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # public: start weights, no noise
            self.body = nn.Sequential(
                nn.Conv2d(1, 8, 3),
                nn.GroupNorm(2, 8),
                nn.Tanh(),
                nn.Conv2d(8, 16, 3, stride=2),
                nn.GroupNorm(2, 16),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(16 * 36, 1),
            )
        self.steep = Steep(gain)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 1, 16, 16] -> [B, 1]."""
        logit_B1: Tensor = self.steep(self.body(x_BCHW))
        return logit_B1


def _images(run: RunConfig) -> int:
    return 1 if run.privacy.unit == "image" else _IMAGES


def _canary_patients(numbers: np.ndarray, run: RunConfig) -> Patients:
    """Canaries of these numbers; the label is the number's parity."""
    each = _images(run)
    rows = torch.from_numpy(np.repeat(numbers, each))
    offsets = np.arange(len(numbers) + 1, dtype=np.int64) * each
    return Patients(rows.float().view(-1, 1, 1, 1), rows % 2, offsets, tuple(f"canary-{n}" for n in numbers))


def _layer_patient(run: RunConfig) -> Patients:
    each = _images(run)
    images = np.random.default_rng(0).random((each, 1, 16, 16), dtype=np.float32)
    return Patients(torch.from_numpy(images), torch.zeros(each, dtype=torch.int64), np.array([0, each]), ("canary",))


def _layer_scale(plan: SitePlan) -> float:
    """Small enough for the network to stay what it is while noise moves it."""
    return 1e-3 / (plan.noise_multiplier * math.sqrt(max(1, plan.steps)))
