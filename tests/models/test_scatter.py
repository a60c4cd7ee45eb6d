"""The scattering transform against a plain slow one, and the properties the theory promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_models import scatter

J, L, STEP = 3, 8, 8


def spatial_gabor(M, N, sigma, angle, xi, slant):
    """A modulated Gaussian, written down in space, made periodic by adding shifted copies."""
    out = np.zeros((M, N), complex)
    for a in range(-4, 5):
        for b in range(-4, 5):
            y, x = np.mgrid[a * M : (a + 1) * M, b * N : (b + 1) * N].astype(float)
            along = y * np.cos(angle) + x * np.sin(angle)
            across = x * np.cos(angle) - y * np.sin(angle)
            envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
            out += envelope * np.exp(1j * xi * along)
    return out * slant / (2 * np.pi * sigma**2)


def spatial_morlet(M, N, j, t):
    sigma, xi, angle, slant = 0.8 * 2**j, 0.75 * np.pi / 2**j, (L // 2 - 1 - t) * np.pi / L, 4 / L
    wave = spatial_gabor(M, N, sigma, angle, xi, slant)
    envelope = spatial_gabor(M, N, sigma, angle, 0.0, slant)
    return wave - wave.sum() / envelope.sum() * envelope


def slow_scattering(image):
    """One image [H, W] to [217, h, w]: path by path, full resolution, sampled at the end."""
    pads = [(8 + (-s % 8) // 2, 8 + (-s % 8) - (-s % 8) // 2) for s in image.shape]
    x = np.pad(image.astype(float), pads, mode="reflect")
    M, N = x.shape
    conv = lambda u, f: np.fft.ifft2(np.fft.fft2(u) * np.fft.fft2(f))  # noqa: E731
    phi = spatial_gabor(M, N, 0.8 * 2 ** (J - 1), 0.0, 0.0, 1.0)
    psi = [(j, spatial_morlet(M, N, j, t)) for j in range(J) for t in range(L)]
    last = lambda u: conv(u, phi).real[8:-8:STEP, 8:-8:STEP]  # noqa: E731
    first, second = [], []
    for j1, psi1 in psi:
        u1 = np.abs(conv(x, psi1))
        first.append(last(u1))
        second += [last(np.abs(conv(u1, psi2))) for j2, psi2 in psi if j2 > j1]
    return np.stack([last(x), *first, *second])


def image(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(16, 16), (32, 24), (21, 50), (64, 64)])
def test_agrees_with_the_slow_transform(size):
    x = image(0, 1, 1, *size)
    fast, slow = scatter.scattering(x)[0].numpy(), slow_scattering(x[0, 0].numpy())
    assert fast.shape == slow.shape == (217, -(-size[0] // 8), -(-size[1] // 8))
    for order in (slice(0, 1), slice(1, 25), slice(25, None)):
        error = np.linalg.norm(fast[order] - slow[order]) / np.linalg.norm(slow[order])
        assert error <= 1e-5


def test_channels_are_transformed_one_by_one():
    x = image(1, 2, 3, 24, 16)
    together = scatter.scattering(x)
    alone = [scatter.scattering(x[:, c : c + 1]) for c in range(3)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)


def test_an_image_does_not_depend_on_the_rest_of_the_batch():
    x = image(2, 11, 1, 32, 32)
    batch = scatter.features(x)
    for i in range(11):
        torch.testing.assert_close(batch[i : i + 1], scatter.features(x[i : i + 1]))


def test_features_are_the_recipe_step_by_step():
    x = image(5, 2, 2, 32, 21)
    got = scatter.features(x)
    for i in range(2):
        parts = []
        for channel in x[i].numpy().astype(float):
            standard = (channel - channel.mean()) / (channel.std() + 0.05)
            maps = slow_scattering(standard)
            maps[1:] = np.log(maps[1:] + 0.01)
            maps -= maps.mean(axis=(1, 2), keepdims=True)
            maps[1:25] -= maps[1:25].mean(axis=0)
            maps[25:] -= maps[25:].mean(axis=0)
            parts.append(maps.ravel())
        want = np.concatenate(parts)
        np.testing.assert_allclose(got[i], want / np.linalg.norm(want), rtol=1e-3, atol=1e-6)


def test_features_have_unit_length_and_forget_brightness_and_most_of_contrast():
    x = image(6, 5, 1, 32, 32)
    f = scatter.features(x)
    torch.testing.assert_close(f.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(scatter.features(x + 0.3), f, rtol=0, atol=1e-5)
    assert (scatter.features(0.7 * x) - f).norm(dim=1).max() < 0.05
    blank = torch.full((1, 1, 32, 32), 0.4)
    assert scatter.features(blank).norm() < 1e-2
    assert scatter.features(blank + 1e-6 * x[:1]).norm() < 0.1  # rounding is not a signal


@pytest.mark.parametrize("size, grid", [((128, 64), (8, 8)), ((100, 40), (8, 5))])
def test_large_images_are_pooled_to_a_grid_of_eight(size, grid):
    x = image(7, 1, 1, *size)
    assert scatter.features(x).shape == (1, 217 * grid[0] * grid[1])
    assert scatter.linear_model(1, size, 2)(scatter.features(x)).shape == (1, 2)


def test_the_linear_model_starts_undecided():
    model = scatter.linear_model(3, (32, 24), 4)
    x = scatter.features(image(8, 2, 3, 32, 24))
    assert torch.equal(model(x), torch.zeros(2, 4))


def test_an_empty_batch_keeps_the_shape():
    assert scatter.scattering(torch.zeros(0, 1, 32, 32)).shape == (0, 217, 4, 4)
    assert scatter.features(torch.zeros(0, 1, 32, 32)).shape[0] == 0


def littlewood_paley(M, N):
    """|phi|^2, and half of |psi|^2 at a frequency and its opposite: what a real image keeps."""
    psi = scatter.wavelets(M, N).double().numpy()
    opposite = np.roll(psi[:, ::-1, ::-1], (1, 1), (1, 2))
    phi = np.abs(np.fft.fft2(spatial_gabor(M, N, 3.2, 0.0, 0.0, 1.0)))
    return phi**2 + 0.5 * (psi**2 + opposite**2).sum(axis=0)


@pytest.mark.parametrize("size", [(32, 32), (80, 80), (40, 72)])
def test_the_filters_neither_amplify_nor_lose_the_middle_of_the_spectrum(size):
    energy = littlewood_paley(*size)
    assert energy.max() <= 1.02
    assert energy[0, 0] == pytest.approx(1.0, abs=1e-6)
    assert energy.min() > 0.1  # the corners of the square of frequencies are the weakest


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), near=st.floats(0.001, 1.0))
def test_never_moves_further_than_the_image(seed, near):
    """||Sx - Sy|| <= (1 + small) ||x - y|| on mirrored images; an output pixel stands for 64."""
    x, y = image(seed, 2, 1, 1, 32, 32)
    y = x + near * (y - x)
    moved = 8 * (scatter.scattering(x) - scatter.scattering(y)).norm()
    mirrored = torch.nn.functional.pad(x - y, (8, 8, 8, 8), mode="reflect").norm()
    # order 2 passes the filters twice; sampling each 8 pixels folds 0.7 % of the energy back
    assert moved <= 1.02 * 1.0072**0.5 * mirrored


def test_orders_one_and_two_are_never_negative():
    assert scatter.scattering(image(3, 4, 1, 32, 48))[:, 1:].min() >= 0


@pytest.mark.parametrize("value", [0.0, 1.0, 255.0])
def test_a_constant_image_has_no_energy_beyond_order_zero(value):
    out = scatter.scattering(torch.full((1, 1, 32, 32), value))
    torch.testing.assert_close(out[:, 0], torch.full((1, 4, 4), value), rtol=1e-5, atol=0)
    assert out[:, 1:].abs().max() <= 1e-5 * max(value, 1)


def test_a_small_shift_changes_little_and_a_shift_by_a_step_shifts_the_map():
    wide = torch.nn.functional.avg_pool2d(image(4, 1, 1, 96, 128), 3, stride=1, padding=1)
    x = wide[..., :, 16:112]
    change = lambda pixels: wide[..., :, 16 + pixels : 112 + pixels] - x  # noqa: E731
    inner = (..., slice(3, 9), slice(3, 9))  # away from the mirrored borders
    S = scatter.scattering
    moved = (S(x + change(1)) - S(x))[inner].norm() / S(x)[inner].norm()
    assert moved < 0.3 * change(1).norm() / x.norm()
    torch.testing.assert_close(S(x + change(8))[..., 3:9, 3:8], S(x)[..., 3:9, 4:9], rtol=1e-3, atol=2e-4)


def test_a_wave_answers_in_its_own_scale_and_angle():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for j in range(J):
        for t in range(L):
            angle, xi = (L // 2 - 1 - t) * np.pi / L, 0.75 * np.pi / 2**j
            wave = torch.cos(xi * (y * np.cos(angle) + x * np.sin(angle)))
            out = scatter.scattering(wave[None, None])[0, 1:25, 3:5, 3:5].mean(dim=(1, 2))
            assert int(out.argmax()) == j * L + t


@pytest.mark.parametrize("size", [(33, 47), (50, 50), (64, 64)])
def test_an_images_features_are_its_own_to_the_last_bit(size):
    """A batch that changed them would let one patient change another's gradient."""
    x = torch.rand(9, 2, *size)
    together = scatter.features(x)
    assert torch.equal(together, torch.cat([scatter.features(one) for one in x.split(1)]))
    assert torch.equal(together[1:], scatter.features(x[1:]))
