"""One series through the door: labels, mixed-up identities, what waits for a person, and spoilt files."""

import functools
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.intake import cache, ocr, quarantine, read
from fedscan_client.intake.records import REASONS, Rectangle
from fedscan_client.intake.rules import QuarantineSettings, Rule

BROKEN = Path(__file__).parents[3] / "../shared/data/dicom/broken"
BROKEN_FILES = sorted(p for p in BROKEN.rglob("*") if p.is_file()) if BROKEN.is_dir() else []


def test_labels_most_specific_first_and_splits(door, cr_instance, save, tmp_path):
    for number in range(4):
        ds = cr_instance(SOPInstanceUID=f"1.2.3.{number}", AccessionNumber=f"ACC{number // 2}")
        save(ds, tmp_path / f"dicom/{number}")
    labels = "sop_uid,accession,study_uid,label,split\n1.2.3.0,,,sop,val\n,ACC0,,acc,val\n,,1.2,study,val\n"
    door.lists(tmp_path, ["A-1"], labels)
    site = door.site(tmp_path, tmp_path / "site")
    door.run(site)
    (images,) = door.contents(site).values()
    assert sorted(entry.label for entry, _ in images) == ["acc", "sop", "study", "study"]
    assert {entry.split for entry, _ in images} == {"val"}
    door.lists(tmp_path, ["A-1"], "sop_uid,label,split\n1.2.3.0,1,train\n1.2.3.1,1,test\n")
    report = door.run(site)  # could not be charged apart: that patient is left out, and nobody else
    assert report.reasons("refused") == {"two_splits": 4} and door.contents(site) == {}
    door.lists(tmp_path, ["A-1"], "sop_uid,label\n1.2.3.0,1\n")
    report = door.run(site)
    assert report.instances("unlabelled") == 3 and report.instances("accepted") == 1
    assert [len(images) for images in door.contents(site).values()] == [1]


def test_mixed_up_identities_are_set_aside(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, ["A-1", "B", "C"], "study_uid,label\n1.2,1\n7.7,0\n")
    save(cr_instance(), tmp_path / "dicom/a")
    # B's file claims a study of A-1: nobody can tell whose it is.
    save(cr_instance(PatientID="B", SOPInstanceUID="5.5", SeriesInstanceUID="5"), tmp_path / "dicom/b")
    clean = cr_instance(PatientID="C", StudyInstanceUID="7.7", SeriesInstanceUID="7", SOPInstanceUID="7.1")
    save(clean, tmp_path / "dicom/c")
    save(clean, tmp_path / "dicom/copy of c")
    save(cr_instance(PatientID=["A-1", "C"]), tmp_path / "dicom/two")
    (tmp_path / "dicom/notes.txt").write_text("hello")
    report = door.run(door.site(tmp_path, tmp_path / "site"))
    assert report.reasons("refused") == {"uid_on_two_patients": 2, "duplicate": 1, "patient_id": 1}
    assert report.instances("unreadable") == 1 == report.instances("accepted") and door.balance(report)
    assert report.objects == 6


def test_a_file_that_becomes_somebody_else_between_the_passes(door, cr_instance, save, tmp_path, monkeypatch):
    door.lists(tmp_path, ["A-1"], "study_uid,label\n1.2,1\n")
    path = save(cr_instance(), tmp_path / "dicom/a")
    real = read.whole

    def swap(stream, size):
        save(cr_instance(PatientID="B"), path)
        with path.open("rb") as now:
            return real(now, path.stat().st_size)

    monkeypatch.setattr(read, "whole", swap)
    report = door.run(door.site(tmp_path, tmp_path / "site"))
    assert report.reasons("refused") == {"changed": 1} and report.instances("accepted") == 0


def test_an_image_that_waits_is_let_in_by_a_person_or_by_a_rule(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, ["A-1"], "study_uid,label\n1.2,1\n")
    save(cr_instance(BurnedInAnnotation="YES"), tmp_path / "dicom/a")
    site = door.site(tmp_path, tmp_path / "site")
    assert door.run(site).reasons("quarantined") == {"burned_in": 1}
    (item,) = quarantine.items(site.folder)
    assert item.waiting == 1 and cache.patients(site.cache) == []
    box = Rectangle(0, 0, 2, 6)
    decide = functools.partial(quarantine.decide, site.folder, door.KEY.wrapping, item.id, by="A. Person", why="a name")
    decide("blackout", rectangles=[box])
    assert door.run(site).instances("accepted") == 1
    ((entry, pixels),) = door.contents(site)[door.name("A-1")]
    values = np.frombuffer(pixels, entry.dtype).reshape(entry.shape)
    assert not values[0, :2].any() and values[0, 2:].any()
    decide("rejected")
    assert door.run(site).instances("accepted") == 0 and cache.patients(site.cache) == []

    rule = Rule.model_validate(
        {"name": "r", "sop_class": "1.2.840.10008.5.1.4.1.1.1", "rows": 4, "columns": 6, "blackout": [[0, 0, 1, 6]]}
        | {"approved_by": "A", "approved_on": "2026-01-01", "why": "looked"}
    )
    ruled = door.site(tmp_path, tmp_path / "ruled", quarantine=QuarantineSettings(rule=(rule,)))
    assert door.run(ruled).instances("accepted") == 1 and quarantine.items(ruled.folder) == []


