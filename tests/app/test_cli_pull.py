"""`fedscan agent pull` and `listen`, from site.toml to exit code."""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from pydicom import dcmread
from pynetdicom import AE

from fedscan import cli_pull
from fedscan_client import key_use, keys
from fedscan_client.audit import log
from fedscan_client.intake import cache
from fedscan_client.intake.records import PatientId
from fedscan_client.intake.sources import spool
from fedscan_client.intake.sources.pull import Archive, Instance
from fedscan_core.errors import ConfigError, ConsentError, FedscanError, SiteKeyError

KEY = bytes(range(32))
REGISTER = "patient_id,issuer,status,date\nP1,,permit,{day}\nP2,EAST,permit,{day}\nP3,,deny,{day}\n"
COMMAND = """
import argparse, sys
from fedscan import cli_pull
from fedscan_client import keys
from fedscan_client.intake.records import PatientId
parser = argparse.ArgumentParser()
cli_pull.add(parser.add_subparsers(required=True))
arguments = parser.parse_args()
sys.exit(arguments.command(arguments))
"""


@pytest.fixture
def site(tmp_path):
    def make(**sources):
        tree = {"name": "north", "patients_declared": 9, "source": sources}
        tree |= {
            "policy": {"max_epsilon": 1, "max_delta": 1e-5},
            "consent": {"kind": "register", "path": "consent.csv"},
        }
        (tmp_path / "site.toml").write_text(tomli_w.dumps(tree))
        (tmp_path / "consent.csv").write_text(REGISTER.format(day=date.today()))
        keys.put(tmp_path, keys.Settings(), keys.SiteKey(bytes(32), KEY), "test")
        shutil.rmtree(tmp_path / "audit")
        return tmp_path

    return make


def run(*arguments):
    parser = argparse.ArgumentParser()
    cli_pull.add(parser.add_subparsers(required=True))
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return parsed.command(parsed)


@pytest.fixture
def pacs(monkeypatch):
    """A PACS of two studies of permitted patients and three of others. Gives the UIDs that it refuses."""
    refused = set[str]()

    def make(settings, session, where, retry):
        def fetch(study, series, missing, whole, attempt, tick):
            for each in missing:
                if each.uid not in refused:
                    spool.put(where.folder, where.key, b"x", each.uid)
                    tick()
            return refused

        ids = {"1.1": "P1", "1.2": "P2", "1.3": "P3", "1.4": "P2"}
        whose = {study: PatientId(number, "EAST" if study == "1.2" else "") for study, number in ids.items()}
        return Archive(
            lambda: ["1.1", "1.2", "1.3", "1.4", "1.5"],
            lambda study: [(f"{study}.1", {"1.1": "CT", "1.2": "DX"}[study])],
            lambda study, series: [Instance(f"{series}.{number}") for number in range(3)],
            fetch,
            whose.get,
        )

    monkeypatch.setattr("fedscan_client.intake.sources.dicomweb._archive", make)
    return refused


WEB = {"kind": "dicomweb", "url": "http://127.0.0.1:9/x", "retry_seconds": 0}


def test_pull_counts_retrieves_and_notes_what_it_did(site, pacs, capsys):
    folder = site(archive=WEB)
    assert run("pull", folder, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "6 are new" in said and "CT" in said and "1.1" not in said
    assert "3 further studies stay in the PACS" in said
    assert not (folder / "spool").exists() and not (folder / "audit").exists()
    pacs.add("1.2.1.0")
    assert run("pull", folder, "--json") == 1
    told = json.loads(capsys.readouterr().out)["archive"]
    assert (told["found"], told["retrieved"], told["failed"]) == (6, 5, 1)
    assert (told["studies"], told["no_consent"]) == (2, 3)
    assert told["modalities"] == {"CT": {"found": 3, "new": 3}, "DX": {"found": 3, "new": 3}}
    pacs.clear()
    assert run("pull", folder) == 0
    assert "1 retrieved, 5 were here" in capsys.readouterr().out
    assert len(list(spool.found(folder / "spool", KEY))) == 6
    records = [row for row in log.read(folder) if row["event"] == "pull"]
    assert [record["retrieved"] for record in records] == [5, 1]
    assert "1.2.1" not in repr(records)


def test_leftovers_of_a_crash_are_removed_first_but_not_by_a_dry_run(site, pacs):
    folder = site(archive=WEB)
    part = folder / "spool/ab/.x.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x")
    run("pull", folder, "--dry-run")
    assert part.exists()
    run("pull", folder)
    assert not part.exists()


