"""Pictures: what is shown is what is there, before and after, and the terminal's version is the same picture."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedscan_client.intake import preview
from fedscan_client.intake.preview import Picture
from fedscan_client.intake.records import Rectangle, Refused

TOP = (Rectangle(0, 0, 2, 6),)


def drawn(images, columns, lines):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="truecolor", width=columns)
    segments, reduced = preview.terminal(images, columns, lines)
    console.print(segments)
    return screen.getvalue(), reduced


def test_a_frame_is_stretched_and_its_black_out_in_the_same_way(cr_instance):
    it = preview.picture(cr_instance())  # 0, 178, ..., 23 * 178
    before, after = preview.shown(it, 0), preview.shown(it, 0, TOP)
    assert before.shape == (4, 6) and before.dtype == np.uint8 and before[0, 0] == 0 and before[-1, -1] == 255
    assert (after[:2] == 0).all() and (after[2:] == before[2:]).all()


def test_low_values_that_are_shown_white_stay_white_and_black_out_is_black(cr_instance):
    it = preview.picture(cr_instance(PhotometricInterpretation="MONOCHROME1"))
    before, after = preview.shown(it, 0), preview.shown(it, 0, TOP)
    assert before[0, 0] == 255 and (after[:2] == 0).all() and (after[2:] == before[2:]).all()


def test_faint_text_shows_in_the_equalised_view():
    frame = np.zeros((1, 40, 40), np.uint16)
    frame[0, 20:] = np.random.default_rng(0).integers(20_000, 60_000, (20, 40))
    frame[0, 5, 5:20] = 40  # seven hundredths of a percent of the range
    it = Picture(frame, False, 0)
    assert preview.shown(it, 0)[5, 5] == 0 and preview.shown(it, 0, view="equal")[5, 5] > 100
    assert preview.shown(it, 0, view="equal")[0, 0] == 0


def test_colour_and_constant_frames():
    colour = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    colour[1].flat[:2] = 0, 255
    it = Picture(colour, False, 0)
    assert (preview.shown(it, 1) == colour[1]).all() and (preview.shown(it, 1, (Rectangle(0, 0, 5, 7),)) == 0).all()
    assert (preview.shown(Picture(np.full((1, 4, 4), 7, np.int16), False, -8), 0) == 0).all()


def test_png_has_every_pixel():
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3)).astype(np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(preview.png(image)))) == image).all()


def test_on_a_wide_terminal_every_pixel_is_half_a_block():
    image = np.array([[0, 255], [10, 20], [1, 2], [3, 4]], np.uint8)
    text, reduced = drawn([image, image], 20, 10)
    assert reduced == 1 and text.count("▀") == 8 and len(text.splitlines()) == 2
    assert "\x1b[38;2;255;255;255;48;2;20;20;20m▀" in text.splitlines()[0]  # row 0 above row 1
    assert "\x1b[38;2;2;2;2;48;2;4;4;4m▀" in text.splitlines()[1]


@pytest.mark.parametrize(("shape", "columns", "lines"), [((400, 300), 80, 20), ((300, 4000), 61, 50), ((9, 9), 3, 1)])
def test_a_large_picture_is_reduced_to_the_terminal(shape, columns, lines):
    image = np.full(shape, 77, np.uint8)
    text, reduced = drawn([image, image], columns, lines)
    plain = Console(width=columns).render_str("").plain or text
    rows = [line for line in plain.splitlines() if "▀" in line]
    assert reduced > 1 and 1 <= len(rows) <= lines and max(row.count("▀") for row in rows) <= columns
    assert "38;2;77;77;77" in text


def test_what_cannot_be_decoded_is_refused(cr_instance):
    with pytest.raises(Refused):
        preview.picture(cr_instance(PixelData=None))
