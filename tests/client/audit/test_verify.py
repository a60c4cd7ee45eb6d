"""Whatever is done to the log, `verify` finds it, up to the last anchor; and nothing else does it call changed."""

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.audit import log
from fedscan_client.audit.verify import verify
from fedscan_core import auditlog
from fedscan_core.errors import RecordDamaged


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A log of 14 records in several files, the lines of each file, and the anchor after each record."""
    folder = tmp_path_factory.mktemp("made")
    anchors = []
    before, log.ROTATE_BYTES = log.ROTATE_BYTES, 700
    for number in range(13):
        anchors.append(log.append_all(folder, [("answer", {"number": number, "status": "ok"})]))
    log.ROTATE_BYTES = before
    files = {path.name: path.read_bytes() for path in log.files(folder / "audit")}
    assert len(files) >= 4
    return folder, files, anchors


@pytest.fixture(scope="module")
def scratch(made, tmp_path_factory):
    return shutil.copytree(made[0], tmp_path_factory.mktemp("scratch") / "site")


def put(folder, files):
    for path in log.files(folder / "audit"):
        path.unlink()
    for name, data in files.items():
        (folder / "audit" / name).write_bytes(data)


def test_a_whole_log_is_whole_and_says_how_far_it_is_anchored(made):
    folder, files, anchors = made
    plain = verify(folder)
    assert plain.whole and (plain.records, plain.files, plain.anchored) == (14, len(files), 0)
    assert plain.anchor == anchors[-1] == log.anchor(folder)
    told = verify(folder, [anchors[4], "", anchors[2]])
    assert told.whole and told.anchored == 6 and told.anchors == 2  # the begin, and answers 0 to 4


def readable(folder):
    """Whether `log.read`, which has a loop of its own, takes the log for whole."""
    try:
        log.read(folder)
        return True
    except RecordDamaged:
        return False


CHANGES = st.one_of(
    st.tuples(st.just("edit"), st.integers(0, 10**6), st.integers(1, 255)),
    st.tuples(st.just("drop"), st.integers(0, 13), st.integers(1, 5)),
    st.tuples(st.just("repeat"), st.integers(0, 13), st.integers(0, 14)),
    st.tuples(st.just("move"), st.integers(0, 13), st.integers(0, 13)),
    st.tuples(st.just("cut"), st.integers(0, 13), st.just(0)),
    st.tuples(st.just("tear"), st.integers(0, 10**6), st.just(0)),
)


def changed(files, change):
    """The files after a change; all bytes of one file, where lines go over the files' borders."""
    kind, a, b = change
    lines = [line for data in files.values() for line in data.splitlines(keepends=True)]
    if kind == "edit":
        edited = bytearray(b"".join(lines))
        edited[a % len(edited)] ^= b
        return [bytes(edited)]
    if kind == "tear":
        whole = b"".join(lines)
        return [whole[: a % len(whole)]]
    if kind == "drop":
        del lines[a : a + b]
    elif kind == "repeat":
        lines.insert(b, lines[a])
    elif kind == "move":
        lines.insert(b, lines.pop(a))
    else:
        del lines[a:]
    return lines


@settings(max_examples=300, deadline=None)
@given(change=CHANGES, anchored=st.integers(0, 12), per_file=st.integers(1, 20))
def test_any_change_up_to_the_last_anchor_is_found_and_nothing_else(made, scratch, change, anchored, per_file):
    """The reference is plain: the log is whole if the anchored lines, and their order, are what they were."""
    _, files, anchors = made
    lines = changed(files, change)
    if change[0] not in ("edit", "tear"):  # how the lines lie in files is free
        chunks = [b"".join(lines[at : at + per_file]) for at in range(0, len(lines), per_file)]
    else:
        chunks = lines
    put(scratch, {f"log-{number:06d}.jsonl": chunk for number, chunk in enumerate(chunks, 1)})
    before = b"".join(files.values()).splitlines(keepends=True)
    after = b"".join(chunks).splitlines(keepends=True)
    if after and not after[-1].endswith(b"\n"):
        after = after[:-1]  # a write that never returned
    lost_anchored = before[: anchored + 2] != after[: anchored + 2]
    no_prefix = after != before[: len(after)]
    told = verify(scratch, anchors[: anchored + 1])
    assert told.whole == (not lost_anchored and not no_prefix), (change, told)
    if log.files(scratch / "audit"):
        assert readable(scratch) == (not told.problems)
    if not no_prefix and len(after) > 0:
        assert not told.problems  # a mere cut shows in the anchors alone
        assert set(told.unknown) == set(anchors[: anchored + 1]) - set(anchors[: max(0, len(after) - 1)])


