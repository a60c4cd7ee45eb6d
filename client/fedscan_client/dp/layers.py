"""What each kind of layer adds to every unit's gradient, in one backward pass and without the ordinary weight gradient.

`attached` replaces the forward of every parametrised layer for one pass (book-keeping: Bu et al. 2023, arXiv
2210.00038). The replaced layer's backward computes the input gradient only, and leaves for each parameter either

- a `Product`: the unit's gradient is b^T a, summed over its rows and positions (Linear, every convolution); or
- the unit's gradient itself (biases, norm layers, Embedding; any other layer by autograd, unit by unit).

Parameter names and the state dict stay as they are, and the forwards are put back whatever happens. A layer is known by
its exact type: a subclass may compute something else, and goes by autograd.

Assumed: dimension 0 of what enters a layer is the rows, or a multiple of them, each unit's side by side. The engine
checks that on random data against the plain loop before it trusts a network (`dp.plans`).

Legend: U units of K rows, B = U K rows, C channels, T positions of a row, p inputs and o outputs of a layer.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fedscan_client.dp.convolution import convolution
from fedscan_client.dp.opaque import opaque
from fedscan_client.dp.tape import Forward, Product, Tape, Unsplittable, as_it_is, by_unit, is_trained, through

_aten = torch.ops.aten


@contextlib.contextmanager
def attached(module: nn.Module, tape: Tape) -> Iterator[Tensor]:
    """Within it, a forward and backward pass of `module` tells `tape` each trainable parameter's gradient by unit.

    Yields:
        A scalar to differentiate the loss by: it sets every layer's backward going, also the first one's.
    """
    anchor = torch.zeros((), requires_grad=True)
    touched = []
    try:
        for name, layer in leaves(module):
            rule = _RULES.get(type(layer), opaque) if not parametrize.is_parametrized(layer) else opaque
            forward = rule(name, layer, tape, anchor)
            layer.forward = _counting(forward, layer, tape)
            touched.append(layer)
        yield anchor
    finally:
        for layer in touched:
            vars(layer).pop("forward", None)


def leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers that own trainable parameters, outermost first; what is inside one is part of it."""
    own = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    if own or parametrize.is_parametrized(module):
        if any(parameter.requires_grad for parameter in module.parameters()):
            yield name, module
        return
    for child_name, child in module.named_children():
        yield from leaves(child, f"{name}.{child_name}" if name else child_name)


def _counting(forward: Forward, layer: nn.Module, tape: Tape) -> Forward:
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def counted(*args: Any, **kwargs: Any) -> Any:
        for parameter in parameters:
            tape.use(parameter)
        return forward(*args, **kwargs)

    return counted


