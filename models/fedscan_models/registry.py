"""The zoo as one dict: a model's name to the function that builds it.

To add a model, write a function ``ModelShape -> Network`` and put it in ``MODELS``; ``build``
refuses it if it holds a layer that breaks the per-patient guarantee (`fedscan_models.dp_ready`),
and the tests in tests/models/test_registry.py run on every entry.

B batch, C channels, H and W pixels (D slices too in 3-D), K outputs.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError
from fedscan_models import classifiers, dp_ready, scatter, segmenters, tasks

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class ModelShape:
    """What a model is built for: all of it public, none of it measured on patients.

    Attributes:
        channels: image channels, 1 for grey, 3 for colour.
        image_size: pixels, (H, W) or (D, H, W).
        outputs: logits per image, or per voxel for a segmenter (`fedscan_models.tasks.outputs`).
    """

    channels: int
    image_size: tuple[int, ...]
    outputs: int

    def __post_init__(self) -> None:
        """Refuses numbers no model can be built for."""
        sides = "x".join(map(str, self.image_size))
        if len(self.image_size) not in (2, 3):
            raise ConfigError(
                f"An image size has 2 or 3 sides, not {len(self.image_size)} ({sides}).",
                remedy="Give (height, width) or (depth, height, width).",
            )
        if min(self.channels, self.outputs, *self.image_size) < 1:
            raise ConfigError(
                f"A model needs at least one channel, output and pixel; got {self.channels} "
                f"channels, {self.outputs} outputs and an image of {sides}.",
                remedy="Correct the channels, the labels or the image size.",
            )


@dataclass(frozen=True)
class Network:
    """A model ready to be trained.

    Attributes:
        name: its name in ``MODELS``.
        module: what is trained and federated; its state dict is "the model" and holds parameters
            only.
        features: a fixed, parameter-free map from pixels x_BCHW to the module's input, computed
            once per image and kept; None where the module reads pixels.
        head: parameter-name prefixes of the last layer.
    """

    name: str
    module: nn.Module
    features: Callable[[Tensor], Tensor] | None
    head: tuple[str, ...]


def _pixels(
    name: str,
    make: Callable[[int, int], nn.Module],
    *,
    head: str,
    dims: int = 2,
    smallest: int = 16,
    multiple: int = 1,
) -> Callable[[ModelShape], Network]:
    """An entry for a model that reads pixels: checks the shape, then makes the module."""

    def build_it(shape: ModelShape) -> Network:
        _check_shape(name, shape, dims=dims, smallest=smallest, multiple=multiple)
        return Network(name, make(shape.channels, shape.outputs), None, (head,))

    return build_it


def _scatter(shape: ModelShape) -> Network:
    _check_shape("scatter", shape, dims=2, smallest=scatter.SMALLEST)
    module = scatter.linear_model(shape.channels, shape.image_size, shape.outputs)
    return Network("scatter", module, scatter.features, ("head",))


MODELS: dict[str, Callable[[ModelShape], Network]] = {
    "scatter": _scatter,
    "cnn": _pixels("cnn", classifiers.cnn, head="head"),
    "resnet18": _pixels("resnet18", classifiers.resnet18, head="head", smallest=32),
    "densenet121": _pixels("densenet121", classifiers.densenet121, head="class_layers.out", smallest=32),
    "unet2d": _pixels("unet2d", segmenters.unet2d, head="head", multiple=segmenters.STRIDE),
    "unet3d": _pixels("unet3d", segmenters.unet3d, head="head", dims=3, multiple=segmenters.STRIDE),
}


def build(name: str, shape: ModelShape, *, seed: int = 0) -> Network:
    """Builds a model with weights drawn from ``seed``; torch's own random state is left untouched.

    Raises:
        ConfigError: for a name that is not in ``MODELS`` and for a shape that the model cannot
            take.
        NotPrivate: if the model holds a layer that breaks the per-patient guarantee.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f'There is no model "{name}".',
            remedy=f'Did you mean "{near}"? The models are {", ".join(MODELS)}.',
        )
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU: no GPU state is touched
        torch.default_generator.manual_seed(seed)
        network = MODELS[name](shape)
    dp_ready.check(network.module)
    return network


def for_run(run: RunConfig) -> Network:
    """A run's network with fresh weights from its seed and its trainable part selected: the same at every site."""
    shape = ModelShape(run.task.channels, run.task.image_size, tasks.outputs(run.task.labels))
    network = build(run.model.name, shape, seed=run.train.seed)
    select_trainable(network.module, network.head, run.model.trainable)
    return network


def select_trainable(module: nn.Module, head: tuple[str, ...], which: Literal["all", "head", "norm"]) -> None:
    """Sets which parameters are trained, by ``requires_grad``.

    Fewer trained parameters meet less noise: the noise's length grows with the square root of
    their number, the clipped gradient's does not.

    Args:
        module: the network, changed in place.
        head: parameter-name prefixes of the head (``Network.head``).
        which: "all", "head" or "norm" (norm layers and the head).

    Raises:
        ConfigError: for another ``which``, and for a head that names no parameter.
    """
    if which not in ("all", "head", "norm"):
        raise ConfigError(f'"{which}" is no choice of parameters to train.', remedy="Use all, head or norm.")
    in_norms = {
        parameter
        for layer in module.modules()
        if isinstance(layer, _NORMS)
        for parameter in layer.parameters(recurse=False)
    }
    in_head = {
        parameter
        for name, parameter in module.named_parameters()
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in head)
    }
    if not in_head:
        raise ConfigError(
            f"No parameter of the model lies under its head ({', '.join(head) or 'none named'}).",
            remedy="Name the last layer's path in Network.head.",
        )
    for parameter in module.parameters():
        chosen = parameter in in_head or (which == "norm" and parameter in in_norms)
        parameter.requires_grad_(which == "all" or chosen)


def _check_shape(name: str, shape: ModelShape, *, dims: int, smallest: int, multiple: int = 1) -> None:
    """Refuses an image the model cannot take, naming both and a size that would do."""
    sides = "x".join(map(str, shape.image_size))
    if len(shape.image_size) != dims:
        others = _TAKES_3D if len(shape.image_size) == 3 else _TAKES_2D
        raise ConfigError(
            f'The model "{name}" takes {dims}-D images; the image size is {sides}.',
            remedy=f"Choose one of {', '.join(others)}, or give {dims} sides.",
        )
    fits = [max(smallest, -(-side // multiple) * multiple) for side in shape.image_size]
    if tuple(fits) != shape.image_size:
        rule = f" and a multiple of {multiple}" if multiple > 1 else ""
        raise ConfigError(
            f'The model "{name}" takes images whose sides are at least {smallest}{rule}; the image size is {sides}.',
            remedy=f"Use {'x'.join(map(str, fits))}, or another model.",
        )


_TAKES_3D = ("unet3d",)
_TAKES_2D = tuple(name for name in MODELS if name not in _TAKES_3D)
