"""`fedscan agent audit ...`: what hospital IT types, and what it says about what left and about the log itself."""

import argparse
import json
import shutil
import sys
import types
import zipfile

import pytest

from fedscan import cli_audit_log
from fedscan_client.audit import log
from fedscan_core import auditlog
from fedscan_core.errors import ConfigError, FolderError, RecordDamaged

SITE = """
name = "north"
patients_declared = 9
[source]
kind = "folder"
folder = "pacs"
[policy]
max_epsilon = 1.0
max_delta = 1e-5
"""


@pytest.fixture
def run(capsys):
    parser = argparse.ArgumentParser()
    cli_audit_log.add(parser.add_subparsers(required=True))

    def typed(*words, code=0):
        arguments = parser.parse_args(["audit", *map(str, words)])
        assert arguments.command(arguments) == code
        return capsys.readouterr().out

    return typed


def release(run_id, round_, size=100, what="update", epsilon=2.5):
    told = {"run_id": run_id, "round": round_, "what": what, "bytes": size, "sha256": "ab" * 32}
    return "release", {**told, "epsilon_of_run": epsilon, "delta_of_run": 1e-5}


def answer(status, reason=""):
    return "answer", {"kind": "train", "run_id": "a", "round": 1, "status": status, "reason": reason}


@pytest.fixture
def site(tmp_path):
    """A site that answered: two rounds of one run, one of them twice, an evaluation, a plan, a failure, a refusal."""
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "site.toml").write_text(SITE)
    log.append_all(folder, [answer("ok")])
    for round_ in (1, 2, 2):
        log.append_all(folder, [release("study-a", round_), answer("ok")])
    log.append_all(folder, [release("study-a", 0, 8, "histogram"), answer("ok")])
    log.append_all(folder, [release("bare", 1, 40, epsilon=float("inf")), answer("ok")])
    log.append_all(folder, [answer("failed")])
    log.append_all(folder, [answer("refused", "only with privacy")])
    return folder


def test_every_command_teaches(run, capsys):
    for words in ([], ["verify"], ["show"], ["export"], ["syslog"]):
        with pytest.raises(SystemExit):
            run(*words, "--help")
        text = capsys.readouterr().out
        assert len(text.splitlines()) >= 8 and max(map(len, text.splitlines())) <= 122


def test_what_left_my_site_is_one_screen(site, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = run("show", site, "--released")
    row = next(line for line in text.splitlines() if "study-a" in line and "update" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][:6] == ["study-a", "update", "2", "3", "300", "2.500"]
    assert "histogram" in text and "no privacy" in text and "348 bytes in all" in text
    assert "1 failed, 1 refused, 1 public plan(s)" in text
    for number in range(40):
        log.append_all(site, [release(f"run-{number}", 1), answer("ok")])
    text = run("show", site / "site.toml", "--released")
    assert len(text.splitlines()) <= 24 and "28 earlier" in text and "run-39" in text and "4,348 bytes" in text


def test_what_left_as_json(site, run):
    told = json.loads(run("show", site, "--released", "--json"))
    first = told["released"][0]
    assert (first["run_id"], first["rounds"], first["times"], first["bytes"]) == ("study-a", 2, 3, 300)
    assert told["answers"] == {"failed": 1, "ok": 6, "refused": 1} and told["bytes"] == 348


def test_nothing_has_left_a_new_site(tmp_path, run):
    (tmp_path / "site.toml").write_text(SITE)
    assert "No update and no histogram has left" in run("show", tmp_path, "--released")
    assert "No such record" in run("show", tmp_path)
    assert not (tmp_path / "audit").exists()


def test_what_an_earlier_version_wrote_down_is_shown_too(tmp_path, run):
    old = {"run_id": "ancient", "round": 1, "what": "update", "bytes": 7, "sha256": "00"}
    auditlog.append(tmp_path / "released.jsonl", old)
    log.append_all(tmp_path, [release("new", 1), answer("ok")])
    told = json.loads(run("show", tmp_path, "--released", "--json"))
    assert [(it["run_id"], it["bytes"], it["epsilon"]) for it in told["released"]] == [
        ("ancient", 7, None),
        ("new", 100, 2.5),
    ]
    assert "before this log began" in run("show", tmp_path, "--released")


def test_records_are_shown_newest_last_and_can_be_chosen(site, run):
    lines = run("show", site).splitlines()
    assert "begin" in lines[0] and "refused" in lines[-1] and "only with privacy" in lines[-1] and len(lines) == 14
    assert len(run("show", site, "--last", "3").splitlines()) == 3
    assert len(run("show", site, "--event", "release", "--run", "study", "--last", "0").splitlines()) == 4
    found = json.loads(run("show", site, "--event", "release", "--run", "bare", "--json"))
    assert [record["epsilon_of_run"] for record in found] == ["inf"]


def test_verify_says_what_it_could_find_and_what_not(site, run):
    text = run("verify", site)
    assert "14 records" in text and "no anchors were compared" in text
    kept = site.parent / "anchors.txt"
    kept.write_text(f"2026 {log.anchor(site)} end\n")
    log.append(site, "stop")
    text = run("verify", site, "--anchors", kept)
    assert "nothing up to record 14 was lost; 1 newer record(s)" in text
    told = json.loads(run("verify", site, "--anchors", kept, "--json"))
    assert told["whole"] and told["anchored"] == 14 and told["records"] == 15


def test_verify_ends_with_1_where_the_log_was_changed_or_cut(site, run):
    kept = site.parent / "anchors.txt"
    kept.write_text(log.anchor(site))
    (path,) = log.files(site / "audit")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"study-a", b"study-b", 1))
    assert "✗" in (text := run("verify", site, code=1)) and "line 3: it was edited" in text and "✓" not in text
    with pytest.raises(RecordDamaged, match="audit verify"):
        run("show", site, "--released")
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    run("verify", site, code=0)
    text = run("verify", site, "--anchors", kept, code=1)
    assert "The log never had the anchor" in text and "was cut" in text


