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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedscan_client.dp.layers import attached
from fedscan_client.dp.tape import Product, Unsplittable
from fedscan_client.dp.ways import (
    Finish,
    contract,
    fastest,
    kept,
    late,
    squared_norms,
    unit_gradients,
)

LossRows = Callable[[Tensor, Tensor], Tensor]
Factors = Callable[[Tensor], Tensor]  # float64 squared norms [U] -> float64 factors [U]

_SMALL = 4096  # entries of a parameter whose gradients are handled together with others'


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
            self._add(parameter, gradient, *kept(gradient, parameter))

    def product(self, name: str, parameter: Tensor, product: Product) -> None:
        """See `tape.Tape`."""
        if self.used[parameter] > 1:  # the norm of a sum needs the gradients themselves
            way = next(iter(product.direct), "kept")
            self.gradient(name, parameter, unit_gradients(product, way))
            return
        if self.tries:
            self.ways[name] = fastest(product, parameter)
        way = self.ways[name]
        if way == "gram":
            if self.seen is not None:
                self.seen += [product.a(torch.float64), product.b(torch.float64)]
            self._add(parameter, None, *late(product, parameter))
            return
        gradient = unit_gradients(product, way, restored=False)
        self._add(parameter, gradient, *kept(gradient, parameter, product if way == "kept" else None))

    def _add(self, parameter: Tensor, gradient: Tensor | None, square: Tensor, finish: Finish) -> None:
        if self.seen is not None:
            self.seen += [square] if gradient is None else [gradient.clone(), square]
        self.parts.append((parameter, square, finish))

    def finish(self, factors: Factors, totals: dict[Tensor, Tensor]) -> None:
        """Adds each used parameter's clipped sum to its total, and forgets what it was made of."""
        for parameter, gradient in self.shared.items():
            self._add(parameter, gradient, *kept(gradient, parameter))
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
            summed = small_UP.new_empty(small_UP.shape[1], dtype=torch.float64)
            contract(small_UP, factor, summed, fresh=True)
            for (parameter, _), part in zip(self.small, summed.split([g.shape[1] for _, g in self.small]), strict=True):
                part = part.view(parameter.shape)
                totals[parameter] = totals[parameter].add_(part) if parameter in totals else part
        while self.parts:
            parameter, _, finish = self.parts.pop()
            totals[parameter] = finish(factor, totals.get(parameter))


def add_clipped_sum(
    plan: Plan,
    module: nn.Module,
    loss_rows: LossRows,
    x_B: Tensor,
    y_B: Tensor,
    units: list[slice],
    factors: Factors,
    sums: dict[Tensor, Tensor],
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
        sums: a float64 tensor for each parameter that has one; made for the others when there is something to add.
    """
    with one_thread():
        for first in range(0, len(units), plan.units):
            inside = units[first : first + plan.units]
            x, y, weight_B = _slots(plan, x_B, y_B, inside)
            tape = Recorder(plan.units, plan.ways)
            clipped_pass(module, tape, loss_rows, x, y, weight_B, _of_the_first(len(inside), factors), sums)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Several threads would cut elementwise work in places that depend on their number, inside of slots."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    totals: dict[Tensor, Tensor],
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
