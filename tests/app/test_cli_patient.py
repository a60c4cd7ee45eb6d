"""`fedscan agent patient` and `fedscan agent consent`: dry by default, quiet about numbers, JSON only where asked."""

import argparse
import io
import json
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest

from fedscan import cli_patient
from fedscan_client import eligible, keys, site
from fedscan_client.consent import Settings
from fedscan_client.intake import cache
from fedscan_client.intake.deid import patient_name
from fedscan_client.intake.records import PatientId, Volume
from fedscan_client.intake.sources.settings import Folder
from fedscan_client.site import Site
from fedscan_core.errors import ConfigError, ConsentError, FedscanError, FolderError
from fedscan_core.policy import Policy

KEY = keys.SiteKey(bytes(range(32)), bytes(range(32, 64)))
NUMBER = "SECRET-0815"
NAME = patient_name(KEY.project("fedscan"), PatientId(NUMBER))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site's folder with one patient; the register lies beside it."""
    home = tmp_path / "site"
    day = (date.today() - timedelta(days=3)).isoformat()
    rows = f"# as-of: {day}\npatient_id,status,date\n{NUMBER},permit,2025-01-01\nSECRET-4711,deny,2025-01-01\n"
    (tmp_path / "register.csv").write_text(rows)
    settings = Settings(kind="register", path=tmp_path / "register.csv", contact="Ask Dr. Who")
    source = {"source": Folder(kind="folder", folder=tmp_path / "pacs")}
    here = Site(name="north", patients_declared=9, source=source, policy=Policy(8, 1e-5), consent=settings, folder=home)
    site.save(here)
    keys.put(home, here.key, KEY, "test")
    entry = cache.Entry("0", "s", "ill", "", "", None, {}, "")
    cache.write_patient(here.cache, KEY, NAME, [(entry, Volume(np.zeros((1, 2, 2), np.uint8), "CR"))])
    eligible.record(home, "run-1", "scatter", [NAME])
    return home


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli_patient.add(parser.add_subparsers())
    arguments = parser.parse_args(words)
    code: int = arguments.command(arguments)
    return code


def test_show_as_text_json_and_letter(folder, tmp_path, capsys):
    assert call("patient", "show", str(folder), NUMBER) == 0
    out = capsys.readouterr().out
    for words in (NAME, "Consent: yes", "given 2025-01-01", "run-1", "scatter", "no privacy"):
        assert words in out
    target = tmp_path / "letter.html"
    assert call("patient", "show", str(folder), NUMBER, "--json", "--letter", str(target)) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 1 and not printed.err and NUMBER not in printed.out
    assert NUMBER in target.read_text() and "Ask Dr. Who" in target.read_text() and target.stat().st_mode & 0o77 == 0
    (tmp_path / "link").symlink_to(folder)
    for inside in (folder / "letter.html", tmp_path / "link" / "letter.html"):
        with pytest.raises(FolderError):
            call("patient", "show", str(folder), NUMBER, "--letter", str(inside))
    with pytest.raises(FolderError):
        call("patient", "show", str(folder), NUMBER, "--letter", str(tmp_path / "register.csv" / "x"))


def test_the_number_may_come_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f" {NUMBER} \r\nmore\n"))
    assert call("patient", "show", str(folder), "-", "--json") == 0
    assert json.loads(capsys.readouterr().out)["patient"] == NAME
    assert call("patient", "show", str(folder), NUMBER, "--issuer", "NORTH", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 0
    for empty in ("", "\n", "\ufffd"):
        monkeypatch.setattr("sys.stdin", io.StringIO(empty))
        with pytest.raises(ConfigError):
            call("patient", "show", str(folder), "-")


def test_withdraw_is_dry_by_default(folder, capsys):
    assert call("patient", "withdraw", str(folder), NUMBER) == 0
    assert "nothing was changed yet" in capsys.readouterr().out and cache.patients(folder / "cache") == [NAME]
    assert call("patient", "withdraw", str(folder), NUMBER[1:]) == 0
    assert "Nothing is held under this number" in capsys.readouterr().out
    assert call("patient", "withdraw", str(folder), NUMBER, "--yes") == 0
    out = capsys.readouterr().out
    assert "destroyed: key and files in the cache: 1" in out and "eligible for run run-1 (model scatter)" in out
    assert cache.patients(folder / "cache") == []
    assert call("patient", "withdraw", str(folder), NUMBER, "--json") == 0
    assert json.loads(capsys.readouterr().out)["done"] is False
    assert call("patient", "show", str(folder), NUMBER) == 0
    out = capsys.readouterr().out
    assert (
        "Consent: no, the patient withdrew here" in out
        and "Withdrew on" in out
        and "No images are held in the cohort." in out
    )


def test_consent_check(folder, tmp_path, capsys):
    assert call("consent", "check", str(folder)) == 0
    out = capsys.readouterr().out
    assert "3 of at most 30 days old" in out and "the patient does not permit it" in out and "SECRET" not in out
    assert call("consent", "check", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["reasons"] == {"denied": 1, "permit": 1}
    (tmp_path / "register.csv").write_text(f"{NUMBER},permit,2025-01-01\n")
    with pytest.raises(ConsentError) as caught:
        call("consent", "check", str(folder))
    assert NUMBER not in str(caught.value)


def test_nothing_is_left_in_the_folder_and_no_error_names_the_patient(folder, tmp_path, capsys):
    words = (
        ("show",),
        ("show", "--json"),
        ("show", "--letter", str(tmp_path / "l.html")),
        ("withdraw",),
        ("withdraw", "--yes"),
    )
    for command, *options in words:
        call("patient", command, str(folder), NUMBER, *options)
    call("consent", "check", str(folder))
    assert NUMBER not in capsys.readouterr().out
    kept = [path for path in folder.rglob("*") if path.is_file()]
    assert len(kept) >= 4 and not [path for path in kept if b"SECRET" in path.read_bytes() or "SECRET" in path.name]
    (folder / "key").unlink()
    for command in ("show", "withdraw"):
        with pytest.raises(FedscanError) as caught:
            call("patient", command, str(folder), NUMBER)
        assert NUMBER not in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize("words", [("patient", "show"), ("patient", "withdraw"), ("consent", "check")])
def test_help_teaches(words, capsys):
    with pytest.raises(SystemExit):
        call(*words, "--help")
    assert "  fedscan agent" in capsys.readouterr().out