def test_an_enrolled_site_asks_its_coordinator(site, run, monkeypatch):
    (site / "connection.toml").write_text("")
    asked, kept = [], [{"utc": "", "run_id": "a", "round": 1, "anchor": log.anchor(site)}]

    def anchors(folder):
        asked.append(folder)
        return kept

    door = types.ModuleType("fedscan_client.door")
    monkeypatch.setattr(door, "anchors", anchors, raising=False)
    monkeypatch.setitem(sys.modules, "fedscan_client.door", door)
    monkeypatch.setattr(sys.modules["fedscan_client"], "door", door, raising=False)
    assert "1 anchors agree" in run("verify", site) and asked == [site]
    kept.append({"utc": "", "run_id": "a", "round": 2, "anchor": "0" * 64})
    assert "0" * 12 in run("verify", site, code=1)
    kept.clear()
    assert "the coordinator kept none yet" in run("verify", site)
    assert "no anchors were compared" in run("verify", site, "--offline") and len(asked) == 3


def test_an_export_is_noted_and_can_be_verified_by_itself(site, run, tmp_path):
    auditlog.append(site / "released.jsonl", {"n": 1})  # after the log began: not part of its first record
    out = tmp_path / "out.zip"
    assert "15 records" in run("export", site, out, "--with-key") and out.stat().st_mode & 0o777 == 0o600
    assert log.read(site)[-1]["what"] == "export of the audit log"
    with zipfile.ZipFile(out) as archive:
        assert json.loads(archive.read("report.json"))["whole"] is True
        archive.extractall(tmp_path / "copy")
    (tmp_path / "copy/audit/key").chmod(0o600)
    assert "15 records" in run("verify", tmp_path / "copy")
    with pytest.raises(FolderError, match="exists already"):
        run("export", site, out)
    assert len(log.read(site)) == 15  # nothing was exported, and nothing noted


def test_an_export_without_the_key_has_none_and_a_changed_log_is_exported_as_it_is(site, run, tmp_path):
    (path,) = log.files(site / "audit")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"refused", b"reFused"))
    assert "✗" in run("export", site, tmp_path / "out.zip", code=1)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert sorted(archive.namelist()) == ["audit/log-000001.jsonl", "report.json"]
        assert archive.read("audit/log-000001.jsonl") == path.read_bytes()
        assert json.loads(archive.read("report.json"))["whole"] is False
    with pytest.raises(FolderError, match="cannot be written"):
        run("export", site, tmp_path / "none" / "out.zip")


def test_what_is_no_site_is_said_so(tmp_path, run, site):
    for words in (("verify",), ("show",)):
        with pytest.raises(FolderError, match="no site's folder"):
            run(words[0], tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="names no log collector"):
        run("syslog", site)
    with pytest.raises(ConfigError, match="--anchors"):
        run("verify", site, "--anchors", tmp_path / "none")
    shutil.rmtree(site / "audit")
    with pytest.raises(FolderError, match="no audit log yet"):
        run("export", site, tmp_path / "out.zip")


def test_syslog_says_what_is_wrong_with_the_collector(site, run):
    (site / "site.toml").write_text(SITE + '[audit]\nsyslog = "127.0.0.1:9"\n')
    with pytest.raises(FolderError, match="cannot be reached"):
        run("syslog", site)
