"""What a stream says of itself, and of the colour of its samples, in the order in which libjpeg decides."""

import pytest

from fedscan_client.intake import codestream
from fedscan_client.intake.records import Refused

JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"


def adobe(transform):
    return b"\xff\xee\0\x0eAdobe\0d\0\0\0\0" + bytes([transform])


def frame(names=b"\1\2\3"):
    return b"\xff\xc0\0\x11\x08\0\4\0\6\3" + b"".join(bytes([name]) + b"\x11\0" for name in names)


@pytest.mark.parametrize(
    ("segments", "colour"),
    [
        (frame(), None),
        (frame(b"RGB"), "RGB"),
        (JFIF + frame(), "YBR"),
        (JFIF + frame(b"RGB"), "YBR"),
        (adobe(0) + frame(), "RGB"),
        (adobe(1) + frame(), "YBR"),
        (adobe(1) + frame(b"RGB"), "YBR"),
        (JFIF + adobe(0) + frame(), "YBR"),
        (b"\xff\xee\0\x0cAdobe\0\0\0\0\0" + frame(), None),  # cut short: no Adobe segment for libjpeg
    ],
)
def test_colour(segments, colour):
    assert codestream.read(b"\xff\xd8" + segments) == codestream.Stream(4, 6, 3, 8, colour=colour)


@pytest.mark.parametrize("length", range(2, 19))
def test_a_header_that_ends_early(length):
    with pytest.raises(Refused, match="cannot be decoded"):
        codestream.read((b"\xff\xd8" + frame())[:length])
