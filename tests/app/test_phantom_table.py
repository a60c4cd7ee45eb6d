"""A research table as DICOM: the pixels come through the door as the table's own loader shows them."""

import csv
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from fedscan.phantom_table import table_to_hospitals
from fedscan_client import consent, keys
from fedscan_client.intake import cache, render
from fedscan_client.intake.ingest import ingest
from fedscan_client.intake.pictures import load_image
from fedscan_client.intake.sources.settings import Folder
from fedscan_client.site import Intake, Site
from fedscan_core.errors import DataError
from fedscan_core.policy import Policy

PIXELS: dict[str, np.ndarray] = {
    "grey.png": np.arange(20 * 24, dtype=np.uint8).reshape(20, 24),
    "deep.png": (np.arange(20 * 24, dtype=np.uint16) * 130).reshape(20, 24),
    "colour.png": np.arange(20 * 24 * 3, dtype=np.uint32).reshape(20, 24, 3).astype(np.uint8),
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "patient_id", "site", "sex", "age", "label", "split"])
        for number, (name, pixels) in enumerate(PIXELS.items()):
            Image.fromarray(pixels).save(folder / name)
            rows.writerow(
                [
                    name,
                    f"P{number // 2}",
                    "east",
                    "F" if number < 2 else "",
                    61 if number < 2 else "",
                    number % 2,
                    "train",
                ]
            )
        np.savez(folder / "more.npz", images=np.stack([PIXELS["grey.png"]] * 2))
    return folder / "metadata.csv"


def test_the_door_shows_what_the_tables_loader_shows(table, tmp_path):
    assert table_to_hospitals(table, tmp_path / "out") == {"east": 2}
    hospital = tmp_path / "out" / "east"
    site = Site(
        name="east",
        patients_declared=2,
        source={"source": Folder(kind="folder", folder=hospital / "dicom", settle_seconds=0)},
        consent=consent.Settings(kind="register", path=hospital / "consent.csv"),
        intake=Intake(labels=hospital / "labels.csv"),
        policy=Policy(1.0, 1e-5),
        folder=tmp_path / "site",
    )
    key = keys.create(site.folder, site.key)
    report = ingest(site)
    assert report.instances("accepted") == report.objects == 3
    shown = []
    for name in cache.patients(site.cache):
        opened = cache.open_patient(site.cache, key, name)
        for entry in opened.patient.entries:
            x = render.render(opened.volume(entry), window="header", size=(20, 24), channels=1)
            shown.append((entry.label, entry.split, entry.sex, entry.age, x[0]))
    expected = [load_image(table.parent / name, size=(20, 24), channels=1) for name in PIXELS]
    facts = [("0", "train", "F", 61), ("1", "train", "F", 61), ("0", "train", "", None)]
    for fact, x in zip(facts, expected, strict=True):
        # Colour became whole grey values on the way: half a step.
        assert any(row[:4] == fact and np.abs(row[4] - x).max() < 0.51 / 255 for row in shown), fact
    exact = [x for row in shown for x in [row[4]]]
    for name in ("grey.png", "deep.png"):
        x = load_image(table.parent / name, size=(20, 24), channels=1)
        assert any(np.abs(it - x).max() < 1e-6 for it in exact), name


def test_identities_are_invented_and_the_same_each_time(table, tmp_path):
    for place in ("a", "b"):
        table_to_hospitals(table, tmp_path / place)
    files = sorted((tmp_path / "a").rglob("IM*"))
    assert len(files) == 3
    for path in files:
        ds = pydicom.dcmread(path)
        assert ds.PatientName and ds.InstitutionName == "east" and ds.AccessionNumber
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_real_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((1, 8, 8), np.float32))
    (tmp_path / "t.csv").write_text("file,patient_id,label,index\nx.npz,p,0,0\n")
    with pytest.raises(DataError, match="float32"):
        table_to_hospitals(tmp_path / "t.csv", tmp_path / "out")
