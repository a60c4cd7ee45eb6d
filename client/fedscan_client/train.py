"""One round of local training: DP-SGD over patients, and the model delta that may leave.

Guarantee of `train_round` with privacy enabled, for one round of S steps: the returned delta is a post-processing of S
runs of the Poisson-sampled Gaussian mechanism with rate plan.sampling_rate, L2 sensitivity C and noise standard
deviation plan.noise_multiplier * C (unit: patient, adjacency: add or remove one), composed adaptively. Everything else
it uses (start weights, divisor, learning rate, weight decay, proximal pull, number of steps) is public. An empty
sample still takes its noisy step. A patient whose images cannot be decoded (`cohort` leaves those out) or whose
gradient is not finite contributes zero. Source: Abadi et al. 2016 (arXiv 1607.00133), with the patient as the unit.

Every sampled patient takes part: memory is bounded by walking over blocks of whole patients, whose float64 sums are
added. For n sampled patients the rounding of the additions moves the sum by at most n^2 2^-53 C, so that of two cohorts
apart by n^2 2^-52 C: `dp.engine.MARGIN` covers it up to a million patients a step.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedscan_client.cohort import Patients
from fedscan_client.dp import engine, heap, sampling
from fedscan_client.dp.noise import SecretStream, add_noise
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_core.wire import Arrays
from fedscan_models import tasks

Uniform = Callable[[int], np.ndarray]
Block = tuple[Tensor, Tensor, list[int]]  # inputs and targets of whole patients, one after another; rows of each

_BLOCK_BYTES = 64 * 2**20  # of inputs at once; more only where one patient alone has more


def train_round(
    module: nn.Module, patients: Patients, run: RunConfig, plan: SitePlan, *, round_: int, site: str
) -> Arrays:
    """Trains from the module's current weights and returns the change of every trainable parameter.

    Args:
        module: holds the round's global model; holds the local one afterwards.
        patients: the site's training patients; may be empty.
        run: the run, all of it public.
        plan: the site's sealed plan.
        round_: from 1; with `site` and train.seed it fixes the randomness of a run without privacy.
        site: the site's name.

    Returns:
        name -> float32 delta.
    """
    start = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = _optimizer(parameters, run)
    module.train()
    for step in range(run.train.local_steps):
        if run.privacy.enabled:
            stream = SecretStream()  # fresh key from the operating system at every step
            gradients = _private_gradients(module, patients, run, plan, stream)
        else:
            gradients = _plain_gradients(module, patients, run, plan, _seeded(run.train.seed, site, round_, step))
        for parameter, gradient, origin in zip(parameters, gradients, start.values(), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            if run.aggregation.strategy == "fedprox":
                # After the noise and from public weights: costs no privacy (Li et al. 2020, arXiv 1812.06127).
                parameter.grad += run.aggregation.proximal_mu * (parameter.detach() - origin)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    heap.give_back()
    return {name: (p.detach() - start[name]).numpy() for name, p in module.named_parameters() if name in start}


def _private_gradients(
    module: nn.Module, patients: Patients, run: RunConfig, plan: SitePlan, stream: SecretStream
) -> list[Tensor]:
    """(clipped sum over the sampled patients + noise) / public divisor."""
    sensitivity = engine.sensitivity(run.privacy.clip)
    divisor = plan.sampling_rate * plan.patients_declared
    sums = _clipped_sums(module, patients, run, plan.sampling_rate, stream.uniform)
    noisy = add_noise(sums, plan.noise_multiplier * sensitivity, stream, sensitivity=sensitivity)
    return [total.div_(divisor) for total in noisy]


def _clipped_sums(module: nn.Module, patients: Patients, run: RunConfig, rate: float, uniform: Uniform) -> list[Tensor]:
    """The clipped gradients of one Poisson sample, added up in float64: exact, so never to be sent."""
    sums: list[Tensor] = []
    rows, sizes = _sample(patients, run, rate, uniform)
    for x_B, y_B, inside in _blocks(patients, run, rows, sizes, uniform):
        parts = engine.clipped_sum(
            module, tasks.loss_rows, x_B, y_B, inside, clip=run.privacy.clip, engine=run.privacy.engine
        )
        if sums:
            for total, part in zip(sums, parts, strict=True):
                total += part
        else:
            sums = parts
    return sums


def _plain_gradients(
    module: nn.Module, patients: Patients, run: RunConfig, plan: SitePlan, uniform: Uniform
) -> list[Tensor]:
    """The mean over the sampled patients of each one's mean gradient: the same layout without clipping and noise."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p) for p in parameters]
    rows, sizes = _sample(patients, run, plan.sampling_rate, uniform)
    for x_B, y_B, inside in _blocks(patients, run, rows, sizes, uniform):
        size_U = torch.tensor(inside, dtype=torch.int64)
        weight_B = torch.repeat_interleave(1.0 / size_U, size_U) / max(len(sizes), 1)
        for first in range(0, len(x_B), 256):
            part = slice(first, first + 256)
            loss = (tasks.loss_rows(module(x_B[part]), y_B[part]) * weight_B[part]).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
    return totals


