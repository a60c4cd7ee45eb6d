"""Per-patient clipped gradients: the sum over patients of each patient's mean gradient, clipped to the norm C.

Guarantee: adding or removing one patient (all rows of one unit) changes the sum by at most C in L2 norm, whatever the
images and whatever the weights. Each unit's contribution depends on its own rows alone, bit for bit, and has a norm of
at most C * (1 - MARGIN); units are added up in float64. The margin covers the rounding of norms (1e-5) and of sums. A
unit whose gradient is not finite contributes zero. A unit is never split between chunks, so chunking for memory changes
nothing.

Engines: "bookkeeping" (default) does it in one forward and one backward pass over units in fixed slots; it checks
itself on random data first (`dp.plans`) and leaves to the loop what it cannot do. "loop" takes one backward pass per
unit: the plain reference. "opacus" forms per-row gradients by Opacus' hooks; it computes units in one common batch of
any size, and weights whose logits cancel down to their own rounding make every row's gradient depend on that size: the
bound holds for weights as they come from training, not for weights that a malicious server chose
(tests/client/dp/test_engine.py). Hospitals refuse it.

Assumed: no layer mixes the rows of a batch or keeps a state (`fedscan_models.dp_ready` refuses those that do). Random
layers (dropout) draw anew for every unit, from the operating system's entropy.

Legend: B rows (images and their views), U units (patients), P entries of one parameter.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedscan_client.dp import bookkeeping, heap, plans, ways

MARGIN = 1e-3
SMALLEST = 1e-12  # clipping norm: squares of gradients far smaller vanish in float32
_GRADIENT_BYTES = 512 * 2**20  # per-row gradients held at once, about
_MOST_ROWS = 256
_ROWS_AT_ONCE = 64  # of one unit in the plain loop: bounds memory whatever the unit holds

LossRows = Callable[[Tensor, Tensor], Tensor]  # (outputs_BK, targets_B) -> loss_B
Clip = float | Literal["auto"]
Engine = Literal["bookkeeping", "loop", "opacus"]


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
    engine: Engine = "bookkeeping",
) -> list[Tensor]:
    """The sum over units of the unit's mean gradient, clipped.

    Args:
        module: the network, in training mode; its gradients and hooks are left as they were found.
        loss_rows: loss of every row.
        x_B: inputs, the rows of one unit after another.
        y_B: targets of the rows.
        sizes: rows of each unit, in order; they add up to B. Zero rows contribute zero.
        clip: C, or "auto" for g / (|g| + 0.01) (Bu et al. 2022, arXiv 2206.07136), whose C is 1.
        engine: see above.

    Returns:
        One float64 tensor per trainable parameter, in the order of `module.parameters()`.
    """
    if sum(sizes) != len(x_B) or len(y_B) != len(x_B) or any(size < 0 for size in sizes):
        raise ValueError("sizes do not add up to the rows: refuse to guess which image belongs to whom")
    if not SMALLEST <= sensitivity(clip) <= 1 / SMALLEST:
        raise ValueError("a clipping norm that float32 gradients cannot be measured by")
    parameters = [p for p in module.parameters() if p.requires_grad]
    sums: dict[Tensor, Tensor] = {}  # of the parameters for which there is something to add
    first, units = 0, list[slice]()
    for size in sizes:
        if size:
            units.append(slice(first, first + size))
        first += size
    if engine == "bookkeeping" and parameters:
        heap.keep_freed()
        units = _bookkept(sums, module, loss_rows, x_B, y_B, units, clip)
    if engine == "opacus":
        _add_by_hooks(sums, module, parameters, loss_rows, x_B, y_B, units, clip)
    else:
        _add_by_loop(sums, module, parameters, loss_rows, x_B, y_B, units, clip)
    return [sums[p] if p in sums else torch.zeros_like(p, dtype=torch.float64) for p in parameters]


def _bookkept(
    sums: dict[Tensor, Tensor],
    module: nn.Module,
    loss_rows: LossRows,
    x_B: Tensor,
    y_B: Tensor,
    units: list[slice],
    clip: Clip,
) -> list[slice]:
    """Adds what book-keeping can do to the sums, by size class; returns the units that are left for the loop."""
    left: list[slice] = []
    by_size: dict[int, list[slice]] = {}
    for unit in units:
        by_size.setdefault(bookkeeping.size_class(unit.stop - unit.start), []).append(unit)
    for size, some in sorted(by_size.items()):
        plan = plans.plan_for(module, loss_rows, x_B, y_B, size)
        if plan is None:
            left += some
            continue
        bookkeeping.add_clipped_sum(
            plan, module, loss_rows, x_B, y_B, some, lambda square: _factors(square, clip), sums
        )
    return left


def _factors(square_U: Tensor, clip: Clip) -> Tensor:
    """float64 scale of each unit from its squared norm (float64); 0 for one that is not finite."""
    norm_U = square_U.sqrt()
    bound = sensitivity(clip) * (1 - MARGIN)
    factor_U = bound / (norm_U + 0.01) if clip == "auto" else (bound / norm_U.clamp_min(1e-300)).clamp_max(1.0)
    return torch.where(torch.isfinite(norm_U), factor_U, 0.0)


def _chunks(units: Sequence[slice], parameters: Sequence[Tensor]) -> list[list[slice]]:
    """Chunks of whole units whose gradients, also in float64, fit _GRADIENT_BYTES."""
    per_row = 12 * sum(p.numel() for p in parameters)
    most = max(1, min(_MOST_ROWS, _GRADIENT_BYTES // max(per_row, 1)))
    chunks: list[list[slice]] = []
    rows = 0
    for unit in units:
        size = unit.stop - unit.start
        if not chunks or rows + size > most:
            chunks.append([])
            rows = 0
        chunks[-1].append(unit)
        rows += size
    return chunks


def _add_by_hooks(
    sums: dict[Tensor, Tensor],
    module: nn.Module,
    parameters: list[nn.Parameter],
    loss_rows: LossRows,
    x_B: Tensor,
    y_B: Tensor,
    units: list[slice],
    clip: Clip,
) -> None:
    """Adds the units' clipped gradients to the sums, chunk by chunk."""
    for inside in _chunks(units, parameters):
        # In float64: float32 cannot hold the factor of a huge gradient or a tiny C, and would round it up.
        gradients_UP = [g.double() for g in _by_hooks(module, parameters, loss_rows, x_B, y_B, inside)]
        factor_U = _factors(torch.stack([(g * g).sum(1) for g in gradients_UP]).sum(0), clip)
        for parameter, gradient_UP in zip(parameters, gradients_UP, strict=True):
            if not factor_U.all():
                gradient_UP.masked_fill_(factor_U.view(-1, 1) == 0, 0.0)  # NaN times 0 would be NaN
            _sum_of(sums, parameter).add_((factor_U @ gradient_UP).view(parameter.shape))


