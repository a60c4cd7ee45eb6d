"""U-Nets for segmentation without batch norm: unet2d and unet3d.

MONAI's residual UNet (Kerfoot et al. 2019; Ronneberger et al. 2015) with GroupNorm. Its last layer
is normalised too and would ask the group count to divide the number of classes, so the body ends
in 16 channels and a 1 x 1 convolution, the head, makes the classes of them.

B batch, C channels, D, H and W voxels, K classes.
"""

from collections import OrderedDict

from torch import nn

from fedscan_models.classifiers import out_of_place

STRIDE = 8  # three halvings: every side of the image must be a multiple of this
_GROUPS = 8
_BODY_OUT = 16


def unet2d(channels: int, outputs: int) -> nn.Sequential:
    """2-D UNet: x_BCHW, sides multiples of 8, to logits_BKHW."""
    return _unet(2, channels, outputs, widths=(32, 64, 128, 256))


def unet3d(channels: int, outputs: int) -> nn.Sequential:
    """3-D UNet: x_BCDHW, sides multiples of 8, to logits_BKDHW."""
    return _unet(3, channels, outputs, widths=(16, 32, 64, 128))


def _unet(dims: int, channels: int, outputs: int, *, widths: tuple[int, ...]) -> nn.Sequential:
    from monai.networks.nets import UNet  # here: importing MONAI takes seconds

    body = UNet(
        spatial_dims=dims,
        in_channels=channels,
        out_channels=_BODY_OUT,
        channels=widths,
        strides=(2, 2, 2),
        num_res_units=2,
        act="relu",
        norm=("group", {"num_groups": _GROUPS}),
    )
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    head = conv(_BODY_OUT, outputs, 1)
    return nn.Sequential(OrderedDict(body=out_of_place(body), head=head))
