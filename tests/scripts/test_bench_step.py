"""The step bench: what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "step.py"


@pytest.mark.slow
def test_it_prints_rows_and_nothing_else():
    command = [sys.executable, str(BENCH), "--models", "cnn", "--images", "1", "4", "--repeats", "3", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    keys = {"model", "variant", "images_per_patient", "time_ratio", "memory_ratio", "layout"}
    assert all(row.keys() >= keys for row in rows)
    ours = [row for row in rows if row["variant"] == "fedscan"]
    assert [row["images_per_patient"] for row in ours] == [1, 4]
    assert {"opacus_hooks", "opacus_functorch", "opacus_ghost", "loop", "nonprivate"} <= {r["variant"] for r in rows}
    for row in ours:
        hooks = next(r for r in rows if r["variant"] == "opacus_hooks")
        assert row["time_ratio"] < hooks["time_ratio"]  # about 1.1 against 1.7
