"""The leak search finds what it claims to find: a search that finds nothing proves nothing."""

import base64
import gzip
import io
import os
import zipfile
import zlib

import pytest

NAME = b"Canary^Carla-4711"


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "packed",
    [
        NAME,
        NAME.upper(),
        NAME.decode().encode("utf-16-le"),
        NAME.decode().encode("utf-16-be"),
        NAME.hex().encode(),
        *(base64.b64encode(b"xyz"[:shift] + NAME + b"end") for shift in range(3)),
        base64.urlsafe_b64encode(zlib.compress(NAME * 3)),
        zlib.compress(NAME),
        gzip.compress(NAME, mtime=0),
        zipped(NAME),
        zipped(zlib.compress(NAME)),
    ],
    ids=map(str, range(12)),  # a zip's bytes tell the time, and workers must agree on a test's name
)
def test_a_needle_is_found_in_every_wrapping(leaks, tmp_path, packed):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "file"
    file.write_bytes(os.urandom(3000) + packed + os.urandom(3000))
    assert leaks(tmp_path, [b"something else", NAME]) == [f"{NAME!r} in deep/file"]


def test_names_of_files_and_folders_count(leaks, tmp_path):
    (tmp_path / "canary^carla-4711").mkdir()
    assert len(leaks(tmp_path, [NAME])) == 1


def test_noise_is_no_leak(leaks, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    assert leaks(tmp_path, [os.urandom(16) for _ in range(20)] + [b"MRN-4711"]) == []
