"""Real and broken files: refused by name or de-identified in bounded time, with no text of theirs, and still valid."""

import csv
import io
import re
import shutil
import subprocess
import time
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from fedscan_client.intake import actions, deid
from fedscan_client.intake.deid import deidentify
from fedscan_client.intake.kinds import TABLES
from fedscan_client.intake.profile import VERSION
from fedscan_client.intake.profile_values import CODES, IMAGE_TYPES, MAKERS, WORDS
from fedscan_client.intake.records import REASONS, Refused

KEY = bytes(range(32))
COLLECTION = Path(__file__).parents[3] / "../shared/data/dicom"
SECONDS = 20  # for one file, reading and writing included; the largest takes 0.2
TEXT = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "DA", "DT", "TM", "UI"}
# Ours: what every result says, whatever the file held.
STATED = {"MONOCHROME1", "MONOCHROME2", "MODIFIED", "removed", "000000", VERSION}
STATED |= {text for method in (*deid._METHODS, deid._CLEAN_PIXELS) for text in method}

pytestmark = [
    pytest.mark.skipif(not COLLECTION.exists(), reason="the collection of DICOM files is not on this machine"),
    pytest.mark.filterwarnings("ignore"),
]


def files() -> list[dict[str, str]]:
    if not COLLECTION.exists():
        return []
    with open(COLLECTION / "metadata.csv") as file:
        return list(csv.DictReader(file))


def legal() -> set[str]:
    """Words of our own lists: a header that holds one of these may keep it. SOP classes are the standard's."""
    words = set(WORDS).union(*CODES.values(), *IMAGE_TYPES, MAKERS.values(), STATED)
    contexts = {row.arguments[0] for table in TABLES.values() for row in table if row.action == "codes"}
    for context in contexts:
        words.update(word for entry in actions._context(context).values() for word in entry)
    return words


def texts(ds: Dataset) -> set[str]:
    """Every text value of at least four characters, at any depth, that can be read."""
    found: set[str] = set()
    stack = [ds]
    while stack:
        item = stack.pop()
        for tag in list(item._dict):
            try:
                element = item[tag]
            except Exception:  # damaged: pydicom raises almost anything
                continue
            if element.VR == "SQ":
                stack += list(element.value)
            elif element.VR in TEXT:
                values = element.value if element.VM > 1 else [element.value]
                found |= {str(value).strip() for value in values if len(str(value).strip()) >= 4}
    return found


def survivors(row: dict[str, str], allowed: set[str]) -> list[str] | str:
    """What of a file's texts is in the result's bytes; a refusal's reason instead."""
    try:
        ds = pydicom.dcmread(COLLECTION / row["file"], force=True)
    except Exception:  # not DICOM at all; the readers of sources refuse it
        return "not_dicom"
    try:
        out = deidentify(ds, KEY, released=True)
    except Refused as refusal:
        return refusal.reason
    buffer = io.BytesIO()
    out.save_as(buffer, enforce_file_format=True)
    picture, data = out.PixelData, buffer.getvalue()
    head = data.replace(picture, b"") if len(picture) > 64 else data
    head = re.sub(rb"2\.25\.\d+", b"", head).replace(out.PatientID.encode(), b"")
    candidates = {text for text in texts(ds) if not text.startswith("1.2.840.10008.")}
    candidates -= {text for text in candidates if set(text.upper().split()) <= WORDS}  # kept on purpose
    candidates -= {text for text in candidates if text.isdecimal() and len(text) < 6}  # in numbers and dates by chance
    found = [text for text in candidates - allowed if text.encode("utf-8", "replace") in head]
    return [text for text in found if not within(text, allowed, head)]


def within(text: str, allowed: set[str], head: bytes) -> bool:
    """Whether every occurrence of a text is a part of a legal word, as TOMO is of RECON TOMO."""
    for word in allowed:
        if text in word:
            head = head.replace(word.encode(), b"")
    return text.encode() not in head


def test_a_sample_of_the_collection():
    check(files()[::8], accepted=40)


@pytest.mark.slow
def test_the_whole_collection():
    check(files(), accepted=420)


def check(rows: list[dict[str, str]], accepted: int) -> None:
    allowed, results = legal(), {}
    for row in rows:
        began = time.monotonic()
        results[row["file"]] = survivors(row, allowed)
        assert time.monotonic() - began < SECONDS, row["file"]
    assert {name: found for name, found in results.items() if isinstance(found, list) and found} == {}
    assert {found for found in results.values() if isinstance(found, str)} <= set(REASONS)
    assert sum(isinstance(found, list) for found in results.values()) >= accepted


def test_the_detector_finds_a_text_that_stays(monkeypatch):
    """A mistake planted in one action is seen."""
    spoilt = dict(actions._ACTIONS) | {"words": lambda found, element, given: str(found)}
    monkeypatch.setattr(actions, "_ACTIONS", spoilt)
    row = next(row for row in files() if row["file"].startswith("series/Study1/") and row["label"] == "ok")
    assert survivors(row, legal())


def complaints(path: Path) -> set[str]:
    """dciodvfy's errors, without values: a UID or date in a message differs although the error is the same."""
    done = subprocess.run(["dciodvfy", path], capture_output=True, check=False)
    lines = (done.stdout + done.stderr).decode("latin1").splitlines()
    return {re.sub(r"<[\d.]+>|\s+", " ", line) for line in lines if line.startswith("Error")}


def new_complaints(ds: Dataset, before: Path, folder: Path) -> set[str]:
    out = folder / "out.dcm"
    deidentify(ds, KEY, released=True).save_as(out, enforce_file_format=True)
    return complaints(out) - complaints(before)


needs_dciodvfy = pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")


@needs_dciodvfy
def test_synthetic_images_stay_valid(canaries, hospital, tmp_path):
    canaries.corpus(tmp_path)
    paths = [tmp_path / f"{name}.dcm" for name in ("ct", "mr_implicit", "us_rgb", "us_frames")]
    enhanced = canaries.image("2.1", NumberOfFrames=2, Modality="CT")
    canaries.save(enhanced, tmp_path / "enhanced.dcm")
    for path in [*paths, tmp_path / "enhanced.dcm", next((hospital / "dicom").rglob("IM*"))]:
        assert complaints(path) or path.parent != tmp_path  # planted files are full of errors: the tool does look
        assert new_complaints(pydicom.dcmread(path), path, tmp_path) == set(), path.name


@needs_dciodvfy
@pytest.mark.parametrize("which", ["a few", pytest.param("all", marks=pytest.mark.slow)])
def test_real_images_stay_valid(which, tmp_path):
    rows: list[dict[str, str] | None] = [row for row in files() if row["label"] == "ok"]
    few = ("eCT_Supplemental", "mf.dcm", "CT_small", "MR2_J2KI", "US1_", "NM1_", "examples_palette", "DX", "XA1_")
    if which == "a few":
        rows = [next((row for row in rows if row and word in row["file"]), None) for word in few]
    checked = 0
    for row in filter(None, rows):
        path = COLLECTION / row["file"]
        try:
            found = new_complaints(pydicom.dcmread(path), path, tmp_path)
        except Refused:
            continue
        checked += 1
        assert found == set(), row["file"]
    assert checked >= (4 if which == "a few" else 420)
