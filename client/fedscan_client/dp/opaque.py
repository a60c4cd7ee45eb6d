"""Any other layer: its gradient by unit through autograd, one unit after another. Exact and slow."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from fedscan_client.dp.tape import Forward, Tape, Unsplittable


class _Opaque(torch.autograd.Function):
    """A layer of any kind: computed for all rows together, differentiated unit by unit."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: Forward, back: Forward, *tensors: Tensor) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.back = back
        return call(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return (None, None, None, *ctx.back(gradients, ctx.needs_input_grad[3:], ctx.saved_tensors))


def opaque(name: str, layer: nn.Module, tape: Tape, anchor: Tensor) -> Forward:
    """The generic way: the layer's own forward again for each unit, by autograd. Exact and slow."""
    trained = {key: parameter for key, parameter in layer.named_parameters() if parameter.requires_grad}
    dim = 0 if getattr(layer, "batch_first", True) else 1  # attention and recurrent layers: (T, B, ...)
    own_forward = type(layer).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        flat, tree = tree_flatten((args, kwargs))
        places = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        out_tree: list[Any] = []

        def call(tensors: tuple[Tensor, ...], parameters: dict[str, Tensor] | None = None) -> tuple[Any, ...]:
            values = list(flat)
            for place, tensor in zip(places, tensors, strict=True):
                values[place] = tensor
            own_args, own_kwargs = tree_unflatten(values, tree)
            patched = vars(layer).pop("forward", None)
            try:
                if parameters is None:
                    out = own_forward(layer, *own_args, **own_kwargs)
                else:
                    out = functional_call(layer, parameters, own_args, own_kwargs)
            finally:
                if patched is not None:
                    layer.forward = patched
            leaves_out, shape = tree_flatten(out)
            out_tree[:] = [shape]
            return tuple(leaves_out)

        tensors = tuple(flat[i] for i in places)
        rows = tensors[0].shape[dim]
        if rows % tape.units:
            raise Unsplittable("a layer's rows are no multiple of the units")

        def part(tensor: Tensor, unit: int) -> Tensor:
            own = rows // tape.units
            if tensor.dim() > dim and tensor.shape[dim] == rows:
                return tensor.narrow(dim, unit * own, own).clone()
            return tensor

        def back(
            gradients: tuple[Tensor | None, ...], wanted: tuple[bool, ...], tensors: tuple[Tensor, ...]
        ) -> list[Tensor | None]:
            found: dict[str, list[Tensor]] = {key: [] for key in trained}
            back_to: list[list[Tensor]] = [[] for _ in tensors]
            for unit in range(tape.units):
                with torch.enable_grad():
                    own = [part(t.detach(), unit).requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
                    copies = {key: parameter.detach().requires_grad_() for key, parameter in trained.items()}
                    outs = call(tuple(own), copies)
                pairs = [
                    (out, _same_part(gradient, out, unit))
                    for out, gradient in zip(outs, gradients, strict=True)
                    if isinstance(out, Tensor) and gradient is not None and out.requires_grad
                ]
                inputs = [*copies.values(), *(o for o, w in zip(own, wanted, strict=True) if w)]
                got = list(
                    torch.autograd.grad(
                        [out for out, _ in pairs],
                        inputs,
                        [gradient for _, gradient in pairs],
                        allow_unused=True,
                        materialize_grads=True,
                    )
                )
                for key in copies:
                    found[key].append(got.pop(0))
                for place, w in enumerate(wanted):
                    if w:
                        back_to[place].append(got.pop(0))
            for key, parameter in trained.items():
                tape.gradient(f"{name}.{key}", parameter, torch.stack(found[key]))
            return [
                (torch.cat(parts, dim) if parts[0].shape != tensor.shape else torch.stack(parts).sum(0)) if w else None
                for tensor, parts, w in zip(tensors, back_to, wanted, strict=True)
            ]

        outs = _Opaque.apply(anchor, call, back, *tensors)  # type: ignore[no-untyped-call]
        return tree_unflatten(list(outs), out_tree[0])

    return forward


def _same_part(gradient: Tensor, own: Tensor, unit: int) -> Tensor:
    """The unit's part of a gradient, along the dimension in which the whole is larger."""
    for dim, (whole, part) in enumerate(zip(gradient.shape, own.shape, strict=True)):
        if whole != part:
            return gradient.narrow(dim, unit * part, part)
    return gradient
