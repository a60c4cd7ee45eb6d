"""`fedscan agent key ...`: what hospital IT types, and what it says."""

import argparse
import getpass
import json
import os
import sys

import numpy as np
import pytest

from fedscan import cli_key
from fedscan_client import key_backup, keys
from fedscan_client.audit import log
from fedscan_client.intake import cache
from fedscan_client.intake.sources.settings import Folder
from fedscan_client.site import Site, save
from fedscan_core.errors import ConfigError, FolderError, SiteKeyError
from fedscan_core.policy import Policy

WORDS = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(key_backup, "LOG_N", 4)
    monkeypatch.delenv("FEDSCAN_KEY_PASSPHRASE", raising=False)
    monkeypatch.delenv("FEDSCAN_SITE_KEY", raising=False)


@pytest.fixture
def run(capsys):
    parser = argparse.ArgumentParser()
    cli_key.add(parser.add_subparsers(required=True))

    def typed(*words):
        arguments = parser.parse_args(["key", *map(str, words)])
        code = arguments.command(arguments)
        out = capsys.readouterr().out
        assert code == 0
        return out

    return typed


@pytest.fixture
def site(tmp_path):
    """A site with a key and two cached patients."""
    here = Site(
        name="north",
        patients_declared=20,
        source={"source": Folder(kind="folder", folder=tmp_path / "pacs")},
        policy=Policy(max_epsilon=1.0, max_delta=1e-5),
        folder=tmp_path / "north",
    )
    save(here)
    key = keys.create(here.folder, here.key)
    for pid in ("a" * 32, "b" * 32):
        entry = cache.Entry("2.25.1", "", "ill", "", "", None, {}, "")
        cache.write_patient(here.cache, key, pid, [(entry, np.zeros(3))])
    return here


def test_every_command_teaches(run, capsys):
    for words in ([], *([name] for name in ("create", "show", "rotate", "backup", "restore"))):
        with pytest.raises(SystemExit):
            run(*words, "--help")
        text = capsys.readouterr().out
        assert len(text.splitlines()) >= 8 and max(map(len, text.splitlines())) <= 122


def test_a_life_of_a_key(run, tmp_path, monkeypatch):
    site, safe = tmp_path / "new", tmp_path / "safe.txt"
    out = run("create", site)
    key = keys.load(site, keys.Settings())
    assert key.key_id in out and "backup" in out and keys.text_of(key) not in out
    with pytest.raises(SiteKeyError, match="already"):
        run("create", site)
    monkeypatch.setenv("FEDSCAN_KEY_PASSPHRASE", WORDS)
    assert key.key_id in run("backup", site, safe)
    assert key.key_id in run("restore", site, safe, "--check")
    (site / "key").unlink()
    assert key.key_id in run("restore", site, safe)
    assert keys.load(site, keys.Settings()) == key
    events = [line["did"] for line in log.read(site) if line["event"] == "key"]
    assert events == ["key created", "key backed up", "key restored"]


def test_show(run, site):
    key = keys.load(site.folder, site.key)
    out = run("show", site.folder)
    assert key.key_id in out and "2 cached patients" in out
    told = json.loads(run("show", site.folder, "--json"))
    assert told["key"] == key.key_id and told["patients"] == 2 and told["rotation_unfinished"] is False


def test_rotate_after_a_dry_run(run, site, monkeypatch):
    old = keys.load(site.folder, site.key)
    files = {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()}
    assert "2 of 2 patients" in run("rotate", site.folder, "--dry-run")
    assert files == {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()}
    (site.folder / "site.toml").rename(site.folder / "aside")
    with pytest.raises(ConfigError):  # or a cache elsewhere would be lost
        run("rotate", site.folder)
    (site.folder / "aside").rename(site.folder / "site.toml")
    with monkeypatch.context() as patch:
        patch.setattr(keys, "replace_by_staged", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("rotate", site.folder)
    assert "unfinished" in run("show", site.folder) and "go on" in run("rotate", site.folder, "--dry-run")
    assert "new backup" in run("rotate", site.folder)
    new = keys.load(site.folder, site.key)
    assert new.names == old.names and new.wrapping != old.wrapping
    assert len(cache.read_index(site.cache, new, "a" * 32).entries) == 1


def test_rotate_and_create_with_an_environment_variable(run, tmp_path, monkeypatch):
    (tmp_path / "site.toml").write_text('[key]\nsource = "environment"\n')
    monkeypatch.setattr(cli_key, "_cache_of", lambda site, needed=False: None)
    assert "key.environment" in run("create", tmp_path)
    monkeypatch.setenv("FEDSCAN_SITE_KEY", (tmp_path / "key.environment").read_text().splitlines()[1].split("=", 1)[1])
    assert "key.next" in run("rotate", tmp_path)
    monkeypatch.setenv("FEDSCAN_SITE_KEY", (tmp_path / "key.next").read_text().splitlines()[1])
    assert "is now" in run("rotate", tmp_path)


def test_the_passphrase_is_asked_for_twice_or_comes_through_a_descriptor(run, site, tmp_path, monkeypatch):
    answers: list[str] = []
    monkeypatch.setattr(getpass, "getpass", lambda prompt: answers.pop(0))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    answers[:] = [WORDS, WORDS + "!"]
    with pytest.raises(ConfigError, match="not the same"):
        run("backup", site.folder, tmp_path / "b.txt")
    assert not (tmp_path / "b.txt").exists()
    answers[:] = [WORDS, WORDS]
    run("backup", site.folder, tmp_path / "b.txt")
    with pytest.raises(FolderError, match="left alone"):  # before anything is asked
        run("backup", site.folder, tmp_path / "b.txt")
    for text, fits in ((WORDS + "\n", True), ("another one\n", False)):
        read, write = os.pipe()
        os.write(write, text.encode())
        os.close(write)
        if fits:
            assert "belongs to it" in run(
                "restore", site.folder, tmp_path / "b.txt", "--check", "--passphrase-fd", read
            )
        else:
            with pytest.raises(SiteKeyError, match="does not open"):
                run("restore", site.folder, tmp_path / "b.txt", "--check", "--passphrase-fd", read)
    with pytest.raises(ConfigError, match="descriptor 999"):
        run("restore", site.folder, tmp_path / "b.txt", "--passphrase-fd", 999)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(ConfigError, match="no terminal"):
        run("restore", site.folder, tmp_path / "b.txt")
