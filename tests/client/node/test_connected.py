"""The whole node against Flower's own SuperLink over TLS: rounds, pause, kills, restart, foreign bundle and key."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedscan_client import connection as connections
from fedscan_client.connection import Connection
from fedscan_client.node import inspect, status
from fedscan_core import bundle, config, node_key, wire
from fedscan_core.order import Order
from fedscan_models import registry

pytestmark = pytest.mark.deployed

AGENT = """
import signal, sys, threading
from pathlib import Path
from fedscan_client.node import start
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
start.start(Path(sys.argv[1]), stop, lambda line: print(line, flush=True), keep=("PYTHONPATH",))
"""
PATIENCE = 240.0  # seconds: the machine may be busy, and a killed node is let in again after a minute


@pytest.fixture(scope="module")
def link(lab, tmp_path_factory):
    with lab.superlink(tmp_path_factory.mktemp("link")) as link:
        yield link


@pytest.fixture
def agent(lab, link, make_site, tmp_path):
    """A running agent of a registered site: its process, its folder and its node id."""
    site = make_site(tmp_path / "north").folder
    shutil.copy(link.ca, site / connections.CA_FILE)
    made = Connection(link.address, "lab", site / connections.CA_FILE, "north", "2026-01-01T00:00:00+00:00")
    connections.save(site, made)
    node_id = link.register(node_key.create(site / connections.NODE_KEY), f"north{time.time_ns()}")
    with (site / "agent.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", AGENT, str(site)], env=os.environ, stdout=log, stderr=log)
    try:
        lab.wait_for(lambda: node_id in link.online(), PATIENCE)
        yield process, site, node_id
    finally:
        process.terminate()
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()


def asked(make_run, rounds):
    """A query and some rounds of a small run."""
    order, run = Order("demo-1", config.for_sites(make_run(train={"rounds": 20}))), make_run()
    model = {name: value.numpy() for name, value in registry.for_run(run).module.state_dict().items()}
    train = [("train", wire.request_record(wire.Request(order, number, model))) for number in rounds]
    return [("query", wire.request_record(wire.Request(order, 0))), *train]


def told(link):
    import json

    path = link.folder / "toy.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(lab, link, asked, content=bundle.CONTENT):
    """Starts a run that asks these things, and forgets the answers of the one before."""
    (link.folder / "toy.jsonl").unlink(missing_ok=True)
    (link.folder / "toy.pickle").write_bytes(pickle.dumps(asked))
    return link.run(content, {bundle.RUN_KEY: "demo-1"})


def children(pid):
    """Processes below this one, with their command lines."""
    found, todo = {}, [pid]
    while todo:
        parent = todo.pop()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ValueError):
                continue
            if above == parent:
                found[int(entry.name)] = line
                todo.append(int(entry.name))
    return found


def named(agent, word):
    return [pid for pid, line in children(agent.pid).items() if word in line]


def test_rounds_a_pause_and_a_foreign_bundle(lab, link, agent, make_run):
    process, site, node_id = agent
    run(lab, link, asked(make_run, (1, 2)))
    lab.wait_for(lambda: told(link) and "done" in told(link)[-1], PATIENCE)
    statuses = [line["reply"]["status"]["status"] for line in told(link)[:-1]]
    assert statuses == ["ok", "ok", "ok"] and told(link)[1]["arrays"]["update"]
    assert not any("token" in line for line in children(process.pid).values())  # nothing for ps to show

    assert status.pause(site)
    lab.wait_for(lambda: not children(process.pid), 60)
    lab.wait_for(lambda: node_id not in link.online(), 60)
    assert status.resume(site)
    lab.wait_for(lambda: node_id in link.online(), PATIENCE)

    code = {"pyproject.toml": bundle.PROJECT.encode(), "fedscan_client/app.py": b"open('/tmp/fedscan-pwned', 'w')"}
    run(lab, link, asked(make_run, ()), bundle.pack({**code, ".info/CONTENT": bundle.listing(code)}))
    lab.wait_for(lambda: told(link) and "done" in told(link)[-1], PATIENCE)
    assert told(link)[0]["error"] == inspect.FOREIGN_BUNDLE
    assert not Path("/tmp/fedscan-pwned").exists() and not (site / "agent" / "flower" / "apps").exists()


@pytest.mark.parametrize("victim", ["node.supernode", "node.executor", "multiprocessing.forkserver"])
def test_a_part_that_is_killed_comes_back(lab, link, agent, make_run, victim):
    process, _, _ = agent
    run(lab, link, asked(make_run, (1,)))
    lab.wait_for(lambda: told(link) and "done" in told(link)[-1], PATIENCE)
    for pid in named(process, victim):
        os.kill(pid, signal.SIGKILL)
    time.sleep(3)
    run(lab, link, asked(make_run, (2,)))
    lab.wait_for(lambda: told(link) and "done" in told(link)[-1], PATIENCE + 120)
    assert process.poll() is None
    assert all(line.get("reply", {}).get("status", {}).get("status") in ("ok", None) for line in told(link)[:-1])


def test_a_server_that_restarts_finds_the_site_again(lab, link, agent, make_run):
    _, _, node_id = agent
    link.processes[0].kill()
    link.processes[0].wait()
    time.sleep(5)
    link.processes[0] = link.start_superlink()
    lab.wait_for(lambda: node_id in link.online(), PATIENCE)
    run(lab, link, asked(make_run, (1,)))
    lab.wait_for(lambda: told(link) and "done" in told(link)[-1], PATIENCE)
    assert told(link)[1]["reply"]["status"]["status"] == "ok"


def test_an_unknown_key_is_not_let_in(lab, link, make_site, tmp_path):
    site = make_site(tmp_path / "stranger").folder
    shutil.copy(link.ca, site / connections.CA_FILE)
    connections.save(
        site, Connection(link.address, "lab", site / connections.CA_FILE, "x", "2026-01-01T00:00:00+00:00")
    )
    node_key.create(site / connections.NODE_KEY)
    before = link.online()
    with (site / "agent.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", AGENT, str(site)], env=os.environ, stdout=log, stderr=log)
    try:
        lab.wait_for(lambda: "supernode: ended" in (site / "agent.log").read_text(), PATIENCE)
        assert link.online() <= before and process.poll() is None  # it tries again, in case the key is still to come
    finally:
        process.terminate()
        process.wait(60)
