"""What a reviewer broke: consent that must hold, decisions that must bind, mistakes that must not destroy."""

import os
import shutil
import threading

import pydicom
import pytest

from fedscan_client import consent, key_rotation, key_use, patients
from fedscan_client.consent import withdrawals
from fedscan_client.intake import cache, index, ingest, objects, quarantine, series
from fedscan_client.intake.records import PatientId
from fedscan_client.intake.rules import QuarantineSettings, Rule
from fedscan_client.intake.sources import spool
from fedscan_client.intake.sources.settings import parse
from fedscan_client.site import Intake
from fedscan_core.errors import ConfigError, FolderError, SiteKeyError

OTHER = {"PatientID": "B", "StudyInstanceUID": "9.2", "SeriesInstanceUID": "9.3", "SOPInstanceUID": "9.4"}
LABELS = "study_uid,label\n1.2,1\n9.2,0\n"


@pytest.fixture
def two(door, cr_instance, save, tmp_path):
    """A site with two patients, A-1 and B, in its cache."""
    door.lists(tmp_path, ["A-1", "B"], LABELS)
    save(cr_instance(), tmp_path / "dicom/a")
    save(cr_instance(**OTHER), tmp_path / "dicom/b")
    site = door.site(tmp_path, tmp_path / "site")
    assert door.run(site).cached_patients == 2
    return site


def test_another_project_or_issuer_does_not_forget_a_withdrawal(door, two, tmp_path):
    patients.withdraw(two, door.KEY, PatientId("A-1"), today=door.TODAY, yes=True)
    labels = tmp_path / "labels.csv"
    issued = consent.Settings(kind="register", path=tmp_path / "consent.csv", issuer="EAST")
    for changes in ({"intake": Intake(labels=labels, project="other")}, {"consent": issued}):
        changed = door.site(tmp_path, tmp_path / "site", **changes)
        (two.folder / index.FILE).unlink(missing_ok=True)
        with pytest.raises(ConfigError, match="changed"):
            door.run(changed)
    assert cache.patients(two.cache) == [door.name("B")]


def test_a_withdrawal_while_an_ingest_runs_holds(door, two, cr_instance, save, tmp_path, monkeypatch):
    save(cr_instance(WindowCenter="7", WindowWidth="9"), tmp_path / "dicom/a")  # to be read again
    real = series.pieces

    def slow(work, uid, rows, **how):
        if rows[0].header.patient == door.name("A-1"):
            withdrawals.add(two.folder, door.name("A-1"), door.TODAY)  # what `withdraw` does first
        yield from real(work, uid, rows, **how)

    monkeypatch.setattr(series, "pieces", slow)
    door.run(two)
    assert cache.patients(two.cache) == [door.name("B")]


def test_one_ingest_at_a_time_and_withdraw_need_not_wait(door, two):
    entered, leave, told = threading.Event(), threading.Event(), []

    def stop(what, done, of):
        if what == "patients" and not entered.is_set():
            entered.set()
            leave.wait(20)

    first = threading.Thread(target=lambda: told.append(door.run(two, tell=stop)))
    first.start()
    assert entered.wait(20)
    with pytest.raises(FolderError, match="Another ingest"):
        door.run(two)
    done = patients.withdraw(two, door.KEY, PatientId("A-1"), today=door.TODAY, yes=True)
    assert done["done"]
    leave.set()
    first.join(20)
    assert told and cache.patients(two.cache) == [door.name("B")]


def test_a_corrected_patient_id_takes_the_image_along(door, two, cr_instance, save, tmp_path):
    (tmp_path / "dicom/half.tmp").write_bytes(b"x")  # nothing follows from absence now
    save(cr_instance(**{**OTHER, "PatientID": "C"}), tmp_path / "dicom/b")
    report = door.run(two)
    assert report.skipped and cache.patients(two.cache) == [door.name("A-1")] and report.destroyed == 1


def test_of_two_copies_the_one_that_has_to_wait_counts(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, ["A-1"], LABELS)
    for number in range(6):  # whatever order the names come in
        flag = {"BurnedInAnnotation": "YES"} if number == 3 else {}
        save(cr_instance(SeriesDescription=f"copy {number}", **flag), tmp_path / f"dicom/{number}")
    report = door.run(door.site(tmp_path, tmp_path / "site"))
    assert report.reasons("quarantined") == {"burned_in": 1} and report.reasons("refused") == {"duplicate": 5}
    assert report.instances("accepted") == 0


def waiting(door, cr_instance, save, tmp_path, **changes):
    door.lists(tmp_path, ["A-1"], LABELS)
    path = save(cr_instance(BurnedInAnnotation="YES", **changes), tmp_path / "dicom/a")
    site = door.site(tmp_path, tmp_path / "site")
    door.run(site)
    (item,) = quarantine.items(site.folder)
    return site, path, item


def decide(door, site, item, verdict, **more):
    quarantine.decide(site.folder, door.KEY.wrapping, item.id, verdict, by="A", why="B", **more)


