"""Rendering against the code that it replaces (bit for bit), the standard's pseudo code, and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.valuerep import DSfloat

from fedscan_client.intake import pictures
from fedscan_client.intake.records import Refused, Volume, Window
from fedscan_client.intake.render import render
from fedscan_client.intake.stack import assemble


def reference(ds, size, channels):
    """`dicom_image` of the first version, for one grey image: what caches were made of."""
    x_HW = ds.pixel_array.astype(np.float64)
    slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    x_HW = x_HW * slope + intercept
    center, width = ds.get("WindowCenter"), ds.get("WindowWidth")
    center, width = (None if number is None else float(number) for number in (center, width))
    function = ds.get("VOILUTFunction", "LINEAR")
    if center is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        half = x_HW / 2
        low, span = half.min(), half.max() - half.min()
        y_HW = (half - low) / span if span > 0 else np.zeros_like(x_HW)
    else:
        with np.errstate(over="ignore"):
            if function == "SIGMOID":
                y_HW = 1 / (1 + np.exp(-4 * (x_HW - center) / width))
            elif function == "LINEAR_EXACT":
                y_HW = (x_HW - center) / width + 0.5
            elif width == 1:
                y_HW = (x_HW > center - 0.5).astype(np.float64)
            else:
                y_HW = (x_HW - (center - 0.5)) / (width - 1) + 0.5
        y_HW = np.clip(y_HW, 0, 1)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        y_HW = 1 - y_HW
    return pictures.finish(y_HW.astype(np.float32)[None], size, channels)


def show(ds, *, window="header", size=(4, 6), channels=1):
    ((volume, _),) = assemble([ds])
    return render(volume, window=window, size=size, channels=channels)


numbers = st.floats(-1e300, 1e300) | st.integers(-5000, 5000) | st.none()


@given(
    st.binary(min_size=48, max_size=48),
    numbers,
    numbers,
    st.integers(-50, 50).filter(bool) | st.floats(-50, 50).filter(lambda slope: abs(slope) > 1e-3),
    st.integers(-3000, 3000) | st.floats(-1e3, 1e3),
    st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    st.sampled_from([(4, 6), (3, 3), (9, 7)]),
    st.sampled_from([1, 3]),
)
def test_one_slice_is_rendered_as_before(
    cr_instance, data, center, width, slope, intercept, function, photometric, size, channels
):
    """Bit for bit where rescaled values are whole; elsewhere the cache rounds them to float32 once."""
    ds = cr_instance(PixelData=data, VOILUTFunction=function, PhotometricInterpretation=photometric)
    for keyword, number in (
        ("WindowCenter", center),
        ("WindowWidth", width),
        ("RescaleSlope", slope),
        ("RescaleIntercept", intercept),
    ):
        if number is not None:
            setattr(ds, keyword, DSfloat(float(number), auto_format=True))
    expected = reference(ds, size, channels)
    ((volume, _),) = assemble([ds])
    found = render(volume, window="header", size=size, channels=channels)
    assert found.shape == (1, channels, *size) and found.dtype == np.float32
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
    if volume.values.dtype.kind in "iu":
        assert np.array_equal(found[0], expected)
    elif not volume.windows:
        assert np.allclose(found[0], expected, atol=1e-5)


def test_a_fractional_slope_differs_by_float32_rounding(cr_instance):
    ds = cr_instance(WindowCenter="300.7", WindowWidth="411.3", RescaleSlope="0.3", RescaleIntercept="-8.1")
    assert np.allclose(show(ds)[0], reference(ds, (4, 6), 1), atol=1e-6)


def slow_window(value: float, center: float, width: float) -> float:
    """PS3.3 C.11.2.1.2.1, the pseudo code of the standard for one value."""
    if value <= center - 0.5 - (width - 1) / 2:
        return 0.0
    if value > center - 0.5 + (width - 1) / 2:
        return 1.0
    return (value - (center - 0.5)) / (width - 1) + 0.5


@pytest.mark.parametrize(("center", "width"), [(2048, 4096), (1000, 300), (40, 1), (100, 2.5)])
def test_window_follows_the_standard(cr_instance, center, width):
    ds = cr_instance(WindowCenter=center, WindowWidth=width, RescaleSlope="0.5", RescaleIntercept="-8")
    raw = np.arange(24).reshape(4, 6) * 178
    expected = np.vectorize(slow_window)(raw * 0.5 - 8, center, width)
    assert np.allclose(show(ds)[0, 0], expected, atol=1e-6)
    del ds.WindowCenter, ds.WindowWidth
    assert np.allclose(show(ds, window=(center, width))[0, 0], expected, atol=1e-6)


def test_other_window_functions(cr_instance):
    raw = np.arange(24).reshape(4, 6) * 178.0
    window = {"WindowCenter": ["2000", "1"], "WindowWidth": ["1500", "1"]}
    sigmoid = show(cr_instance(**window, VOILUTFunction="SIGMOID"))
    assert np.allclose(sigmoid[0], 1 / (1 + np.exp(-4 * (raw - 2000) / 1500)), atol=1e-6)
    exact = show(cr_instance(**window, VOILUTFunction="LINEAR_EXACT"))
    assert np.allclose(exact[0], np.clip((raw - 2000) / 1500 + 0.5, 0, 1), atol=1e-6)


def test_the_voi_table_comes_before_the_window():
    values = np.array([[[0, 1, 2, 3, 9]]], np.int16)
    volume = Volume(values, "DX", windows=(Window(1, 2),), voi_lut=(1, (0.1, 0.5, 0.9)))
    header = render(volume, window="header", size=(1, 5), channels=1)
    assert header[0, 0, 0] == pytest.approx([0.1, 0.1, 0.5, 0.9, 0.9])
    full = render(volume, window="full", size=(1, 5), channels=1)
    assert full[0, 0, 0] == pytest.approx(np.array([0, 1, 2, 3, 9]) / 9)


def test_full_looks_at_the_whole_volume_and_at_nobody_else(cr_instance):
    values = np.array([[[0, 10]], [[20, 40]]], np.int16)
    found = render(Volume(values, "CT"), window="full", size=(1, 2), channels=3)
    assert found.shape == (2, 3, 1, 2)
    assert found[:, 0, 0].tolist() == [[0, 0.25], [0.5, 1]] and (found[:, 0] == found[:, 2]).all()
    flat = render(Volume(np.full((1, 2, 2), 700, np.int16), "CT"), window="full", size=(2, 2), channels=1)
    assert (flat == 0).all()
    image = show(cr_instance(), channels=3)  # "header" without a window
    assert image.min() == 0 and image.max() == 1


def test_monochrome1_is_inverted(cr_instance):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    one = show(cr_instance(PhotometricInterpretation="MONOCHROME1", **window))
    assert np.allclose(one, 1 - show(cr_instance(**window)), atol=1e-6)


def test_colour_is_luma_or_stays():
    rgb = np.random.default_rng(0).integers(0, 65536, (2, 3, 4, 3)).astype(np.uint16)
    volume = Volume(rgb, "US", windows=(Window(1, 2),))
    found = render(volume, window="header", size=(3, 4), channels=3)
    assert np.allclose(found, rgb.transpose(0, 3, 1, 2) / 65535, atol=1e-6)
    luma = render(volume, window="full", size=(3, 4), channels=1)
    assert np.allclose(luma[:, 0], rgb @ np.array([0.299, 0.587, 0.114]) / 65535, atol=1e-6)


def test_every_slice_is_resized_like_a_picture():
    values = np.random.default_rng(0).integers(0, 255, (3, 8, 16)).astype(np.uint8)
    found = render(Volume(values, "CT"), window=(128, 256), size=(4, 4), channels=1)
    for slice_, image in zip(values, found, strict=True):
        y = np.clip((slice_.astype(np.float64) - 127.5) / 255 + 0.5, 0, 1).astype(np.float32)
        assert np.array_equal(image, pictures.fit(y[None], (4, 4)))


def test_a_window_without_width_is_the_caller_s_mistake():
    for width in (0.5, 0, -3, float("nan")):
        with pytest.raises(ValueError, match="at least 1"):
            render(Volume(np.zeros((1, 2, 2), np.int16), "CT"), window=(0, width), size=(2, 2), channels=1)


def test_what_has_no_finite_values_never_gets_here(cr_instance):
    with pytest.raises(Refused):
        show(cr_instance(RescaleSlope="1e308", RescaleIntercept="1e308"))
