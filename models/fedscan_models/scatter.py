"""Fixed wavelet scattering features, and the linear model that is trained on them.

The scattering transform (Mallat 2012; Bruna and Mallat 2013; Oyallon and Mallat 2015) is a
two-layer convolutional network whose filters are written down, not learned:

    S0 = x * phi
    S1[j, t] = |x * psi_jt| * phi
    S2[j, t, k, s] = ||x * psi_jt| * psi_ks| * phi        for k > j

psi_jt are Morlet wavelets at scales j = 0, 1, 2 and 8 angles t, phi is a Gaussian; every map is
sampled each 8 pixels. The constants are Kymatio's (Andreux et al. 2020, arXiv:1812.11214). With
features that cost no privacy, only a linear layer is trained, which is what works best under a
small budget (Tramer and Boneh 2021, arXiv:2011.11660).

Unlike Kymatio this transform keeps full resolution up to the last step, so that nothing is aliased;
the Gaussian is separable, so the last step is two small matrix products, which also is faster.

B batch, C channels, H and W pixels, M and N padded pixels, h = ceil(H / 8) and w = ceil(W / 8)
rows and columns of the maps, D features.
"""

import math
from collections import OrderedDict
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALES = 3
ANGLES = 8
STEP = 2**SCALES
PATHS = 1 + SCALES * ANGLES + ANGLES**2 * SCALES * (SCALES - 1) // 2
SMALLEST = 16

_SIGMA = 0.8  # width of the finest envelope, in pixels; doubles with each scale
_XI = 3 * math.pi / 4  # frequency of the finest wavelet, in radians a pixel; halves with each scale
_SLANT = 4 / ANGLES  # the envelope is longer across the wave than along it by 1 / slant
_PIXELS_AT_ONCE = 2**15  # padded pixels per pass: bounds memory, and is as fast as more
_BLANK = 0.05  # added to an image's standard deviation
_FLOOR = 0.01  # added before the logarithm
_GRID = 8  # at most this many feature rows and columns


def scattering(x_BCHW: Tensor) -> Tensor:
    """The scattering coefficients of each image by itself: [B, C * 217, h, w], float32.

    Path order within a channel: S0, S1 by (j, t), S2 by (j, t, k, s). The border is mirrored.

    Args:
        x_BCHW: images of at least 16 x 16 pixels, on any device.
    """
    B, C, H, W = x_BCHW.shape
    pad_h, pad_w = _margins(H), _margins(W)
    size = (H + sum(pad_h), W + sum(pad_w))
    psi = wavelets(*size).to(x_BCHW.device)
    rows, columns = low_pass(size[0]).to(x_BCHW.device), low_pass(size[1]).to(x_BCHW.device)
    chunk = max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))
    flat = x_BCHW.to(torch.float32).reshape(B * C, 1, H, W)
    out = flat.new_empty(B * C, PATHS, len(rows), len(columns))
    for start in range(0, B * C, chunk):
        part = flat[start : start + chunk]
        padded = F.pad(part, (*pad_w, *pad_h), mode="reflect")[:, 0]
        out[start : start + chunk] = _transform(padded, psi, rows, columns)
    return out.reshape(B, C * PATHS, len(rows), len(columns))


