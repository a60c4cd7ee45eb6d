"""The intake end to end: a phantom hospital through the whole door, on a site's own folder."""

import shutil
from datetime import date

import pydicom
import pytest

from fedscan_client import consent, keys
from fedscan_client.audit import log
from fedscan_client.intake import cache, decode, deid, objects, quarantine, read
from fedscan_client.intake.sources.settings import Folder
from fedscan_core.errors import ConfigError, ConsentError, DataError, SiteKeyError


def test_a_phantom_hospital_end_to_end(door, hospital, tmp_path):
    site = door.site(hospital, tmp_path / "site")
    report = door.run(site)
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted((hospital / "dicom").rglob("IM*"))]
    assert report.objects == len(headers) and door.balance(report)
    assert report.patients == 12 and report.cached_patients == 9  # one denied, one withdrawn, one absent
    assert set(report.reasons("no consent")) == {"denied", "not_listed"}
    assert sum(line.studies for line in report.lines) == len({h.StudyInstanceUID for h in headers})
    assert {line.outcome for line in report.lines} == {"accepted", "no consent"} and not report.skipped
    held = door.contents(site)
    assert sum(map(len, held.values())) == report.instances("accepted") == report.read
    by_name = {door.name(h.PatientID): h for h in headers}
    for patient, images in held.items():
        header = by_name[patient]
        for entry, _ in images:
            assert entry.sex == header.PatientSex and entry.label in ("0", "1") and entry.split == ""
            assert entry.age == min(int(header.PatientAge[:3]), 90)
            assert entry.modality == header.Modality and entry.shape == (1, 64, 64)
        assert cache.read_index(site.cache, door.KEY, patient).basis


def test_no_identity_and_no_pixels_in_the_sites_folder(door, hospital, tmp_path):
    site = door.site(hospital, tmp_path / "site")
    door.run(site)
    marks = set()
    for path in (hospital / "dicom").rglob("IM*"):
        ds = pydicom.dcmread(path)
        marks |= {str(value).encode() for value in (ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.StationName)}
        marks |= {ds.StudyInstanceUID.encode(), ds.SeriesInstanceUID.encode(), ds.SOPInstanceUID.encode()}
        marks |= {ds.OtherPatientIDs.encode(), ds.AccessionNumber.encode(), ds.InstitutionName.encode()}
        marks |= {row.tobytes() for row in ds.pixel_array[::16]}
        marks.add(str(path.relative_to(hospital)).encode())
    stored = [path.read_bytes() + path.name.encode() for path in site.folder.rglob("*") if path.is_file()]
    plain = [repr(entry).encode() for images in door.contents(site).values() for entry, _ in images]
    assert len(marks) > 100 and len(stored) > 20
    assert not [mark for mark in marks for blob in stored + plain if mark in blob]


def test_the_same_again_reads_nothing_and_changes_nothing(door, hospital, tmp_path, monkeypatch):
    site = door.site(hospital, tmp_path / "one")
    first, before = door.run(site), None
    before = door.files(site.folder)
    monkeypatch.setattr(read, "header", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(read, "whole", lambda *a, **k: 1 / 0)
    again = door.run(site)
    assert again.lines == first.lines and again.read == 0 and first.read > 0
    assert door.files(site.folder) == before
    monkeypatch.undo()
    # Names and order of the files play no part, and another folder gives the same content.
    moved = tmp_path / "moved"
    for number, path in enumerate(sorted((hospital / "dicom").rglob("IM*"), reverse=True)):
        (moved / "dicom").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / "dicom" / f"{number}.bin")
    for table in ("consent.csv", "labels.csv"):
        shutil.copy(hospital / table, moved)
    other = door.site(moved, tmp_path / "two")
    door.run(other)
    ids = [
        {(p, e.id, e.label, pixels) for p, it in door.contents(s).items() for e, pixels in it} for s in (site, other)
    ]
    assert ids[0] == ids[1]


def test_only_what_changed_is_read_again(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, ["A-1", "B"], "study_uid,label\n1.2,1\n9.2,0\n")
    save(cr_instance(), tmp_path / "dicom/a")
    other = {"PatientID": "B", "StudyInstanceUID": "9.2", "SeriesInstanceUID": "9.3", "SOPInstanceUID": "9.4"}
    save(cr_instance(**other), tmp_path / "dicom/b")
    site = door.site(tmp_path, tmp_path / "site")
    assert door.run(site).read == 2
    before = door.contents(site)
    save(cr_instance(**other, WindowCenter="7", WindowWidth="9"), tmp_path / "dicom/b")
    assert door.run(site).read == 1
    assert (
        door.contents(site)[door.name("A-1")] == before[door.name("A-1")]
        and door.contents(site)[door.name("B")] != before[door.name("B")]
    )
    door.lists(tmp_path, ["A-1", "B"], "study_uid,label\n1.2,0\n9.2,0\n")  # a label changed
    assert door.run(site).read == 1
    assert door.contents(site)[door.name("A-1")][0][0].label == "0"


def test_an_interrupted_run_goes_on(door, hospital, tmp_path):
    site = door.site(hospital, tmp_path / "site")

    def stop(what: str, done: int, of: int | None) -> None:
        if (what, done) == ("patients", 6):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        door.run(site, tell=stop)
    half = len(cache.patients(site.cache))
    assert 0 < half < 9
    report = door.run(site)
    assert report.cached_patients == 9 and 0 < report.read < report.instances("accepted")


