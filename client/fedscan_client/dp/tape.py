"""What a layer tells about each unit's gradient, and to whom: the words that `layers` and `bookkeeping` share.

Legend: U units of K rows, B = U K rows, T positions of a row, p inputs and o outputs of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Forward = Callable[..., Any]


class Unsplittable(Exception):
    """This layer's gradient cannot be split by unit here; the plain loop can."""


@dataclass(frozen=True)
class Product:
    """A weight whose gradient is, for each unit, the sum over its rows and positions of b^T a.

    Attributes:
        a: makes [U, K T, p] of a type, on demand: an image's patches are many times the image.
        b: makes [U, K T, o] of a type.
        shape: (K T, p, o); K T is 0 where only the direct ways are right.
        units: U.
        dtype: of the gradients.
        restore: [..., o, p] to [..., *weight.shape].
        lines: a tensor of the weight's shape to its [o, p] view, or None where its memory does not allow one.
        direct: other exact ways to all units' gradients, [U, *weight.shape], by name.
    """

    a: Callable[[torch.dtype], Tensor]
    b: Callable[[torch.dtype], Tensor]
    shape: tuple[int, int, int]
    units: int
    dtype: torch.dtype
    restore: Callable[[Tensor], Tensor]
    lines: Callable[[Tensor], Tensor | None]
    direct: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


class Tape(Protocol):
    """Whom the layers tell, during the backward pass."""

    units: int

    def use(self, parameter: Tensor) -> None:
        """Counts one use in the forward pass: the gradients of a shared parameter are added up."""

    def product(self, name: str, parameter: Tensor, product: Product) -> None:
        """A weight's gradient, as a product."""

    def gradient(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """A parameter's gradient, [U, *parameter.shape]."""


class Layer(torch.autograd.Function):
    """A layer of one input: `run` gives the output and what `back` needs; `back` gives the input gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, run: Forward, back: Forward) -> Tensor:
        """The layer's output."""
        y, saved = run(x)
        ctx.save_for_backward(x, *saved)
        ctx.back = back
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The input gradient; what belongs to parameters goes to the tape."""
        return ctx.back(gradient, ctx.needs_input_grad[0], *ctx.saved_tensors), None, None, None


def by_unit(rows: Tensor, units: int) -> Tensor:
    """[R, ...] to [U, R / U, ...]."""
    if len(rows) % units:
        raise Unsplittable("a layer's rows are no multiple of the units")
    return rows.reshape(units, len(rows) // units, *rows.shape[1:])


def through(layer: tuple[Forward, Forward], x: Tensor, anchor: Tensor) -> Tensor:
    """Applies a layer given as (run, back)."""
    y: Tensor = Layer.apply(x, anchor, *layer)  # type: ignore[no-untyped-call]
    return y


def is_trained(parameter: Tensor | None) -> bool:
    """Whether there is such a parameter and it is trained."""
    return parameter is not None and parameter.requires_grad


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor: a `Product`'s restore and lines where its [o, p] is the weight."""
    return tensor
