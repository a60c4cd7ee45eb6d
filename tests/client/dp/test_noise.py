"""The noise has the law that is charged for, lies on the grid, and is never the same twice.

The key is secret, so no seed can be fixed: every single check is set for a false alarm near one in 10^9 (SD standard
deviations, or the p-value P), and some 200 of them are made in a run.
"""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from fedscan_client.dp import noise, sampling
from fedscan_client.dp.noise import GRID_BITS, ROUNDING, SecretStream, add_noise, grid_spacing
from fedscan_core.errors import PrivacyError

N = 200_000
SD, P = 6.2, 1e-9
HALF = noise._BLOCK // 2  # Box and Muller's pairs lie this far apart


def test_gaussian_has_the_moments_of_the_standard_normal():
    z = SecretStream().gaussian(N)
    assert z.dtype == np.float64 and z.shape == (N,)
    assert abs(z.mean()) < SD / math.sqrt(N)
    assert abs(z.var() - 1) < SD * math.sqrt(2 / N)
    assert abs((z**3).mean()) < SD * math.sqrt(15 / N)
    assert abs((z**4).mean() - 3) < SD * math.sqrt(96 / N)


def test_gaussian_and_uniform_have_their_whole_distribution():
    stream = SecretStream()
    z = stream.gaussian(N)
    assert stats.kstest(z, "norm").pvalue > P
    assert stats.kstest(z[:HALF], "norm").pvalue > P and stats.kstest(z[HALF : 2 * HALF], "norm").pvalue > P
    assert stats.kstest(stream.uniform(N), "uniform").pvalue > P


def test_tails_are_there():
    z = np.abs(SecretStream().gaussian(10 * N))
    for edge in (3, 4, 4.5):  # what a wrong angle or a clipped radius would cut off
        seen, expected = int((z > edge).sum()), float(2 * stats.norm.sf(edge))
        assert stats.binomtest(seen, len(z), expected).pvalue > P


def correlated(a, b):
    """Whether values or squares of two equally long series go together."""
    return any(abs(np.corrcoef(a**power, b**power)[0, 1]) > SD / math.sqrt(len(a)) for power in (1, 2))


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 64, HALF - 1, HALF, HALF + 1, 2 * HALF])
def test_neighbours_and_blocks_are_independent(lag):
    z = SecretStream().gaussian(N)
    assert not correlated(z[:-lag], z[lag:])


