"""Secret randomness for masks and noise: AES-256 in counter mode, rekeyed from the operating system at every step.

Guarantee: under the assumption that AES-CTR keyed with 256 fresh bits is indistinguishable from random, `gaussian`
gives independent N(0, 1) values, exact up to 53-bit uniforms (the tail ends at 8.5 standard deviations), and
`add_noise` returns only points of a fixed public grid, which closes the gaps that floating-point noise leaves
(Haney et al. 2022, arXiv 2207.13793). Rounding the sum to the grid adds at most grid * sqrt(d) to the L2 sensitivity;
`dp.engine.MARGIN` covers it. This is hardened, not proven exact: an exact discrete Gaussian (Canonne, Kamath, Steinke
2020) would be far slower.

A generator that can be seeded (torch, numpy) must not be used here: whoever knows or guesses the seed subtracts the
noise. The key is never stored, logged or reused; a cloned or restored machine draws a new one.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

GRID_BITS = 30  # grid spacing is (noise standard deviation, rounded down to a power of two) * 2**-GRID_BITS


class SecretStream:
    """One step's keystream. Make a new one for every step; draws are independent and never repeat."""

    def __init__(self) -> None:
        self._encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def uniform(self, count: int) -> np.ndarray:
        """float64 in (0, 1]: multiples of 2**-53."""
        words = np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype=np.uint64)
        return ((words >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53

    def gaussian(self, count: int) -> np.ndarray:
        """float64 standard normal values (Box and Muller 1958)."""
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniform(half)))
        angle = (2.0 * math.pi) * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def add_noise(sums: Sequence[Tensor], scale: float, stream: SecretStream) -> list[Tensor]:
    """Adds N(0, scale^2) to every entry, on the grid.

    Args:
        sums: float64 tensors: the clipped sums, one per parameter.
        scale: standard deviation, noise multiplier times clipping norm; above 0.
        stream: this step's keystream.

    Returns:
        float64 tensors of the same shapes, every entry a multiple of the grid spacing.
    """
    grid = 2.0 ** (math.floor(math.log2(scale)) - GRID_BITS)
    noisy = []
    for total in sums:
        noise = torch.from_numpy(stream.gaussian(total.numel())).view(total.shape).to(total.device)
        # Both are rounded to whole grid points first, so that their sum is exact in float64.
        noisy.append(((total.double() / grid).round() + (noise * (scale / grid)).round()) * grid)
    return noisy
