"""Secret randomness for masks and noise: AES-256 in counter mode, rekeyed from the operating system at every step.

Guarantee of `add_noise` (unit and adjacency are those of the sums it is given): the Gaussian mechanism with noise
multiplier scale / sensitivity, the rounding onto the grid charged for. Let S and S' be the sums of neighbouring
cohorts, |S - S'| <= C, d their entries, g the grid's spacing, R rounding to it. Rounding moves an entry by at most g/2,
so |R(S) - R(S')| <= C + g sqrt(d), and `grid_spacing` chooses g so that this is at most C (1 + ROUNDING/2), whatever
the noise multiplier and d. R(S) is on the grid, so R(S) + R(N) = R(R(S) + N) but for ties, whose probability is 0: this
is the Gaussian mechanism applied to R(S), then rounded. N has standard deviation scale * (1 + ROUNDING), which pays for
the longer R(S) - R(S'); the second half of ROUNDING is for the float64 arithmetic that finds g. Sums longer than
2**53 g, as where the noise is tiny, are sound too: both terms are still whole multiples of g, and IEEE addition returns
a function of their exact sum.

Assumed: AES-CTR with a fresh 256-bit key is indistinguishable from random. Only points of a public grid come out, which
closes the gaps that floating-point noise leaves (Haney et al. 2022, arXiv 2207.13793); each has many pre-images. The
tail does not end early: a radius uniform below 2**-32 gets 53 more bits, so values reach 12.7 standard deviations and
what is cut off has probability 2**-117 a pair: below 1e-26 of delta a step at 1e9 parameters. This is hardened, not
proven exact: the transcendental functions are float64. An exact discrete Gaussian (Canonne, Kamath, Steinke 2020) would
be far slower.

A generator that can be seeded (torch, numpy) must not be used here: whoever knows or guesses the seed subtracts the
noise. The key is never stored, logged or reused. A machine cloned or restored between steps draws a new one, and so
does a forked process; a copy of the whole machine made within a step shares that step's keystream.

Sums on a GPU: the keystream is made on the host and copied in blocks. Weaker there: the noise crosses the bus and lies
in device memory that nobody wipes, where another process with access to the device may find it. Not run on CUDA so far.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedscan_core.errors import PrivacyError

ROUNDING = 2.0**-14  # share of noise added to pay for the grid
GRID_BITS = 30  # the spacing is at most scale * 2**-GRID_BITS: the noise's law is not distorted
_BLOCK = 2**16  # values at once: what is held stays in the processor's cache, whatever the model's size


class SecretStream:
    """One step's keystream. Make a new one for every step; draws are independent and never repeat."""

    def __init__(self) -> None:
        self._rekey()

    def _rekey(self) -> None:
        self._process = os.getpid()
        self._encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def _words(self, count: int) -> np.ndarray:
        """uint64: the keystream's next `count` words."""
        if os.getpid() != self._process:  # a fork: the other side holds the same key
            self._rekey()
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype=np.uint64)

    def uniform(self, count: int) -> np.ndarray:
        """float64 in (0, 1]: multiples of 2**-53, all as likely."""
        u = (self._words(count) >> np.uint64(11)).astype(np.float64)
        u += 1.0
        u *= 2.0**-53
        return u

    def gaussian(self, count: int) -> np.ndarray:
        """float64 standard normal values (Box and Muller 1958)."""
        values = np.empty(count)
        for first in range(0, count, _BLOCK):
            part = values[first : first + _BLOCK]
            half = (len(part) + 1) // 2
            radius = self._radius(half)
            angle = torch.from_numpy(self.uniform(half)).mul_(2.0 * math.pi)  # torch's sine is three times numpy's
            np.multiply(radius, angle.cos().numpy(), out=part[:half])
            np.multiply(radius[: len(part) - half], angle.sin_().numpy()[: len(part) - half], out=part[half:])
        return values

    def _radius(self, count: int) -> np.ndarray:
        """sqrt(-2 log u), u uniform in (0, 1] with the keystream's 64 bits, and 53 more where u is below 2**-32."""
        words = self._words(count)
        u = words.astype(np.float64)
        u += 1.0
        if words.min() < 2**32:
            low = np.flatnonzero(words < 2**32)
            u[low] = words[low] + self.uniform(len(low))
        u *= 2.0**-64
        np.log(u, out=u)
        u *= -2.0
        return np.sqrt(u, out=u)


def grid_spacing(scale: float, sensitivity: float, entries: int) -> float:
    """The grid: the largest power of two g with g <= scale * 2**-GRID_BITS and g sqrt(d) <= sensitivity * ROUNDING / 2.

    Args:
        scale: the noise's standard deviation.
        sensitivity: C, the L2 norm by which one patient can change the sums.
        entries: d, of all sums together.

    Raises:
        PrivacyError: a scale or sensitivity outside 1e-90 to 1e90, where float64 would leave its exact range.
    """
    for name, value in (("noise scale", scale), ("sensitivity", sensitivity)):
        if not 1e-90 <= value <= 1e90:
            raise PrivacyError(
                f"A {name} of {value:g} cannot be computed with exactly.",
                remedy="Choose a clipping norm and a noise multiplier of ordinary size.",
            )
    most = min(scale * 2.0**-GRID_BITS, sensitivity * (ROUNDING / 2) / math.sqrt(max(entries, 1)))
    return math.ldexp(1.0, math.frexp(most)[1] - 1)


def add_noise(sums: Sequence[Tensor], scale: float, stream: SecretStream, *, sensitivity: float) -> list[Tensor]:
    """Adds N(0, (scale * (1 + ROUNDING))^2) to every entry, on the grid. See the module's docstring for the guarantee.

    Args:
        sums: the clipped sums, one per parameter. Those of `dp.engine` are overwritten: no exact sum stays in memory.
        scale: standard deviation to account with: noise multiplier times sensitivity.
        stream: this step's keystream.
        sensitivity: C, the L2 norm by which one patient can change all sums together.

    Returns:
        float64 tensors of the same shapes and devices, every entry a multiple of `grid_spacing`.

    Raises:
        PrivacyError: see `grid_spacing`; it depends on public values only.
    """
    grid = grid_spacing(scale, sensitivity, sum(total.numel() for total in sums))
    noisy = []
    for total in sums:
        # In the order of memory, so that it happens in place: a convolution's sum may have its channels last.
        turned = total.dim() > 2 and total.movedim(1, -1).is_contiguous()
        ordered = total.movedim(1, -1) if turned else total
        flat = ordered.double().contiguous().view(-1)
        for part in flat.split(_BLOCK):
            noise = torch.from_numpy(stream.gaussian(len(part))).mul_(scale * (1 + ROUNDING) / grid).round_()
            # Both are rounded to whole grid points first; the grid is a power of two, so scaling is exact.
            part.mul_(1 / grid).round_().add_(noise.to(part.device)).mul_(grid)
        found = flat.view(ordered.shape)
        noisy.append(found.movedim(-1, 1) if turned else found)
    return noisy
