"""The cache bench: what it prints, and that reading stays within the bar where it can."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "cache.py"


@pytest.mark.slow
def test_reading_costs_at_most_1_3_times_plain_npy_but_for_the_cipher_over_a_volume_in_memory(tmp_path):
    words = [sys.executable, BENCH, "--json", "--folder", tmp_path]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=280, check=True)
    rows = {(row["size"], row["state"], row["variant"]): row["ratio"] for row in json.loads(ran.stdout)}
    assert len(rows) == 3 * 3 * 3 and all(ratio == 1 for (_, _, variant), ratio in rows.items() if variant == "npy")
    for size in ("tiny", "slice"):
        for state in ("cold", "warm", "reused"):
            assert rows[size, state, "opened"] <= 1.3, (size, state)
    assert rows["volume", "cold", "opened"] <= 1.3
    assert rows["volume", "warm", "opened"] <= 1.7  # the cipher alone takes 1.6 ms for 16 MiB
    assert not list(tmp_path.iterdir())
