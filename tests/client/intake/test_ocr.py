"""Tesseract as a second alarm: it gets the frame through a pipe, leaves nothing behind, and ends in time."""

import os
import shutil
import stat
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fedscan_client.intake import ocr
from fedscan_core.errors import DataError, MissingExtra

real = pytest.mark.skipif(not ocr.installed(), reason="tesseract is not installed")


def page(text, ink=255, paper=0):
    image = Image.new("L", (320, 120), paper)
    ImageDraw.Draw(image).text((20, 40), text, fill=ink, font_size=22)
    return np.asarray(image)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a shell script in tesseract's place."""

    def put(script):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "tesseract").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "tesseract").chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return put


@real
@pytest.mark.parametrize(
    "frame",
    [page("MUSTER ERIKA"), page("MUSTER ERIKA", 0, 255), page("ID 471108").astype(np.int16) * 100 - 9000],
)
def test_plain_text_raises_the_alarm(frame):
    assert ocr.alarm(frame) and ocr.alarm(np.stack([frame] * 3, axis=2))


@real
@pytest.mark.parametrize("frame", [page(""), np.full((9, 9), 7.5), page("x"), np.zeros((5000, 20), np.uint8)])
def test_nothing_raises_none(frame):
    assert not ocr.alarm(frame)


@real
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_file_is_opened_for_writing(tmp_path, monkeypatch):
    log = tmp_path / "calls"
    traced = ocr._COMMAND.replace("ulimit -f 0; ", "").replace("exec ", f"exec strace -f -e trace=file,%desc -o {log} ")
    monkeypatch.setattr(ocr, "_COMMAND", traced)
    assert ocr.alarm(page("MUSTER ERIKA"))
    calls = log.read_text().splitlines()
    opened = [line for line in calls if "open" in line.split("(")[0] and " = -1 " not in line]
    assert len(opened) > 10
    assert not [line for line in opened if "O_WRONLY" in line or "O_RDWR" in line or "O_CREAT" in line]
    assert not [line for line in calls if "memfd_create" in line or "mkdir" in line]


def test_it_could_not_write_if_it_wanted_to(fake, tmp_path):
    fake(f"cat > {tmp_path}/pixels; cat >/dev/null")
    with pytest.raises(DataError, match="tesseract ended"):
        ocr.alarm(page("MUSTER"))
    assert not (tmp_path / "pixels").exists() or (tmp_path / "pixels").stat().st_size == 0


def test_one_thread_and_no_secrets_in_its_environment(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSCAN_SITE_KEY", "canary")
    header = "\\t".join("abcdefghijkl")
    word = "\\t".join([*("0" * 10), "90", "WORD"])
    clean = 'env | grep -q canary || [ "$OMP_THREAD_LIMIT" != 1 ]'
    fake(f'cat >/dev/null; printf "{header}\\n"; {clean} || printf "{word}\\n"')
    assert ocr.alarm(page(""))


def test_too_long_is_an_alarm(fake):
    fake("exec sleep 30")
    begin = time.monotonic()
    assert ocr.alarm(page(""), seconds=0.2) and time.monotonic() - begin < 5


def test_failing_or_missing_is_an_error_and_not_silence(fake, tmp_path, monkeypatch):
    fake("cat >/dev/null; exit 1")
    with pytest.raises(DataError, match="code 1"):
        ocr.alarm(page(""))
    fake("cat >/dev/null; exit 0")  # says nothing at all
    with pytest.raises(DataError, match="code 0"):
        ocr.alarm(page(""))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtra, match="tesseract is not installed"):
        ocr.alarm(page(""))


def test_which_frames_are_read():
    assert ocr.reads("off", 2, 5, 9) == ()
    assert ocr.reads("sample", 2, 5, 9) == (4,) and ocr.reads("sample", 1, 5, 9) == ()
    assert ocr.reads("all", 1, 5, 3) == (0, 1, 2)
    assert [ocr.reads("sample", 0, 1, frames) for frames in (1, 2)] == [(0,), (1,)]