def test_a_file_that_is_gone_is_found(made, scratch):
    _, files, anchors = made
    names = sorted(files)
    for gone in names:
        put(scratch, {name: data for name, data in files.items() if name != gone})
        told = verify(scratch, anchors[-1:])
        assert not told.whole
        assert bool(told.problems) == (gone != names[-1])  # the last one is a cut


def test_an_older_copy_that_was_written_to_since_is_found(made, scratch):
    _, files, anchors = made
    old = dict(list(files.items())[:-2])
    put(scratch, old)
    for number in range(5):
        log.append(scratch, "answer", number=number)
    assert verify(scratch).whole  # by itself it is a whole log
    told = verify(scratch, anchors)
    assert not told.problems and told.unknown == tuple(anchors[-len(told.unknown) :]) and len(told.unknown) >= 2


def test_a_line_of_another_history_of_the_same_log_is_found(made, scratch):
    """An older copy was put back and written to; a line of one history in the other has a right MAC and number."""
    _, files, anchors = made
    put(scratch, {"log-000001.jsonl": b"".join(b"".join(files.values()).splitlines(keepends=True)[:8])})
    for number in range(7, 13):
        log.append(scratch, "answer", number=number, status="no")
    (path,) = log.files(scratch / "audit")
    other = path.read_bytes().splitlines(keepends=True)
    mine = b"".join(files.values()).splitlines(keepends=True)
    for at in range(8, 13):
        put(scratch, {"log-000001.jsonl": b"".join([*mine[:at], other[at], *mine[at + 1 :]])})
        assert bool(verify(scratch).problems) and not readable(scratch)
    put(scratch, {"log-000001.jsonl": b"".join([*mine[:13], other[13]])})
    assert verify(scratch, anchors[-1:]).unknown == (anchors[-1],)


def test_a_log_begun_anew_is_found(made, tmp_path):
    log.append(tmp_path, "start")
    assert verify(tmp_path).whole and verify(tmp_path, made[2]).unknown == tuple(made[2])
    shutil.rmtree(tmp_path / "audit")
    told = verify(tmp_path, made[2][:1])
    assert not told.whole and told.records == 0
    assert verify(tmp_path).whole  # a site that has no log yet


def test_even_who_has_the_key_cannot_rewrite_what_was_anchored(made, tmp_path):
    _, _, anchors = made
    site = shutil.copytree(made[0], tmp_path / "site")
    for path in log.files(site / "audit"):
        path.unlink()
    for number in range(13):  # the same key, the same records but one
        log.append(site, "answer", number=number if number != 5 else 99, status="ok")
    told = verify(site, anchors)
    assert not told.problems and len(told.unknown) >= 8


@pytest.mark.parametrize("what", ["another key", "no key", "no log"])
def test_what_cannot_be_checked_is_not_called_whole(made, tmp_path, what):
    site = shutil.copytree(made[0], tmp_path / "site")
    if what == "another key":
        (site / "audit/key").write_text("11" * 32)
    elif what == "no key":
        (site / "audit/key").unlink()
    else:
        for path in log.files(site / "audit"):
            path.unlink()
    told = verify(site)
    assert not told.whole and told.records == 0 and len(told.problems) <= 21


def test_what_is_wrong_is_said_with_file_and_line(made, scratch):
    _, files, _ = made
    name = sorted(files)[1]
    lines = files[name].splitlines(keepends=True)
    put(scratch, {**files, name: b"".join([*lines[:1], *lines[2:]])})
    (problem,) = verify(scratch).problems
    assert f"{name}, line 2: 1 record(s) before it are missing" in problem
    put(scratch, {**files, name: files[name].replace(b'"status":"ok"', b'"status":"no"', 1)})
    (problem,) = verify(scratch).problems
    assert f"{name}, line 1: it was edited" in problem


def test_the_log_of_an_earlier_version_is_watched_too(tmp_path):
    auditlog.append(tmp_path / "released.jsonl", {"n": 1})
    log.append(tmp_path, "start")
    assert verify(tmp_path).whole
    kept = (tmp_path / "released.jsonl").read_bytes()
    (tmp_path / "released.jsonl").write_bytes(kept.replace(b"1", b"2", 1))
    assert "was changed" in verify(tmp_path).problems[0]
    (tmp_path / "released.jsonl").unlink()
    assert "is missing" in verify(tmp_path).problems[0]