def _by_hooks(
    module: nn.Module, parameters: list[nn.Parameter], loss_rows: LossRows, x_B: Tensor, y_B: Tensor, units: list[slice]
) -> list[Tensor]:
    """Per-unit mean gradients through Opacus: per-row gradients by hooks, summed by unit.

    Convolutions with a padding mode other than zeros go through functorch: the hooks' sampler ignores the mode.
    """
    from opacus.grad_sample import GradSampleModule  # here: importing Opacus takes seconds

    sizes = [unit.stop - unit.start for unit in units]
    rows = torch.cat([torch.arange(unit.start, unit.stop) for unit in units]).to(x_B.device)
    x_B, y_B = x_B[rows], y_B[rows]
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


def _add_by_loop(
    sums: dict[Tensor, Tensor],
    module: nn.Module,
    parameters: list[nn.Parameter],
    loss_rows: LossRows,
    x_B: Tensor,
    y_B: Tensor,
    units: list[slice],
    clip: Clip,
) -> None:
    """Adds the units' clipped gradients to the sums: one ordinary backward pass per unit. Slow, plain, exact."""
    for unit in units:
        with torch.random.fork_rng():
            # For random layers: a seed that others may know, or a draw counted on from other units, would tie units.
            torch.manual_seed(int.from_bytes(os.urandom(8), "big"))
            gradient = _plain_gradient(module, parameters, loss_rows, x_B, y_B, unit)
        squares = [ways.squared_norms(g.reshape(1, -1)) for g in gradient]
        factor = float(_factors(torch.stack(squares).sum(0), clip))
        if factor:
            for parameter, found in zip(parameters, gradient, strict=True):
                _sum_of(sums, parameter).add_(found, alpha=factor)


def _sum_of(sums: dict[Tensor, Tensor], parameter: Tensor) -> Tensor:
    """The parameter's sum so far: zeros at first."""
    if parameter not in sums:
        sums[parameter] = torch.zeros_like(parameter, dtype=torch.float64)
    return sums[parameter]


def _plain_gradient(
    module: nn.Module, parameters: list[nn.Parameter], loss_rows: LossRows, x_B: Tensor, y_B: Tensor, unit: slice
) -> list[Tensor]:
    """The unit's mean gradient."""
    gradient: list[Tensor] = []
    for begin in range(unit.start, unit.stop, _ROWS_AT_ONCE):
        part = slice(begin, min(begin + _ROWS_AT_ONCE, unit.stop))
        own = x_B[part].clone()  # a slice's place in memory can choose another kernel
        loss = loss_rows(module(own), y_B[part].clone()).sum() / (unit.stop - unit.start)
        more = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradient = [a + b for a, b in zip(gradient, more, strict=True)] if gradient else list(more)
    return gradient
