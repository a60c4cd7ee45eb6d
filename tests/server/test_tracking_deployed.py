"""What a deployed run keeps beside its rounds: where it stands, what a live view shows, and the wish to stop."""

import json
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_core.errors import FolderError
from fedscan_server import tracking
from fedscan_server.tracking import Progress

STEPS = st.builds(
    Progress,
    st.sampled_from(["declare", "round", "evaluate", "done"]),
    *(st.integers(0, 10**6) for _ in range(4)),
    st.floats(0, allow_nan=False),
    st.floats(0, allow_nan=False),
    st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False) | st.none(), max_size=3),
    st.lists(st.text(max_size=20), max_size=3).map(tuple),
)


def test_a_run_that_has_not_begun_waits(tmp_path):
    assert tracking.read_state(tmp_path) == {"state": "waiting", "reason": "", "utc": ""}


@pytest.mark.parametrize("state", ["waiting", "running", *tracking.FINAL])
def test_states(tmp_path, state):
    tracking.set_state(tmp_path, state, "why")
    found = tracking.read_state(tmp_path)
    assert (found["state"], found["reason"]) == (state, "why") and found["utc"].endswith("+00:00")
    assert (tmp_path / tracking.STATE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [tracking.STATE]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": "odd", "reason": "", "utc": ""}', '{"state": "running"}'])
def test_a_damaged_state_is_said(tmp_path, text):
    (tmp_path / tracking.STATE).write_text(text)
    with pytest.raises(FolderError, match="cannot be read"):
        tracking.read_state(tmp_path)


@settings(max_examples=25)
@given(st.lists(STEPS, max_size=6), st.integers(0, 7))
def test_progress_comes_back_line_by_line(tmp_path_factory, steps, after):
    folder = tmp_path_factory.mktemp("run")
    for step in steps:
        tracking.add_progress(folder, step)
    lines = tracking.read_progress(folder, after)
    assert [tracking.progress_of(line) for line in lines] == steps[after:]
    assert all(line["utc"].endswith("+00:00") for line in lines)
    for line in (folder / tracking.PROGRESS).read_text().splitlines() if steps else []:
        assert json.loads(line, parse_constant=lambda name: pytest.fail(name))  # no Infinity: it is no JSON


def test_a_line_that_a_crash_cut_is_no_line_and_the_next_one_is_whole(tmp_path):
    step = Progress("round", 1, 3, 1, 3, epsilon_high=math.inf, notes=("a" * 9000,))
    for cut in (1, 5000, 9000):
        tracking.add_progress(tmp_path, step)
        path = tmp_path / tracking.PROGRESS
        path.write_bytes(path.read_bytes()[:-cut])
        count = len(tracking.read_progress(tmp_path))
        tracking.add_progress(tmp_path, step)
        assert [tracking.progress_of(line) for line in tracking.read_progress(tmp_path)] == [step] * (count + 1)
    assert (tmp_path / tracking.PROGRESS).stat().st_mode & 0o777 == 0o600


def test_a_reader_beside_the_writer_sees_whole_lines_only(tmp_path):
    done = threading.Event()

    def write():
        for number in range(60):
            tracking.add_progress(tmp_path, Progress("round", number, 60, 0, 3, notes=("x" * 300,)))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = 0
    while not done.is_set():
        lines = tracking.read_progress(tmp_path, seen)
        assert [line["round"] for line in lines] == list(range(seen, seen + len(lines)))
        seen += len(lines)
    thread.join()
    assert len(tracking.read_progress(tmp_path)) == 60


def test_the_wish_to_stop(tmp_path):
    tracking.forget_stop(tmp_path)
    tracking.ask_to_stop(tmp_path)
    assert (tmp_path / tracking.STOP).exists()
    tracking.forget_stop(tmp_path)
    assert not (tmp_path / tracking.STOP).exists()


def test_one_process_works_on_a_folder(tmp_path):
    with tracking.locked(tmp_path), pytest.raises(FolderError, match="Another process"), tracking.locked(tmp_path):
        pass
    with tracking.locked(tmp_path):
        pass
