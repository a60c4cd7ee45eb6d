"""The bench of the intake: one row for each kind of image and variant, and nothing else on standard output."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "ingest.py"


def test_json_rows(tmp_path):
    words = [
        sys.executable,
        BENCH,
        "--json",
        "--patients",
        "8",
        "--slices",
        "3",
        "--repeats",
        "1",
        "--folder",
        tmp_path,
    ]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True)
    rows = {(row["images"], row["variant"]): row for row in json.loads(ran.stdout)}
    assert set(rows) == {(kind, it) for kind in ("radiographs", "ct") for it in ("dcmread", "ingest", "again")}
    assert rows["ct", "ingest"]["accepted"] == 3
    assert all(rows[kind, "dcmread"]["ratio_wall"] == 1 for kind in ("radiographs", "ct"))
    assert not list(tmp_path.iterdir())
