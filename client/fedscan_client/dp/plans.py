"""How chunks of one shape are computed, and whether book-keeping may be trusted with a network at all.

A plan is made once per network structure, row shape, size class, thread count and machine, from public things alone: a
copy of the network with random weights, and random images. Making it times the exact ways of each weight and both
memory layouts, then checks the assumption on which `dp.bookkeeping` rests: a unit's part of every sum is the same, bit
for bit, in every slot and whatever the other slots hold. It also compares the sum with plain autograd. Whoever fails
gets no plan, and the caller takes the plain loop.
"""

import contextlib
import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedscan_client.dp.bookkeeping import LossRows, Plan, Recorder, alike, clipped_pass, laid_out, now, zero_sums
from fedscan_client.dp.tape import Unsplittable

_ROWS = 32  # of a chunk
_MOST_ROWS = 256  # of a chunk whose rows are small
_SMALL_ROW = 2**16  # bytes
_CHUNK_BYTES = 2**30  # activations of a chunk, about
_RIGHT = 1e-3  # against plain autograd in float32: kernels differ, and so do sums


_PLANS: dict[object, Plan | None] = {}


def plan_for(module: nn.Module, loss_rows: LossRows, x_B: Tensor, y_B: Tensor, size: int) -> Plan | None:
    """The plan for units of `size` rows, or None where only the plain loop is right. Made once per network and machine.

    From public things alone: the network's structure, the shape and type of a row, the size class. Its ways are timed
    and checked on a copy of the network with random weights, and random images.
    """
    rows = (x_B.shape[1:], x_B.dtype, x_B.device, y_B.shape[1:], y_B.dtype)
    key = (_structure(module), rows, size, torch.get_num_threads())
    if key not in _PLANS:
        _PLANS[key] = _planned(module, loss_rows, x_B, y_B, size)
    return _PLANS[key]


