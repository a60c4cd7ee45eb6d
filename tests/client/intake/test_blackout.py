"""Rectangles: exactly the pixels inside become one constant, in every frame; `outside` is exactly the rest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedscan_client.intake import blackout
from fedscan_client.intake.records import Rectangle, Refused
from fedscan_core.errors import DataError

ROWS, COLUMNS = 11, 13


@st.composite
def rectangles(draw, at_most=5):
    def side(most):
        first = draw(st.integers(0, most - 1))
        return first, draw(st.integers(first + 1, most))

    many = draw(st.integers(0, at_most))
    sides = [(side(ROWS), side(COLUMNS)) for _ in range(many)]
    return [Rectangle(top, left, bottom, right) for (top, bottom), (left, right) in sides]


def inside(found):
    """The plain reference: one pixel at a time."""
    hit = np.zeros((ROWS, COLUMNS), int)
    for row in range(ROWS):
        for column in range(COLUMNS):
            hit[row, column] = sum(it.top <= row < it.bottom and it.left <= column < it.right for it in found)
    return hit


@given(rectangles(), st.sampled_from([(3, ROWS, COLUMNS), (2, ROWS, COLUMNS, 3)]), st.sampled_from(["u1", "i2"]))
def test_every_pixel_inside_and_no_other_changes_in_every_frame(found, shape, dtype):
    frames = np.random.default_rng(0).integers(5, 100, shape).astype(dtype)
    kept = frames.copy()
    out = blackout.apply(frames, found, 3)
    hit = inside(found) > 0
    assert out.dtype == frames.dtype and (frames == kept).all()
    assert (out[:, hit] == 3).all() and (out[:, ~hit] == frames[:, ~hit]).all()


@given(rectangles())
def test_the_rest_of_a_frame_is_covered_once_and_exactly(kept):
    rest = blackout.outside(kept, ROWS, COLUMNS)
    assert (inside(rest) == (inside(kept) == 0)).all()


@pytest.mark.parametrize(
    "sides", [(0, 0, 12, 1), (0, 0, 1, 14), (-1, 0, 1, 1), (0, -1, 1, 1), (2, 2, 2, 3), (2, 3, 3, 3), (3, 3, 2, 4)]
)
def test_a_rectangle_beyond_the_frame_or_empty_is_refused(sides):
    with pytest.raises(DataError, match="is not inside 11 rows x 13 columns"):
        blackout.apply(np.zeros((1, ROWS, COLUMNS), np.uint8), [Rectangle(*sides)], 0)


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({}, 0),
        ({"PhotometricInterpretation": "MONOCHROME1"}, 4095),
        ({"RescaleSlope": -1}, 4095),
        ({"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": -2}, 0),
        ({"PixelRepresentation": 1}, -2048),
        ({"PixelRepresentation": 1, "PhotometricInterpretation": "MONOCHROME1"}, 2047),
        ({"BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1}, -32768),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, 0),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, 0),
    ],
)
def test_black_is_the_end_that_is_shown_black(cr_instance, changes, value):
    assert blackout.black(cr_instance(**changes)) == value


@pytest.mark.parametrize("changes", [{"BitsStored": 40}, {"BitsStored": 0}, {"PixelRepresentation": 2}])
def test_a_bit_layout_that_is_none_is_refused(cr_instance, changes):
    with pytest.raises(Refused):
        blackout.black(cr_instance(**changes))
