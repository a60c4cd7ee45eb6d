#!/usr/bin/env python3
"""What a round over the network costs beyond the work in it: our node beside Flower's own, on loopback.

    scripts/bench/round.py [--sites 2] [--rounds 8] [--json]
    scripts/bench/round.py --work [--patients 40] [--rounds 4] [--json]

One SuperLink (TLS, node authentication, state on disk) serves both, with a ServerApp that asks every site for a round
as soon as the one before is complete. Seconds are from asking until every site's answer is there, the median over all
rounds but the first two, when things are imported for the first time.

- flower: `flower-supernode` as it comes, whose ClientApp sends the message back;
- fedscan: `fedscan agent start` of a small site each, which really trains: one private step of the cnn.

`floor` is what Flower's polling alone costs: a SuperNode that found nothing to do sleeps for 3 seconds.

--work asks the worker alone, with no network and no task: what the work takes the first time and from then on, for
patients with two radiographs each in the encrypted cache and the frozen scattering features. One private step.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from fedscan_client import connection as connections
from fedscan_client import keys
from fedscan_client.cohort import COLUMNS
from fedscan_client.connection import Connection
from fedscan_client.intake import cache
from fedscan_client.intake.records import Volume, Window
from fedscan_client.intake.sources.settings import Folder
from fedscan_client.intake.sources.settings import Table as TableSource
from fedscan_client.site import Site
from fedscan_client.site import save as save_site
from fedscan_core import bundle, config, node_key, wire
from fedscan_core.config import RunConfig
from fedscan_core.order import Order
from fedscan_core.policy import Policy
from fedscan_models import registry

FLOOR = 3.0  # seconds: `time.sleep(3)` in flwr/supernode/start_client_internal.py
_WARM = 2  # rounds that are not counted
_TEST_NODE = Path(__file__).resolve().parents[2] / "tests" / "client" / "node"


def main() -> None:
    """Parses, measures, prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--sites", type=int, default=2, help="default %(default)s")
    words.add_argument("--rounds", type=int, default=8, help="default %(default)s")
    words.add_argument("--json", action="store_true", help="rows as JSON on standard output and nothing else there")
    words.add_argument("--work", action="store_true", help="the worker alone: its first request and the later ones")
    words.add_argument("--patients", type=int, default=40, help="of --work; default %(default)s")
    arguments = words.parse_args()
    if arguments.sites < 1 or arguments.rounds <= _WARM:
        words.error(f"--sites must be at least 1 and --rounds more than {_WARM}")
    with tempfile.TemporaryDirectory(prefix="fedscan-round-") as folder:
        if arguments.work:
            rows = work(Path(folder), arguments.patients, arguments.rounds)
        else:
            rows = measure(Path(folder), arguments.sites, arguments.rounds)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    elif arguments.work:
        for row in rows:
            print(f"{row['kind']:6} {row['round']:3} {row['seconds']:8.2f} s")
    else:
        show(rows)


