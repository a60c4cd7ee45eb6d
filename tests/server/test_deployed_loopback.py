"""The deployed ServerApp on Flower's own SuperLink, SuperExec and SuperNodes over loopback."""

import contextlib
import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import fedscan
from fedscan import federation
from fedscan_core import config, files, node_key, order
from fedscan_core.config import RunConfig
from fedscan_core.order import Order
from fedscan_server import tracking
from fedscan_server.coordinator import control, service, sites

pytestmark = pytest.mark.deployed
RUN = "loopback-0123456789ab"


@pytest.fixture(scope="module")
def lab():
    """See coordinator/conftest.py."""
    return runpy.run_path(str(Path(__file__).parent / "coordinator" / "conftest.py"))


def run_config(rounds):
    tree = {
        "name": "loopback",
        "task": {"labels": ["no finding", "opacity"], "image_size": 32},
        "privacy": {"enabled": False},
        "train": {"rounds": rounds, "learning_rate": 0.5},
        "data": {"source": "phantom"},
        "simulation": {"sites": 3, "patients": 12},
        "federation": {"round_minutes": 8, "approval_hours": 0.2},
    }
    return RunConfig.model_validate(tree)


@contextlib.contextmanager
def supernodes(c, lab, folders):
    """A stock SuperNode for each site folder, enrolled; each task is a process of Flower's. Yields name -> process."""
    running = {}
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(lab["tls_door"](c))
        for folder in folders:
            node_key.create(folder / "node.key")
            public = node_key.public_text(node_key.load(folder / "node.key"))
            sites.redeem(c, sites.invite(c, folder.name, 1.0).token, public, {})
            sites.set_node(c, folder.name, control.register_node(c, public, folder.name))
            argv = [
                *(str(Path(sys.executable).with_name("flower-supernode")), "--superlink", f"localhost:{port}"),
                *("--root-certificates", str(c.folder / "pki/ca.crt")),
                *("--auth-supernode-private-key", str(folder / "node.key")),
                *("--host", "127.0.0.1", "--port", str(service.free_port())),
                *("--node-config", f'fedscan-site="{folder}"'),
            ]
            env = {**service.environment(c), "FLWR_HOME": str(folder / "home"), "HOME": str(folder)}
            with open(folder / "supernode.log", "ab") as log:
                process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True, cwd=folder)
            running[folder.name] = process
            stack.callback(process.wait)
            stack.callback(_end, process)
        lab["wait_for"](lambda: len(control.online_nodes(c)) == len(folders), 200)
        yield running


def _end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def launch(c, run):
    """What the edge does."""
    folder = c.runs / RUN
    folder.mkdir(mode=0o700)
    files.write_atomic(folder / tracking.RUN, config.to_toml(run).encode())
    now = datetime.now(UTC)
    asked = Order(RUN, config.for_sites(run), "ada", now.isoformat(timespec="seconds"))
    asked = dataclasses.replace(asked, valid_until=(now + timedelta(days=1)).isoformat(timespec="seconds"))
    files.write_atomic(folder / "order.json", order.to_text(asked).encode())
    return folder


def state(folder):
    return tracking.read_state(folder)["state"]


def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.timeout(1500)
def test_the_deployed_run_is_the_simulated_one_bit_by_bit_also_when_the_serverapp_is_killed(tmp_path, lab):
    run = run_config(rounds=2)
    fedscan.simulate(run, out=tmp_path / "simulated")
    built = federation.build(run, federation.plan(run), tmp_path / "sites", lambda done: None)
    c = lab["make"](tmp_path / "state")
    with lab["running"](c) as (_, superexec), supernodes(c, lab, [site.folder for site in built]):
        folder = launch(c, run)
        began = time.monotonic()
        flower = control.start_run(c, RUN)
        lab["wait_for"](lambda: len(tracking.read_rounds(folder)) >= 1 or state(folder) == "failed", 500)
        assert state(folder) == "running", (tracking.read_state(folder), (folder / tracking.LOG).read_text())
        for pid in subprocess.run(
            ["pgrep", "-f", "flwr-serverapp", "--pgroup", str(os.getpgid(superexec.pid))],
            capture_output=True,
            text=True,
        ).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        lab["wait_for"](lambda: control.run_status(c, flower).over, 200)
        assert state(folder) == "running" and not (folder / tracking.SUMMARY).exists()
        control.start_run(c, RUN)  # as the edge's watchdog does
        lab["wait_for"](lambda: state(folder) in tracking.FINAL, 500)
        print(f"{time.monotonic() - began:.0f} s", [r["seconds"] for r in tracking.read_rounds(folder)])
    assert state(folder) == "finished", (folder / tracking.LOG).read_text()
    assert [(r["sites"], r["missing"]) for r in tracking.read_rounds(folder)] == [(3, [])] * 2
    assert same(load_file(folder / tracking.MODEL), load_file(tmp_path / "simulated" / tracking.MODEL))
    for text in (path.read_text(errors="replace") for path in c.logs.iterdir() if path.is_file()):
        assert "Traceback" not in text
