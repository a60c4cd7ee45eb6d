"""The noise bench: what it prints, and that secret noise stays affordable."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "noise.py"


@pytest.mark.slow
def test_secret_noise_costs_at_most_six_times_torchs_and_15_percent_of_a_densenet_step():
    ran = subprocess.run([sys.executable, BENCH, "--json"], capture_output=True, text=True, timeout=280, check=True)
    rows = {row["variant"]: row for row in json.loads(ran.stdout)}
    assert {row["parameters"] for row in rows.values()} == {7_000_000}
    assert rows["torch_normal"]["time_ratio"] == 1.0
    assert rows["fedscan"]["time_ratio"] <= 6
    assert rows["fedscan"]["time_ratio"] <= 0.15 * rows["densenet121_step"]["time_ratio"]
    assert rows["fedscan"]["memory_ratio"] < 1  # added in place, in blocks