def measure(folder: Path, sites: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each variant."""
    lab, rows = _lab(), []
    for name, nodes in (("flower", flower), ("fedscan", fedscan)):
        with lab.superlink(folder / name) as link, nodes(lab, link, sites, rounds) as content:
            link.run(content, {"fedscan-run": "demo-1"})
            out = link.folder / "toy.jsonl"
            # A round takes ten times as long where the machine is busy. (Asking the SuperLink would keep it busy.)
            lab.wait_for(lambda out=out: out.exists() and '"done"' in out.read_text(), 120 + 60 * rounds)
            told = [json.loads(line) for line in out.read_text().splitlines()]
        if failed := [
            line for line in told if "error" in line or line.get("reply", {}).get("status", {}).get("reason")
        ]:
            raise SystemExit(f"{name}: a site refused: {failed[0]}")
        order = list(dict.fromkeys(line["took"] for line in told if line.get("kind") == "train"))
        median = statistics.median(order[_WARM:])
        row = {"variant": name, "sites": sites, "rounds": len(order) - _WARM, "seconds": median}
        rows.append(
            row | {"fastest": min(order), "slowest": max(order[_WARM:]), "floor": FLOOR, "over_floor": median / FLOOR}
        )
    return rows


def work(folder: Path, patients: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each request to a worker: the query, then the rounds."""
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fedscan_client.node import executor, task, worker

    site, run = _cached_site(folder / "site", patients), _run("scatter", 224)
    order = Order("demo-1", config.for_sites(run))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 7, 1
    context = Context(run_id=1, node_id=7, node_config={task.SITE_KEY: str(site)}, state=RecordDict(), run_config={})
    asked = [("query", wire.Request(order, 0))]
    asked += [("train", wire.Request(order, number, train_model(run))) for number in range(1, rounds + 1)]
    process = worker.start(executor.warm())
    rows = []
    try:
        for kind, request in asked:
            message = Message(wire.request_record(request), 7, kind)
            start = time.perf_counter()
            content = worker.ask(process.pipe, message, context)
            seconds = time.perf_counter() - start
            if content is None or wire.read_reply(content).status != "ok":
                raise SystemExit(f"{kind}: the worker did not answer")
            rows.append({"kind": kind, "round": request.round, "patients": patients, "seconds": seconds})
    finally:
        process.end()
    return rows


@contextlib.contextmanager
def flower(lab: ModuleType, link: Any, sites: int, rounds: int) -> Iterator[bytes]:
    """Flower's own SuperNodes with the app that does nothing; yields their bundle."""
    keys = [node_key.create(link.folder / f"node{number}.key") for number in range(sites)]
    ids = {link.register(key, f"site{number}") for number, key in enumerate(keys)}
    for number in range(sites):
        argv = [str(Path(sys.executable).parent / "flower-supernode"), "--superlink", f"localhost:{link.port}"]
        argv += ["--root-certificates", "ca.crt", "--auth-supernode-private-key", f"node{number}.key"]
        link.start(f"supernode{number}", [*argv, "--host", "127.0.0.1", "--port", str(lab.free_port())])
    _, content = _asked()
    (link.folder / "toy.pickle").write_bytes(pickle.dumps([("train", content)] * rounds))
    lab.wait_for(lambda: ids <= link.online(), 120)
    project = bundle.PROJECT.replace(bundle.CLIENTAPP, "noop:app").replace('"fedscan-run"\nversion', '"noop"\nversion')
    files = {"pyproject.toml": project.encode()}
    yield bundle.pack({**files, ".info/CONTENT": bundle.listing(files)})


@contextlib.contextmanager
def fedscan(lab: ModuleType, link: Any, sites: int, rounds: int) -> Iterator[bytes]:
    """Our agents, each a process of its own with a small site; yields the known bundle."""
    code = "import sys, threading, signal; from pathlib import Path; from fedscan_client.node import start; "
    code += "stop = threading.Event(); signal.signal(15, lambda *_: stop.set()); "
    code += "start.start(Path(sys.argv[1]), stop, keep=('PYTHONPATH',))"
    ids, agents = set(), []
    try:
        for number in range(sites):
            site = _site(link.folder / f"site{number}", f"site{number}")
            shutil.copy(link.ca, site / connections.CA_FILE)
            ca = site / connections.CA_FILE
            connections.save(site, Connection(link.address, "bench", ca, f"site{number}", "2026-01-01T00:00:00+00:00"))
            ids.add(link.register(node_key.create(site / connections.NODE_KEY), f"site{number}"))
            with (site / "agent.log").open("wb") as log:
                argv = [sys.executable, "-c", code, str(site)]
                agents.append(subprocess.Popen(argv, env=os.environ, stdout=log, stderr=log))
        order, _ = _asked()
        query = wire.request_record(wire.Request(order, 0))
        asked = [
            ("train", wire.request_record(wire.Request(order, n, train_model(_run())))) for n in range(1, rounds + 1)
        ]
        (link.folder / "toy.pickle").write_bytes(pickle.dumps([("query", query), *asked]))
        lab.wait_for(lambda: ids <= link.online(), 120)
        yield bundle.CONTENT
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(40)
            agent.kill()


def _run(network: str = "cnn", size: int = 32) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "demo",
            "task": {"labels": ["well", "ill"], "image_size": [size, size]},
            "model": {"name": network},
            "privacy": {"noise_multiplier": 1.0},
            "train": {"rounds": 100, "local_steps": 1, "patients_per_step": "all"},
        }
    )


def train_model(run: RunConfig) -> wire.Arrays:
    """The run's start weights."""
    return {name: value.numpy() for name, value in registry.for_run(run).module.state_dict().items()}


def _asked() -> tuple[Order, Any]:
    order = Order("demo-1", config.for_sites(_run()))
    return order, wire.request_record(wire.Request(order, 1, train_model(_run())))


def _site(folder: Path, name: str) -> Path:
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    rows = [",".join(COLUMNS)]
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        rows.append(f"{number}.png,,p{number},{('well', 'ill')[number % 2]},train,,")
    (folder / "cohort.csv").write_text("\n".join(rows) + "\n")
    allowed = Policy(max_epsilon=1e6, max_delta=1e-2, research_cohort=True, approval="auto-within-policy")
    source = {"source": TableSource(kind="table", folder=pictures)}
    save_site(Site(name=name, patients_declared=20, source=source, policy=allowed, folder=folder))
    return folder


def _cached_site(folder: Path, patients: int) -> Path:
    """A site whose patients, each with two radiographs of 1024 x 1024 pixels, are in its encrypted cache."""
    key, policy = (
        keys.SiteKey(bytes(32), bytes(32)),
        Policy(max_epsilon=1e6, max_delta=1e-2, research_cohort=True, approval="auto-within-policy"),
    )
    source = {"source": Folder(kind="folder", folder=folder / "pacs")}
    site = Site(name="north", patients_declared=patients, source=source, policy=policy, folder=folder)
    save_site(site)
    keys.put(folder, site.key, key, "bench")
    for number in range(patients):
        images = []
        for view in range(2):
            pixels = np.random.default_rng(2 * number + view).integers(0, 4096, (1, 1024, 1024), np.uint16)
            entry = cache.Entry(str(view), "s", ("well", "ill")[number % 2], "train", "", None, {}, "")
            images.append((entry, Volume(pixels, "DX", windows=(Window(2048, 4096),))))
        cache.write_patient(site.cache, key, f"{number:032x}", images)
    return folder


def _lab() -> ModuleType:
    """The coordinator that the node's tests use."""
    spec = importlib.util.spec_from_file_location("fedscan_lab", _TEST_NODE / "lab.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table("variant", "sites", "rounds", "seconds", "slowest", "over the floor of 3 s")
    for row in rows:
        numbers = (f"{row['seconds']:.2f}", f"{row['slowest']:.2f}", f"{row['over_floor']:.2f} x")
        table.add_row(row["variant"], str(row["sites"]), str(row["rounds"]), *numbers)
    Console(width=100).print(table)


if __name__ == "__main__":
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    main()
