"""Per-patient clipped gradients: the sum over patients of each patient's mean gradient, clipped to the norm C.

Guarantee: adding or removing one patient (all rows of one unit) changes the sum by at most C in L2 norm. Each unit's
gradient is scaled to a norm of at most C * (1 - MARGIN); the margin covers what float32 adds: the rounding of the norm
and of the sum, the dependence of the forward pass on the batch it is computed in, and the noise's grid
(`dp.noise`). A unit whose gradient is not finite contributes zero. A unit is never split between chunks, so chunking
for memory changes nothing.

The margin is measured for networks as they are trained. The server picks the weights, and weights whose logits cancel
down to their own rounding make every row's gradient depend on the size of the batch it is computed in. Engine "loop"
computes each unit by itself and holds for any weights; "opacus" does not (tests/client/dp/test_engine.py).

Assumed: no layer mixes the rows of a batch (`fedscan_models.dp_ready` refuses those that do).

Legend: B rows (images and their views), U units (patients), P entries of one parameter.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

MARGIN = 1e-3
_GRADIENT_BYTES = 512 * 2**20  # per-row gradients held at once, about
_MOST_ROWS = 256
_ROWS_AT_ONCE = 64  # of one unit in the plain loop: bounds memory whatever the unit holds

LossRows = Callable[[Tensor, Tensor], Tensor]  # (outputs_BK, targets_B) -> loss_B
Clip = float | Literal["auto"]


def sensitivity(clip: Clip) -> float:
    """C: the L2 norm by which one patient can change `clipped_sum`. Automatic clipping has C = 1."""
    return 1.0 if clip == "auto" else clip


def clipped_sum(
    module: nn.Module,
    loss_rows: LossRows,
    x_B: Tensor,
    y_B: Tensor,
    sizes: Sequence[int],
    *,
    clip: Clip,
    engine: Literal["opacus", "loop"] = "opacus",
) -> list[Tensor]:
    """The sum over units of the unit's mean gradient, clipped.

    Args:
        module: the network, in training mode; its gradients and hooks are left as they were found.
        loss_rows: loss of every row.
        x_B: inputs, the rows of one unit after another.
        y_B: targets of the rows.
        sizes: rows of each unit, in order; they add up to B. Zero rows contribute zero.
        clip: C, or "auto" for g / (|g| + 0.01) (Bu et al. 2022, arXiv 2206.07136), whose C is 1.
        engine: "opacus" (per-row gradients by hooks) or "loop" (one backward per unit: the plain reference).

    Returns:
        One float64 tensor per trainable parameter, in the order of `module.parameters()`.
    """
    if sum(sizes) != len(x_B):
        raise ValueError("sizes do not add up to the rows: refuse to guess which image belongs to whom")
    parameters = [p for p in module.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    chunk_gradients = _by_hooks if engine == "opacus" else _by_loop
    for first, last, inside in _chunks(sizes, parameters):
        found_UP = chunk_gradients(module, parameters, loss_rows, x_B[first:last], y_B[first:last], inside)
        # In float64: float32 cannot hold the factor of a huge gradient or a tiny C, and would round it up.
        gradients_UP = [gradient_UP.double() for gradient_UP in found_UP]
        factor_U = _factors(gradients_UP, clip)
        for total, gradient_UP in zip(sums, gradients_UP, strict=True):
            if not factor_U.all():
                gradient_UP.masked_fill_(factor_U.view(-1, 1) == 0, 0.0)  # NaN times 0 would be NaN
            total += (factor_U @ gradient_UP).view_as(total)
    return sums


def _factors(gradients_UP: list[Tensor], clip: Clip) -> Tensor:
    """float64 scale of each unit; 0 for one that is not finite. Norms in float64: float32 sums come out low."""
    square_U = torch.stack([(g * g).sum(1) for g in gradients_UP]).sum(0)
    norm_U = square_U.sqrt()
    bound = sensitivity(clip) * (1 - MARGIN)
    factor_U = bound / (norm_U + 0.01) if clip == "auto" else (bound / norm_U.clamp_min(1e-300)).clamp_max(1.0)
    return torch.where(torch.isfinite(norm_U), factor_U, 0.0)


def _chunks(sizes: Sequence[int], parameters: Sequence[Tensor]) -> list[tuple[int, int, list[int]]]:
    """(first row, last row, sizes) of chunks of whole units whose gradients, also in float64, fit _GRADIENT_BYTES."""
    per_row = 12 * sum(p.numel() for p in parameters)
    most = max(1, min(_MOST_ROWS, _GRADIENT_BYTES // max(per_row, 1)))
    chunks: list[tuple[int, int, list[int]]] = []
    first, inside = 0, list[int]()
    for size in sizes:
        if size == 0:
            continue
        if inside and sum(inside) + size > most:
            chunks.append((first, first + sum(inside), inside))
            first, inside = first + sum(inside), []
        inside.append(size)
    return [*chunks, (first, first + sum(inside), inside)] if inside else chunks


def _by_hooks(
    module: nn.Module, parameters: list[nn.Parameter], loss_rows: LossRows, x_B: Tensor, y_B: Tensor, sizes: list[int]
) -> list[Tensor]:
    """Per-unit mean gradients through Opacus: per-row gradients by hooks, summed by unit.

    Convolutions with a padding mode other than zeros go through functorch: the hooks' sampler ignores the mode.
    """
    padded = any(getattr(layer, "padding_mode", "zeros") != "zeros" for layer in module.modules())
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    sampler = GradSampleModule(module, loss_reduction="sum", strict=False, force_functorch=padded)
    try:
        with warnings.catch_warnings():  # torch remarks that pixels need no gradient: true, and as it should be
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss_rows(sampler(x_B), y_B).sum().backward()
        count_U = torch.tensor(sizes, device=x_B.device)
        unit_B = torch.repeat_interleave(torch.arange(len(sizes), device=x_B.device), count_U)
        gradients_UP = []
        for parameter in parameters:
            per_row = getattr(parameter, "grad_sample", None)
            if not isinstance(per_row, Tensor) or len(per_row) != len(x_B):
                raise RuntimeError("a parameter has no per-row gradient: the bound would not hold")
            summed_UP = per_row.new_zeros(len(sizes), parameter.numel()).index_add_(0, unit_B, per_row.flatten(1))
            gradients_UP.append(summed_UP / count_U.view(-1, 1))
        return gradients_UP
    finally:
        sampler.to_standard_module()
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        for thing in (*module.modules(), *parameters):  # Opacus keeps activations and more where a pass did not end
            for name in ("activations", "max_batch_len", "grad_sample", "_current_grad_sample", "_forward_counter"):
                vars(thing).pop(name, None)


def _by_loop(
    module: nn.Module, parameters: list[nn.Parameter], loss_rows: LossRows, x_B: Tensor, y_B: Tensor, sizes: list[int]
) -> list[Tensor]:
    """Per-unit mean gradients by one ordinary backward pass per unit: slow, plain, exact."""
    rows: list[list[Tensor]] = []
    first = 0
    for size in sizes:
        total = [parameter.new_zeros(parameter.numel()) for parameter in parameters]
        for begin in range(first, first + size, _ROWS_AT_ONCE):
            part = slice(begin, min(begin + _ROWS_AT_ONCE, first + size))
            own = x_B[part].clone()  # a slice's place in memory can choose another kernel
            loss = loss_rows(module(own), y_B[part]).sum() / size
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            for so_far, more in zip(total, gradient, strict=True):
                so_far += more.reshape(-1)
        rows.append(total)
        first += size
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]