def test_the_second_alarm_sets_aside_and_a_person_overrules_it(door, cr_instance, save, tmp_path, monkeypatch):
    door.lists(tmp_path, ["A-1"], "study_uid,label\n1.2,1\n")
    save(cr_instance(), tmp_path / "dicom/a")
    looked = []

    def alarm(frame):
        looked.append(frame.shape)
        return True

    monkeypatch.setattr(ocr, "alarm", alarm)
    site = door.site(tmp_path, tmp_path / "site", quarantine=QuarantineSettings(ocr="sample"))
    assert door.run(site).reasons("quarantined") == {"text_seen": 1} and looked == [(4, 6)]
    (item,) = quarantine.items(site.folder)
    box = Rectangle(0, 0, 1, 6)
    quarantine.decide(site.folder, door.KEY.wrapping, item.id, "blackout", by="A", why="R", rectangles=[box])
    assert door.run(site).instances("accepted") == 1 and len(looked) == 1
    ((entry, pixels),) = door.contents(site)[door.name("A-1")]
    values = np.frombuffer(pixels, entry.dtype).reshape(entry.shape)
    assert not values[0, :1].any() and values[0, 1:].any()


def test_a_consent_of_a_guardian_ends(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, [], "study_uid,label\n1.2,1\n")
    rows = "# as-of: 2026-01-10\npatient_id,status,date,by_guardian\nA-1,permit,2020-01-01,yes\n"
    (tmp_path / "consent.csv").write_text(rows)
    save(cr_instance(PatientBirthDate="20080115"), tmp_path / "dicom/a")
    site = door.site(tmp_path, tmp_path / "site")
    assert door.run(site, today=date(2026, 1, 14)).instances("accepted") == 1
    assert cache.read_index(site.cache, door.KEY, door.name("A-1")).consent_until == date(2026, 1, 14)
    assert door.run(site).reasons("no consent") == {"guardian_ended": 1}  # 18 today
    assert cache.patients(site.cache) == []


BROKEN_IDS = ["1CT1", "4MR1", "../../etc/passwd", '"=HYPERLINK(""http://127.0.0.1"")"', "OTHER", "2CT2"]


@pytest.mark.skipif(not BROKEN_FILES, reason="the broken DICOM files are not on this machine")
def test_broken_files_are_accepted_or_counted(door, tmp_path):
    studies = set()
    for path in BROKEN_FILES:
        try:
            studies.add(str(pydicom.dcmread(path, stop_before_pixels=True).StudyInstanceUID))
        except Exception:  # most of them are broken
            continue
    door.lists(tmp_path, BROKEN_IDS, "study_uid,label\n" + "".join(f"{s},1\n" for s in sorted(studies)))
    outcomes = {}
    for number, path in enumerate(BROKEN_FILES):
        single = tmp_path / str(number)
        (single / "dicom").mkdir(parents=True)
        shutil.copy(path, single / "dicom")
        for table in ("consent.csv", "labels.csv"):
            shutil.copy(tmp_path / table, single)
        site = door.site(single, single / "site")
        report = door.run(site)
        assert report.objects == 1 and door.balance(report)
        (line,) = report.lines
        assert line.reason in REASONS or line.outcome in ("accepted", "no consent")
        outcomes[path.name] = line.reason or line.outcome
        for images in door.contents(site).values():
            for entry, pixels in images:
                assert np.isfinite(np.frombuffer(pixels, entry.dtype)).all()
    assert outcomes["monochrome1.dcm"] == outcomes["path_in_patient_id.dcm"] == "accepted"
    assert outcomes["rescale_slope_nan.dcm"] in ("not_finite", "bad_header")
    assert outcomes["rescale_slope_zero.dcm"] == "bad_header"
    assert outcomes["two_patient_ids.dcm"] == outcomes["no_patient_id.dcm"] == "patient_id"
    assert outcomes["claims_17_exabytes.dcm"] == "too_large"
    assert outcomes["identifying_tags.dcm"] == "burned_in"


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8), st.booleans()
)
def test_damaged_bytes_never_become_an_exception(
    door, cr_instance: Callable[..., pydicom.Dataset], save, tmp_path_factory, damage, cut
):
    folder = tmp_path_factory.mktemp("damaged")
    door.lists(folder, ["A-1"], "study_uid,label\n1.2,1\n")
    path = save(cr_instance(WindowCenter="2048", WindowWidth="4096", RescaleSlope="1"), folder / "dicom/a")
    data = bytearray(path.read_bytes())
    for place, value in damage:
        data[132 + int(place * (len(data) - 132))] = value
    path.write_bytes(data[: 132 + int(damage[0][0] * len(data))] if cut else data)
    report = door.run(door.site(folder, folder / "site"))
    assert report.objects == 1 and door.balance(report)
