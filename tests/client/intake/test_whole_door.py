"""The door as a whole: real series train, a spooled site survives a rotation, consent gates what the spool keeps."""

import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from flwr.app import Message

from fedscan.grid import InlineGrid
from fedscan_client import cohort, key_rotation, keys
from fedscan_client.app import make_app
from fedscan_client.intake import cache, objects, quarantine
from fedscan_client.intake.sources import spool
from fedscan_client.intake.sources.settings import Folder, parse
from fedscan_core import config, wire
from fedscan_core.order import Order
from fedscan_core.policy import Policy
from fedscan_core.wire import Request
from fedscan_models import registry

SERIES = Path(__file__).parents[3] / "../shared/data/dicom/series"


@pytest.mark.skipif(not SERIES.is_dir(), reason="the real series are not on this machine")
def test_real_series_become_a_cohort_that_trains(door, make_run, tmp_path):
    files = [path for path in SERIES.rglob("*") if path.is_file() and path.suffix != ".md"]
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    studies = {ds.StudyInstanceUID: ds.PatientID for ds in headers}
    labels = "".join(f"{study},{number % 2},train\n" for number, study in enumerate(sorted(studies)))
    door.lists(tmp_path, sorted(set(studies.values())), f"study_uid,label,split\n{labels}")
    source = {"source": Folder(kind="folder", folder=SERIES, settle_seconds=0)}
    site = door.site(tmp_path, tmp_path / "site", source=source)
    report = door.run(site)
    assert report.objects == len(files) and door.balance(report)
    # Cropped, so derived, hippocampi wait for a person; a series of 8 of 22 slices has gaps; the rest are whole stacks.
    assert report.reasons("quarantined") == {"image_type": 107} and report.reasons("refused") == {"geometry": 8}
    shapes = sorted(entry.shape for images in door.contents(site).values() for entry, _ in images)
    assert shapes == [(17, 128, 88), *[(22, 320, 280)] * 4] and report.instances("accepted") == 17 + 4 * 22

    site = site.model_copy(update={"policy": Policy(50.0, 1e-3, research_cohort=True, approval="auto-within-policy")})
    site = site.model_copy(update={"consent": site.consent.model_copy(update={"max_age_days": 36_500})})
    run = make_run(task={"labels": ["0", "1"], "modality": "MR"})
    patients = cohort.load_patients(site, run, "train")
    assert len(patients) == 1 and patients.inputs.shape == (88, 1, 16, 16) and 0.05 < patients.inputs.mean() < 0.9
    model = {name: tensor.numpy() for name, tensor in registry.for_run(run).module.state_dict().items()}
    grid = InlineGrid(make_app(lambda context: site), 1)
    (node,) = grid.get_node_ids()
    for kind, round_, weights in (("query", 0, None), ("train", 1, model)):
        record = wire.request_record(Request(Order("demo", config.for_sites(run)), round_, weights))
        (reply,) = grid.send_and_receive([Message(record, node, kind)])
        answer = wire.read_reply(reply.content)
        assert answer.status == "ok", answer
    assert answer.update and all(np.isfinite(array).all() for array in answer.update.values())


def spooled(door, cr_instance, save, tmp_path):
    """A site to which a PACS sent three images: one accepted, one that waits, one of somebody who did not consent."""
    door.lists(tmp_path, ["A-1"], "study_uid,label\n1.2,1\n")
    tree = {"kind": "dimse-store", "listen_address": "127.0.0.1", "listen_port": 0}
    tree |= {"allow": [{"ae_title": "PACS", "address": "127.0.0.1"}]}
    source = parse(tree, tmp_path)
    site = door.site(tmp_path, tmp_path / "site", source=source)
    other = {"PatientID": "B", "StudyInstanceUID": "9.2", "SeriesInstanceUID": "9.3"}
    for number, changes in enumerate(({}, {"BurnedInAnnotation": "YES"}, other)):
        uid = f"1.2.3.{number}"
        path = save(cr_instance(SOPInstanceUID=uid, **changes), tmp_path / "sent")
        spool.put(site.spool, door.KEY.wrapping, path.read_bytes(), uid)
    return site


