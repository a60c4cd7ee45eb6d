"""How chunks of one shape are computed, and whether book-keeping may be trusted with a network at all.

A plan is made once per network structure, row shape, size class and process, from public things alone: a
copy of the network with random weights, and random images. Making it times the exact ways of each weight and both
memory layouts, then checks the assumption on which `dp.bookkeeping` rests: a unit's part of every sum is the same, bit
for bit, in every slot and whatever the other slots hold. It also compares the sum with plain autograd. Whoever fails
gets no plan, and the caller takes the plain loop: several times slower, so the logger "fedscan.engine" says why, once
per network. The reason comes from the same public things; no patient's image or weight had a part in it.
"""

import copy
import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedscan_client.dp.bookkeeping import LossRows, Plan, Recorder, clipped_pass, laid_out, one_thread
from fedscan_client.dp.tape import Unsplittable
from fedscan_client.dp.ways import alike, now

_ROWS = 32  # of a chunk, at least and at most: see `dp.bookkeeping` on remainders
_MOST_ROWS = 256  # of a chunk whose rows are small
_SMALL_ROW = 2**16  # bytes
_CHUNK_BYTES = 4 * 2**30  # activations of a chunk: if they are more, the loop
_RIGHT = 1e-3  # against plain autograd in float32: kernels differ, and so do sums


_PLANS: dict[object, Plan | None] = {}
_REASONS: dict[tuple[str, str], None] = {}  # (network, why it is computed by the loop), in the order found
_log = logging.getLogger("fedscan.engine")


def plan_for(module: nn.Module, loss_rows: LossRows, x_B: Tensor, y_B: Tensor, size: int) -> Plan | None:
    """The plan for units of `size` rows, or None where only the plain loop is right. Made once per network and machine.

    From public things alone: the network's structure, the shape and type of a row, the size class. Its ways are timed
    and checked on a copy of the network with random weights, and random images.
    """
    rows = (x_B.shape[1:], x_B.dtype, x_B.device, y_B.shape[1:], y_B.dtype)
    key = (_structure(module), rows, size, loss_rows, torch.backends.mkldnn.enabled)
    if key not in _PLANS:
        try:
            with one_thread(), torch.random.fork_rng():
                _PLANS[key] = _planned(module, loss_rows, x_B, y_B, size)
        except Unsplittable as error:
            _PLANS[key] = None
            _say(module, str(error))
        except Exception as error:  # by the network's structure only; the loop says it if it fails there, too
            _PLANS[key] = None
            _say(module, f"{type(error).__name__} in the trial on random images: {error}")
    return _PLANS[key]


def reasons() -> list[str]:
    """Why networks of this process went to the loop; empty if none did."""
    return list(dict.fromkeys(reason for _, reason in _REASONS))


def _say(module: nn.Module, reason: str) -> None:
    network = repr(module)  # for people: not what the plan's key tells apart
    if (network, reason) not in _REASONS:
        _REASONS[network, reason] = None
        _log.warning("patients are computed one by one, which takes several times as long: %s", reason)


def _structure(module: nn.Module) -> tuple[object, ...]:
    """What decides a network's arithmetic, weights apart."""
    plain = (bool, int, float, str, tuple, type(None))
    parts: list[object] = []
    for name, layer in module.named_modules():
        settings = tuple((k, v) for k, v in vars(layer).items() if isinstance(v, plain))
        parts.append((name, type(layer), repr(settings), layer.extra_repr()))
    first: dict[int, int] = {}  # which names are one parameter
    for name, p in module.named_parameters(remove_duplicate=False):
        parts.append((name, first.setdefault(id(p), len(first)), p.shape, p.stride(), p.dtype, p.requires_grad))
    return tuple(parts)


