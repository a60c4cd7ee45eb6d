"""Image classifiers without batch norm: cnn, resnet18, densenet121.

All normalise with GroupNorm (Wu and He 2018, arXiv:1803.08494), which looks at one image at a
time, and none changes a tensor in place, because per-sample gradient engines keep the activations
they hook.

B batch, C channels, H and W pixels, K outputs.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

_GROUPS = 16


def cnn(channels: int, outputs: int) -> nn.Sequential:
    """A small network, about 0.1 M parameters: x_BCHW of 16 x 16 or more to logits_BK.

    Three convolution blocks, average pooling and a linear head.
    """

    def block(n_in: int, n_out: int) -> nn.Sequential:
        conv = nn.Conv2d(n_in, n_out, 3, padding=1)
        return nn.Sequential(conv, nn.GroupNorm(8, n_out), nn.ReLU(), nn.MaxPool2d(2))

    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["block1"] = block(channels, 32)
    parts["block2"] = block(32, 64)
    parts["block3"] = block(64, 128)
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["head"] = nn.Linear(128, outputs)
    return nn.Sequential(parts)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016), added out of place."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        """Builds the block; the shortcut is a 1 x 1 convolution where the shape changes."""
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(_GROUPS, n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            conv = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.GroupNorm(_GROUPS, n_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns [B, n_out, H / stride, W / stride]."""
        y = torch.relu(self.norm1(self.conv1(x_BCHW)))
        y = self.norm2(self.conv2(y))
        return torch.relu(y + self.shortcut(x_BCHW))


def resnet18(channels: int, outputs: int) -> nn.Sequential:
    """ResNet-18 (He et al. 2016) with GroupNorm, 11.2 M parameters.

    Takes x_BCHW of 32 x 32 or more, returns logits_BK.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["stem"] = nn.Sequential(
        nn.Conv2d(channels, 64, 7, 2, 3, bias=False),
        nn.GroupNorm(_GROUPS, 64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    )
    n_in = 64
    for i, (n_out, stride) in enumerate([(64, 1), (128, 2), (256, 2), (512, 2)], start=1):
        first, second = ResidualBlock(n_in, n_out, stride), ResidualBlock(n_out, n_out, 1)
        parts[f"stage{i}"] = nn.Sequential(first, second)
        n_in = n_out
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["head"] = nn.Linear(512, outputs)
    return nn.Sequential(parts)


def densenet121(channels: int, outputs: int) -> nn.Module:
    """MONAI's DenseNet-121 (Huang et al. 2017) with GroupNorm, 7 M parameters.

    Takes x_BCHW of 32 x 32 or more, returns logits_BK. Ziegler et al. 2022 (arXiv:2205.03168) train
    this net on chest x-rays across sites under differential privacy.
    """
    from monai.networks.nets import DenseNet121  # here: importing MONAI takes seconds

    net = DenseNet121(
        spatial_dims=2,
        in_channels=channels,
        out_channels=outputs,
        act="relu",
        norm=("group", {"num_groups": _GROUPS}),
    )
    return out_of_place(net)


def out_of_place(module: nn.Module) -> nn.Module:
    """Turns off every activation's ``inplace`` switch, in place, and returns the module."""
    for layer in module.modules():
        if hasattr(layer, "inplace"):
            setattr(layer, "inplace", False)  # noqa: B010 - nn.Module types attributes as modules
    return module
