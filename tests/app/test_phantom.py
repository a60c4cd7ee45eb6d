import csv
from collections import Counter
from datetime import date
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import config as pydicom_config

from fedscan.phantom import draw_hospital, draw_image, draw_patients, phantom_table
from fedscan_client.intake.pictures import load_image
from fedscan_client.intake.render import render
from fedscan_client.intake.sources import read_table, row_path
from fedscan_client.intake.stack import assemble

DAY = date(2026, 1, 15)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    draw_hospital(folder, name="Phantom North", patients=40, seed=7, as_of=DAY)
    return folder


def headers(folder):
    return [pydicom.dcmread(path) for path in sorted((folder / "dicom").rglob("IM*"))]


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_files_are_valid_dicom(hospital, monkeypatch):
    monkeypatch.setattr(pydicom_config.settings, "reading_validation_mode", pydicom_config.RAISE)
    for ds in headers(hospital):
        for element in ds.iterall():
            assert element.value is not None or element.VM == 0  # every value is parsed and checked
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert pydicom.uid.UID(ds.StudyInstanceUID).is_valid
        assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit) == (16, 12, 11)
        assert ds.pixel_array.shape == (64, 64) and ds.pixel_array.max() <= 4095
        born = date.fromisoformat(f"{ds.PatientBirthDate[:4]}-{ds.PatientBirthDate[4:6]}-{ds.PatientBirthDate[6:]}")
        assert abs((date(2021, 1, 4) - born).days / 365.25 - int(ds.PatientAge[:3])) < 2


def test_headers_carry_an_identity_that_is_one_patients_own(hospital):
    found = headers(hospital)
    for ds in found:
        for keyword in [
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "PatientAddress",
            "InstitutionName",
            "ReferringPhysicianName",
            "OperatorsName",
            "AccessionNumber",
            "OtherPatientIDs",
            "StudyDescription",
            "DeviceSerialNumber",
            "StudyDate",
        ]:
            assert ds[keyword].value, keyword
        assert any(element.tag.is_private for element in ds)
    by_patient: dict[str, set[Any]] = {}
    for ds in found:
        by_patient.setdefault(ds.PatientID, set()).add((str(ds.PatientName), ds.PatientBirthDate, ds.PatientSex))
    assert len(by_patient) == 40 and all(len(who) == 1 for who in by_patient.values())
    assert len({ds.SOPInstanceUID for ds in found}) == len(found)
    owners: dict[str, set[Any]] = {}
    for ds in found:
        owners.setdefault(ds.StudyInstanceUID, set()).add(ds.PatientID)
    assert all(len(patients) == 1 for patients in owners.values())


def test_variety_and_balance(hospital):
    found = headers(hospital)
    patients = {ds.PatientID: ds for ds in found}.values()
    assert {ds.Modality for ds in found} == {"CR", "DX"}
    assert {ds.PhotometricInterpretation for ds in found} == {"MONOCHROME1", "MONOCHROME2"}
    for keyword in ("PatientSex", "Manufacturer"):
        assert min(Counter(ds[keyword].value for ds in patients).values()) >= 10
    images = Counter(ds.PatientID for ds in found).values()
    assert min(images) == 1 and max(images) == 4
    label = {row["study_uid"]: row["label"] for row in rows(hospital / "labels.csv")}
    assert set(label) == {ds.StudyInstanceUID for ds in found}
    assert Counter(label[ds.StudyInstanceUID] for ds in patients) == {"0": 20, "1": 20}


def test_monochrome1_shows_the_same_kind_of_picture(hospital):
    middle: dict[str, list[float]] = {"MONOCHROME1": [], "MONOCHROME2": []}
    for ds in headers(hospital):
        if ds.Modality == "CR":
            image = render(assemble([ds])[0][0], window="header", size=(64, 64), channels=1)[0, 0]
            # The spine is brighter than the air beside the body, whatever the stored polarity.
            assert image[20:50, 30:34].mean() > image[:10, :4].mean() + 0.2
            middle[ds.PhotometricInterpretation].append(image.mean())
    assert abs(np.mean(middle["MONOCHROME1"]) - np.mean(middle["MONOCHROME2"])) < 0.08


def test_the_register_leaves_a_few_out(hospital):
    status: dict[str, list[str]] = {}
    for row in rows(hospital / "consent.csv"):
        status.setdefault(row["patient_id"], []).append(row["status"])
    assert (hospital / "consent.csv").read_text().startswith("# as-of: 2026-01-15\n")
    assert Counter(map(tuple, status.values())) == {
        ("permit",): 37,
        ("deny",): 1,
        ("permit", "withdrawn"): 1,
    }


def test_the_seed_and_the_name_decide_everything(tmp_path):
    def draw(place, **changes):
        options: dict[str, Any] = {
            "name": "N",
            "patients": 5,
            "seed": 1,
            "image_size": 48,
            "as_of": DAY,
        }
        draw_hospital(tmp_path / place, **(options | changes))
        return {
            str(p.relative_to(tmp_path / place)): p.read_bytes()
            for p in sorted((tmp_path / place).rglob("*"))
            if p.is_file()
        }

    first = draw("a")
    assert draw("b") == first
    later = draw("later", as_of=date(2027, 1, 1))
    assert {name for name in first if first[name] != later[name]} == {"consent.csv"}
    for place, changes in (("c", {"seed": 2}), ("d", {"name": "M"})):
        other = draw(place, **changes)
        assert all(first[name] != other[name] for name in first if name in other)


def test_the_disease_can_be_learned_but_not_perfectly():
    """Ridge regression on 16 x 16 pixels, a floor for any real model, on unseen patients."""

    def draw(patients, seed):
        rng = np.random.default_rng(seed)
        drawn = [
            (draw_image(p, rng, 64).reshape(16, 4, 16, 4).mean((1, 3)).ravel(), p.sick)
            for p in draw_patients(rng, patients, 0.5, 2)
            for _ in range(2)
        ]
        return np.array([x for x, _ in drawn]), np.array([y for _, y in drawn])

    (x, y), (x_new, y_new) = draw(400, 1), draw(300, 2)
    mean, scale = x.mean(0), x.std(0) + 1e-3
    x, x_new = (x - mean) / scale, (x_new - mean) / scale
    weights = np.linalg.solve(x.T @ x + 1000 * np.eye(256), x.T @ (y - y.mean()))
    score = x_new @ weights
    auroc = (score[y_new][:, None] > score[~y_new]).mean()
    assert 0.75 < auroc < 0.95


def test_the_table_is_one_that_the_intake_reads(tmp_path):
    phantom_table(tmp_path / "a", patients=60, sites=3, seed=1)
    table = read_table(tmp_path / "a" / "metadata.csv")
    patients = {row.patient_id: row for row in table}.values()
    assert len(patients) == 60
    assert Counter(row.site for row in patients) == {f"phantom_{i}": 20 for i in (1, 2, 3)}
    for site in ("phantom_1", "phantom_2", "phantom_3"):
        splits = Counter(row.split for row in patients if row.site == site)
        assert splits == {"train": 14, "val": 2, "test": 4}
    assert Counter(row.label for row in patients) == {"0": 30, "1": 30}
    assert {row.sex for row in table} == {"F", "M"} and {row.extra["maker"] for row in table} == {
        "A",
        "B",
    }
    image = load_image(row_path(tmp_path / "a" / "metadata.csv", table[0]), size=(64, 64), channels=1)
    assert image.min() < 0.2 < 0.8 < image.max()
    phantom_table(tmp_path / "b", patients=60, sites=3, seed=1)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
