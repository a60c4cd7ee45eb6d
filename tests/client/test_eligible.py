"""Who was eligible: once for each run and patient, only keyed HMACs, on disk when it returns."""

import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedscan_client import eligible
from fedscan_core.errors import DataError, FolderError

NAMES = [f"{n:032x}" for n in range(1, 8)]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.sets(st.sampled_from(NAMES))), max_size=5))
def test_against_a_dictionary(tmp_path_factory, calls):
    folder = tmp_path_factory.mktemp("site")
    plain: dict[str, list[str]] = {name: [] for name in NAMES}
    order: list[str] = []
    for run, names in calls:
        eligible.record(folder, run, f"model-{run}", names)
        order += [run] if run not in order else []
        for name in names:
            plain[name] += [run] if run not in plain[name] else []
    for name in NAMES:
        found = [(run.run_id, run.model) for run in eligible.runs_of(folder, name)]
        assert found == [(run, f"model-{run}") for run in order if run in plain[name]]


def test_only_keyed_hmacs_are_kept(tmp_path):
    for name in ("4711", "canary-001", "", "AB" * 16, "é" * 32, " " + "ab" * 16):
        with pytest.raises(DataError) as caught:
            eligible.record(tmp_path, "run", "model", [NAMES[0], name])
        assert "4711" not in str(caught.value)
        with pytest.raises(DataError):
            eligible.runs_of(tmp_path, name)
    assert not (tmp_path / eligible.FILE).exists()
    eligible.record(tmp_path, "run", "model", NAMES)
    assert stat.S_IMODE((tmp_path / eligible.FILE).stat().st_mode) == 0o600
    with sqlite3.connect(tmp_path / eligible.FILE) as db:
        columns = [
            row[1] for table in ("runs", "patients", "eligible") for row in db.execute(f"PRAGMA table_info({table})")
        ]
    assert columns == ["number", "run_id", "model", "number", "name", "run", "patient", "since"]


def test_what_was_recorded_survives_a_killed_process(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from fedscan_client import eligible
eligible.record(Path({str(tmp_path)!r}), "run", "model", {NAMES!r})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [run.run_id for run in eligible.runs_of(tmp_path, NAMES[3])] == ["run"]


def test_a_damaged_file_is_an_error_of_ours(tmp_path: Path):
    assert eligible.runs_of(tmp_path, NAMES[0]) == []
    (tmp_path / eligible.FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(FolderError):
        eligible.runs_of(tmp_path, NAMES[0])
