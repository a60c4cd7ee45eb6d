"""Clipped sums in one forward and one backward pass, whoever chose the weights.

Book-keeping (Bu et al. 2023, arXiv 2210.00038): each layer hands over what its units' gradients are made of
(`dp.layers`); their norms give the clip factors; then each parameter's clipped sum is formed once. Per weight and
layout the fastest of several exact ways is taken: keep the units' gradients (one batched product, unit by unit, or
grouped), or take only their norms from Gram matrices and form the sum from the factors afterwards.

Guarantee: what one unit contributes is a function of its own rows, the weights and public constants, bit for bit; it
depends on no other unit. So adding or removing a patient changes the sum by that patient's contribution alone, and its
norm is at most the clip. Three things make it so:

1. Units are computed in *slots*: a chunk always has the same shape (units padded to a power of two, chunks filled up
   with empty units), so every operation is the same whoever is there. The order in which a product or a sum adds
   numbers is a property of shapes, not of values; that it is the same in each slot is checked: on random weights and
   images, a unit must give the same bits in every slot and whatever stands in the others (`dp.plans`). Elementwise
   functions have no order, but a vector loop of up to 32 numbers and other code for the remainder, which differs in the
   last bit for some values only: a chunk has a multiple of 32 rows and one thread, so there is no remainder. Weights
   that a malicious server makes to blow up rounding change values, not orders.
2. Where units are added up, it is in float64.
3. A Gram norm below 1e-3 of the sum of its terms' norms is not trusted and replaced by that bound; its own rounding is
   float64's. All this is far below `dp.engine.MARGIN`.

Where the check fails, or a layer cannot be split by unit, or the network draws random numbers, there is no plan and the
caller takes the plain loop. Assumed: the check's random data show a different order where there is one, and torch's
vector loops are no longer than 32 numbers.

Legend: U units (slots) of K rows, B = U K rows, P entries of a parameter.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fedscan_client.dp.layers import attached
from fedscan_client.dp.tape import Product, Unsplittable

LossRows = Callable[[Tensor, Tensor], Tensor]
Factors = Callable[[Tensor], Tensor]  # float64 squared norms [U] -> float64 factors [U]
Restore = Callable[[Tensor], Tensor]
Finish = Callable[[Tensor, Tensor], None]  # (factors [U], total): adds the clipped sum to the float64 total

_TRUST = 1e-6  # squared: of a Gram norm against its terms
_KEPT = 64 * 2**20  # entries of units' gradients kept for one weight
_BLOCK = 2**18  # entries turned to float64 at once
_HELD = 2**20  # entries of float64 patches kept between norm and sum rather than made again
_SMALL = 4096  # entries of a parameter whose gradients are handled together with others'
_UNFOLDED = 16 * 2**20  # entries of the patches of one layer, at most
_TRIES = 3


@dataclass(frozen=True)
class Plan:
    """How chunks of one shape are computed: public, made from random data.

    Attributes:
        units: U.
        size: K.
        memory_format: of the chunk's images.
        ways: for each weight by its layer's name, the fastest exact way.
    """

    units: int
    size: int
    memory_format: torch.memory_format
    ways: dict[str, str]


@dataclass
class Recorder:
    """One pass. With `tries` it times every way of each weight; with `seen` it keeps what each unit is made of."""

    units: int
    ways: dict[str, str]
    tries: bool = False
    seen: list[Tensor] | None = None
    used: dict[Tensor, int] = field(default_factory=dict)
    shared: dict[Tensor, Tensor] = field(default_factory=dict)
    small: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    parts: list[tuple[Tensor, Tensor, Finish]] = field(default_factory=list)

    def use(self, parameter: Tensor) -> None:
        """See `tape.Tape`."""
        self.used[parameter] = self.used.get(parameter, 0) + 1

    def gradient(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """See `tape.Tape`."""
        gradient = gradient.reshape(self.units, -1)
        if self.used[parameter] > 1:
            known = self.shared.get(parameter)
            self.shared[parameter] = gradient if known is None else known + gradient
        elif gradient.shape[1] <= _SMALL:
            self.small.append((parameter, gradient))
        else:
            self._add(parameter, gradient, *_kept(gradient, _flat, _itself))

    def product(self, name: str, parameter: Tensor, product: Product) -> None:
        """See `tape.Tape`."""
        if self.used[parameter] > 1:  # the norm of a sum needs the gradients themselves
            way = next(iter(product.direct), "kept")
            self.gradient(name, parameter, _gradient(product, way))
            return
        if self.tries:
            self.ways[name] = _fastest(product, parameter)
        way = self.ways[name]
        if way == "gram":
            a, b = product.a(torch.float64), product.b(torch.float64)
            if self.seen is not None:
                self.seen += [a, b]
            held = (a, b) if a.numel() <= _HELD else None
            self._add(parameter, None, _gram_square(a, b), lambda f, total: _late(product, held, f, total))
            return
        gradient = _gradient(product, way, restored=False)
        self._add(parameter, gradient, *_kept(gradient, *_places(product, way)))

    def _add(self, parameter: Tensor, gradient: Tensor | None, square: Tensor, finish: Finish) -> None:
        if self.seen is not None:
            self.seen += [square] if gradient is None else [gradient.clone(), square]
        self.parts.append((parameter, square, finish))

    def finish(self, factors: Factors, totals: Mapping[Tensor, Tensor]) -> None:
        """Adds each used parameter's clipped sum to its total, and forgets what it was made of."""
        for parameter, gradient in self.shared.items():
            self._add(parameter, gradient, *_kept(gradient, _flat, _itself))
        small_UP = torch.cat([gradient for _, gradient in self.small], dim=1) if self.small else None
        squares = [square for _, square, _ in self.parts]
        if small_UP is not None:
            squares.append(squared_norms(small_UP))
            if self.seen is not None:
                self.seen += [small_UP, squares[-1]]
        if not squares:
            return
        factor = factors(torch.stack(squares).sum(0))
        if small_UP is not None:
            summed = small_UP.new_zeros(small_UP.shape[1], dtype=torch.float64)
            _contract(small_UP, factor, summed)
            for (parameter, _), part in zip(self.small, summed.split([g.shape[1] for _, g in self.small]), strict=True):
                totals[parameter].add_(part.view(totals[parameter].shape))
        while self.parts:
            parameter, _, finish = self.parts.pop()
            finish(factor, totals[parameter])