def test_what_is_missing_is_said(site, tmp_path):
    for command in ("pull", "listen"):
        with pytest.raises(ConfigError, match="no source that"):
            run(command, site(images={"kind": "folder", "folder": "in"}))
    (site(archive=WEB) / "key").unlink()
    with pytest.raises(SiteKeyError, match="no site key"):
        run("pull", tmp_path)
    (site(archive=WEB) / "consent.csv").unlink()
    with pytest.raises(ConsentError):
        run("pull", tmp_path)


def test_a_pacs_that_is_not_there(site):
    with pytest.raises(FedscanError, match="cannot be reached"):
        run("pull", site(archive={**WEB, "attempts": 1}))


def test_listen_until_a_signal(site, hospital_file):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    allow = [{"ae_title": "PACS", "address": "127.0.0.1"}]
    folder = site(routed={"kind": "dimse-store", "listen_address": "127.0.0.1", "listen_port": port, "allow": allow})
    command = [sys.executable, "-c", COMMAND, "listen", str(folder), "--json"]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "listens on 127.0.0.1" in process.stderr.readline()
        for title in ("PACS", "STRANGER"):
            ae = AE(title)
            ds = dcmread(hospital_file)
            ae.add_requested_context(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)
            association = ae.associate("127.0.0.1", port, ae_title="FEDSCAN")
            assert association.is_established == (title == "PACS")
            if association.is_established:
                assert association.send_c_store(ds).Status == 0
                association.release()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, err
    counts = json.loads(out)["routed"]
    assert counts["stored"] == 1 and counts["stranger"] == 1
    assert "stopping" in err and "Traceback" not in err and str(ds.PatientID) not in err
    assert log.read(folder)[-1]["stored"] == 1
    assert [found.size > 100 for found in spool.found(folder / "spool", KEY)] == [True]


def agent(*words):
    return [sys.executable, "-m", "fedscan.cli", "agent", *map(str, words)]


def test_a_rotation_waits_for_nobody_who_listens(site):
    allow = [{"ae_title": "PACS", "address": "127.0.0.1"}]
    folder = site(routed={"kind": "dimse-store", "listen_address": "127.0.0.1", "listen_port": 0, "allow": allow})
    entry = cache.Entry("2.25.1", "", "ill", "", "", None, {}, "")  # without a cache there is nothing to rotate
    cache.write_patient(folder / "cache", keys.load(folder, keys.Settings()), "a" * 32, [(entry, np.zeros(3))])
    with subprocess.Popen(agent("listen", folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as it:
        try:
            assert it.stderr is not None and "listens on" in it.stderr.readline()
            refused = subprocess.run(agent("key", "rotate", folder), capture_output=True, text=True)
            assert refused.returncode == 2 and "in use" in refused.stderr and "agent listen" in refused.stderr
            assert keys.load(folder, keys.Settings()).wrapping == KEY and not (folder / "key.next").exists()
            it.send_signal(signal.SIGTERM)
            assert it.wait(10) == 0
        finally:
            it.kill()
    assert subprocess.run(agent("key", "rotate", folder), capture_output=True).returncode == 0
    assert keys.load(folder, keys.Settings()).wrapping != KEY


def test_nobody_pulls_or_listens_while_a_rotation_is_at_work(site, pacs):
    allow = [{"ae_title": "PACS", "address": "127.0.0.1"}]
    store = {"kind": "dimse-store", "listen_address": "127.0.0.1", "listen_port": 0, "allow": allow}
    folder = site(archive=WEB, routed=store)
    with key_use.alone(folder):
        refused = subprocess.run(agent("pull", folder), capture_output=True, text=True)
        assert refused.returncode == 2 and "rotation of the site's key is at work" in refused.stderr
        with pytest.raises(SiteKeyError, match="at work"):
            run("listen", folder)
    assert not (folder / "spool").exists()
    assert run("pull", folder) == 0


@pytest.fixture
def hospital_file(tmp_path: Path) -> Path:
    from fedscan.phantom import draw_hospital

    draw_hospital(tmp_path / "hospital", name="Canary General", patients=8, seed=5)
    return min(path for path in (tmp_path / "hospital/dicom").rglob("*") if path.is_file())