def _transform(x_BMN: Tensor, psi: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    def smooth(u: Tensor) -> Tensor:
        smoothed: Tensor = rows @ (u @ columns.T)
        return smoothed

    x_hat = torch.fft.fft2(x_BMN)
    u1 = _modulus(torch.fft.ifft2(x_hat[:, None] * psi))
    u1_hat = torch.fft.fft2(u1[:, :-ANGLES])  # the coarsest scale has no second order
    out = [smooth(x_BMN)[:, None], smooth(u1)]
    for path in range(u1_hat.shape[1]):
        coarser = psi[(path // ANGLES + 1) * ANGLES :]
        out.append(smooth(_modulus(torch.fft.ifft2(u1_hat[:, path, None] * coarser))))
    return torch.cat(out, dim=1)


def _modulus(z: Tensor) -> Tensor:
    return (z.real.square() + z.imag.square()).sqrt()  # three times as fast as abs() on a CPU


def _margins(side: int) -> tuple[int, int]:
    """Mirrored pixels before and after: up to a multiple of 8, then 8 more on both sides."""
    extra = -side % STEP
    return STEP + extra // 2, STEP + extra - extra // 2


@lru_cache(maxsize=8)
def wavelets(rows: int, columns: int) -> Tensor:
    """Fourier transforms (real) of the 24 periodic Morlet wavelets by (j, t): [24, M, N].

    A Morlet wavelet is a plane wave under a Gaussian envelope, minus as much of the envelope as
    makes its mean zero. Its transform is a Gaussian around the wave's frequency, minus one around
    zero.
    """
    out = torch.empty(SCALES * ANGLES, rows, columns, dtype=torch.float64)
    for j in range(SCALES):
        sigma, xi = _SIGMA * 2**j, _XI / 2**j
        for t in range(ANGLES):
            angle = (ANGLES // 2 - 1 - t) * math.pi / ANGLES
            wave = _gaussian_hat(rows, columns, sigma, angle, xi)
            envelope = _gaussian_hat(rows, columns, sigma, angle, 0.0)
            out[j * ANGLES + t] = wave - wave[0, 0] / envelope[0, 0] * envelope
    return out.to(torch.float32)


def _gaussian_hat(rows: int, columns: int, sigma: float, angle: float, xi: float) -> Tensor:
    """Transform of a modulated Gaussian on the grid: its spectrum's copies, 2 pi apart, add up."""
    out = torch.zeros(rows, columns, dtype=torch.float64)
    turn = 2 * math.pi
    for a in range(-3, 4):
        for b in range(-3, 4):
            y = turn * (torch.arange(rows, dtype=torch.float64)[:, None] / rows + a)
            x = turn * (torch.arange(columns, dtype=torch.float64)[None, :] / columns + b)
            along = y * math.cos(angle) + x * math.sin(angle) - xi
            across = (x * math.cos(angle) - y * math.sin(angle)) / _SLANT
            out += torch.exp(-(sigma**2) / 2 * (along**2 + across**2))
    return out


@lru_cache(maxsize=16)
def low_pass(side: int) -> Tensor:
    """The Gaussian along one axis, sampled each 8 pixels without the margins: [h, M]."""
    sigma = _SIGMA * 2 ** (SCALES - 1)
    centre = torch.arange(STEP, side - STEP, STEP, dtype=torch.float64)[:, None]
    pixel = torch.arange(side, dtype=torch.float64)[None, :]
    out = torch.zeros(len(centre), side, dtype=torch.float64)
    for turn in range(-2, 3):  # periodic, as the wavelets are
        out += torch.exp(-((pixel - centre + turn * side) ** 2) / (2 * sigma**2))
    low: Tensor = out / (sigma * math.sqrt(2 * math.pi))
    return low.to(torch.float32)


def features(x_BCHW: Tensor) -> Tensor:
    """The fixed features of each image: [B, D], float32, of unit length.

    Every step looks at one image alone and has no constant that was taken from data, so the
    features cost no privacy:

    1. each channel is brought to mean 0 and standard deviation 1 (plus 0.05, against blank images);
    2. scattering; a map of more than 8 x 8 is average-pooled to 8 x 8;
    3. the logarithm of orders 1 and 2 (plus 0.01), which turns contrast into an offset;
    4. each map's own mean is taken off: what is left says where a texture is, not how much of it
       there is, and the part that all images share, which would use up the clipped gradient, is
       gone;
    5. at each position the mean over the 24 maps of order 1 is taken off, and the mean over the 192
       of order 2: what is left says which texture, not how much contrast;
    6. the whole is scaled to unit length, so that no logistic gradient is longer than 1.

    This suits images with a fixed layout, such as chest x-rays. Where the signal may lie anywhere
    (a parasite in a cell) step 4 removes much of it: take a convolutional network there.

    D is C * 217 * min(h, 8) * min(w, 8). A blank image has features of nearly 0.

    Args:
        x_BCHW: images with values in [0, 1], of at least 16 x 16 pixels, on any device.
    """
    with torch.no_grad():
        # One at a time: in a batch an image's last bits depend on its neighbours, and one patient's on another's.
        return torch.cat([_normalised(x_1CHW) for x_1CHW in x_BCHW.split(1)])


def _normalised(x_BCHW: Tensor) -> Tensor:
    x = x_BCHW.to(torch.float32)
    x = x - x.mean(dim=(2, 3), keepdim=True)
    x = x / (x.square().mean(dim=(2, 3), keepdim=True).sqrt() + _BLANK)
    maps = scattering(x)
    grid = (min(maps.shape[2], _GRID), min(maps.shape[3], _GRID))
    maps = F.adaptive_avg_pool2d(maps, grid).unflatten(1, (x.shape[1], PATHS))
    logs = torch.cat([maps[:, :, :1], torch.log(maps[:, :, 1:] + _FLOOR)], dim=2)
    logs = logs - logs.mean(dim=(3, 4), keepdim=True)
    order0, order1, order2 = logs.split([1, SCALES * ANGLES, PATHS - 1 - SCALES * ANGLES], dim=2)
    order1 = order1 - order1.mean(dim=2, keepdim=True)
    order2 = order2 - order2.mean(dim=2, keepdim=True)
    flat = torch.cat([order0, order1, order2], dim=2).flatten(start_dim=1)
    # real images measure tens here; rounding on a blank one must not be blown up to length 1
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit: Tensor = flat / length.clamp_min(1e-2)
    return unit


def linear_model(channels: int, image_size: tuple[int, ...], outputs: int) -> nn.Sequential:
    """The linear layer on ``features``, starting at zero: [B, D] to logits_BK.

    It has no bias: a bias cannot change the order of the scores, and its gradient would take its
    share of the clipping norm.
    """
    h, w = (min(-(-side // STEP), _GRID) for side in image_size)
    head = nn.Linear(channels * PATHS * h * w, outputs, bias=False)
    nn.init.zeros_(head.weight)
    return nn.Sequential(OrderedDict(head=head))