def test_what_was_rejected_stays_out_whatever_a_rule_says(door, cr_instance, save, tmp_path):
    site, _, item = waiting(door, cr_instance, save, tmp_path)
    decide(door, site, item, "rejected")
    words = {"name": "r", "sop_class": "1.2.840.10008.5.1.4.1.1.1", "rows": 4, "columns": 6, "blackout": [[0, 0, 1, 6]]}
    rule = Rule.model_validate(words | {"approved_by": "A", "approved_on": "2026-01-01", "why": "looked"})
    ruled = site.model_copy(update={"quarantine": QuarantineSettings(rule=(rule,))})
    assert door.run(ruled).instances("accepted") == 0


def test_a_release_is_for_the_content_that_was_looked_at(door, cr_instance, save, tmp_path):
    site, path, item = waiting(door, cr_instance, save, tmp_path)
    decide(door, site, item, "released")
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # same size, same time
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = door.run(site)
    assert report.instances("accepted") == 0 and report.reasons("quarantined") == {"burned_in": 1}
    assert [it.state for it in quarantine.items(site.folder)] == ["waiting"]


def test_a_person_is_told_the_gravest_reason(door, cr_instance, save, tmp_path):
    changes = {"ImageType": ["DERIVED", "SECONDARY"], "RecognizableVisualFeatures": "YES"}
    _, _, item = waiting(door, cr_instance, save, tmp_path, **changes)
    assert item.reason == "recognizable"


def test_a_lost_list_of_what_waits_is_made_again(door, cr_instance, save, tmp_path):
    site, _, _ = waiting(door, cr_instance, save, tmp_path)
    for path in site.folder.glob("quarantine.sqlite*"):
        path.unlink()
    assert door.run(site).reasons("quarantined") == {"burned_in": 1}
    assert len(quarantine.items(site.folder)) == 1


def test_one_instance_in_two_series_stops_nobody(door, two, cr_instance, save, tmp_path):
    save(cr_instance(SeriesInstanceUID="1.2.77"), tmp_path / "dicom/again")
    report = door.run(two)
    assert report.instances("accepted") == 2 and report.reasons("refused") == {"duplicate": 1}
    assert report.cached_patients == 2


def test_an_accession_of_two_patients_labels_neither(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, ["A-1", "B"], "accession,study_uid,label\nACC7,,1\n,9.2,0\n")
    save(cr_instance(), tmp_path / "dicom/a")
    save(cr_instance(**OTHER), tmp_path / "dicom/b")
    report = door.run(door.site(tmp_path, tmp_path / "site"))
    assert report.instances("unlabelled") == 1 == report.instances("accepted")


@pytest.fixture
def many(door, cr_instance, save, tmp_path):
    """Twelve patients in a cache, and what changes their register."""
    for number in range(12):
        uids = {"StudyInstanceUID": f"5.{number}", "SeriesInstanceUID": f"6.{number}", "SOPInstanceUID": f"7.{number}"}
        save(cr_instance(PatientID=f"P{number}", **uids), tmp_path / f"dicom/{number}")
    rows = "".join(f"5.{number},1\n" for number in range(12))

    def listed(ids):
        door.lists(tmp_path, ids, f"study_uid,label\n{rows}")

    listed([f"P{number}" for number in range(12)])
    site = door.site(tmp_path, tmp_path / "site")
    assert door.run(site).cached_patients == 12
    return site, listed


def test_a_cut_register_or_source_does_not_destroy_everybody(door, many, tmp_path):
    site, listed = many
    listed(["P0", "SOMEBODY"])
    assert door.run(site, dry_run=True).unlisted_kept == 11
    report = door.run(site)
    assert (report.unlisted_kept, report.destroyed, report.cached_patients) == (11, 0, 12)
    listed([f"P{number}" for number in range(12)])
    shutil.move(tmp_path / "dicom", tmp_path / "away")
    (tmp_path / "dicom").mkdir()
    shutil.copy(tmp_path / "away/0", tmp_path / "dicom/0")
    report = door.run(site)
    assert (report.gone_kept, report.destroyed, report.cached_patients) == (11, 0, 12)
    assert door.run(site, dry_run=True, allow_loss=True).destroyed == 11
    report = door.run(site, allow_loss=True)
    assert (report.gone_kept, report.destroyed, report.cached_patients) == (0, 11, 1)


def test_denials_are_honoured_however_many(door, many, tmp_path):
    site, _ = many
    rows = "".join(f"P{number},deny,2025-06-01\n" for number in range(12))
    (tmp_path / "consent.csv").write_text(f"# as-of: 2026-01-10\npatient_id,status,date\n{rows}")
    assert door.run(site, dry_run=True).destroyed == 12
    assert door.run(site).destroyed == 12 and cache.patients(site.cache) == []


def test_leftovers_of_a_killed_write_are_swept(door, two):
    name = "ab" * 16
    (two.cache / "patients" / name).mkdir()
    (two.cache / "patients" / name / "x.img").write_bytes(b"x")
    door.run(two)
    assert not (two.cache / "patients" / name).exists()


