"""The noise has the law that is charged for, lies on the grid, and is never the same twice.

Every statistical bound is set for a false alarm below one in a million: 5 standard deviations, or a p-value of 1e-7.
"""

import math
import os

import numpy as np
import pytest
import torch
from scipy import stats

from fedscan_client.dp.noise import GRID_BITS, SecretStream, add_noise

N = 200_000


def test_gaussian_has_the_moments_of_the_standard_normal():
    z = SecretStream().gaussian(N)
    assert z.dtype == np.float64 and z.shape == (N,)
    assert abs(z.mean()) < 5.5 / math.sqrt(N)
    assert abs(z.var() - 1) < 5.5 * math.sqrt(2 / N)
    assert abs((z**3).mean()) < 5.5 * math.sqrt(15 / N)
    assert abs((z**4).mean() - 3) < 5.5 * math.sqrt(96 / N)


def test_gaussian_and_uniform_have_their_whole_distribution():
    stream = SecretStream()
    assert stats.kstest(stream.gaussian(N), "norm").pvalue > 1e-7
    assert stats.kstest(stream.uniform(N), "uniform").pvalue > 1e-7


def test_tails_are_there():
    tail = 2 * stats.norm.sf(4)  # what a wrong angle or a clipped radius would cut off
    seen = int((np.abs(SecretStream().gaussian(5 * N)) > 4).sum())
    assert stats.binomtest(seen, 5 * N, tail).pvalue > 1e-7


def test_neighbours_and_halves_are_independent():
    z = SecretStream().gaussian(N)
    for lag in (1, 2, N // 2):  # Box and Muller's pairs lie half the length apart
        for power in (1, 2):
            correlation = np.corrcoef(z[:-lag] ** power, z[lag:] ** power)[0, 1]
            assert abs(correlation) < 5.5 / math.sqrt(N - lag), (lag, power)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_count(count):
    assert SecretStream().gaussian(count).shape == (count,)
    assert SecretStream().uniform(count).shape == (count,)


class Words:
    """A cipher whose keystream is what it is told to be."""

    def __init__(self, *words):
        self.words = words

    def update(self, data):
        return np.array(self.words, np.uint64)[: len(data) // 8].tobytes()


def test_uniform_never_gives_zero_and_reaches_one():
    stream = SecretStream()
    stream._encryptor = Words(0, 2**64 - 1, 2**63)  # type: ignore[assignment]
    assert stream.uniform(3).tolist() == [2.0**-53, 1.0, 0.5 + 2.0**-53]
    assert np.isfinite(stream.gaussian(3)).all()
    u = SecretStream().uniform(N)
    assert u.min() > 0 and u.max() <= 1 and (u * 2.0**53 % 1 == 0).all()


def test_two_streams_and_two_draws_never_repeat():
    one, two = SecretStream(), SecretStream()
    blocks = [one.uniform(1000), one.uniform(1000), two.uniform(1000), two.uniform(1000)]
    assert len(np.unique(np.concatenate(blocks))) == 4000


def test_seeds_do_not_reach_the_noise():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(add_noise([torch.zeros(50)], 1.0, SecretStream())[0])
    assert not torch.equal(*drawn)


def test_the_key_comes_whole_from_the_operating_system(monkeypatch):
    asked = []
    real = os.urandom

    def urandom(count):
        asked.append(count)
        return real(count)

    monkeypatch.setattr(os, "urandom", urandom)
    SecretStream().gaussian(10)
    SecretStream().gaussian(10)
    assert asked == [32, 16, 32, 16]


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.7, 1000.0])
def test_add_noise_has_the_scale_asked_for_around_the_sum(scale):
    total = torch.full((100, 200), 5 * scale, dtype=torch.float64)
    (noisy,) = add_noise([total], scale, SecretStream())
    z = ((noisy - total) / scale).numpy().ravel()
    assert noisy.shape == total.shape and noisy.dtype == torch.float64
    assert stats.kstest(z, "norm").pvalue > 1e-7
    assert abs(z.std() - 1) < 5.5 * math.sqrt(0.5 / z.size)


@pytest.mark.parametrize("scale", [0.01, 1.0, 1.999, 3.7, 1000.0])
def test_only_points_of_the_grid_come_out(scale):
    sums = [torch.randn(500, dtype=torch.float64) * 10, torch.randn(3, 4, dtype=torch.float64) / 3]
    grid = 2.0 ** (math.floor(math.log2(scale)) - GRID_BITS)
    for noisy in add_noise(sums, scale, SecretStream()):
        steps = (noisy / grid).numpy()
        assert (steps == np.round(steps)).all()
        assert len(np.unique(steps % 1024)) > 2  # and not of a coarser one


def test_the_sum_is_rounded_before_the_noise_is_added(monkeypatch):
    """What comes out must not depend on where between two grid points the sum was."""
    fixed = np.random.default_rng(0).standard_normal(500)
    monkeypatch.setattr(SecretStream, "gaussian", lambda self, count: fixed[:count])
    grid = 2.0**-GRID_BITS
    whole = torch.arange(500, dtype=torch.float64) * grid
    outputs = [add_noise([whole + part * grid], 1.0, SecretStream())[0] for part in (-0.4, 0.0, 0.4)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


def test_every_tensor_gets_its_own_noise():
    first, second = add_noise([torch.zeros(40), torch.zeros(40)], 1.0, SecretStream())
    assert len(np.unique(torch.cat([first, second]).numpy())) == 80
