import fcntl
import json
import multiprocessing
import os
import stat

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedscan_core import auditlog
from fedscan_core.errors import RecordDamaged

RECORDS = [{"kind": "open", "epsilon": 8.0}, {"kind": "plan", "run": "äß\n"}, {"n": 0}, {"n": 1}]


def write(path, records=RECORDS):
    return [auditlog.append(path, record) for record in records]


def test_round_trip_and_heads(tmp_path):
    path = tmp_path / "deep" / "ledger.jsonl"
    assert auditlog.read(path) == [] and auditlog.head(path) == auditlog.START
    heads = write(path)
    assert auditlog.read(path) == RECORDS
    assert auditlog.head(path) == heads[-1] and len(set(heads)) == len(RECORDS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for number, line in enumerate(path.read_bytes().splitlines()):
        assert json.loads(line)["prev"] == ([auditlog.START, *heads][number])


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.booleans(), max_size=3)))
def test_any_records_come_back_in_order(tmp_path_factory, records):
    records = [{k: v for k, v in record.items() if k not in ("seq", "prev")} for record in records]
    path = tmp_path_factory.mktemp("log") / "log"
    write(path, records)
    assert auditlog.read(path) == records


def test_a_record_cannot_bring_its_own_place_in_the_chain(tmp_path):
    path = tmp_path / "log"
    write(path, [{"n": 0}, {"seq": 77, "prev": "x", "n": 1}, {"n": 2}])
    assert auditlog.read(path) == [{"n": 0}, {"n": 1}, {"n": 2}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "log"
    write(path)
    return path, path.read_bytes(), auditlog.head(path)


def noticed(path, data, kept_head):
    """Whether the chain, or the copy of the head kept elsewhere, gives the change away."""
    path.write_bytes(data)
    try:
        return auditlog.read(path) != RECORDS or auditlog.head(path) != kept_head
    except RecordDamaged:
        return True


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["edit", "remove", "insert"]))
def test_any_edit_removal_or_insertion_is_found(whole, data, kind):
    path, clean, kept_head = whole
    where = data.draw(st.integers(0, len(clean) - 1))
    byte = bytes([data.draw(st.integers(0, 255))])
    end = where + data.draw(st.integers(1, 200)) if kind == "remove" else where + (kind == "edit")
    changed = clean[:where] + (b"" if kind == "remove" else byte) + clean[end:]
    assume(changed != clean)
    assert noticed(path, changed, kept_head)
    last = clean.rindex(b"\n", 0, len(clean) - 1) + 1
    if end < last and kind != "insert":  # before the last line the chain alone must do it
        path.write_bytes(changed)
        with pytest.raises(RecordDamaged, match="was changed") as caught:
            auditlog.read(path)
        assert caught.value.remedy


def test_lines_cannot_be_swapped_doubled_or_left_out(whole):
    path, clean, _ = whole
    lines = clean.splitlines(keepends=True)
    for changed in ([lines[i] for i in order] for order in ([0, 2, 1, 3], [0, 1, 1, 2, 3], [0, 2, 3], [1, 2, 3])):
        path.write_bytes(b"".join(changed))
        with pytest.raises(RecordDamaged):
            auditlog.read(path)


@settings(max_examples=20)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_torn_last_line_was_never_written(tmp_path_factory, kept):
    path = tmp_path_factory.mktemp("torn") / "log"
    heads = write(path)
    clean = path.read_bytes()
    auditlog.append(path, {"n": 2, "long": "x" * 10_000})
    torn = path.read_bytes()[len(clean) : -1]
    path.write_bytes(clean + torn[: int(kept * len(torn))])
    assert auditlog.read(path) == RECORDS and auditlog.head(path) == heads[-1]
    auditlog.append(path, {"n": 3})
    assert auditlog.read(path) == [*RECORDS, {"n": 3}]


def test_a_file_that_is_only_a_torn_line_starts_anew(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b'{"seq":0,"pre')
    auditlog.append(path, {"n": 0})
    assert auditlog.read(path) == [{"n": 0}] and path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"[]\n", b'{"n":1}\n', b'{"seq":"x"}\n'])
def test_nothing_is_added_to_a_damaged_file(tmp_path, line):
    path = tmp_path / "log"
    path.write_bytes(line)
    with pytest.raises(RecordDamaged):
        auditlog.append(path, {"n": 0})
    assert path.read_bytes() == line


def test_the_line_and_the_new_name_are_on_disk_before_append_returns(tmp_path, monkeypatch):
    path, seen = tmp_path / "log", []

    def fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        seen.append((kind, path.stat().st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    auditlog.append(path, {"n": 0})
    first = path.stat().st_size
    assert seen == [("file", first), ("folder", first)]
    auditlog.append(path, {"n": 1})
    assert seen[2:] == [("file", path.stat().st_size)]


def test_a_disk_that_takes_bytes_one_by_one(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:1])))
    write(tmp_path / "log")
    monkeypatch.undo()
    assert auditlog.read(tmp_path / "log") == RECORDS


def test_exclusive_shuts_others_out_and_lets_them_in_afterwards(tmp_path):
    path = tmp_path / "new" / "log"
    with auditlog.exclusive(path), open(f"{path}.lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(f"{path}.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _add_many(path, mark):
    for number in range(20):
        with auditlog.exclusive(path):
            auditlog.append(path, {"mark": mark, "number": number})


def test_two_processes_do_not_break_the_chain(tmp_path):
    path = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_add_many, args=(path, mark)) for mark in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    found = auditlog.read(path)
    for mark in "ab":
        assert [r["number"] for r in found if r["mark"] == mark] == list(range(20))
