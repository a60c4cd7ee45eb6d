"""The audit log: what was written is there after any crash, in order, under one key; anchors tell every state apart."""

import json
import multiprocessing
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedscan_client.audit import chain, log
from fedscan_core import auditlog
from fedscan_core.errors import RecordDamaged


def events(folder):
    return [record["event"] for record in log.read(folder)]


def lines(folder):
    return [line for path in log.files(folder / "audit") for line in path.read_bytes().splitlines()]


def test_what_is_written_comes_back_with_its_time_and_nothing_is_there_before(tmp_path):
    assert log.read(tmp_path) == [] and log.anchor(tmp_path) == "" and log.head(tmp_path) == chain.START
    assert not (tmp_path / "audit").exists()  # looking makes nothing
    log.append(tmp_path, "start", version="1", cost=float("inf"), place=tmp_path)
    begin, start = log.read(tmp_path)
    assert begin.pop("utc") and start.pop("utc").endswith("+00:00")
    assert start == {"event": "start", "version": "1", "cost": "inf", "place": str(tmp_path)}
    assert begin == {"event": "begin", "old": {}, "key": chain.key_id(log.read_key(tmp_path / "audit"))}


def test_key_and_log_are_for_this_user_alone(tmp_path):
    os.umask(os.umask(0))  # whatever it is
    log.append(tmp_path, "start")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "audit").iterdir()}
    assert modes == {"key": 0o600, "log-000001.jsonl": 0o600, "log.lock": 0o600}
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o700


def test_every_record_has_another_anchor_which_is_no_line_of_the_file_and_another_one_at_another_site(tmp_path):
    seen = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        for _ in range(3):
            told = log.append_all(folder, [("answer", {"status": "failed"})])
            assert told == log.anchor(folder) and len(bytes.fromhex(told)) == 32
            seen.append(told)
        text = b"\n".join(lines(folder)).decode()
        assert not [anchor for anchor in seen if anchor in text]
    assert len(set(seen)) == 6


def test_records_that_belong_together_are_one_write_and_one_fsync(tmp_path, monkeypatch):
    log.append(tmp_path, "start")
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    log.append_all(tmp_path, [("release", {"run_id": "r"}), ("answer", {"status": "ok"})])
    assert len(synced) == 1 and events(tmp_path) == ["begin", "start", "release", "answer"]


def test_the_name_of_a_new_file_is_on_disk_before_anything_leaves(tmp_path, monkeypatch):
    synced, real = set[str](), os.fsync

    def fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(log, "ROTATE_BYTES", 10)
    for number in (1, 2):
        synced.clear()
        log.append(tmp_path, "start")
        folder = tmp_path / "audit"
        assert {str(folder / f"log-00000{number}.jsonl"), str(folder), str(tmp_path)} <= synced


@pytest.mark.parametrize("event", ["", "Release", "a b", "a\n"])
def test_an_event_without_a_plain_name_is_refused(tmp_path, event):
    with pytest.raises(ValueError, match="No record"):
        log.append(tmp_path, event)


@pytest.mark.parametrize("name", ["seq", "prev", "mac", "utc"])
def test_the_logs_own_names_are_not_for_fields(tmp_path, name):
    with pytest.raises(ValueError, match="No record"):
        log.append(tmp_path, "start", **{name: 1})


def test_adding_reads_the_end_of_the_log_only(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "ROTATE_BYTES", 40_000)
    for _ in range(3):
        log.append_all(tmp_path, [("answer", {"number": number}) for number in range(200)])
    looked, real = list[bytes](), chain.unseal

    def unseal(key, line):
        looked.append(line)
        return real(key, line)

    monkeypatch.setattr(chain, "unseal", unseal)
    log.append(tmp_path, "stop")
    log.anchor(tmp_path)
    assert len(looked) == 2 and len(log.files(tmp_path / "audit")) > 1


