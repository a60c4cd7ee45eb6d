"""The exact ways to one weight's clipped sum, and which is the fastest for a shape. See `dp.bookkeeping`.

"kept" and a `Product`'s direct ways form every unit's gradient and keep it until the clip factors are known; "gram"
takes the norms from Gram matrices first and forms the sum afterwards.

Legend: U units, K rows of a unit, T positions of a row, p inputs, o outputs, P entries of a parameter.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fedscan_client.dp.tape import Product, Unsplittable, as_it_is

Finish = Callable[[Tensor, Tensor | None], Tensor]  # (factors [U], total so far) -> float64 total

_TRUST = 1e-6  # squared: of a Gram norm against its terms
_KEPT = 64 * 2**20  # entries of units' gradients kept for one weight
_BLOCK = 2**18  # entries turned to float64 at once
_UNFOLDED = 16 * 2**20  # entries of the patches of one layer, at most
_LATE = 8  # units turned to float64 at once
_TRIES = 3
_FRESH = 1.5e-10  # seconds a byte that is held to the end of the pass: what comes next finds no warm memory


def new_sum(parameter: Tensor, *, channels_last: bool) -> Tensor:
    """float64 memory for a parameter's sum, not set; a convolution's channels last in memory, as "kept" and "gram" add.

    Made when there is something to write: after a pass, where its activations were.
    """
    shape = tuple(parameter.shape)
    if not channels_last or len(shape) < 3:
        return parameter.new_empty(shape, dtype=torch.float64)
    return parameter.new_empty((shape[0], *shape[2:], shape[1]), dtype=torch.float64).movedim(-1, 1)


def unit_gradients(product: Product, way: str, *, restored: bool = True) -> Tensor:
    """[U, *weight.shape]; of the way "kept" [U, o, p] unless restored."""
    if way != "kept":
        return product.direct[way]()
    a = product.a(product.dtype)
    found = torch.bmm(product.b(product.dtype).transpose(1, 2), a)
    return product.restore(found) if restored else found


def kept(gradient_U: Tensor, parameter: Tensor, product: Product | None = None) -> tuple[Tensor, Finish]:
    """Norms and sum of units' gradients that are there: [U, o, p] of a product, or else [U, *parameter.shape]."""
    gradient_UP, shape = gradient_U.flatten(1), gradient_U.shape[1:]
    # `finish` waits until the end of the pass: it must not hold the product, which holds the layer's activations.
    last, lines, restore = (True, product.lines, product.restore) if product else (False, in_place, as_it_is)

    def finish(factor_U: Tensor, total: Tensor | None) -> Tensor:
        fresh = total is None
        total = new_sum(parameter, channels_last=last) if total is None else total
        flat = lines(total)
        if flat is not None:
            contract(gradient_UP, factor_U, flat.view(-1), fresh=fresh)
            return total
        summed = total.new_empty(shape)
        contract(gradient_UP, factor_U, summed.view(-1), fresh=True)
        return total.copy_(restore(summed).view_as(total)) if fresh else total.add_(restore(summed).view_as(total))

    return squared_norms(gradient_UP), finish


def in_place(total: Tensor) -> Tensor | None:
    """Where a sum in the parameter's own order lies in the total: all of it, if it is in that order."""
    return total if total.is_contiguous() else None


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


def contract(gradient_UP: Tensor, factor_U: Tensor, total_P: Tensor, *, fresh: bool) -> None:
    """Adds (fresh: sets) the sum over units of factor times gradient, in float64; a unit of factor 0 may be NaN."""
    absent = None if factor_U.all() else factor_U.view(-1, 1) == 0
    step = max(1, _BLOCK // len(gradient_UP))
    for block, part in zip(gradient_UP.split(step, dim=1), total_P.split(step), strict=True):
        block = block.double()
        part.addmv_((block if absent is None else block.masked_fill(absent, 0.0)).t(), factor_U, beta=0 if fresh else 1)


def gram_square(a: Tensor, b: Tensor) -> Tensor:
    """Squared norms [U] of b^T a without forming it: the sum of (a a^T) * (b b^T), of float64 a and b."""
    a_Utt, b_Utt = torch.bmm(a, a.transpose(1, 2)), torch.bmm(b, b.transpose(1, 2))
    terms = (a_Utt.diagonal(0, 1, 2) * b_Utt.diagonal(0, 1, 2)).sqrt().sum(1).square()
    square = (a_Utt * b_Utt).sum((1, 2))
    return torch.where(torch.isfinite(square), torch.maximum(square, _TRUST * terms), square)


def late(product: Product, parameter: Tensor) -> tuple[Tensor, Finish]:
    """Norms by Gram matrices; the clipped sum from the factors, in float64: products of float32 are exact there."""

    def finish(factor_U: Tensor, total: Tensor | None) -> Tensor:
        fresh = total is None
        total = new_sum(parameter, channels_last=True) if total is None else total
        flat = product.lines(total)
        lines = total.new_empty(product.shape[2], product.shape[1]) if flat is None else flat
        add = not fresh and flat is not None
        a, b = product.a(product.dtype), product.b(torch.float64) * factor_U.view(-1, 1, 1)
        if not factor_U.all():
            gone = factor_U.view(-1, 1, 1) == 0
            a, b = a.masked_fill(gone, 0.0), b.masked_fill(gone, 0.0)
        for a_part, b_part in zip(a.split(_LATE), b.split(_LATE), strict=True):  # float64 only what the cache holds
            lines.addmm_(b_part.flatten(0, 1).t(), a_part.flatten(0, 1).double(), beta=int(add))
            add = True
        if flat is None:
            found = product.restore(lines).view_as(total)
            total = found.clone() if fresh else total.add_(found)
        return total

    return gram_square(product.a(torch.float64), product.b(torch.float64)), finish


def fastest(product: Product, parameter: Tensor) -> str:
    """The fastest way whose result is the same in every slot, for a product whose slots all hold the same."""
    times: dict[str, float] = {}
    for way in _candidates(product):
        best = math.inf
        for _ in range(_TRIES):
            start = now()
            made = None if way == "gram" else unit_gradients(product, way, restored=False)
            if made is None:
                square, finish = late(product, parameter)
            else:
                square, finish = kept(made, parameter, product if way == "kept" else None)
            finish(torch.ones_like(square), None)
            best = min(best, now() - start + (0.0 if made is None else _FRESH * made.nbytes))
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