def _planned(module: nn.Module, loss_rows: LossRows, x_B: Tensor, y_B: Tensor, size: int) -> Plan:
    """Raises Unsplittable with the reason where there is none."""
    if any("forward" in vars(layer) for layer in module.modules()):
        raise Unsplittable("a layer's forward was replaced by hand")
    if x_B.dtype not in (torch.float32, torch.float64):
        raise Unsplittable("its inputs are whole numbers, and no random ones fit every network")
    probe = _randomised(module)
    rows = _rows_at_once(probe, x_B)
    if size > rows:
        raise Unsplittable(f"a patient of more than {rows} images")
    why = Unsplittable("a patient's part depends on its place in the batch")
    for memory_format in _formats(probe, loss_rows, x_B, y_B, Plan(rows // size, size, torch.contiguous_format, {})):
        plan = Plan(rows // size, size, memory_format, {})
        try:
            alike_rows = _probe_rows(plan, x_B, y_B, same=True)
            tape = Recorder(plan.units, plan.ways, tries=True)
            clipped_pass(probe, tape, loss_rows, *alike_rows, torch.ones_like, {})
            _certify(plan, probe, loss_rows, x_B, y_B)
            return plan
        except Unsplittable as error:
            why = error
    raise why


def _formats(
    probe: nn.Module, loss_rows: LossRows, x_B: Tensor, y_B: Tensor, plan: Plan
) -> Iterable[torch.memory_format]:
    """Memory formats to try, the better one first: channels last where the plain step gains clearly from it."""
    if x_B.dim() not in (4, 5):
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
    """B: the rows of a chunk, from what the layers hand on for one row. Refused: too large, or drawing numbers."""
    entries = 0

    def count(layer: nn.Module, inputs: object, output: object) -> None:
        nonlocal entries
        entries += output.numel() if isinstance(output, Tensor) else 0

    hooks = [layer.register_forward_hook(count) for layer in probe.modules() if not any(layer.children())]
    before = torch.get_rng_state(), [buffer.clone() for buffer in probe.buffers()]
    try:
        with torch.no_grad():
            probe(x_B.new_ones(1, *x_B.shape[1:]))
    finally:
        for hook in hooks:
            hook.remove()
    changed = any(not torch.equal(a, b) for a, b in zip(before[1], probe.buffers(), strict=True))
    if changed or not torch.equal(before[0], torch.get_rng_state()):
        raise Unsplittable("it draws random numbers (dropout), or changes a buffer, in its forward pass")
    if entries * 4 <= _SMALL_ROW:
        return _MOST_ROWS
    if _ROWS * entries * 4 > _CHUNK_BYTES:
        raise Unsplittable(f"{_ROWS} images at once take more than {_CHUNK_BYTES / 2**30:.0f} GiB")
    return _ROWS


def _probe_rows(plan: Plan, x_B: Tensor, y_B: Tensor, *, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows and labels for every slot: the same unit in each, or another in each but the first."""
    generator = torch.Generator().manual_seed(1)
    shape = (plan.units, plan.size)
    x = torch.randn(*shape, *x_B.shape[1:], generator=generator, dtype=x_B.dtype)
    y = torch.randint(0, 2, (*shape, *y_B.shape[1:]), generator=generator).to(y_B.dtype)
    if same:
        x, y = x[:1].expand(x.shape), y[:1].expand(y.shape)
    x, y = x.flatten(0, 1).to(x_B.device), y.flatten(0, 1).to(y_B.device)
    weight_B = torch.full((len(x),), 1 / plan.size, dtype=torch.float64, device=x.device)
    return laid_out(x, plan.memory_format), y, weight_B


def _certify(plan: Plan, probe: nn.Module, loss_rows: LossRows, x_B: Tensor, y_B: Tensor) -> None:
    """Refuses unless a unit's part is the same, bit for bit, in every slot and beside other units; and right."""
    seen: list[list[Tensor]] = [[], []]
    factor_U = torch.linspace(0.5, 1.0, plan.units, dtype=torch.float64, device=x_B.device)
    for same, tensors in zip((True, False), seen, strict=True):
        rows = _probe_rows(plan, x_B, y_B, same=same)
        totals: dict[Tensor, Tensor] = {}
        tape = Recorder(plan.units, plan.ways, seen=tensors)
        clipped_pass(probe, tape, loss_rows, *rows, lambda square: factor_U, totals)
    if not all(alike(tensor) for tensor in seen[0]):
        raise Unsplittable("a patient's part depends on its place in the batch")
    if not all(torch.equal(first[0], second[0]) for first, second in zip(*seen, strict=True)):
        raise Unsplittable("a patient's part depends on who else is in the batch")
    # Right, too: against plain autograd with a factor of its own for each unit, so that each unit's rows are its own.
    x, y, weight_B = rows
    trained = [p for p in probe.parameters() if p.requires_grad]
    loss_B = loss_rows(probe(x), y)
    loss = (loss_B * (weight_B * factor_U.repeat_interleave(plan.size)).to(loss_B.dtype)).sum()
    plain = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    off = sum(float((totals.get(p, 0.0) - b).square().sum()) for p, b in zip(trained, plain, strict=True))
    if not off <= _RIGHT**2 * sum(float(b.double().square().sum()) for b in plain):
        raise Unsplittable("its layers do not give each patient's gradient: rows change places between layers, perhaps")
