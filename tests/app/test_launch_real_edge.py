"""The researcher's commands against the coordinator's own edge, a process of its own over TLS; Flower is away."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from fedscan import cli
from fedscan_core import invite, node_key, policy
from fedscan_core.policy import Policy
from fedscan_server.coordinator import people, sites, state

pytestmark = pytest.mark.deployed
RUN = """
name = "cxr"
task = {labels = ["0", "1"], image_size = 16}
train = {rounds = 3, patients_per_step = "all"}
federation = {approval_hours = 1}
"""


@pytest.fixture
def coordinator(tmp_path, home):
    """A coordinator with three sites, whose edge answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SystemExit):
        cli.main(["server", "init", "--state", str(tmp_path / "state"), "--address", f"127.0.0.1:{port}"])
    here = state.load(tmp_path / "state")
    for name in ("north", "south", "west"):
        key = node_key.create(tmp_path / f"{name}.key")
        allowed = Policy(max_epsilon=3.0 if name == "west" else 20.0, max_delta=1e-4)
        published = policy.public(allowed, name, 300, (allowed.max_epsilon, 1e-4))
        sites.redeem(here, sites.invite(here, name, 24.0).token, node_key.public_text(key), published)
    with (tmp_path / "edge.log").open("w") as log:
        edge = subprocess.Popen(
            [sys.executable, "-m", "fedscan_server.edge", str(here.folder)],
            env=os.environ,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(300):
            time.sleep(0.1)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        else:
            pytest.fail((tmp_path / "edge.log").read_text())
        yield here
    finally:
        edge.terminate()
        edge.wait(30)


def test_from_login_to_fetch(coordinator, tmp_path, capsys, monkeypatch):
    def call(*words):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(word) for word in words])
        return caught.value.code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for name, role in (("ada", "researcher"), ("vic", "viewer")):
        invite.write(tmp_path / f"{name}.toml", people.invite(coordinator, name, role, 1.0))
        assert call("login", f"{name}.toml", "--profile", name)[0] == 0
    assert call("login", "ada.toml", "--profile", "ada")[0] == 2  # once only
    (tmp_path / "run.toml").write_text(RUN)

    code, out, _ = call("launch", "run.toml", "--dry-run", "--json")
    told = json.loads(out)
    assert code == 2 and told["faults"] == ["2 of 3 sites would take part; aggregation.min_sites asks for 3"]
    assert told["sites"][2]["refusal"].endswith("this site allows 3")
    assert json.loads(call("runs", "--json")[1]) == []

    two = ("--set", "aggregation.min_sites=2")
    assert call("launch", "run.toml", "--yes", *two, "--profile", "vic")[0] == 2
    code, out, err = call("launch", "run.toml", "--yes", "--json", *two)
    assert code == 0, err
    run_id = json.loads(out)["run_id"]
    listed = json.loads(call("runs", "--json", "--profile", "vic")[1])
    assert [(run["run_id"], run["launcher"], run["state"]) for run in listed] == [(run_id, "ada", "waiting")]
    assert call("stop", "cxr", "--profile", "vic")[0] == 2
    assert call("stop", "cxr")[0] == 0
    assert call("resume", "brain")[0] == 2

    code, out, err = call("fetch", run_id, "--out", "here")
    assert code == 0, err
    assert 'name = "cxr"' in (tmp_path / "here" / "run.toml").read_text()
    assert not (tmp_path / "here" / "order.json").exists()
    people.remove(coordinator, "ada")
    code, _, err = call("runs")
    assert code == 2 and "fedscan login INVITE" in err
