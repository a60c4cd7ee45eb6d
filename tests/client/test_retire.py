"""Retiring: what protects patients is gone for ever, the ledger and the log are kept; stopped anywhere, it goes on."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from fedscan_client import connection as connections
from fedscan_client import door, enrol, key_use, keys, retire, site
from fedscan_client.audit import log, verify
from fedscan_client.dp import ledger
from fedscan_client.intake import cache
from fedscan_client.node import start
from fedscan_core.errors import FolderError, RecordDamaged, SiteKeyError


@pytest.fixture(autouse=True)
def _let_go(monkeypatch):
    """The lock lives as long as the process, which here goes on: each test has a ledger of its own."""
    from fedscan_client.dp import ledger_lock

    monkeypatch.setattr(ledger_lock, "_held", {})


@pytest.fixture
def north(fake, tmp_path):
    folder = tmp_path / "north"
    here = enrol.enrol(fake.invitation(tmp_path / "INVITE.toml"), folder).site
    ledger.open_ledger(here.book, ledger.Budget(8.0, 1e-5), 20, "sum")
    key = keys.load(folder, here.key)
    entry = cache.Entry("2.25.1", "", "ill", "", "", None, {}, "")
    cache.write_patient(here.cache, key, "a" * 32, [(entry, np.zeros(3))])
    (folder / "outbox/run").mkdir(parents=True)
    for name in (
        "outbox/run/1-update.safetensors",
        "eligible.sqlite",
        "eligible.sqlite-wal",
        "site.log",
        ".key.next.x.part",
    ):
        (folder / name).write_text("depends on patients")
    (folder / "agent").mkdir()
    (folder / "agent/executor.log").write_text("depends on patients")
    (folder / "withdrawals.jsonl").write_text("")
    return folder


GONE = (
    "node.key",
    "key",
    ".key.next.x.part",
    "cache",
    "outbox",
    "eligible.sqlite",
    "eligible.sqlite-wal",
    "site.log",
    "agent",
)


def test_a_dry_run_changes_nothing(north):
    before = {path: path.read_bytes() for path in north.rglob("*") if path.is_file()}
    todo = retire.plan(north)
    assert {path.name for path in todo.destroyed} >= set(GONE) and north / "ledger.sqlite" in todo.kept
    assert before == {path: path.read_bytes() for path in north.rglob("*") if path.is_file()}


def test_what_goes_and_what_stays(north, fake, tmp_path, leaks):
    secret = (north / "key").read_bytes().strip().rpartition(b":")[2]
    node = (north / connections.NODE_KEY).read_bytes().splitlines()[-3]
    out = tmp_path / "records/north.tar.gz"
    done = retire.retire(north, out)
    assert done.not_told == "" and fake.revoked == {"north"}
    for name in (*GONE, connections.CA_FILE, connections.FILE):
        assert not (north / name).exists(), name
    assert not leaks(north, [secret, node, b"depends on patients"])
    assert ledger.summary(site.load(north).book)["rows"] == 1 and verify.verify(north).whole
    assert log.read(north)[-1]["event"] == "retire"
    assert not out.stat().st_mode & 0o077
    with tarfile.open(out) as archive:
        names = set(archive.getnames())
        (report,) = [json.load(archive.extractfile("north/ledger.json") or io.BytesIO())]
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert report["rows"] == 1
    assert {"north/ledger.sqlite", "north/ledger.counter", "north/site.toml", "north/withdrawals.jsonl"} < names
    assert any("audit/log-000001.jsonl" in name for name in names) and not any(name.endswith("key") for name in names)
    unpacked = tmp_path / "unpacked/north"
    shutil.copy(north / "audit/key", unpacked / "audit/key")  # the hospital's own
    assert verify.verify(unpacked).whole and ledger.summary(site.load(unpacked).book)["rows"] == 1
    again = retire.retire(north, out)
    assert [path.name for path in again.destroyed] == [start.FOLDER]  # its lock
    assert [it["event"] for it in log.read(north)].count("retire") == 1


@pytest.mark.slow
def test_stopped_at_every_moment(north, fake, tmp_path, at_every_write):
    copy = tmp_path / "copy"
    shutil.copytree(north, copy)
    for _ in at_every_write(lambda: retire.retire(north)):
        if (north / "retired").exists() and not (north / "node.key").exists():
            assert (north / retire.EXPORT).exists() and fake.revoked
        retire.retire(north)
        for name in GONE:
            assert not (north / name).exists(), name
        assert verify.verify(north).whole and ledger.summary(site.load(north).book)["rows"] == 1
        shutil.rmtree(north)
        shutil.copytree(copy, north)
        fake.revoked.clear()
        from fedscan_client.dp import ledger_lock

        ledger_lock._held.clear()


def test_a_coordinator_that_is_gone_does_not_keep_a_hospital(north, fake, monkeypatch):
    def gone(folder):
        raise door.DoorError("nobody there", remedy="ask", kind="unreachable")

    monkeypatch.setattr(door, "retire", gone)
    assert "nobody there" in retire.retire(north).not_told
    assert not (north / "key").exists() and not (north / "cache").exists()


def test_nothing_is_destroyed_where_it_cannot_be_recorded(north, tmp_path):
    (tmp_path / "full").write_text("")
    with pytest.raises(FolderError, match="Nothing was destroyed"):
        retire.retire(north, tmp_path / "full/north.tar.gz")
    assert (north / "key").exists() and (north / "cache").exists()
    (north / "retired").unlink()
    (path,) = log.files(north / log.FOLDER)
    path.write_bytes(path.read_bytes()[:-20] + b"x" * 19 + b"\n")
    with pytest.raises(RecordDamaged):
        retire.retire(north)
    assert (north / "key").exists() and not (north / "retired").exists()


def test_another_file_is_not_overwritten(north, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FolderError, match="left alone"):
        retire.retire(north, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine" and (north / "key").exists()


def test_not_while_an_agent_or_a_listener_is_at_work(north):
    with start.only_agent(north), pytest.raises(FolderError, match="fedscan agent stop"):
        retire.retire(north)
    with key_use.held(north), pytest.raises(SiteKeyError, match="in use"):
        retire.retire(north)
    assert (north / "key").exists() and not (north / "retired").exists()
