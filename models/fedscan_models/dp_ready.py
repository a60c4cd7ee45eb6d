"""Which layers break the per-patient guarantee, by name, and what to use instead.

The guarantee rests on one fact: a patient's gradient depends on that patient's images, on the
public model and on nothing else. Two things break it. A layer that **mixes samples** (batch norm)
makes every gradient depend on the whole batch, so clipping bounds nothing. A layer that
**remembers** (running averages, spectral norm's power iteration) keeps statistics that are never
clipped or noised, and federating the state dict would send them out.

``check`` reads the module tree and needs no data; ``mixes_samples`` and ``changed_buffers`` run
the model and see what it does. Source: Dwork and Roth 2014 for the sensitivity argument; Opacus'
module validator (arXiv:2109.12298) refuses the same layers.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from fedscan_core.errors import NotPrivate

_GROUP_NORM = "Use torch.nn.GroupNorm instead: it normalises each image by itself."
_INSTANCE_NORM = "Set track_running_stats=False, or use torch.nn.GroupNorm."
_SPECTRAL_NORM = "Remove spectral norm: its power iteration updates a stored vector at every step."
_BUFFER = "Make it a parameter, or, if it is a constant, register it with persistent=False."


def check(module: nn.Module) -> None:
    """Refuses a model that holds a layer known to break the guarantee.

    Refused are batch norm in every form, instance norm with running statistics, spectral norm, and
    any buffer in the state dict (what a site sends must be parameters, each clipped and noised).
    Dropout and in-place activations are fine.

    Raises:
        NotPrivate: naming each offending layer by its path in the model, with what to use instead.
    """
    found = list(_offenders(module))
    if not found:
        return
    layers = "; ".join(f"{path or '(the model itself)'} ({what})" for path, what, _ in found)
    remedies = dict.fromkeys(remedy for _, _, remedy in found)  # one of each, in order
    raise NotPrivate(
        f"The model holds layers that break the per-patient guarantee: {layers}.",
        remedy=" ".join(remedies),
    )


def _offenders(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yields (path, what it is, remedy); a layer is named once even where two rules catch it."""
    for path, layer in module.named_modules():
        kind = type(layer).__name__
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            yield path, kind, _GROUP_NORM
        elif isinstance(layer, nn.modules.instancenorm._InstanceNorm):
            if layer.track_running_stats:
                yield path, f"{kind} with running statistics", _INSTANCE_NORM
        elif _is_spectral_norm(layer):
            yield path, "spectral norm", _SPECTRAL_NORM
        else:
            for name, buffer in layer.named_buffers(recurse=False):
                if buffer is not None and name not in layer._non_persistent_buffers_set:
                    yield f"{path}.{name}" if path else name, f"buffer of {kind}", _BUFFER


def _is_spectral_norm(layer: nn.Module) -> bool:
    """True for both of PyTorch's spectral norms: the parametrization and the older forward hook."""
    if isinstance(layer, nn.utils.parametrizations._SpectralNorm):
        return True
    hooks = layer._forward_pre_hooks.values()
    return any(isinstance(hook, SpectralNorm) for hook in hooks)


def mixes_samples(module: nn.Module, shape: tuple[int, ...], *, batch: int = 3) -> bool:
    """Tells by experiment whether one sample's output depends on another sample of the same batch.

    In training mode on a copy, with random input: output i must not move when input j is replaced,
    and its gradient with respect to input j must be exactly zero.

    Args:
        module: the network; it is left as it was.
        shape: one sample's shape, without the batch axis.
        batch: samples in the trial batch, at least 2.
    """
    probe = copy.deepcopy(module).train()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        x = torch.randn(batch, *shape, requires_grad=True)
        other = x.detach().clone()
        other[1:] = torch.randn(batch - 1, *shape)
        first = _forward(probe, x)[0]
        weights = torch.randn_like(first)  # a plain sum can cancel what mixing does
        (grad,) = torch.autograd.grad((first * weights).sum(), x)
        moved = (_forward(probe, other)[0] - first).abs().max() > 1e-3 * first.abs().max()
    return bool(grad[1:].abs().max() > 0) or bool(moved)


def changed_buffers(module: nn.Module, shape: tuple[int, ...], *, batch: int = 3) -> list[str]:
    """Names the buffers that one forward pass in training mode changes, on a copy of the model.

    Covers buffers outside the state dict too: a site keeps them, but they carry one batch into the
    next.
    """
    probe = copy.deepcopy(module).train()
    before = {name: buffer.clone() for name, buffer in probe.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        _forward(probe, torch.randn(batch, *shape))
    after = dict(probe.named_buffers())
    return [name for name, old in before.items() if not torch.equal(old, after[name])]


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    """One forward pass under a fixed seed, so that dropout draws the same mask each time."""
    torch.default_generator.manual_seed(1)
    out = module(x)
    assert isinstance(out, Tensor)
    return out