def test_a_dry_run_writes_and_destroys_nothing(door, hospital, tmp_path):
    site = door.site(hospital, tmp_path / "site")
    before = sorted(site.folder.rglob("*"))
    dry = door.run(site, dry_run=True)
    assert sorted(site.folder.rglob("*")) == before
    wet = door.run(site)
    assert dry.lines == wet.lines and dry.read == 0 and dry.dry and not wet.dry


def test_pixels_of_a_patient_without_consent_are_never_decoded(door, cr_instance, save, tmp_path, monkeypatch):
    door.lists(tmp_path, ["A-1"], "study_uid,label\n1.2,1\n9.2,1\n")
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
    site = door.site(tmp_path, tmp_path / "site")
    report = door.run(site)
    assert report.instances("no consent") == 1 == report.instances("accepted") and not report.instances("refused")
    assert "B" not in decoded and "A-1" in decoded
    door.lists(tmp_path, ["A-1", "B"], "study_uid,label\n1.2,1\n9.2,1\n")
    assert set(door.run(site).reasons("refused")) <= {"pixels_undecodable", "no_pixels", "bit_layout", "too_large"}
    assert door.run(site).instances("refused") == 1


def test_no_register_means_that_nothing_is_read(door, hospital, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "header", lambda *a, **k: 1 / 0)
    for changes, today in (
        ({"consent": consent.Settings(kind="register", path=tmp_path / "none")}, door.TODAY),
        ({}, None),
    ):
        with pytest.raises(ConsentError):
            door.run(door.site(hospital, tmp_path / "site", **changes), today=today or date(2027, 1, 1))
    with pytest.raises(ConfigError):
        door.run(door.site(hospital, tmp_path / "site", consent=None))
    assert not (tmp_path / "site" / "cache").exists()


def test_a_withdrawal_destroys_even_when_the_rest_fails(door, cr_instance, save, tmp_path):
    labels = "study_uid,label\n1.2,1\n9.2,0\n"
    door.lists(tmp_path, ["A-1", "B"], labels)
    save(cr_instance(), tmp_path / "dicom/a")
    other = cr_instance(PatientID="B", StudyInstanceUID="9.2", SeriesInstanceUID="9.3", SOPInstanceUID="9.4")
    save(other, tmp_path / "dicom/b")
    site = door.site(tmp_path, tmp_path / "site")
    assert door.run(site).cached_patients == 2
    with (tmp_path / "consent.csv").open("a") as file:
        file.write("B,withdrawn,2025-06-01\n")
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(DataError):
        door.run(site)
    assert cache.patients(site.cache) == [door.name("A-1")]
    # Gone from the source: gone from the cache.
    door.lists(tmp_path, ["A-1", "B"], labels)
    (tmp_path / "dicom/a").unlink()
    report = door.run(site)
    assert report.destroyed == 1 and cache.patients(site.cache) == [door.name("B")]


@pytest.mark.parametrize("spoil", ["half.part", "denied"])
def test_nobody_is_destroyed_where_the_source_could_not_be_read_whole(
    door, cr_instance, save, tmp_path, spoil, monkeypatch
):
    door.lists(tmp_path, ["A-1", "B"], "study_uid,label\n1.2,1\n9.2,0\n")
    save(cr_instance(), tmp_path / "dicom/a")
    other = cr_instance(PatientID="B", StudyInstanceUID="9.2", SeriesInstanceUID="9.3", SOPInstanceUID="9.4")
    save(other, tmp_path / "dicom/b/b")
    site = door.site(tmp_path, tmp_path / "site")
    assert door.run(site).cached_patients == 2
    if spoil == "denied":  # a folder that may not be listed; root may list any, so it is simulated
        import os

        real = os.scandir

        def scandir(path):
            if str(path).endswith("/b"):
                raise PermissionError(13, "denied")
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
    else:
        (tmp_path / "dicom/b/b").rename(tmp_path / "dicom/b/half.part")
    report = door.run(site)
    assert report.skipped and report.destroyed == 0 and len(cache.patients(site.cache)) == 2


def test_another_key_is_told_before_anything_is_written(door, hospital, tmp_path):
    site = door.site(hospital, tmp_path / "site")
    door.run(site)
    before = door.files(site.folder)
    (site.folder / "key").unlink()
    keys.put(site.folder, site.key, keys.SiteKey(bytes(32), bytes(32)), "test")
    with pytest.raises(SiteKeyError):
        door.run(site)
    assert door.files(site.folder) == before


def test_an_empty_source_is_an_error_and_destroys_nobody(door, hospital, tmp_path):
    site = door.site(hospital, tmp_path / "site")
    door.run(site)
    (tmp_path / "unmounted").mkdir()
    source = {"source": Folder(kind="folder", folder=tmp_path / "unmounted", settle_seconds=0)}
    with pytest.raises(DataError, match="no file"):
        door.run(site.model_copy(update={"source": source}))
    assert len(cache.patients(site.cache)) == 9


def test_what_was_done_is_on_record_without_identifiers(door, hospital, tmp_path):
    site = door.site(hospital, tmp_path / "site")
    door.run(site)
    last = log.read(site.folder)[-1]
    assert last["event"] == "ingest" and last["accepted"] > 0 and last["key"] == door.KEY.key_id


def test_what_goes_when_a_patient_goes(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, ["A-1"], "study_uid,label\n1.2,1\n")
    save(cr_instance(BurnedInAnnotation="YES"), tmp_path / "dicom/a")
    save(cr_instance(SOPInstanceUID="1.9"), tmp_path / "dicom/b")
    site = door.site(tmp_path, tmp_path / "site")
    door.run(site)
    assert cache.patients(site.cache) and quarantine.items(site.folder)
    assert objects.destroy(site, door.name("A-1"), for_good=True)
    assert not cache.patients(site.cache) and not quarantine.items(site.folder)