def _linear(name: str, layer: nn.Linear, tape: Tape, anchor: Tensor) -> Forward:
    def run(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.linear(x, layer.weight, layer.bias), ()

    def back(gradient: Tensor, wanted: bool, x: Tensor) -> Tensor | None:
        b_Uto = by_unit(gradient, tape.units).flatten(1, -2)
        if layer.weight.requires_grad:
            a_Utp = by_unit(x, tape.units).flatten(1, -2)
            shape = (a_Utp.shape[1], a_Utp.shape[2], b_Uto.shape[2])
            tape.product(
                name, layer.weight, Product(a_Utp.to, b_Uto.to, shape, tape.units, x.dtype, as_it_is, as_it_is)
            )
        if is_trained(layer.bias):
            tape.gradient(name, layer.bias, b_Uto.sum(1))
        return gradient @ layer.weight if wanted else None

    def forward(x: Tensor) -> Tensor:
        return through((run, back), x, anchor)

    return forward


def _group_norm(name: str, layer: Any, tape: Tape, anchor: Tensor) -> Forward:
    """GroupNorm, and InstanceNorm without running statistics: one channel a group."""

    def run(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows, channels = x.shape[:2]
        groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else channels
        positions = math.prod(x.shape[2:])
        y, mean, rstd = _aten.native_group_norm(
            x, layer.weight, layer.bias, rows, channels, positions, groups, layer.eps
        )
        return y, (mean, rstd)

    def back(gradient: Tensor, wanted: bool, x: Tensor, mean_BG: Tensor, rstd_BG: Tensor) -> Tensor | None:
        rows, channels = x.shape[:2]
        positions, groups = math.prod(x.shape[2:]), mean_BG.shape[1]
        # Every row as groups of its own in one wide image: the backward pass then leaves each row's sums apart.
        wide = (1, rows * channels, *x.shape[2:])
        found_x, found_weight, found_bias = _aten.native_group_norm_backward(
            gradient.contiguous().view(wide),
            x.contiguous().view(wide),
            mean_BG.view(1, -1),
            rstd_BG.view(1, -1),
            layer.weight.repeat(rows),
            1,
            rows * channels,
            positions,
            rows * groups,
            (wanted, is_trained(layer.weight), is_trained(layer.bias)),
        )
        for parameter, found in ((layer.weight, found_weight), (layer.bias, found_bias)):
            if is_trained(parameter):
                tape.gradient(name, parameter, by_unit(found.view(rows, channels), tape.units).sum(1))
        return found_x.view(x.shape) if wanted else None

    def forward(x: Tensor) -> Tensor:
        if not isinstance(layer, nn.GroupNorm) and (layer.track_running_stats or layer.training is False):
            raise Unsplittable("instance norm with running statistics")
        return through((run, back), x, anchor)

    return forward


def _layer_norm(name: str, layer: nn.LayerNorm, tape: Tape, anchor: Tensor) -> Forward:
    shape = list(layer.normalized_shape)

    def run(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, mean, rstd = _aten.native_layer_norm(x, shape, layer.weight, layer.bias, layer.eps)
        return y, (mean, rstd)

    def back(gradient: Tensor, wanted: bool, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor | None:
        if is_trained(layer.weight):
            terms = gradient * (x - mean) * rstd
            tape.gradient(name, layer.weight, terms.reshape(tape.units, -1, *shape).sum(1))
        if is_trained(layer.bias):
            tape.gradient(name, layer.bias, gradient.reshape(tape.units, -1, *shape).sum(1))
        if not wanted:
            return None
        mask = (True, False, False)
        found: Tensor = _aten.native_layer_norm_backward(
            gradient, x, shape, mean, rstd, layer.weight, layer.bias, mask
        )[0]
        return found

    def forward(x: Tensor) -> Tensor:
        if len(x) % tape.units or x.dim() == len(shape):
            raise Unsplittable("a layer norm over the rows themselves")
        return through((run, back), x, anchor)

    return forward


def _embedding(name: str, layer: nn.Embedding, tape: Tape, anchor: Tensor) -> Forward:
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        raise Unsplittable("an embedding with max_norm, scale_grad_by_freq or sparse")

    def run(index: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.embedding(index, layer.weight), ()

    def back(gradient: Tensor, wanted: bool, index: Tensor) -> None:
        found = gradient.new_zeros(tape.units * layer.num_embeddings, layer.embedding_dim)
        first_U = torch.arange(tape.units, device=index.device) * layer.num_embeddings
        place = by_unit(index, tape.units).flatten(1) + first_U.view(-1, 1)
        found.index_add_(0, place.flatten(), gradient.reshape(-1, layer.embedding_dim))
        found_U = found.view(tape.units, *layer.weight.shape)
        if layer.padding_idx is not None:
            found_U[:, layer.padding_idx] = 0
        tape.gradient(name, layer.weight, found_U)

    def forward(index: Tensor) -> Tensor:
        return through((run, back), index, anchor)

    return forward


_RULES: dict[type[nn.Module], Callable[[str, Any, Tape, Tensor], Forward]] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), convolution),
    nn.GroupNorm: _group_norm,
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _group_norm),
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