def _sample(patients: Patients, run: RunConfig, rate: float, uniform: Uniform) -> tuple[np.ndarray, list[int]]:
    """Rows of the sampled patients' images, and how many each has; those without images are left out."""
    chosen = sampling.poisson(len(patients), rate, uniform)
    rows, sizes = sampling.images_of(chosen, patients.offsets, run.privacy.max_images_per_patient, uniform)
    return rows, [size for size in sizes if size]


def _blocks(
    patients: Patients, run: RunConfig, rows: np.ndarray, sizes: Sequence[int], uniform: Uniform
) -> Iterator[Block]:
    """Whole patients with all their augmented views, side by side, as many at a time as fit `_BLOCK_BYTES`.

    At least one block, perhaps empty: what the engine refuses must not depend on who was drawn.
    """
    views = run.train.multiplicity
    row_bytes = views * patients.inputs[:1].numel() * patients.inputs.element_size()
    most = _BLOCK_BYTES // max(row_bytes, 1)
    groups: list[list[int]] = [[]]
    held = 0
    for size in sizes:
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(size)
        held += size
    first = 0
    for inside in groups:
        last = first + sum(inside)
        index = torch.from_numpy(np.repeat(rows[first:last], views))
        x_B, y_B = patients.inputs[index], patients.targets[index]
        if run.train.augmentation != "none" and len(x_B):
            x_B = augment(x_B, run.train.augmentation, uniform)
        yield x_B, y_B, [size * views for size in inside]
        first = last


def augment(x_BCHW: Tensor, kind: str, uniform: Uniform) -> Tensor:
    """A random view of each image: mirrored with probability 1/2; "shift" also moves it by up to 1/16 of the side."""
    flip_B = torch.from_numpy(uniform(len(x_BCHW)) <= 0.5)
    x_BCHW = torch.where(flip_B.view(-1, 1, 1, 1), x_BCHW.flip(-1), x_BCHW)
    if kind == "shift":
        height, width = x_BCHW.shape[-2:]
        reach = (height // 16, width // 16)
        moves = [np.floor(uniform(len(x_BCHW)) * (2 * r + 1 - 1e-9)).astype(int) for r in reach]
        padded = nn.functional.pad(x_BCHW, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
        x_BCHW = torch.stack([x[:, i : i + height, j : j + width] for x, i, j in zip(padded, *moves, strict=True)])
    return x_BCHW


def _optimizer(parameters: list[nn.Parameter], run: RunConfig) -> torch.optim.Optimizer:
    settings = run.train
    if settings.optimizer == "adam":
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def _seeded(seed: int, site: str, round_: int, step: int) -> Uniform:
    """Reproducible uniforms for runs without privacy: the same whatever ran before and in which process."""
    key = hashlib.sha256(f"{seed}|{site}|{round_}|{step}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big")))
    return lambda count: 1.0 - generator.random(count)
