"""What is shipped to start an agent: systemd unit and container file, checked by their own tools where present."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
UNIT = ROOT / "client" / "deploy" / "fedscan-agent.service"
CONTAINER = ROOT / "client" / "deploy" / "Containerfile"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_has_nothing_to_say_of_the_unit(tmp_path):
    text = UNIT.read_text().replace("/opt/fedscan/bin/fedscan", sys.executable)  # the program has to be there
    (tmp_path / UNIT.name).write_text(text)
    ran = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / UNIT.name)], capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_unit_is_hardened():
    lines = set(UNIT.read_text().splitlines())
    wanted = {"NoNewPrivileges=true", "ProtectSystem=strict", "PrivateTmp=true", "User=fedscan", "Restart=always"}
    assert wanted | {"CapabilityBoundingSet=", "UMask=0077", "LimitCORE=0"} <= lines


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say_of_the_container_file():
    ran = subprocess.run(["hadolint", str(CONTAINER)], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_the_container_file_copies_what_exists_and_runs_as_nobody_special():
    text = re.sub(r"\\\n", " ", CONTAINER.read_text())
    words = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    for line in words:
        if line[0] == "COPY" and not line[1].startswith("--from"):
            for name in line[1:-1]:
                assert (ROOT / name).exists(), name
    known = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {line[0] for line in words if line[0].isupper()} <= known  # no ADD: nothing is downloaded but packages
    assert [line[1] for line in words if line[0] == "USER"] == ["10001:10001"]
    assert not re.search(r"curl|wget|apt-get|git clone", text)
    assert all(re.search(r":\d+\.\d+\.\d+", line[1]) for line in words if line[0] == "FROM")