def add_clipped_sum(
    plan: Plan,
    module: nn.Module,
    loss_rows: LossRows,
    x_B: Tensor,
    y_B: Tensor,
    units: list[slice],
    factors: Factors,
    sums: Sequence[Tensor],
) -> None:
    """Adds the clipped sum over some units that fit the plan to `sums`.

    Args:
        plan: of `plans.plan_for`, for this network and these rows.
        module: the network, in training mode.
        loss_rows: loss of every row.
        x_B: inputs.
        y_B: targets.
        units: each unit's rows; at most plan.size.
        factors: squared norms to clip factors, 0 for a unit that contributes nothing.
        sums: one float64 tensor per trainable parameter; fastest if a convolution's has its channels last in memory.
    """
    totals: dict[Tensor, Tensor] = dict(zip((p for p in module.parameters() if p.requires_grad), sums, strict=True))
    with one_thread():
        for first in range(0, len(units), plan.units):
            inside = units[first : first + plan.units]
            x, y, weight_B = _slots(plan, x_B, y_B, inside)
            tape = Recorder(plan.units, plan.ways)
            clipped_pass(module, tape, loss_rows, x, y, weight_B, _of_the_first(len(inside), factors), totals)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Several threads would cut elementwise work in places that depend on their number, inside of slots."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def zero_sums(parameters: Sequence[Tensor]) -> list[Tensor]:
    """float64 zeros of each parameter's shape, with a convolution's channels last in memory."""
    sums = []
    for p in parameters:
        shape = (p.shape[0], *p.shape[2:], p.shape[1]) if p.dim() > 2 else tuple(p.shape)
        # NumPy's zeros take no memory before they are written to: after the activations are gone.
        on_cpu = p.device.type == "cpu"
        total = torch.from_numpy(np.zeros(shape)) if on_cpu else p.new_zeros(shape, dtype=torch.float64)
        sums.append(total.movedim(-1, 1) if p.dim() > 2 else total)
    return sums