def test_a_withdrawal_finds_what_was_refused_and_what_came_since(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, ["A-1"], LABELS)
    tree = {"kind": "dimse-store", "listen_address": "127.0.0.1", "listen_port": 0}
    tree |= {"allow": [{"ae_title": "PACS", "address": "127.0.0.1"}]}
    site = door.site(tmp_path, tmp_path / "site", source=parse(tree, tmp_path))

    def send(uid, **changes):
        path = save(cr_instance(SOPInstanceUID=uid, **changes), tmp_path / "sent")
        spool.put(site.spool, door.KEY.wrapping, path.read_bytes(), uid)

    send("1.1", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")  # a report: never let in
    assert door.run(site).reasons("refused") == {"sop_class": 1}
    send("1.2")
    send("1.3", PatientID="B")
    told = patients.withdraw(site, door.KEY, PatientId("A-1"), today=door.TODAY, yes=True)
    assert told["destroyed"]["objects in the spool"] == 2
    left = [pydicom.dcmread(it.open()).PatientID for it in spool.found(site.spool, door.KEY.wrapping)]
    assert left == ["B"]


def test_an_ingest_and_a_rotation_exclude_each_other(door, two):
    with key_use.alone(two.folder), pytest.raises(SiteKeyError):
        door.run(two)
    tried: list[str] = []

    def rotate(what, done, of):
        if what == "patients" and not tried:
            with pytest.raises(SiteKeyError) as caught:
                key_rotation.rotate(two.folder, two.key, two.cache)
            tried.append(caught.value.remedy)

    door.run(two, tell=rotate)
    assert tried and tried[0]


def test_a_dry_run_leaves_no_file_behind(door, two):
    before = sorted(two.folder.rglob("*"))
    door.run(two, dry_run=True)
    assert sorted(two.folder.rglob("*")) == before and (two.folder / ingest.LOCK).exists()


def test_an_opt_out_list_that_names_no_issuer_covers_no_other_hospitals_ids(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, [], LABELS)
    objections = tmp_path / "objections.csv"
    objections.write_text("# as-of: 2026-01-10\npatient_id\nA-1\n")
    save(cr_instance(IssuerOfPatientID="KLINIKUM"), tmp_path / "dicom/a")
    save(cr_instance(**OTHER), tmp_path / "dicom/b")
    settings = consent.Settings(kind="opt-out", path=objections, legal_basis="a law")
    site = door.site(tmp_path, tmp_path / "site", consent=settings)
    report = door.run(site)
    assert report.reasons("refused") == {"patient_id": 1} and cache.patients(site.cache) == [door.name("B")]
    objections.write_text("# as-of: 2026-01-10\npatient_id,issuer\nA-1,KLINIKUM\nC,\n")
    with_issuer = door.site(tmp_path, tmp_path / "other", consent=settings.model_copy(update={"issuer": "EAST"}))
    assert door.run(with_issuer).reasons("no consent") == {"objected": 1}


def test_a_rotation_changes_nothing_where_an_image_lies_in_several_files(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, ["A-1"], LABELS)
    for number in range(7):
        save(cr_instance(BurnedInAnnotation="YES", SeriesDescription=f"{number}"), tmp_path / f"dicom/{number}")
    site = door.site(tmp_path, tmp_path / "site")
    door.run(site)
    (item,) = [it for it in quarantine.items(site.folder) if it.reason == "burned_in"]
    decide(door, site, item, "released")
    assert door.run(site).instances("accepted") == 1
    for _ in range(3):
        assert key_rotation.rotate(site.folder, site.key, site.cache, also=[objects.rewrapped(site.folder)])
        report = door.run(site)
        assert (report.instances("accepted"), report.read, report.destroyed) == (1, 0, 0)


def test_a_decision_outlives_a_copy_that_only_has_another_time(door, cr_instance, save, tmp_path):
    site, path, item = waiting(door, cr_instance, save, tmp_path)
    decide(door, site, item, "released")
    assert door.run(site).instances("accepted") == 1
    os.utime(path, ns=(1, 1))
    report = door.run(site)
    assert (report.instances("accepted"), report.destroyed) == (1, 0)


def test_files_that_cannot_be_used_are_listed_until_they_are_gone(door, cr_instance, save, tmp_path):
    door.lists(tmp_path, ["A-1"], LABELS)
    save(cr_instance(), tmp_path / "dicom/a")
    save(cr_instance(PatientID=["A-1", "B"], SOPInstanceUID="1.9"), tmp_path / "dicom/b")
    (tmp_path / "dicom/notes.txt").write_text("hello")
    site = door.site(tmp_path, tmp_path / "site")
    door.run(site)
    assert sorted(it.reason for it in quarantine.items(site.folder)) == ["not_dicom", "patient_id"]
    (tmp_path / "dicom/notes.txt").unlink()
    door.run(site)
    assert [it.reason for it in quarantine.items(site.folder)] == ["patient_id"]


def test_a_patient_of_whom_nothing_is_left_counts_as_destroyed(door, two, cr_instance, save, tmp_path):
    save(cr_instance(BurnedInAnnotation="YES"), tmp_path / "dicom/a")
    assert door.run(two, dry_run=True).destroyed == 1
    assert door.run(two).destroyed == 1 and cache.patients(two.cache) == [door.name("B")]
