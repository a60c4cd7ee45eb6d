"""`fedscan agent quarantine`: nothing is decided by accident, pictures are seen and not stored, JSON is only JSON."""

import argparse
import io
import json
import tomllib

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from rich.console import Console

from fedscan import cli_quarantine, quarantine_view
from fedscan_client import keys
from fedscan_client.audit import log
from fedscan_client.intake import preview_server, quarantine
from fedscan_client.intake.quarantine import Found
from fedscan_client.intake.rules import QuarantineSettings, blackout_for
from fedscan_client.intake.traits import traits
from fedscan_core.errors import ConfigError, DataError

KEY = b"k" * 32
WORDS = ("--by", "A. Meier", "--why", "seen all frames")
SITE = """\
name = "north"
patients_declared = 20
[source]
kind = "folder"
folder = "../pacs"
[policy]
max_epsilon = 8.0
max_delta = 1e-5
"""


def cr(path, uid, maker="GE MEDICAL SYSTEMS"):
    """Writes a CR image with burned-in text, 4 x 6 pixels; returns it."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", uid
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "CR", maker, "Sono 9"
    ds.PatientName, ds.BurnedInAnnotation = "Canary^Carla", "YES"
    ds.Rows, ds.Columns = 4, 6
    ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.add_new("PixelData", "OW", (np.arange(24, dtype="<u2") * 178).tobytes())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = UID(ds.SOPClassUID)
    ds.file_meta.MediaStorageSOPInstanceUID = UID(uid)
    ds.save_as(path, enforce_file_format=True)
    return ds


@pytest.fixture
def site(tmp_path):
    """A site with two images of one series that wait, and a damaged one."""
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "site.toml").write_text(SITE)
    keys.put(folder, keys.Settings(), keys.SiteKey(bytes(32), KEY), "test")
    pacs = tmp_path / "pacs"
    pacs.mkdir()
    found = []
    for number in (1, 2):
        path = pacs / f"Canary^Carla-{number}.dcm"
        ds = cr(path, f"1.2.3.{number}")
        found.append(Found("burned_in", "p", "s", f"i{number}", f"source\n{path.name}", "d", traits(ds, KEY)))
    found.append(Found("not_dicom", "", "", "i3", "source\nCanary.txt"))
    quarantine.put(folder, KEY, found)
    return folder


@pytest.fixture
def run(site, capsys, monkeypatch):
    """Runs one command; returns what it printed on standard output."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words, folder=site):
        parser = argparse.ArgumentParser()
        cli_quarantine.add(parser.add_subparsers())
        arguments = parser.parse_args(["quarantine", words[0], str(folder), *words[1:]])
        assert arguments.command(arguments) == 0
        return capsys.readouterr().out

    return call


def ids(site):
    by_reason = {item.reason: item.id for item in quarantine.items(site)}
    return by_reason["burned_in"], by_reason["not_dicom"]


def asked(site):
    states = quarantine.states(site, "s")
    return [states[f"i{number}"].let_in("d") for number in (1, 2)]


def decisions(site):
    return [row for row in log.read(site) if row["event"] == "quarantine"]


def test_list(site, run):
    id, damaged = ids(site)
    text = run("list")
    assert id in text and damaged in text and "GE CR" in text and "Canary" not in text
    told = json.loads(run("list", "--json", "--reason", "burned_in"))["items"]
    assert [(it["id"], it["instances"], it["state"], it["releasable"]) for it in told] == [(id, 2, "waiting", True)]
    assert "release" in told[0]["what_to_do"]
    with pytest.raises(ConfigError, match="is no reason"):
        run("list", "--reason", "Canary")


def test_release_is_a_dry_run_first(site, run):
    id, _ = ids(site)
    said = run("release", id, *WORDS)
    assert "2 instances of Computed Radiography Image Storage, GE CR, 4 x 6: would be let in as they are" in said
    assert "Nothing was changed" in said and asked(site) == [None, None]
    assert decisions(site) == []
    with pytest.raises(DataError, match="needs a name"):
        run("release", id, "--yes")
    assert "next ingest" in run("release", id[:4], *WORDS, "--yes")
    assert asked(site) == [(), ()] and len(decisions(site)) == 1
    assert id not in run("list") and "released by A. Meier" in run("list", "--all")
    assert "seen all frames" in run("show", id)


def test_blackout(site, run):
    id, _ = ids(site)
    with pytest.raises(ConfigError, match="at least one rectangle"):
        run("blackout", id)
    with pytest.raises(ConfigError, match="four whole numbers"):
        run("blackout", id, "--rect", "1,2,3")
    with pytest.raises(DataError, match="is not inside 4 rows x 6 columns"):
        run("blackout", id, "--rect", "0,0,5,6")
    assert "would be let in with 1 rectangle" in run("blackout", id, "--rect", "0,0,2,6", "--preview")
    told = json.loads(run("blackout", id, "--rect", "0,0,2,6", *WORDS, "--yes", "--json"))
    assert told["done"] and told["rectangles"] == [{"top": 0, "left": 0, "bottom": 2, "right": 6}]
    assert asked(site) == [quarantine.get(site, id).rectangles] * 2
    assert "Last decision: blackout, by A. Meier" in run("release", id)
    assert "kept out" in run("reject", id, *WORDS, "--yes") and asked(site) == [None, None]


@pytest.mark.parametrize("words", [("release",), ("blackout", "--rect", "0,0,1,1"), ("release", "--as-rule")])
def test_nobody_lets_in_a_damaged_file(site, run, words):
    _, damaged = ids(site)
    with pytest.raises(DataError, match="cannot be let in by anybody"):
        run(words[0], damaged, *words[1:], *WORDS, *(() if "--as-rule" in words else ("--yes",)))
    assert "no image that can be used" in run("show", damaged)
    run("reject", damaged, *WORDS, "--yes")
    assert damaged not in run("list")


