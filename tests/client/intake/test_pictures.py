import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fedscan_client.intake.pictures import fit, load_image
from fedscan_core.errors import DataError


def png(folder, pixels, name="a.png", **options):
    Image.fromarray(pixels).save(folder / name, **options)
    return folder / name


def ramp(*shape, dtype=np.uint8):
    count = int(np.prod(shape))
    return np.linspace(0, np.iinfo(dtype).max, count).astype(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_of_the_right_size_comes_through_unchanged(tmp_path, dtype):
    pixels = ramp(5, 7, dtype=dtype)
    image = load_image(png(tmp_path, pixels), size=(5, 7), channels=1)
    assert image.dtype == np.float32 and image.shape == (1, 5, 7)
    assert np.array_equal(image[0], pixels.astype(np.float32) / np.float32(np.iinfo(dtype).max))


def test_colour_grey_and_alpha(tmp_path):
    rgb = ramp(4, 4, 3)
    path = png(tmp_path, rgb)
    assert np.array_equal(load_image(path, size=(4, 4), channels=3), rgb.transpose(2, 0, 1).astype(np.float32) / 255)
    luma = rgb @ np.array([0.299, 0.587, 0.114]) / 255
    assert np.allclose(load_image(path, size=(4, 4), channels=1)[0], luma, atol=1e-6)
    grey = load_image(png(tmp_path, ramp(4, 4)), size=(4, 4), channels=3)
    assert (grey[0] == grey[1]).all() and (grey[0] == grey[2]).all()
    clear = np.concatenate([rgb, np.full((4, 4, 1), 51, np.uint8)], axis=2)
    over_black = load_image(png(tmp_path, clear), size=(4, 4), channels=3)
    assert np.allclose(over_black, rgb.transpose(2, 0, 1) / 255 * 0.2, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "P", "LA"])
def test_rarer_png_modes(tmp_path, mode):
    source = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((2, 2), np.uint8)))
    source.convert(mode).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", size=(4, 4), channels=1)
    assert np.allclose(image[0], np.asarray(source) / 255, atol=1e-6)


def test_jpeg(tmp_path):
    path = png(tmp_path, np.full((16, 16), 128, np.uint8), "a.jpg")
    assert np.allclose(load_image(path, size=(16, 16), channels=1), 128 / 255, atol=0.01)


def test_shrinking_averages_areas_and_keeps_the_aspect_ratio():
    x = np.random.default_rng(0).random((1, 8, 16), np.float32)
    small = fit(x, (8, 8))
    expected = x.reshape(1, 4, 2, 8, 2).mean((2, 4))
    assert np.allclose(small[:, 2:6], expected, atol=1e-6)
    assert (small[:, :2] == 0).all() and (small[:, 6:] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=40),
        elements=st.floats(0, 1, width=32),
    ),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_any_size_gives_the_shape_and_the_range(x, rows, columns):
    image = fit(x, (rows, columns))
    assert image.shape == (len(x), rows, columns) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    # Something of the picture is always there, however extreme its shape.
    if x.min() > 0.5:
        assert image.max() > 0.4


def test_npz_rows(tmp_path):
    images = ramp(3, 4, 5)
    np.savez(tmp_path / "a.npz", images=images)
    assert np.array_equal(
        load_image(tmp_path / "a.npz", 2, size=(4, 5), channels=1)[0],
        images[2].astype(np.float32) / 255,
    )
    colour = ramp(2, 4, 5, 3, dtype=np.uint16)
    np.savez(tmp_path / "b.npz", images=colour)
    assert load_image(tmp_path / "b.npz", 1, size=(4, 5), channels=3).shape == (3, 4, 5)
    for index in (-1, 3):
        with pytest.raises(DataError, match="3 images"):
            load_image(tmp_path / "a.npz", index, size=(4, 5), channels=1)


def test_npz_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((2, 2, 2), np.uint8))
    load_image(path, 0, size=(2, 2), channels=1)
    with monkeypatch.context() as patched:
        patched.setattr(np, "load", lambda *a, **k: 1 / 0)
        load_image(path, 1, size=(2, 2), channels=1)
    np.savez(path, images=np.full((3, 2, 2), 255, np.uint8))
    assert load_image(path, 2, size=(2, 2), channels=1).min() == 1


@pytest.mark.parametrize(
    "arrays",
    [
        {"pictures": np.zeros((2, 4, 4), np.uint8)},
        {"images": np.zeros((4, 4), np.uint8)},
        {"images": np.zeros((2, 4, 4, 2), np.uint8)},
        {"images": np.zeros((2, 4, 4), np.int32)},
        {"images": np.full((2, 4, 4), 1.5)},
        {"images": np.full((2, 4, 4), np.nan)},
        {"images": np.array([None, None])},
    ],
)
def test_npz_refusals(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError) as caught:
        load_image(tmp_path / "a.npz", 0, size=(4, 4), channels=1)
    assert caught.value.remedy


def test_damaged_files_are_one_error(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(ramp(32, 32)).save(whole, "png")
    for name, data in [
        ("cut.png", whole.getvalue()[:80]),
        ("text.png", b"hello"),
        ("empty.png", b""),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            load_image(tmp_path / name, size=(4, 4), channels=1)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04broken")
    with pytest.raises(DataError, match="npz"):
        load_image(tmp_path / "a.npz", 0, size=(4, 4), channels=1)
    with pytest.raises(DataError, match="exist"):
        load_image(tmp_path / "none.png", size=(4, 4), channels=1)