def _of_the_first(there: int, factors: Factors) -> Factors:
    """The factors of the units that are there; 0 for empty slots."""

    def masked(square_U: Tensor) -> Tensor:
        return torch.where(torch.arange(len(square_U), device=square_U.device) < there, factors(square_U), 0.0)

    return masked


def size_class(size: int) -> int:
    """The power of two to which a unit of `size` rows is padded."""
    return 1 << max(0, size - 1).bit_length()


def _slots(plan: Plan, x_B: Tensor, y_B: Tensor, units: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
    """The units in their slots: inputs, targets, and each row's weight, 1 / size or 0 for air."""
    rows = plan.units * plan.size
    x, y = x_B.new_zeros(rows, *x_B.shape[1:]), y_B.new_zeros(rows, *y_B.shape[1:])
    weight_B = torch.zeros(rows, dtype=torch.float64, device=x.device)
    for slot, unit in enumerate(units):
        size = unit.stop - unit.start
        place = slice(slot * plan.size, slot * plan.size + size)
        x[place], y[place], weight_B[place] = x_B[unit], y_B[unit], 1 / size
        air = slice(place.stop, (slot + 1) * plan.size)  # of weight 0; an image of zeros may have no finite gradient
        x[air], y[air] = x_B[unit.start], y_B[unit.start]
    return laid_out(x, plan.memory_format), y, weight_B


def laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The same numbers in that layout."""
    return x if memory_format == torch.contiguous_format else x.contiguous(memory_format=memory_format)


def clipped_pass(
    module: nn.Module,
    tape: Recorder,
    loss_rows: LossRows,
    x: Tensor,
    y: Tensor,
    weight_B: Tensor,
    factors: Factors,
    totals: Mapping[Tensor, Tensor],
) -> None:
    """One forward and one backward pass over a chunk; adds each parameter's clipped sum to its float64 total.

    Raises:
        Unsplittable: a layer or a parameter's use that is not known to split by unit.
    """
    parameters = {p: name for name, p in module.named_parameters() if p.requires_grad}
    with attached(module, tape) as anchor:
        loss_B = loss_rows(module(x), y)
        loss = (loss_B * weight_B.to(loss_B.dtype)).sum()
        if not loss.requires_grad:
            return
        _, *outside = torch.autograd.grad(loss, [anchor, *parameters], allow_unused=True)
    strays = [name for name, gradient in zip(parameters.values(), outside, strict=True) if gradient is not None]
    if strays:
        raise Unsplittable(f"{strays[0]} is used outside of its layer")
    with torch.no_grad():
        tape.finish(factors, totals)


# ---------------------------------------------------------------------------------------------------------- one weight


def _gradient(product: Product, way: str, *, restored: bool = True) -> Tensor:
    """[U, *weight.shape]; of the way "kept" [U, o, p] unless restored."""
    if way != "kept":
        return product.direct[way]()
    a = product.a(product.dtype)
    found = torch.bmm(product.b(product.dtype).transpose(1, 2), a)
    return product.restore(found) if restored else found


def _kept(gradient_U: Tensor, lines: Callable[[Tensor], Tensor | None], restore: Restore) -> tuple[Tensor, Finish]:
    """Norms and sum of units' gradients that are there, [U, ...]; `lines` and `restore` as of a `Product`."""
    gradient_UP = gradient_U.flatten(1)

    def finish(factor_U: Tensor, total: Tensor) -> None:
        flat = lines(total)
        if flat is not None:
            _contract(gradient_UP, factor_U, flat.view(-1))
            return
        summed = total.new_zeros(gradient_U.shape[1:])
        _contract(gradient_UP, factor_U, summed.view(-1))
        total += restore(summed).view(total.shape)

    return squared_norms(gradient_UP), finish


def _places(product: Product, way: str) -> tuple[Callable[[Tensor], Tensor | None], Restore]:
    """Where the way's sum lies in the total, and how it is put there otherwise."""
    return (product.lines, product.restore) if way == "kept" else (_flat, _itself)


def _flat(total: Tensor) -> Tensor | None:
    return total if total.is_contiguous() else None


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def squared_norms(gradient_UP: Tensor) -> Tensor:
    """Squared norms [U], float64. In two levels: a long float32 row comes out low by 3e-4, a short one by 1e-5."""
    if gradient_UP.dtype not in (torch.float32, torch.float64):
        gradient_UP = gradient_UP.float()
    units, entries = gradient_UP.shape
    whole = entries // 256 * 256
    short = torch.linalg.vector_norm(gradient_UP[:, :whole].reshape(units, -1, 256), dim=2).double()
    rest = gradient_UP[:, whole:].double()
    square: Tensor = (short * short).sum(1) + (rest * rest).sum(1)
    return square


def _contract(gradient_UP: Tensor, factor_U: Tensor, total_P: Tensor) -> None:
    """Adds the sum over units of factor times gradient, in float64; a unit of factor 0 may be NaN."""
    absent = None if factor_U.all() else factor_U.view(-1, 1) == 0
    step = max(1, _BLOCK // len(gradient_UP))
    for block, part in zip(gradient_UP.split(step, dim=1), total_P.split(step), strict=True):
        block = block.double()
        part.addmv_((block if absent is None else block.masked_fill(absent, 0.0)).t(), factor_U)


def _gram_square(a: Tensor, b: Tensor) -> Tensor:
    """Squared norms [U] of b^T a without forming it: the sum of (a a^T) * (b b^T), of float64 a and b."""
    a_Utt, b_Utt = torch.bmm(a, a.transpose(1, 2)), torch.bmm(b, b.transpose(1, 2))
    terms = (a_Utt.diagonal(0, 1, 2) * b_Utt.diagonal(0, 1, 2)).sqrt().sum(1).square()
    square = (a_Utt * b_Utt).sum((1, 2))
    return torch.where(torch.isfinite(square), torch.maximum(square, _TRUST * terms), square)


def _late(product: Product, held: tuple[Tensor, Tensor] | None, factor_U: Tensor, total: Tensor) -> None:
    """Adds the clipped sum from its factors, in float64: products of float32 numbers are exact there."""
    a, b = held or (product.a(torch.float64), product.b(torch.float64))
    b = b * factor_U.view(-1, 1, 1)
    if not factor_U.all():
        gone = factor_U.view(-1, 1, 1) == 0
        a, b = a.masked_fill(gone, 0.0), b.masked_fill(gone, 0.0)
    a, b = a.flatten(0, 1), b.flatten(0, 1).t()
    lines = product.lines(total)
    if lines is None:
        total += product.restore(b @ a)
    else:
        lines.addmm_(b, a)


def _fastest(product: Product, parameter: Tensor) -> str:
    """The fastest way whose result is the same in every slot, for a product whose slots all hold the same."""
    times: dict[str, float] = {}
    (total,) = zero_sums([parameter])
    for way in _candidates(product):
        best = math.inf
        for _ in range(_TRIES):
            start = now()
            if way == "gram":
                a, b, made = product.a(torch.float64), product.b(torch.float64), None
                square = _gram_square(a, b)
                _late(product, (a, b) if a.numel() <= _HELD else None, torch.ones_like(square), total)
            else:
                made = _gradient(product, way, restored=False)
                square, finish = _kept(made, *_places(product, way))
                finish(torch.ones_like(square), total)
            best = min(best, now() - start)
            if not alike(square) or (made is not None and not alike(made)):
                best = math.inf
                break
            if times and best > 1.3 * min(times.values()):
                break
        times[way] = best
    way = min(times, key=lambda key: times[key])
    if times[way] == math.inf:
        raise Unsplittable("a layer's gradient depends on the slot")
    return way


def _candidates(product: Product) -> list[str]:
    """What a cost model leaves to be timed."""
    positions, inputs, outputs = product.shape
    units = product.units
    entries = units * inputs * outputs
    ways = []
    if 0 < positions * inputs * units <= _UNFOLDED:
        if entries <= _KEPT:
            ways.append("kept")
        if positions * (inputs + outputs) < 4 * inputs * outputs and positions <= 1024:
            ways.append("gram")
    if entries <= _KEPT // 8 or not ways:
        ways += product.direct
    return ways or ["kept"]


def alike(slots_U: Tensor) -> bool:
    """Whether every slot holds the same bits."""
    return bool((slots_U == slots_U[:1]).all())


def now() -> float:
    """Processor seconds, with a GPU's work done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.process_time()