def test_the_halves_of_a_pair_are_independent():
    """Cosine and sine share radius and angle: any function of the one tells nothing of the other."""
    z = SecretStream().gaussian(2 * HALF)
    cos, sin = z[:HALF], z[HALF:]
    assert not correlated(cos, sin)
    table = np.histogram2d(stats.norm.cdf(cos), stats.norm.cdf(sin), bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(table.ravel()).pvalue > P
    assert stats.kstest(cos**2 + sin**2, stats.chi2(2).cdf).pvalue > P


def test_mask_and_noise_of_a_step_are_independent():
    """One stream gives both: within a step, and first draws over many steps."""
    stream = SecretStream()
    u, z = stream.uniform(N), stream.gaussian(N)
    taken = np.zeros(N)
    taken[sampling.poisson(N, 0.3, lambda count: u)] = 1
    for lag in (0, 1, HALF):
        for a in (u, taken):
            assert abs(np.corrcoef(a[: N - lag], z[lag:])[0, 1]) < SD / math.sqrt(N - lag)
            assert abs(np.corrcoef(a[: N - lag], z[lag:] ** 2)[0, 1]) < SD / math.sqrt(N - lag)
    steps = 10_000
    first = np.array([(s.uniform(1)[0], s.gaussian(1)[0]) for s in (SecretStream() for _ in range(steps))])
    assert not correlated(*first.T)
    assert stats.kstest(first[:, 0], "uniform").pvalue > P and stats.kstest(first[:, 1], "norm").pvalue > P


@pytest.mark.parametrize("count", [0, 1, 2, 7, 2 * HALF, 2 * HALF + 1])
def test_any_count(count):
    z = SecretStream().gaussian(count)
    assert z.shape == (count,) and np.isfinite(z).all() and len(np.unique(z)) >= count - 2
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


def test_the_tail_does_not_end_where_53_bits_do():
    stream = SecretStream()
    stream._encryptor = Words(0, 2**64 - 1, 2**32, 5, 2**32 - 1)  # type: ignore[assignment]
    # The three words below 2^32 get fractions; this cipher gives the words anew: 2^-53, 1, and 2^32 shifted by 11.
    low = [2.0**-53, 5 + 1.0, 2**32 - 1 + (2**21 + 1) * 2.0**-53]
    u = np.array([low[0], 2.0**64, 2**32 + 1, low[1], low[2]]) * 2.0**-64
    assert np.allclose(stream._radius(5), np.sqrt(-2 * np.log(u)), rtol=1e-15)
    assert stream._radius(5).max() > 12.7


def test_two_streams_and_two_draws_never_repeat():
    one, two = SecretStream(), SecretStream()
    blocks = [one.uniform(1000), one.uniform(1000), two.uniform(1000), two.uniform(1000)]
    assert len(np.unique(np.concatenate(blocks))) == 4000


SIDES = """
import os, sys, torch
from fedscan_client.dp.noise import SecretStream, add_noise
torch.set_num_threads(1)
stream = SecretStream()
stream.uniform(3)
def draw(stream):
    ours = [stream.uniform(1000), SecretStream().uniform(1000)]
    ours.append(add_noise([torch.zeros(1000)], 1.0, stream, sensitivity=1.0)[0].numpy())
    return b"".join(a.tobytes() for a in ours)
print("ready", flush=True)
sys.stdin.readline()
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, draw(stream))
    os._exit(0)
mine = draw(stream)
os.close(write)
with open(read, "rb") as pipe:
    print((mine + pipe.read()).hex())
"""


def test_processes_started_at_once_and_forks_never_share_noise():
    """Two processes wait for one signal, draw, and fork with a stream in hand: 4 x 3000 values, all different."""
    started = [
        subprocess.Popen([sys.executable, "-c", SIDES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [bytes.fromhex(process.communicate(timeout=60)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
    values = np.frombuffer(b"".join(found), np.float64).reshape(4, 3, 1000)
    # Grid points of the noise: 2^30 to a standard deviation, so two of 4000 may meet by chance, hundreds may not.
    assert len(np.unique(values[:, :2])) == 8000
    assert len(np.unique(values[:, 2])) > 3900


def test_a_process_that_did_not_fork_keeps_its_key(monkeypatch):
    stream = SecretStream()
    first = stream._encryptor
    stream.gaussian(10)
    assert stream._encryptor is first
    monkeypatch.setattr(os, "getpid", lambda: -1)
    stream.gaussian(10)
    assert stream._encryptor is not first


def test_seeds_do_not_reach_the_noise():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(add_noise([torch.zeros(50)], 1.0, SecretStream(), sensitivity=1.0)[0])
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
    total = torch.full((100, 1000), 5 * scale, dtype=torch.float64)
    (noisy,) = add_noise([total.clone()], scale, SecretStream(), sensitivity=1.0)
    z = ((noisy - total) / scale).numpy().ravel()
    assert noisy.shape == total.shape and noisy.dtype == torch.float64
    assert stats.kstest(z, "norm").pvalue > P
    assert abs(z.std() - 1) < SD * math.sqrt(0.5 / z.size)


@pytest.mark.parametrize("sensitivity", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1.999, 3.7, 1000.0])
def test_only_points_of_the_grid_come_out(scale, sensitivity):
    sums = [torch.randn(500, dtype=torch.float64) * 10, torch.randn(3, 4, dtype=torch.float64) / 3]
    grid = grid_spacing(scale, sensitivity, 512)
    for noisy in add_noise(sums, scale, SecretStream(), sensitivity=sensitivity):
        steps = (noisy / grid).numpy()
        assert (steps == np.round(steps)).all()
        assert len(np.unique(steps % 1024)) > 2  # and not of a coarser one


def fixed(monkeypatch, values):
    """The noise is, for once, what it is told to be: `values` from the start of every draw."""
    monkeypatch.setattr(SecretStream, "gaussian", lambda self, count: values[:count].copy())


def test_the_sum_is_rounded_before_the_noise_is_added(monkeypatch):
    """What comes out must not depend on where between two grid points the sum was."""
    fixed(monkeypatch, np.random.default_rng(0).standard_normal(500))
    grid = grid_spacing(1.0, 1.0, 500)
    whole = torch.arange(500, dtype=torch.float64) * grid
    outputs = [add_noise([whole + part * grid], 1.0, SecretStream(), sensitivity=1.0)[0] for part in (-0.4, 0.0, 0.4)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


@given(st.floats(1e-12, 1e6), st.floats(1e-9, 1e9), st.integers(1, 10**9))
@example(100.0, 1.0, 10**8)
@example(100.0, 1.0, 10**9)
@example(1e4, 0.1, 10**9)
@example(0.01, 1.0, 10**9)
@example(100.0, 1.0, 4**15)
@example(1.0, 1.0, 1)
def test_the_grid_adds_no_more_to_the_sensitivity_than_is_paid_for(multiplier, clip, entries):
    """|R(S) - R(S')| <= C + g sqrt(d), and its ratio to the standard deviation that is added is at most 1/sigma."""
    scale = multiplier * clip
    grid = grid_spacing(scale, clip, entries)
    assert math.frexp(grid)[0] == 0.5  # a power of two
    longest = clip + grid * math.sqrt(entries)
    assert longest <= clip * (1 + ROUNDING / 2) * (1 + 1e-15)
    assert scale * (1 + ROUNDING) / longest >= multiplier
    assert grid <= scale * 2.0**-GRID_BITS
    # And not needlessly fine: 8 deviations of noise stay far below 2^53, so each point has many pre-images.
    assert multiplier > 1e4 or 8 * scale * (1 + ROUNDING) / grid < 2**48


@pytest.mark.parametrize(("multiplier", "entries"), [(100.0, 300_000), (1.0, 300_000), (0.01, 300_000), (50.0, 1)])
def test_neighbouring_sums_come_out_as_near_as_the_docstring_says(monkeypatch, multiplier, entries):
    """The worst case, built: every entry of two sums apart by C lies just beyond the middle between two points."""
    fixed(monkeypatch, np.zeros(noise._BLOCK))
    grid = grid_spacing(multiplier, 1.0, entries)
    apart = max(1, round(1.0 / math.sqrt(entries) / grid)) * grid
    low = torch.full((entries,), -0.4999 * grid, dtype=torch.float64)
    high = torch.full((entries,), apart + 0.5001 * grid, dtype=torch.float64)
    exact = float((high - low).norm())
    rounded = [add_noise([t], multiplier, SecretStream(), sensitivity=1.0)[0] for t in (high, low)]
    longer = float((rounded[0] - rounded[1]).norm()) - exact
    assert -1e-3 * grid < longer <= grid * math.sqrt(entries) <= ROUNDING / 2


@pytest.mark.parametrize("multiplier", [1e-12, 1e-6, 0.01])
def test_sums_far_longer_than_the_noise_are_the_exact_grid_sum_rounded_once(monkeypatch, multiplier):
    """Beyond 2^53 grid points float64 cannot hold both terms; what comes out is a function of their exact sum."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal(2000)
    fixed(monkeypatch, z)
    sums = torch.from_numpy(rng.uniform(-1e4, 1e4, 2000))  # 1e4 patients of clipping norm 1
    grid = grid_spacing(multiplier, 1.0, 2000)
    wide = float(sums.abs().max()) / grid
    assert (wide > 2**53) == (multiplier < 0.01)
    points = [round(float(s) / grid) for s in sums]  # Python's integers: exact
    added = [int(np.round(v * (multiplier * (1 + ROUNDING) / grid))) for v in z]
    (noisy,) = add_noise([sums], multiplier, SecretStream(), sensitivity=1.0)
    assert noisy.tolist() == [float(p + a) * grid for p, a in zip(points, added, strict=True)]


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf, 1e-300, 1e300])
def test_a_scale_outside_the_exact_range_is_refused_before_anything_is_added(wrong):
    total = torch.ones(3, dtype=torch.float64)
    for scale, sensitivity in ((wrong, 1.0), (1.0, wrong)):
        with pytest.raises(PrivacyError, match="exactly"):
            add_noise([total], scale, SecretStream(), sensitivity=sensitivity)
    assert (total == 1).all()


def test_every_tensor_and_block_gets_its_own_noise():
    sums = [torch.zeros(40), torch.zeros(3 * noise._BLOCK), torch.zeros(())]
    noisy = add_noise(sums, 1.0, SecretStream(), sensitivity=1.0)
    blocks = [*noisy[:1], *noisy[1].split(noise._BLOCK)]
    for one, two in itertools.combinations(blocks, 2):
        count = min(len(one), len(two))
        assert int((one[:count] == two[:count]).sum()) < 3  # by chance: 2^16 * 2^-31
    assert noisy[2].shape == () and noisy[2] != 0


def test_noise_is_drawn_in_blocks_so_that_memory_stays_small(monkeypatch):
    asked = []

    def gaussian(self, count):
        asked.append(count)
        return np.zeros(count)

    monkeypatch.setattr(SecretStream, "gaussian", gaussian)
    add_noise([torch.zeros(noise._BLOCK * 2 + 5), torch.zeros(7)], 1.0, SecretStream(), sensitivity=1.0)
    assert asked == [noise._BLOCK, noise._BLOCK, 5, 7]


def test_exact_sums_are_overwritten_and_any_layout_is_taken():
    plain = torch.zeros(5, dtype=torch.float64)
    assert add_noise([plain], 1.0, SecretStream(), sensitivity=1.0)[0].data_ptr() == plain.data_ptr() and plain.all()
    turned = torch.zeros(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    (noisy,) = add_noise([turned + 1e6], 1.0, SecretStream(), sensitivity=1.0)
    assert noisy.shape == turned.shape and ((noisy - 1e6).abs() < 9).all() and len(noisy.unique()) > 115
    assert add_noise([torch.zeros(0, 3)], 1.0, SecretStream(), sensitivity=1.0)[0].shape == (0, 3)


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3), (4, 2, 3, 3), (2, 3, 2, 2, 2)])
def test_sums_of_any_layout_are_overwritten(shape):
    """The engine's sums have a convolution's channels last in memory; what is exact must not stay there."""
    dims = (0, *range(2, len(shape)), 1) if len(shape) > 2 else (0, 1)
    for total in (torch.ones(shape), torch.ones(shape, dtype=torch.float64)):
        turned = total.permute(dims).contiguous().permute(*(dims.index(d) for d in range(len(shape))))
        for some in (total, turned):
            exact = some.clone()
            (noisy,) = add_noise([some], 1.0, SecretStream(), sensitivity=1.0)
            assert noisy.shape == some.shape and noisy.dtype == torch.float64
            assert 0.01 < (noisy - exact).std() < 4
            assert some.dtype != torch.float64 or noisy.data_ptr() == some.data_ptr()