def test_a_full_file_is_followed_by_the_next_and_the_chain_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "ROTATE_BYTES", 1000)
    for number in range(30):
        log.append(tmp_path, "answer", number=number)
    names = [path.name for path in log.files(tmp_path / "audit")]
    assert len(names) > 4 and names[:2] == ["log-000001.jsonl", "log-000002.jsonl"]
    assert [record["number"] for record in log.read(tmp_path)[1:]] == list(range(30))
    sizes = [path.stat().st_size for path in log.files(tmp_path / "audit")]
    assert all(1000 < size < 1400 for size in sizes[:-1])


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_crash_in_a_new_file_loses_nothing_that_was_written(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(log, "ROTATE_BYTES", 10)
    log.append(tmp_path, "start")
    log.append(tmp_path, "stop")
    second = log.files(tmp_path / "audit")[-1]
    assert second.name == "log-000002.jsonl"
    second.write_bytes(second.read_bytes()[:cut])
    assert events(tmp_path) == ["begin", "start"]
    log.append(tmp_path, "access")
    assert events(tmp_path) == ["begin", "start", "access"]


def test_a_write_that_was_cut_anywhere_is_dropped_by_the_next(tmp_path):
    log.append(tmp_path, "start")
    (path,) = log.files(tmp_path / "audit")
    whole = path.read_bytes()
    log.append(tmp_path, "stop", text="x" * 9000)
    more = path.read_bytes()
    for cut in (len(whole), len(whole) + 1, len(whole) + 5000, len(more) - 1):
        path.write_bytes(more[:cut])
        assert events(tmp_path) == ["begin", "start"]
        log.append(tmp_path, "access")
        assert events(tmp_path) == ["begin", "start", "access"]


def test_a_crash_within_the_very_first_write_is_no_log(tmp_path):
    log.append(tmp_path, "start")
    (path,) = log.files(tmp_path / "audit")
    path.write_bytes(path.read_bytes()[:50])
    assert log.read(tmp_path) == [] and log.head(tmp_path) == chain.START
    log.append(tmp_path, "start")
    assert events(tmp_path) == ["begin", "start"]


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    log.append(tmp_path, "start")
    before, real = log.head(tmp_path), os.write

    def full(descriptor, data):
        if len(data) > 100:
            return real(descriptor, data[:250])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            log.append_all(tmp_path, [("release", {"run_id": "r"}), ("answer", {"status": "ok"})])
    assert log.head(tmp_path) == before and events(tmp_path) == ["begin", "start"]
    (path,) = log.files(tmp_path / "audit")
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("what", ["gone", "damaged", "short", "readable", "another", "link"])
def test_without_its_own_key_a_log_is_neither_read_nor_added_to(tmp_path, what):
    log.append(tmp_path, "start")
    key = tmp_path / "audit" / "key"
    if what in ("gone", "link"):
        key.rename(tmp_path / "kept")
    if what == "link":
        key.symlink_to(tmp_path / "kept")
    if what in ("damaged", "short", "another"):
        key.write_text({"damaged": "xyz", "short": "00" * 31, "another": "00" * 32}[what])
    if what == "readable":
        key.chmod(0o644)
    before = lines(tmp_path)
    for use in (log.read, lambda folder: log.append(folder, "stop")):
        with pytest.raises(RecordDamaged) as caught:
            use(tmp_path)
        assert str(tmp_path) in str(caught.value) and "00" * 31 not in str(caught.value)
    assert lines(tmp_path) == before and key.exists() == (what != "gone")


def test_a_last_line_that_was_changed_is_not_added_to(tmp_path):
    log.append(tmp_path, "answer", status="failed")
    (path,) = log.files(tmp_path / "audit")
    path.write_bytes(path.read_bytes().replace(b'"failed"', b'"faiLed"'))
    with pytest.raises(RecordDamaged, match="audit verify"):
        log.append(tmp_path, "stop")


def test_logs_of_earlier_versions_are_kept_and_bound_into_the_first_record(tmp_path):
    for name in log.OLD:
        auditlog.append(tmp_path / name, {"n": 1})
        auditlog.append(tmp_path / name, {"n": 2})
    (tmp_path / "intake.jsonl").write_bytes(b'{"edited":1}\n')
    kept = {name: (tmp_path / name).read_bytes() for name in log.OLD}
    log.append(tmp_path, "start")
    old = log.read(tmp_path)[0]["old"]
    assert old["released.jsonl"]["head"] == auditlog.head(tmp_path / "released.jsonl")
    assert old["released.jsonl"]["lines"] == 2 and old["intake.jsonl"]["head"] == ""
    assert {name: (tmp_path / name).read_bytes() for name in log.OLD} == kept


def test_access_names_the_account(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGNAME", "radiologist")
    log.access(tmp_path, "a patient")
    assert log.read(tmp_path)[-1]["user"] == "radiologist"


def _write(folder, mark):
    for number in range(20):
        log.append(folder, "answer", mark=mark, number=number)


def test_processes_that_write_at_once_lose_and_reorder_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "ROTATE_BYTES", 2000)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(tmp_path, mark)) for mark in range(4)]
    for worker in workers:
        worker.start()
    with ThreadPoolExecutor(1) as pool:  # somebody reads meanwhile
        pool.submit(lambda: [log.read(tmp_path) for _ in range(5)]).result(timeout=60)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = [(record["mark"], record["number"]) for record in log.read(tmp_path)[1:]]
    assert len(found) == 80
    assert all([n for m, n in found if m == mark] == list(range(20)) for mark in range(4))


def test_a_line_is_json_by_itself(tmp_path):
    log.append(tmp_path, "answer", text='a\n\u2028\udc80"}')
    for line in lines(tmp_path):
        assert json.loads(line)["mac"]
    assert log.read(tmp_path)[-1]["text"] == 'a\n\u2028\udc80"}'
