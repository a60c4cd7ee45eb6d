"""A real PACS: every way of asking it brings every instance, as it is stored, once."""

import io
import logging
import threading
from pathlib import Path

import pytest
from pydicom import dcmread

from fedscan_client.intake.sources import dicomweb, dimse, spool
from fedscan_client.intake.sources.pull import ArchiveError
from fedscan_client.intake.sources.settings import parse
from fedscan_client.intake.sources.spool import Spool
from fedscan_core.errors import FedscanError

KEY = b"k" * 32
WAYS = ("dicomweb", "dimse-move", "dimse-get")
SLOWLY = tuple(pytest.param(kind, marks=pytest.mark.slow) for kind in WAYS)
ALL, CT_SLICES = 30, 12


@pytest.fixture
def source(tmp_path):
    """Settings for one way of asking an Orthanc."""

    def make(kind, orthanc, **changes):
        common = {"kind": kind, "retry_seconds": 0.05, "timeout_seconds": 20}
        if kind == "dicomweb":
            (tmp_path / "password").write_text("site-pass\n")
            (tmp_path / "password").chmod(0o600)
            login = {"username": "site", "password_file": "password", "page_size": 5}
            return parse({**common, "url": orthanc.url, **login, **changes}, tmp_path)["source"]
        common |= {"host": "127.0.0.1", "port": orthanc.dicom, "pacs_ae_title": "PACS"}
        if kind == "dimse-move":
            common |= {"listen_address": "127.0.0.1", "listen_port": orthanc.agent}
        return parse({**common, **changes}, tmp_path)["source"]

    return make


def retrieve(settings, folder, *, known=lambda uid: False, progress=lambda done, found: None, stop=None, **more):
    module = dicomweb if settings.kind == "dicomweb" else dimse
    stop = stop or threading.Event()
    return module.retrieve(settings, Spool(folder, KEY), known=known, progress=progress, stop=stop, **more)


def received(folder):
    """SOP Instance UID -> the file's bytes, of all that is in a spool."""
    files = {}
    for found in spool.found(folder, KEY):
        with found.open() as file:
            uid = str(dcmread(file, specific_tags=["SOPInstanceUID"], stop_before_pixels=True).SOPInstanceUID)
            file.seek(0)
            assert uid not in files
            files[uid] = file.read()
    return files


def assert_same(files, instances, kind):
    """Every instance is there, once, with the stored transfer syntax and the same data set."""
    assert files.keys() == instances.keys()
    for uid, data in files.items():
        with instances[uid].open("rb") as original:
            ours, theirs = dcmread(io.BytesIO(data)), dcmread(original)
        assert ours.file_meta.TransferSyntaxUID == theirs.file_meta.TransferSyntaxUID
        assert ours == theirs
        if kind == "dicomweb":
            assert data_set(data) == data_set(instances[uid].read_bytes())


def data_set(data: bytes) -> bytes:
    """A DICOM file without preamble and file meta information."""
    assert data[128:140] == b"DICM\x02\x00\x00\x00UL\x04\x00"
    return data[144 + int.from_bytes(data[140:144], "little") :]


