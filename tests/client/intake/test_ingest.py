import dataclasses
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.intake import cache, decode, deid
from fedscan_client.intake.deid import pseudonym
from fedscan_client.intake.ingest import ingest, load_cohort_records
from fedscan_client.intake.records import REASONS
from fedscan_core.errors import ConsentError, DataError

KEY = bytes(range(32))
TODAY = date(2026, 1, 15)
BROKEN = Path(__file__).parents[3] / "../shared/data/dicom/broken"
BROKEN_FILES = sorted(p for p in BROKEN.rglob("*") if p.is_file()) if BROKEN.is_dir() else []


def run(folder: Path, out: Path, **changes):
    options: dict[str, Any] = {
        "consent_csv": folder / "consent.csv",
        "labels_csv": folder / "labels.csv",
        "image_size": (32, 32),
        "site_key": KEY,
        "out": out,
        "as_of": TODAY,
    }
    return ingest(folder / "dicom", **(options | changes))


def balance(report) -> int:
    parts = (report.accepted, report.no_consent, report.unlabelled, report.unreadable)
    total: int = sum(parts) + sum(report.refused.values())
    return total


def write_lists(folder: Path, permitted: list[str], labels: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{patient},permit,2025-01-01\n" for patient in permitted)
    (folder / "consent.csv").write_text(f"# as-of: 2026-01-10\npatient_id,status,date\n{rows}")
    (folder / "labels.csv").write_text(labels)


def contents(out: Path):
    """Everything in the cache, decrypted."""
    return {
        name: (p.meta, {k: v.tobytes() for k, v in p.arrays.items()})
        for name in cache.patients(out)
        if (p := cache.read_patient(out, KEY, name))
    }


def test_a_phantom_hospital_end_to_end(hospital, tmp_path):
    report = run(hospital, tmp_path / "cache")
    files = sorted((hospital / "dicom").rglob("IM*"))
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    assert report.files == len(files) == balance(report)
    assert report.patients == 12 and report.cached == 9  # one denied, one withdrawn, one absent
    assert report.studies == len({h.StudyInstanceUID for h in headers})
    assert report.no_consent > 0 and not report.refused and report.unreadable == 0
    records = load_cohort_records(tmp_path / "cache", KEY)
    assert len(records) == report.accepted
    by_name = {pseudonym(KEY, "pid", h.PatientID): h for h in headers}
    for record in records:
        header = by_name[record.patient]
        assert record.sex == header.PatientSex and record.label in ("0", "1") and record.split == ""
        assert record.age == min(int(header.PatientAge[:3]), 90)
        assert record.group["manufacturer"] == header.Manufacturer.split()[0]
        assert record.image.shape == (1, 32, 32) and record.image.dtype == np.float32
        assert 0 <= record.image.min() < record.image.max() <= 1


def test_no_identity_in_the_cache_not_even_inside_the_encryption(hospital, tmp_path):
    run(hospital, tmp_path)
    marks = set()
    for path in (hospital / "dicom").rglob("IM*"):
        ds = pydicom.dcmread(path)
        values = (
            ds.PatientName,
            ds.PatientID,
            ds.PatientBirthDate,
            ds.OtherPatientIDs,
            ds.AccessionNumber,
        )
        uids = (ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID)
        marks |= {str(v).encode() for v in (*values, *uids, ds.InstitutionName, ds.StationName, ds.StudyDate)}
    stored = [path.read_bytes() + path.name.encode() for path in tmp_path.rglob("*") if path.is_file()]
    plain = [repr((meta, arrays)).encode() + b"".join(arrays.values()) for meta, arrays in contents(tmp_path).values()]
    assert len(marks) > 60 and len(stored) == 18 and len(plain) == 9
    assert not [mark for mark in marks for blob in stored + plain if mark in blob]


def test_the_same_again_changes_nothing(hospital, tmp_path):
    first = run(hospital, tmp_path / "one")
    before = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert run(hospital, tmp_path / "one") == first
    assert dataclasses.asdict(first)["refused"] == {}
    assert {p: p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()} == before
    # Names and order of the files play no part, and another folder gives the same content.
    moved = tmp_path / "moved"
    for number, path in enumerate(sorted((hospital / "dicom").rglob("IM*"), reverse=True)):
        (moved / "dicom").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / "dicom" / f"{number}.bin")
    for name in ("consent.csv", "labels.csv"):
        shutil.copy(hospital / name, moved)
    run(moved, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_pixels_of_a_patient_without_consent_are_never_decoded(cr_instance, save, tmp_path, monkeypatch):
    write_lists(tmp_path, ["A-1"], "study_uid,label\n1.2,1\n9.2,1\n")
    save(cr_instance(), tmp_path / "dicom/a")
    junk = cr_instance(PatientID="B", StudyInstanceUID="9.2", SeriesInstanceUID="9.3", SOPInstanceUID="9.4")
    junk.add_new("PixelData", "OW", b"\xff" * 10)  # would be refused as undecodable
    save(junk, tmp_path / "dicom/b")
    decoded: list[str] = []
    real = decode.frames

    def watched(ds):
        decoded.append(ds.PatientID)
        return real(ds)

    monkeypatch.setattr(deid, "frames", watched)
    report = run(tmp_path, tmp_path / "cache")
    assert report.no_consent == 1 and report.accepted == 1 and not report.refused
    assert "B" not in decoded and "A-1" in decoded
    write_lists(tmp_path, ["A-1", "B"], "study_uid,label\n1.2,1\n9.2,1\n")
    assert run(tmp_path, tmp_path / "cache").refused == {"pixels_undecodable": 1}


def test_no_register_means_that_nothing_is_read(hospital, tmp_path, monkeypatch):
    monkeypatch.setattr("fedscan_client.intake.ingest.read_instance", lambda *a, **k: 1 / 0)
    for changes in ({"consent_csv": tmp_path / "none.csv"}, {"max_age_days": -1}):
        with pytest.raises(ConsentError):
            run(hospital, tmp_path / "cache", **changes)
    assert not (tmp_path / "cache").exists()


def test_a_withdrawal_destroys_even_when_the_rest_fails(cr_instance, save, tmp_path):
    labels = "study_uid,label\n1.2,1\n9.2,0\n"
    write_lists(tmp_path, ["A-1", "B"], labels)
    save(cr_instance(), tmp_path / "dicom/a")
    save(
        cr_instance(PatientID="B", StudyInstanceUID="9.2", SeriesInstanceUID="9.3", SOPInstanceUID="9.4"),
        tmp_path / "dicom/b",
    )
    assert run(tmp_path, tmp_path / "cache").cached == 2
    with (tmp_path / "consent.csv").open("a") as file:
        file.write("B,withdrawn,2025-06-01\n")
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(DataError):
        run(tmp_path, tmp_path / "cache")
    assert cache.patients(tmp_path / "cache") == [pseudonym(KEY, "pid", "A-1")]
    # Gone from the source: gone from the cache.
    write_lists(tmp_path, ["A-1", "B"], labels)
    (tmp_path / "dicom/a").unlink()
    report = run(tmp_path, tmp_path / "cache")
    assert report.destroyed == 1 and cache.patients(tmp_path / "cache") == [pseudonym(KEY, "pid", "B")]


def test_labels_most_specific_first_and_splits(cr_instance, save, tmp_path):
    for number in range(4):
        save(
            cr_instance(SOPInstanceUID=f"1.2.3.{number}", AccessionNumber=f"ACC{number // 2}"),
            tmp_path / f"dicom/{number}",
        )
    labels = "sop_uid,accession,study_uid,label,split\n"
    labels += "1.2.3.0,,,sop,val\n,ACC0,,acc,val\n,,1.2,study,val\n"
    write_lists(tmp_path, ["A-1"], labels)
    run(tmp_path, tmp_path / "cache")
    records = load_cohort_records(tmp_path / "cache", KEY)
    assert sorted(r.label for r in records) == ["acc", "sop", "study", "study"]
    assert {r.split for r in records} == {"val"}
    write_lists(tmp_path, ["A-1"], "sop_uid,label,split\n1.2.3.0,1,train\n1.2.3.1,1,test\n")
    with pytest.raises(DataError, match="two splits"):
        run(tmp_path, tmp_path / "cache")
    write_lists(tmp_path, ["A-1"], "sop_uid,label\n1.2.3.0,1\n")
    assert run(tmp_path, tmp_path / "cache").unlabelled == 3


@pytest.mark.parametrize(
    "labels",
    [
        "",
        "label\n1\n",
        "study_uid\n1.2\n",
        "study_uid,label\n",
        "study_uid,label\n1.2,\n",
        "study_uid,label\n,1\n",
        "study_uid,label,split\n1.2,1,holdout\n",
        "study_uid,label\n1.2,1\n1.2,0\n",
    ],
)
def test_bad_labels_are_one_clear_error(cr_instance, save, tmp_path, labels):
    write_lists(tmp_path, ["A-1"], labels)
    save(cr_instance(), tmp_path / "dicom/a")
    with pytest.raises(DataError) as caught:
        run(tmp_path, tmp_path / "cache")
    assert caught.value.remedy


def test_mixed_up_identities_are_set_aside(cr_instance, save, tmp_path):
    write_lists(tmp_path, ["A-1", "B", "C"], "study_uid,label\n1.2,1\n7.7,0\n")
    save(cr_instance(), tmp_path / "dicom/a")
    # B's file claims a study of A-1: nobody can tell whose it is.
    save(
        cr_instance(PatientID="B", SOPInstanceUID="5.5", SeriesInstanceUID="5"),
        tmp_path / "dicom/b",
    )
    clean = cr_instance(PatientID="C", StudyInstanceUID="7.7", SeriesInstanceUID="7", SOPInstanceUID="7.1")
    save(clean, tmp_path / "dicom/c")
    save(clean, tmp_path / "dicom/copy of c")
    save(cr_instance(PatientID=["A-1", "C"]), tmp_path / "dicom/two")
    (tmp_path / "dicom/notes.txt").write_text("hello")
    report = run(tmp_path, tmp_path / "cache")
    assert report.refused == {"uid_on_two_patients": 2, "duplicate": 1, "patient_id": 1}
    assert report.unreadable == 1 and report.accepted == 1 and balance(report) == report.files == 6


def test_a_file_that_becomes_somebody_else_between_the_passes(cr_instance, save, tmp_path, monkeypatch):
    write_lists(tmp_path, ["A-1"], "study_uid,label\n1.2,1\n")
    path = save(cr_instance(), tmp_path / "dicom/a")
    from fedscan_client.intake import ingest as module

    real = module._read_clean

    def swap(entry, key):
        save(cr_instance(PatientID="B"), path)
        return real(entry, key)

    monkeypatch.setattr(module, "_read_clean", swap)
    report = run(tmp_path, tmp_path / "cache")
    assert report.refused == {"changed": 1} and report.accepted == 0


def test_loading_needs_a_cache_and_its_key(hospital, tmp_path):
    with pytest.raises(DataError, match="no cached patient"):
        load_cohort_records(tmp_path, KEY)
    run(hospital, tmp_path)
    with pytest.raises(DataError, match="another site key"):
        load_cohort_records(tmp_path, bytes(32))
    with pytest.raises(DataError, match="16 bytes"):
        run(hospital, tmp_path / "other", site_key=bytes(16))


def test_an_empty_source_is_an_error_and_destroys_nobody(hospital, tmp_path):
    run(hospital, tmp_path / "cache")
    empty = tmp_path / "unmounted"
    (empty / "dicom").mkdir(parents=True)
    for name in ("consent.csv", "labels.csv"):
        shutil.copy(hospital / name, empty)
    with pytest.raises(DataError, match="empty"):
        run(empty, tmp_path / "cache")
    assert len(cache.patients(tmp_path / "cache")) == 9


BROKEN_IDS = [
    "1CT1",
    "4MR1",
    "../../etc/passwd",
    '"=HYPERLINK(""http://127.0.0.1"")"',
    "OTHER",
    "2CT2",
]


@pytest.mark.skipif(not BROKEN_FILES, reason="the broken DICOM files are not on this machine")
@pytest.mark.filterwarnings("ignore")
def test_broken_files_are_accepted_or_counted(tmp_path):
    studies = set()
    for path in BROKEN_FILES:
        try:
            studies.add(str(pydicom.dcmread(path, stop_before_pixels=True).StudyInstanceUID))
        except Exception:  # most of them are broken
            continue
    write_lists(tmp_path, BROKEN_IDS, "study_uid,label\n" + "".join(f"{s},1\n" for s in studies))
    outcomes = {}
    for number, path in enumerate(BROKEN_FILES):
        single = tmp_path / str(number)
        (single / "dicom").mkdir(parents=True)
        shutil.copy(path, single / "dicom")
        report = run(
            single,
            single / "cache",
            consent_csv=tmp_path / "consent.csv",
            labels_csv=tmp_path / "labels.csv",
        )
        assert report.files == balance(report) == 1 and set(report.refused) <= set(REASONS)
        outcomes[path.name] = "accepted" if report.accepted else next(iter(report.refused), "other")
        if report.accepted:
            (record,) = load_cohort_records(single / "cache", KEY)
            assert np.isfinite(record.image).all() and 0 <= record.image.min() <= record.image.max() <= 1
    assert outcomes["monochrome1.dcm"] == outcomes["path_in_patient_id.dcm"] == "accepted"
    assert outcomes["rescale_slope_nan.dcm"] == "not_finite"
    assert outcomes["rescale_slope_zero.dcm"] == "bad_header"
    assert outcomes["two_patient_ids.dcm"] == outcomes["no_patient_id.dcm"] == "patient_id"
    assert outcomes["claims_17_exabytes.dcm"] in ("multi_frame", "too_large")
    assert outcomes["identifying_tags.dcm"] == "burned_in"
    everything = tmp_path / "all"
    shutil.copytree(BROKEN, everything / "dicom")
    for name in ("consent.csv", "labels.csv"):
        shutil.copy(tmp_path / name, everything)
    report = run(everything, everything / "cache")
    assert report.files == balance(report) == len(BROKEN_FILES)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_become_an_exception(cr_instance, save, tmp_path_factory, damage, cut):
    folder = tmp_path_factory.mktemp("damaged")
    write_lists(folder, ["A-1"], "study_uid,label\n1.2,1\n")
    path = save(cr_instance(WindowCenter="2048", WindowWidth="4096", RescaleSlope="1"), folder / "dicom/a")
    data = bytearray(path.read_bytes())
    for place, value in damage:
        data[132 + int(place * (len(data) - 132))] = value
    path.write_bytes(data[: 132 + int(damage[0][0] * len(data))] if cut else data)
    report = run(folder, folder / "cache")
    assert report.files == balance(report) == 1