def _structure(module: nn.Module) -> tuple[object, ...]:
    """What decides a network's arithmetic, weights apart."""
    plain = (bool, int, float, str, tuple, type(None))
    parts: list[object] = []
    for name, layer in module.named_modules():
        settings = tuple((k, v) for k, v in vars(layer).items() if isinstance(v, plain))
        parts.append((name, type(layer), repr(settings), layer.extra_repr()))
    parts += [(name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters(remove_duplicate=False)]
    return tuple(parts)


def _planned(module: nn.Module, loss_rows: LossRows, x_B: Tensor, y_B: Tensor, size: int) -> Plan | None:
    if draws(module):
        return None
    probe = _randomised(module)
    rows = _rows_at_once(probe, x_B)
    # A power of two of units, also of three or six rows each: at other heights the kernels' last tile is another.
    units = rows // (size if size & (size - 1) == 0 else size * 2 // 3)
    if not units:
        return None
    for memory_format in _formats(probe, loss_rows, x_B, y_B, Plan(units, size, torch.contiguous_format, {})):
        plan = Plan(units, size, memory_format, {})
        with contextlib.suppress(Unsplittable):
            alike_rows = _probe_rows(plan, x_B, y_B, same=True)
            tape = Recorder(plan.units, plan.ways, tries=True)
            clipped_pass(probe, tape, loss_rows, *alike_rows, torch.ones_like, _totals(probe))
            if _certified(plan, probe, loss_rows, x_B, y_B):
                return plan
    return None


def _totals(probe: nn.Module) -> dict[Tensor, Tensor]:
    trained = [p for p in probe.parameters() if p.requires_grad]
    return dict(zip(trained, zero_sums(trained), strict=True))


def _formats(
    probe: nn.Module, loss_rows: LossRows, x_B: Tensor, y_B: Tensor, plan: Plan
) -> Iterable[torch.memory_format]:
    """Memory formats to try, the better one first: channels last where the plain step gains clearly from it."""
    if x_B.dim() not in (4, 5) or not x_B.is_floating_point():
        return (torch.contiguous_format,)
    last = torch.channels_last if x_B.dim() == 4 else torch.channels_last_3d
    x, y, _ = _probe_rows(plan, x_B, y_B, same=True)
    trained = [p for p in probe.parameters() if p.requires_grad]
    seconds = []
    for inputs in (x, laid_out(x, last)):
        best = math.inf
        for _ in range(3):
            start = now()
            torch.autograd.grad(loss_rows(probe(inputs), y).sum(), trained, allow_unused=True)
            best = min(best, now() - start)
        seconds.append(best)
    return (last, torch.contiguous_format) if seconds[1] < 0.9 * seconds[0] else (torch.contiguous_format, last)


def draws(module: nn.Module) -> bool:
    """Whether the network draws random numbers (dropout): then a slot does not give the same twice."""
    rates = (getattr(layer, name, 0.0) for layer in module.modules() for name in ("p", "dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _randomised(module: nn.Module) -> nn.Module:
    """A copy with random weights: a fresh network's zeros would hide the order of a sum."""
    probe = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in probe.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.numel() / max(1, len(parameter)) if parameter.dim() else 1
            parameter.copy_(drawn / math.sqrt(fan_in) if parameter.dim() > 1 else 1 + 0.3 * drawn)
    return probe


def _rows_at_once(probe: nn.Module, x_B: Tensor) -> int:
    """B: as many rows as make a chunk, from what the layers hand on for one row."""
    entries = 0

    def count(layer: nn.Module, inputs: object, output: object) -> None:
        nonlocal entries
        entries += output.numel() if isinstance(output, Tensor) else 0

    hooks = [layer.register_forward_hook(count) for layer in probe.modules() if not any(layer.children())]
    try:
        with torch.no_grad():
            probe(x_B.new_zeros(1, *x_B.shape[1:]))
    finally:
        for hook in hooks:
            hook.remove()
    if entries * 4 <= _SMALL_ROW:
        return _MOST_ROWS
    return max(1, min(_ROWS, 1 << int(math.log2(max(1, _CHUNK_BYTES // (4 * entries))))))


def _probe_rows(plan: Plan, x_B: Tensor, y_B: Tensor, *, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows for every slot: the same unit in each, or another in each (the first slot's is the same)."""
    generator = torch.Generator().manual_seed(1)
    shape = (plan.units, plan.size, *x_B.shape[1:])
    x = torch.zeros(shape, dtype=x_B.dtype)
    if x_B.is_floating_point():
        x = torch.randn(shape, generator=generator, dtype=x_B.dtype)
        if same:
            x = x[:1].expand(shape)
    x = x.reshape(-1, *x_B.shape[1:]).to(x_B.device)
    weight_B = torch.full((len(x),), 1 / plan.size, dtype=torch.float64)
    return laid_out(x, plan.memory_format), y_B.new_zeros(len(x), *y_B.shape[1:]), weight_B.to(x.device)


def _certified(plan: Plan, probe: nn.Module, loss_rows: LossRows, x_B: Tensor, y_B: Tensor) -> bool:
    """Whether a unit's part is the same, bit for bit, in every slot and beside other units; and right."""
    seen: list[list[Tensor]] = [[], []]
    for same, tensors in zip((True, False), seen, strict=True):
        rows = _probe_rows(plan, x_B, y_B, same=same)
        totals = _totals(probe)
        clipped_pass(probe, Recorder(plan.units, plan.ways, seen=tensors), loss_rows, *rows, torch.ones_like, totals)
    if not all(alike(tensor) for tensor in seen[0]):
        return False
    if not all(torch.equal(first[0], second[0]) for first, second in zip(*seen, strict=True)):
        return False
    # Right, too: against plain autograd on the same rows, without clipping.
    x, y, weight_B = rows
    trained = [p for p in probe.parameters() if p.requires_grad]
    loss_B = loss_rows(probe(x), y)
    loss = (loss_B * weight_B.to(loss_B.dtype)).sum()
    plain = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    off = sum(float((a - b).square().sum()) for a, b in zip(totals.values(), plain, strict=True))
    return off <= _RIGHT**2 * sum(float(b.double().square().sum()) for b in plain)
