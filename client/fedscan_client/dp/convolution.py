"""Convolutions of every kind, and their gradients by unit. Tells as `layers` describes.

Legend: U units of K rows, B = U K rows, C channels, T positions of a row.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedscan_client.dp.tape import Forward, Product, Tape, by_unit, is_trained, through

_aten = torch.ops.aten


def convolution(name: str, layer: Any, tape: Tape, anchor: Tensor) -> Forward:
    """The forward of nn.Conv1d to 3d and nn.ConvTranspose1d to 3d, whatever their settings."""
    transposed: bool = layer.transposed
    dims = len(layer.kernel_size)
    outside = layer.padding_mode != "zeros" or isinstance(layer.padding, str)  # padding by F.pad, by autograd
    padding = [0] * dims if outside else list(layer.padding)
    stride, dilation, groups = list(layer.stride), list(layer.dilation), layer.groups

    def forward(x: Tensor, output_size: list[int] | None = None) -> Tensor:
        more = [0] * dims
        if transposed:
            more = list(
                layer._output_padding(
                    x, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
                )
            )
        if outside:
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        settings = (stride, padding, dilation, transposed, more)

        def run(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return torch.convolution(x, layer.weight, layer.bias, *settings, groups), ()

        def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
            return _conv_backward(gradient, x, layer.weight, settings, groups, (False, True, False))

        def grouped(x: Tensor, gradient: Tensor) -> Tensor:
            """All rows at once, each as a group of one image's channels; then the sum over a unit's rows."""
            rows, weight = len(x), layer.weight
            wide = weight.expand(rows, *weight.shape).reshape(-1, *weight.shape[1:])
            x = x.reshape(1, -1, *x.shape[2:])
            gradient = gradient.reshape(1, -1, *gradient.shape[2:])
            found = _conv_backward(gradient, x, wide, settings, groups * rows, (False, True, False))
            return found.view(tape.units, -1, *weight.shape).sum(1)

        def back(gradient: Tensor, wanted: bool, x: Tensor) -> Tensor | None:
            if layer.weight.requires_grad:
                x_UK, gradient_UK = by_unit(x, tape.units), by_unit(gradient, tape.units)
                direct = {
                    "unit by unit": lambda: torch.stack(
                        [weight_gradient(*pair) for pair in zip(x_UK, gradient_UK, strict=True)]
                    ),
                    "grouped": lambda: grouped(x, gradient),
                }
                tape.product(name, layer.weight, _conv_product(layer, padding, x, gradient, tape.units, direct))
            if is_trained(layer.bias):
                tape.gradient(name, layer.bias, by_unit(gradient.flatten(2).sum(2), tape.units).sum(1))
            if not wanted:
                return None
            return _conv_backward(gradient, x, layer.weight, settings, groups, (True, False, False))

        return through((run, back), x, anchor)

    return forward


def _conv_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...], groups: int, mask: tuple[bool, bool, bool]
) -> Tensor:
    """The input gradient or the weight gradient, whichever `mask` says."""
    found: Tensor = _aten.convolution_backward(gradient, x, weight, None, *settings, groups, mask)[mask.index(True)]
    return found


def _conv_product(
    layer: Any, padding: list[int], x: Tensor, gradient: Tensor, units: int, direct: dict[str, Callable[[], Tensor]]
) -> Product:
    """Patches times output gradients; for a transposed convolution the two change roles."""
    image, grid = (gradient, x) if layer.transposed else (x, gradient)
    positions = math.prod(grid.shape[2:])
    channels, outputs = image.shape[1], grid.shape[1]  # `restore` is kept to the end: it must not hold the image
    inputs = math.prod(layer.kernel_size) * channels

    def a(dtype: torch.dtype) -> Tensor:
        return _patches(image.to(dtype), layer, padding, grid.shape[2:]).reshape(units, -1, inputs)

    def b(dtype: torch.dtype) -> Tensor:
        return grid.to(dtype).flatten(2).transpose(1, 2).reshape(units, -1, outputs)

    def restore(g: Tensor) -> Tensor:
        split: Tensor = g.unflatten(-1, (*layer.kernel_size, channels))
        return split.movedim(-1, g.dim() - 1)

    def lines(g: Tensor) -> Tensor | None:
        last = g.movedim(1, -1)
        return last.view(outputs, inputs) if last.is_contiguous() else None

    shape = (len(x) // units * positions, inputs, outputs)
    if layer.groups > 1:  # not a single product: only the direct ways are right
        shape = (0, *shape[1:])
    return Product(a, b, shape, units, x.dtype, restore, lines, direct)


def _patches(x_BC: Tensor, layer: Any, padding: list[int], out: torch.Size) -> Tensor:
    """[B, T, kernel x C]: what each output position sees, channels innermost."""
    dims = len(out)
    if any(padding):
        x_BC = F.pad(x_BC, [width for side in reversed(padding) for width in (side, side)])
    x = x_BC.movedim(1, -1)
    if all(size == 1 for size in layer.kernel_size):
        steps = (slice(None), *(slice(0, step * (n - 1) + 1, step) for step, n in zip(layer.stride, out, strict=True)))
        return x[steps].reshape(len(x), math.prod(out), x.shape[-1])
    x = x.contiguous()
    step = x.stride()
    view = x.as_strided(
        (len(x), *out, *layer.kernel_size, x.shape[-1]),
        (
            step[0],
            *(step[i + 1] * layer.stride[i] for i in range(dims)),
            *(step[i + 1] * layer.dilation[i] for i in range(dims)),
            1,
        ),
    )
    return view.reshape(len(x), math.prod(out), -1)
