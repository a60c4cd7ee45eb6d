import contextlib
import os
import sqlite3

import pytest

from fedscan_server.coordinator import check, pki, registry, vault


def verdicts(c, verdict):
    return [item for item in check.check(c) if item.verdict == verdict]


def objects(c, *contents):
    """A database with Flower's table of objects (flwr/supercore/state/schema/objectstore_models.py)."""
    with contextlib.closing(sqlite3.connect(c.flower_database)) as db:
        db.execute("CREATE TABLE objects (object_id TEXT, content BLOB, is_available INTEGER, ref_count INTEGER)")
        db.executemany("INSERT INTO objects VALUES ('x', ?, 1, 0)", [(content,) for content in contents])
        db.commit()
    os.chmod(c.flower_database, 0o600)


def test_a_new_coordinator_is_sound(coordinator):
    assert verdicts(coordinator, "bad") == []
    assert any("does not run" in item.text for item in verdicts(coordinator, "note"))


def test_it_changes_nothing(coordinator):
    objects(coordinator, b"x")
    before = {path: path.stat().st_mtime_ns for path in coordinator.folder.rglob("*") if path.is_file()}
    list(check.check(coordinator))
    assert before == {path: path.stat().st_mtime_ns for path in coordinator.folder.rglob("*") if path.is_file()}


def break_mode(c):
    os.chmod(c.folder / "secrets" / "control", 0o640)


def break_secret(c):
    (c.folder / "secrets" / "superexec").write_text("short")


def break_pair(c):
    other = c.private_key.read_bytes()
    pki.renew(c)
    c.private_key.write_bytes(other)


def break_certificate(c, days=-1):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pki, "SERVER_DAYS", days)
        patch.setattr(pki, "_EARLY", pki._EARLY * 10**4)
        pki.renew(c)


def break_registry(c):
    c.database.unlink()


def break_database(c):
    with registry.open_(c) as db:
        db.executemany("INSERT INTO dead_key VALUES (?, 'a')", [(f"key {number}" * 50,) for number in range(400)])
    data = bytearray(c.database.read_bytes())
    data[len(data) // 2 :] = os.urandom(len(data) - len(data) // 2)
    c.database.write_bytes(data)


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (break_mode, "secrets/control"),
        (break_secret, "superexec"),
        (break_pair, "go together"),
        (break_certificate, "valid from"),
        (break_registry, "coordinator.sqlite"),
        (break_database, "coordinator.sqlite"),
    ],
)
def test_what_is_broken_is_said_with_a_remedy(coordinator, breaks, said):
    breaks(coordinator)
    bad = verdicts(coordinator, "bad")
    assert any(said in item.text for item in bad), bad
    assert all(item.remedy for item in bad)


def test_a_certificate_that_ends_soon_is_a_note(coordinator):
    break_certificate(coordinator, days=20)
    assert any("ends on" in item.text for item in verdicts(coordinator, "note"))
    assert verdicts(coordinator, "bad") == []


def test_updates_that_wait_in_clear_are_counted(coordinator):
    objects(coordinator, b"x" * 2**20, b"y" * 2**20)
    assert any("2 parts (2 MiB)" in item.text for item in verdicts(coordinator, "note"))
    coordinator.flower_database.write_bytes(b"rubbish" * 1000)
    texts = [item.text for item in check.check(coordinator)]
    assert any("not known" in text for text in texts)
    assert not any("No update waits" in text for text in texts)


def test_plain_and_encrypted_files_of_runs_are_told_apart(coordinator, monkeypatch):
    monkeypatch.setenv(vault.KEY, "5a" * 32)
    vault.write(coordinator.runs / "r" / "model", b"m" * 5000)
    (coordinator.runs / "r" / "run.toml").write_bytes(b"x" * 3000)
    os.chmod(coordinator.runs / "r", 0o700)
    os.chmod(coordinator.runs / "r" / "run.toml", 0o600)
    assert any("In clear in runs: 3 KiB" in item.text for item in verdicts(coordinator, "note"))


def test_a_missing_vault_key_is_bad(coordinator, monkeypatch):
    import dataclasses

    monkeypatch.delenv(vault.KEY, raising=False)
    monkeypatch.delenv(vault.KEY_FILE, raising=False)
    c = dataclasses.replace(coordinator, encrypt=True)
    assert any("no key" in item.text for item in verdicts(c, "bad"))
