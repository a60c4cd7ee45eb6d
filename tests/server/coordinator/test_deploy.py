"""The files in server/deploy: what can be checked of them without installing anything."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedscan.cli import _parser

yaml = pytest.importorskip("yaml")  # Flower brings it
DEPLOY = Path(__file__).resolve().parents[3] / "server" / "deploy"
UNIT = DEPLOY / "fedscan-coordinator.service"


def settings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if match := re.match(r"([A-Za-z]+)=(.*)$", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_has_nothing_to_say(tmp_path):
    """With a program that exists: this machine has no /opt/fedscan."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/fedscan/bin/fedscan", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=perhaps"))
    assert subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True).stderr


def test_the_unit_gives_nothing_away():
    found = settings()
    assert found["NoNewPrivileges"] == ["yes"] and found["ProtectSystem"] == ["strict"]
    assert found["PrivateTmp"] == ["yes"] and found["UMask"] == ["0077"] and found["CapabilityBoundingSet"] == [""]
    assert found["User"] == ["fedscan-coordinator"] and found["Restart"] == ["always"]
    assert int(found["TimeoutStopSec"][0]) > 60  # three processes, 20 s each


def test_the_commands_in_the_files_exist():
    (start,) = settings()["ExecStart"]
    words = [start.split()[1:]]
    text = (DEPLOY / "compose.yaml").read_text()
    words += [["server", *line.split()] for line in re.findall(r"--rm coordinator (.*)", text)]
    words += [line.split() for line in re.findall(r"exec coordinator fedscan (.*)", text)]
    readme = (DEPLOY.parent / "README.md").read_text()
    words += [line.split("#")[0].split()[1:] for line in readme.splitlines() if line.startswith("fedscan server ")]
    assert len(words) >= 7
    for line in words:
        assert callable(_parser().parse_args(line).command), line


def test_the_container_runs_as_nobody_and_keeps_its_door_shut():
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["coordinator"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] == "10001:10001"
    assert service["ports"] == ["8443:8443"] and "no-new-privileges:true" in service["security_opt"]
    file = (DEPLOY / "Containerfile").read_text()
    assert re.search(r"^USER 10001:10001$", file, re.M) and 'ENTRYPOINT ["fedscan", "server"]' in file
    root = DEPLOY.parents[1]
    for line in re.findall(r"^COPY (.*) \S+$", file, re.M):
        assert all((root / name).exists() for name in line.split()), line


def test_nginx_lets_two_paths_through_and_nothing_else():
    text = (DEPLOY / "nginx.conf").read_text()
    assert re.findall(r"location (?:= )?(\S+)", text) == [
        "/v1/fleet/",
        "/fedscan/v1/enrol",
        "/fedscan/v1/login",
        "/fedscan/v1/",
        *("/v1/fleet", "/fedscan/v1", "/"),  # nothing of these passes:
    ]
    assert len(re.findall(r"location (?:/|= /v1/fleet|= /fedscan/v1) \{\s+return 404;", text)) == 3
    assert set(re.findall(r"proxy_pass (\S+);", text)) == {"https://127.0.0.1:8443"}
    assert "proxy_ssl_verify on;" in text and "proxy_request_buffering off;" in text


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_reads_it(coordinator, tmp_path):
    text = (DEPLOY / "nginx.conf").read_text()
    for name, path in {
        "/etc/fedscan/chain.pem": coordinator.certificate,
        "/etc/fedscan/server.pem": coordinator.private_key,
        "/etc/fedscan/ca.pem": coordinator.folder / "pki" / "ca.crt",
        "/var/log/nginx/": tmp_path,
        "/run/nginx.pid": tmp_path / "pid",
    }.items():
        text = text.replace(name, f"{path}/" if name.endswith("/") else str(path))
    (tmp_path / "nginx.conf").write_text(text)
    done = subprocess.run(["nginx", "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