@pytest.mark.parametrize("kind", WAYS)
def test_everything_comes_once_and_as_it_is_stored(pacs, source, instances, tmp_path, kind, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    told = []
    folder = tmp_path / "spool"
    report = retrieve(source(kind, pacs), folder, progress=lambda done, found: told.append((done, found)))
    assert (report.found, report.retrieved, report.failed, report.problem) == (ALL, ALL, 0, "")
    assert sum(report.modalities.values()) == ALL
    assert report.modalities["CT"] == 2 * CT_SLICES and report.new == report.modalities
    assert told[-1] == (ALL, ALL) and len(told) > ALL - 2 and all(done <= found for done, found in told)
    assert_same(received(folder), instances, kind)

    again = retrieve(source(kind, pacs), folder)
    assert (again.found, again.retrieved, again.already_known) == (ALL, 0, ALL)
    said = caplog.text + "".join(capfd.readouterr())
    names = {str(dcmread(path).PatientName) for path in instances.values()} | set(instances) | {"1.2.99.7", "MRN-"}
    assert not [name for name in names if name in said]
    on_disk = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(on_disk) >= ALL
    for path in on_disk:
        text = str(path).encode() + path.read_bytes()
        assert not [name for name in names if name.encode() in text]


def test_what_was_read_before_is_not_fetched_and_a_dry_run_changes_nothing(pacs, source, instances, tmp_path):
    planned = retrieve(source("dicomweb", pacs), tmp_path / "spool", dry_run=True)
    assert planned.left == len(instances) and not (tmp_path / "spool").exists()
    ingested = retrieve(
        source("dicomweb", pacs), tmp_path / "spool", known=lambda uid: not uid.startswith("1.2.99.7.1")
    )
    assert (ingested.retrieved, ingested.already_known) == (CT_SLICES, ALL - CT_SLICES)
    assert {uid for uid in received(tmp_path / "spool")} == {uid for uid in instances if uid.startswith("1.2.99.7.1")}


@pytest.mark.parametrize("kind", WAYS)
def test_only_permitted_patients_are_asked_for(pacs, source, instances, tmp_path, kind):
    chosen, asked = dcmread(next(iter(instances.values()))).PatientID, []
    theirs = {uid for uid, path in instances.items() if dcmread(path).PatientID == chosen}

    def permitted(patient):
        asked.append(patient)
        return patient.id == chosen

    report = retrieve(source(kind, pacs), tmp_path / "spool", permitted=permitted)
    assert set(received(tmp_path / "spool")) == theirs and report.found == len(theirs) < ALL
    assert report.no_consent == len(asked) - report.studies > 0


@pytest.mark.parametrize(
    "kind",
    ("dicomweb", pytest.param("dimse-move", marks=pytest.mark.slow), pytest.param("dimse-get", marks=pytest.mark.slow)),
)
def test_a_pacs_that_dies_half_way(pacs, source, instances, tmp_path, kind):
    """Killed in the middle; while we still try, it comes back: nothing is lost and nothing comes twice."""
    fetched = []
    back = threading.Timer(0.5, pacs.start)

    def progress(done, found):
        fetched.append(done)
        if found - done == 3 and back.ident is None:  # in the middle of a CT series
            pacs.kill()
            back.start()

    report = retrieve(source(kind, pacs, retry_seconds=0.4), tmp_path / "spool", progress=progress)
    back.join()
    assert back.ident is not None and pacs.process is not None
    assert (report.found, report.retrieved, report.failed, report.problem) == (ALL, ALL, 0, "")
    assert_same(received(tmp_path / "spool"), instances, kind)


@pytest.mark.parametrize("kind", SLOWLY)
def test_a_pacs_that_stays_away_and_the_run_after(pacs, source, instances, tmp_path, kind):
    def progress(done, found):
        if found - done == 3:
            pacs.kill()

    settings = source(kind, pacs, attempts=2)
    report = retrieve(settings, tmp_path / "spool", progress=progress)
    there = len(received(tmp_path / "spool"))
    assert report.problem and report.failed + report.left > 0 and report.retrieved == there < ALL
    assert report.found == report.retrieved + report.already_known + report.failed + report.left
    with pytest.raises(ArchiveError, match="cannot be reached"):
        retrieve(settings, tmp_path / "spool")
    pacs.start()
    rest = retrieve(settings, tmp_path / "spool")
    assert (rest.already_known, rest.retrieved, rest.problem) == (there, ALL - there, "")
    assert_same(received(tmp_path / "spool"), instances, kind)


@pytest.mark.parametrize("kind", ("dicomweb", *SLOWLY[1:]))
def test_stopped_and_gone_on(pacs, source, instances, tmp_path, kind):
    stop = threading.Event()

    def progress(done, found):
        if done > 9:
            stop.set()

    report = retrieve(source(kind, pacs), tmp_path / "spool", progress=progress, stop=stop)
    assert report.problem == "It was stopped." and 0 < report.retrieved < ALL and not report.failed
    rest = retrieve(source(kind, pacs), tmp_path / "spool")
    assert rest.retrieved == ALL - report.retrieved and rest.already_known == report.retrieved
    assert received(tmp_path / "spool").keys() == instances.keys()


@pytest.mark.parametrize("kind", ("dicomweb", pytest.param("dimse-get", marks=pytest.mark.slow)))
@pytest.mark.parametrize(
    ("narrowed", "expected"),
    [
        ({"modality": ["CT"]}, 2 * CT_SLICES),
        ({"modality": ["CT", "DX", "CR"]}, ALL),
        ({"modality": ["MR"]}, 0),
        ({"modality": ["CT"], "body_part": ["HEAD"]}, CT_SLICES),
        ({"study_date_from": "2019-07-04", "study_date_to": "2019-07-04"}, 2 * CT_SLICES),
        ({"study_date_to": "2019-07-03"}, 0),
        ({"study_date_from": "2019-07-05"}, ALL - 2 * CT_SLICES),
        ({"series": {"Manufacturer": "no such maker"}}, 0),
        ({"study": {"StudyDescription": "no such*"}}, 0),
    ],
)
def test_filters(pacs, source, tmp_path, kind, narrowed, expected):
    report = retrieve(source(kind, pacs, filter=narrowed), tmp_path / "spool", dry_run=True)
    assert (report.found, report.problem) == (expected, "")


def test_a_filter_over_dimse(pacs, source, tmp_path):
    narrowed = {"modality": ["CT"], "body_part": ["HEAD"], "study_date_to": "2019-07-04"}
    report = retrieve(source("dimse-get", pacs, filter=narrowed), tmp_path / "spool", dry_run=True)
    assert (report.found, report.series, report.problem) == (CT_SLICES, 1, "")


@pytest.mark.parametrize(
    ("kind", "changes", "says", "remedy"),
    [
        ("dicomweb", {"password_file": "wrong"}, "refuses us (HTTP 401)", "password"),
        ("dicomweb", {"url": "http://127.0.0.1:9/dicom-web"}, "cannot be reached", "url"),
        ("dimse-get", {"ae_title": "STRANGER"}, "refuses", "AE title"),
        ("dimse-get", {"pacs_ae_title": "OTHER"}, "refuses", "pacs_ae_title"),
        ("dimse-get", {"port": 9}, "cannot be reached", "port"),
        ("dimse-move", {"host": "no-such-host.invalid"}, "has no address", "host"),
    ],
)
def test_what_is_wrong_is_said(pacs, source, tmp_path, kind, changes, says, remedy):
    (tmp_path / "wrong").write_text("guess")
    (tmp_path / "wrong").chmod(0o600)
    with pytest.raises(FedscanError) as caught:
        retrieve(source(kind, pacs, attempts=1, **changes), tmp_path / "spool")
    assert says in caught.value.message and remedy in caught.value.remedy
    assert "guess" not in str(caught.value)


def test_a_pacs_that_lets_us_ask_but_not_retrieve(pacs, source, tmp_path):
    narrowed = source("dimse-get", pacs, ae_title="ASKER", attempts=2, filter={"modality": ["CT"]})
    report = retrieve(narrowed, tmp_path / "spool")
    assert report.retrieved == 0 and report.found == 2 * CT_SLICES and report.reason
    assert report.found == report.failed + report.left


SAMPLES = Path(__file__).parents[4] / "../shared/data/dicom"


@pytest.mark.slow
def test_a_large_collection_of_real_and_odd_files(another_orthanc, source, tmp_path):
    """All that Orthanc takes of some 600 files: by every way the same instances, though it is killed twice."""
    if not SAMPLES.exists():
        pytest.skip("the sample data dicom is not on this machine")
    stored = another_orthanc.load(SAMPLES)
    assert stored > 250
    files = {}
    for kind in WAYS:
        for kill_at in (60, 140, None):
            if another_orthanc.process is None:
                another_orthanc.start()

            def progress(done, found, kill_at=kill_at):
                if kill_at and done >= kill_at and another_orthanc.process:
                    another_orthanc.kill()

            report = retrieve(source(kind, another_orthanc, attempts=2), tmp_path / kind, progress=progress)
            assert bool(report.problem) == bool(kill_at)
            assert report.found == report.retrieved + report.already_known + report.failed + report.left
        files[kind] = {found.locator: found.open().read() for found in spool.found(tmp_path / kind, KEY)}
        assert len(files[kind]) == report.retrieved + report.already_known
    # Left: an instance whose UID is none, six of a study without one; by DICOMweb also one of two patients' same UID.
    assert files["dicomweb"].keys() < files["dimse-move"].keys() == files["dimse-get"].keys()
    assert len(files["dimse-get"]) - len(files["dicomweb"]) == 1 and stored - len(files["dimse-get"]) == 7