def test_what_came_over_the_network_is_ingested_and_kept_for_those_who_consent(door, cr_instance, save, tmp_path):
    site = spooled(door, cr_instance, save, tmp_path)
    report = door.run(site)
    assert report.instances("accepted") == 1 == report.instances("quarantined") == report.instances("no consent")
    assert len(list(spool.found(site.spool, door.KEY.wrapping))) == 2  # B's is gone
    again = door.run(site)
    assert again.read == 0 and again.instances("accepted") == 1 and again.objects == 2


def test_a_rotation_loses_nothing_and_nothing_is_read_again(door, cr_instance, save, tmp_path):
    site = spooled(door, cr_instance, save, tmp_path)
    door.run(site)
    (item,) = quarantine.items(site.folder)
    before = door.contents(site)
    assert key_rotation.rotate(site.folder, site.key, site.cache, also=[objects.rewrapped(site.folder)])
    key = keys.load(site.folder, site.key)
    assert key.names == door.KEY.names and key.wrapping != door.KEY.wrapping
    report = door.run(site)
    assert (report.read, report.instances("accepted"), report.instances("quarantined")) == (0, 1, 1)
    opened = {name: cache.open_patient(site.cache, key, name) for name in cache.patients(site.cache)}
    after = {n: [(e, it.values(e).tobytes()) for e in it.patient.entries] for n, it in opened.items()}
    assert after == before
    (held,) = quarantine.held(site.folder, key.wrapping, item.id)
    with objects.opened(site, key, held.locator) as (stream, size):
        assert pydicom.dcmread(stream).BurnedInAnnotation == "YES" and size > 0


def test_between_the_two_runs_of_an_environment_variable_everything_works(
    door, cr_instance, save, tmp_path, monkeypatch
):
    site = spooled(door, cr_instance, save, tmp_path)
    (site.folder / "key").unlink()
    site = site.model_copy(update={"key": keys.Settings(source="environment")})
    monkeypatch.setenv("FEDSCAN_SITE_KEY", keys.text_of(door.KEY))
    door.run(site)
    (item,) = quarantine.items(site.folder)

    def rotate():
        return key_rotation.rotate(site.folder, site.key, site.cache, also=[objects.rewrapped(site.folder)])

    def arrives(key, number):
        data = save(cr_instance(SOPInstanceUID=f"1.2.3.{number}"), tmp_path / "sent").read_bytes()
        return spool.put(site.spool, key.wrapping, data, f"1.2.3.{number}")

    assert rotate() is False
    new = keys.load(site.folder, site.key)
    assert arrives(new, 0) == "same"  # a PACS sends again what is here
    assert arrives(new, 7) == "stored" == arrives(door.KEY, 8)  # the latter under the old key
    report = door.run(site)  # the variable still holds the old one
    assert report.instances("accepted") == 2 and report.instances("quarantined") >= 1
    (held,) = quarantine.held(site.folder, new.wrapping, item.id)
    with objects.opened(site, new, held.locator) as (stream, _):
        assert pydicom.dcmread(stream).SOPInstanceUID == "1.2.3.1"
    monkeypatch.setenv("FEDSCAN_SITE_KEY", keys.text_of(new))
    assert rotate() is True and keys.load(site.folder, site.key) == new
    report = door.run(site)
    assert report.instances("accepted") == 3 and report.objects == 4
    assert [found.open().read(1) != b"" for found in spool.found(site.spool, new.wrapping)] == [True] * 4


def test_a_spooled_object_that_was_altered_is_counted(door, cr_instance, save, tmp_path):
    site = spooled(door, cr_instance, save, tmp_path)
    for path in site.spool.rglob("*.enc"):
        status = path.stat()
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = door.run(site)
    assert door.balance(report) and report.instances("accepted") == 0 and report.objects == 3