def test_the_rule_that_is_printed_is_one_and_matches(site, run, tmp_path):
    id, _ = ids(site)
    text = run("blackout", id, "--rect", "0,0,2,6", "--as-rule", *WORDS)
    settings = QuarantineSettings.model_validate(tomllib.loads(text)["quarantine"])
    ds = pydicom.dcmread(tmp_path / "pacs" / "Canary^Carla-1.dcm")
    assert blackout_for(ds, settings.rule) == settings.rule[0].rectangles != ()
    assert "Canary" not in text and asked(site) == [None, None]
    assert json.loads(run("blackout", id, "--rect", "0,0,2,6", "--as-rule", "--json"))["rows"] == 4
    assert "clean = true" in run("release", id, "--as-rule")


def test_a_rule_that_would_be_too_wide_is_not_printed(site, run, tmp_path):
    cr(tmp_path / "pacs" / "Canary^Carla-1.dcm", "1.2.3.1", maker="")
    with pytest.raises(DataError, match=r"No rule can be made of it: rule .* is too wide"):
        run("release", ids(site)[0], "--as-rule")


def look(site, run, monkeypatch, *words, terminal=True):
    """What a terminal of 100 columns shows."""
    file = io.StringIO()
    screen = Console(
        file=file, force_terminal=terminal, color_system="truecolor", width=100, height=40, highlight=False
    )
    monkeypatch.setattr(cli_quarantine, "Console", lambda **_: screen)
    run(*words)
    return file.getvalue()


def test_show_prints_before_and_after(site, run, monkeypatch):
    id, _ = ids(site)
    text = look(site, run, monkeypatch, "show", id)
    assert text.count("▀") == 2 * 6 and "Instance 2 of 2, frame 1 of 1, as it is." in text
    text = look(site, run, monkeypatch, "show", id, "--rect", "0,0,2,6", "--instance", "1")
    assert text.count("▀") == 2 * 2 * 6 and "Instance 1 of 2, frame 1 of 1, before and after." in text
    first = next(line for line in text.splitlines() if "▀" in line)
    assert first.count("38;2;0;0;0;48;2;0;0;0m▀") == 6  # the top two rows, black
    assert "this is not a terminal" in look(site, run, monkeypatch, "show", id, terminal=False)
    for wrong in (("--instance", "3"), ("--frame", "2"), ("--frame", "0")):
        with pytest.raises(ConfigError, match="There is no"):
            look(site, run, monkeypatch, "show", id, *wrong)


def test_show_in_a_browser(site, run, monkeypatch):
    served = []

    def serve(shown, ready):
        ready("http://127.0.0.1:1/token/")
        served.append(shown)
        assert shown.load(0).frames.shape == (1, 4, 6)

    monkeypatch.setattr(preview_server, "serve", serve)
    said = run("show", ids(site)[0], "--browser", "--rect", "0,0,2,6")
    assert "Open http://127.0.0.1:1/token/" in said
    (shown,) = served
    assert (shown.instances, shown.instance, shown.frame, len(shown.rectangles)) == (2, 1, 0, 1)
    assert "Canary" not in shown.title and "2 instances" in shown.title


def test_looking_writes_nothing_but_that_somebody_looked(site, run, monkeypatch):
    def state():
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in site.rglob("*")
            if path.is_file() and path.suffix != ".sqlite-shm" and path.parent.name != "audit"
        }

    id, _ = ids(site)
    before = state()
    look(site, run, monkeypatch, "show", id)
    look(site, run, monkeypatch, "blackout", id, "--rect", "0,0,2,6", "--preview")
    look(site, run, monkeypatch, "list")
    looks = [record for record in log.read(site) if record["event"] == "access"]
    assert [record["item"] for record in looks] == [id, id] and all(record["user"] for record in looks)
    # SQLite's own two files may come and go; nothing else, and nothing in it changed.
    assert {path: it for path, it in state().items() if path.stat().st_size} == {
        path: it for path, it in before.items() if it[0]
    }


def test_json_is_only_json(site, run):
    id, damaged = ids(site)
    for words in (("list",), ("show", id), ("show", damaged), ("release", id), ("reject", damaged)):
        assert isinstance(json.loads(run(*words, "--json")), dict)
    assert isinstance(json.loads(run("blackout", id, "--rect", "0,0,1,1", "--preview", "--json")), dict)


def test_an_empty_quarantine_and_a_wrong_id(tmp_path, run):
    (tmp_path / "site.toml").write_text(SITE)
    assert run("list", folder=tmp_path) == "Nothing waits.\n"
    assert json.loads(run("list", "--json", "--all", folder=tmp_path)) == {"items": []}
    with pytest.raises(DataError, match="no item of that id"):
        run("show", "abcd", folder=tmp_path)


def test_help_teaches(capsys):
    for words in ((), ("list",), ("show",), ("release",), ("blackout",), ("reject",)):
        parser = argparse.ArgumentParser()
        cli_quarantine.add(parser.add_subparsers())
        with pytest.raises(SystemExit):
            parser.parse_args(["quarantine", *words, "--help"])
        assert len(capsys.readouterr().out) > 300


def test_sizes_are_words():
    item = quarantine.Item("a", "kind", "", "", "X", "US", "GE", "", 0, 0, 0, 1, 1, "2026-01-15", "", (), "", "")
    assert quarantine_view.many(item) == "1 instance of X, GE US, unknown"
