"""The bench of the second alarm: what it prints, and that the README's words about it hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedscan_client.intake import ocr

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "ocr.py"


@pytest.mark.slow
@pytest.mark.skipif(not ocr.installed(), reason="tesseract is not installed")
def test_text_on_black_is_mostly_found_and_text_on_texture_mostly_not():
    command = [sys.executable, str(BENCH), "--json", "--textures", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    rows = {(row["frames"], row["contrast"]): row["found"] / row["of"] for row in json.loads(ran.stdout)}
    assert len(rows) == 6
    assert rows["ultrasound", 255] >= 0.75 and rows["ultrasound", 128] >= 0.75
    assert rows["radiograph", 128] <= 0.5 and rows["ultrasound", 40] <= 0.5  # if better: say so in client/README.md
