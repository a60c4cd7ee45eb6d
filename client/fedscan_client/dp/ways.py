"""The exact ways to one weight's clipped sum, and which is the fastest for a shape. See `dp.bookkeeping`.

"kept" and a `Product`'s direct ways form every unit's gradient and keep it until the clip factors are known; "gram"
takes the norms from Gram matrices first and forms the sum afterwards.

Legend: U units, K rows of a unit, T positions of a row, p inputs, o outputs, P entries of a parameter.
"""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedscan_client.dp.tape import Product, Unsplittable, as_it_is

Restore = Callable[[Tensor], Tensor]
Finish = Callable[[Tensor, Tensor], None]  # (factors [U], total): adds the clipped sum to the float64 total

_TRUST = 1e-6  # squared: of a Gram norm against its terms
_KEPT = 64 * 2**20  # entries of units' gradients kept for one weight
_BLOCK = 2**18  # entries turned to float64 at once
_UNFOLDED = 16 * 2**20  # entries of the patches of one layer, at most
_TRIES = 3
HELD = 2**20  # entries of float64 patches kept between norm and sum rather than made again


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


def unit_gradients(product: Product, way: str, *, restored: bool = True) -> Tensor:
    """[U, *weight.shape]; of the way "kept" [U, o, p] unless restored."""
    if way != "kept":
        return product.direct[way]()
    a = product.a(product.dtype)
    found = torch.bmm(product.b(product.dtype).transpose(1, 2), a)
    return product.restore(found) if restored else found


def kept(gradient_U: Tensor, lines: Callable[[Tensor], Tensor | None], restore: Restore) -> tuple[Tensor, Finish]:
    """Norms and sum of units' gradients that are there, [U, ...]; `lines` and `restore` as of a `Product`."""
    gradient_UP = gradient_U.flatten(1)

    def finish(factor_U: Tensor, total: Tensor) -> None:
        flat = lines(total)
        if flat is not None:
            contract(gradient_UP, factor_U, flat.view(-1))
            return
        summed = total.new_zeros(gradient_U.shape[1:])
        contract(gradient_UP, factor_U, summed.view(-1))
        total += restore(summed).view(total.shape)

    return squared_norms(gradient_UP), finish


def places(product: Product, way: str) -> tuple[Callable[[Tensor], Tensor | None], Restore]:
    """Where the way's sum lies in the total, and how it is put there otherwise."""
    return (product.lines, product.restore) if way == "kept" else (in_place, as_it_is)


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


def contract(gradient_UP: Tensor, factor_U: Tensor, total_P: Tensor) -> None:
    """Adds the sum over units of factor times gradient, in float64; a unit of factor 0 may be NaN."""
    absent = None if factor_U.all() else factor_U.view(-1, 1) == 0
    step = max(1, _BLOCK // len(gradient_UP))
    for block, part in zip(gradient_UP.split(step, dim=1), total_P.split(step), strict=True):
        block = block.double()
        part.addmv_((block if absent is None else block.masked_fill(absent, 0.0)).t(), factor_U)


def gram_square(a: Tensor, b: Tensor) -> Tensor:
    """Squared norms [U] of b^T a without forming it: the sum of (a a^T) * (b b^T), of float64 a and b."""
    a_Utt, b_Utt = torch.bmm(a, a.transpose(1, 2)), torch.bmm(b, b.transpose(1, 2))
    terms = (a_Utt.diagonal(0, 1, 2) * b_Utt.diagonal(0, 1, 2)).sqrt().sum(1).square()
    square = (a_Utt * b_Utt).sum((1, 2))
    return torch.where(torch.isfinite(square), torch.maximum(square, _TRUST * terms), square)


def add_late(product: Product, held: tuple[Tensor, Tensor] | None, factor_U: Tensor, total: Tensor) -> None:
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


def fastest(product: Product, parameter: Tensor) -> str:
    """The fastest way whose result is the same in every slot, for a product whose slots all hold the same."""
    times: dict[str, float] = {}
    (total,) = zero_sums([parameter])
    for way in _candidates(product):
        best = math.inf
        for _ in range(_TRIES):
            start = now()
            if way == "gram":
                a, b, made = product.a(torch.float64), product.b(torch.float64), None
                square = gram_square(a, b)
                add_late(product, (a, b) if a.numel() <= HELD else None, torch.ones_like(square), total)
            else:
                made = unit_gradients(product, way, restored=False)
                square, finish = kept(made, *places(product, way))
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
