"""A SuperNode whose server is the test: Flower's own node state, local API and pulling, with no network behind them."""

import contextlib
import hashlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedscan_client import keys
from fedscan_client.intake import cache
from fedscan_client.intake.records import Volume, Window
from fedscan_client.intake.sources.settings import Folder
from fedscan_client.site import Site, load, save
from fedscan_core import bundle

HERE = Path(__file__).resolve().parent
SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="session")
def lab() -> ModuleType:
    """See lab.py."""
    spec = importlib.util.spec_from_file_location("fedscan_test_lab", HERE / "lab.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class FakeServer:
    """What a server may say of one run: everything in here is the attacker's to choose."""

    content: bytes = bundle.CONTENT
    fab_hash: str | None = None
    fab_id: str = bundle.APP_ID
    fab_version: str = bundle.VERSION
    config: dict[str, Any] | None = None
    task_type: str = "flwr-serverapp"
    message_type: str = "query"
    record: Any = None
    ends: float | None = None  # the run, so many seconds after its message was asked for


class Node:
    """Flower's SuperNode in this process: `ask` is one message from the server, to the reply it would be sent."""

    def __init__(self, address: str, state: Any, store: Any) -> None:
        self.address, self.state, self.store = address, state, store
        self._runs = 0

    def ask(self, server: FakeServer, seconds: float = 60.0) -> Any:
        """The reply to the server: a Message, and its content inflated or its error's reason."""
        return self.reply(self.pull(server), seconds)

    def pull(self, server: FakeServer) -> int:
        """One message from the server, as the SuperNode pulls it: the run's id."""
        from flwr.app import Message, RecordDict
        from flwr.supercore.fab import Fab
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
        from flwr.supercore.run import Run
        from flwr.supercore.task_identity import TaskIdentity

        internal = importlib.import_module("flwr.supernode.start_client_internal")
        self._runs += 1
        run_id = self._runs
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 0, 1
        record = RecordDict() if server.record is None else server.record
        message = Message(record, 7, server.message_type)
        message.metadata.__dict__["_run_id"] = run_id
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}
        tree = get_object_tree(message)
        digest = hashlib.sha256(server.content).hexdigest() if server.fab_hash is None else server.fab_hash
        config: dict[str, Any] = {bundle.RUN_KEY: "demo-1"} if server.config is None else server.config
        run = Run.create_empty(run_id)
        run.fab_id, run.fab_version, run.fab_hash = server.fab_id, server.fab_version, digest
        run.override_config, run.primary_task_type, run.series_id = config, server.task_type, run_id
        from flwr.app.message import remove_content_from_message
        from flwr.supercore.run import RunNotRunningException

        def ended(number: int, key: str) -> bytes:
            time.sleep(server.ends or 0.0)
            raise RunNotRunningException

        pulled = internal._pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (remove_content_from_message(message), tree),
            get_run=lambda number: run,
            get_fab=lambda name, number: Fab(digest, server.content, {}),
            pull_object=ended if server.ends is not None else lambda number, key: objects[key],
            confirm_message_received=lambda number, key: None,
            trusted_entities=None,
        )
        assert pulled == (run_id if server.ends is None else None)
        return run_id

    def reply(self, run_id: int, seconds: float) -> Any:
        """Waits for what the SuperNode would send."""
        end = time.monotonic() + seconds
        while not (replies := self.state.get_messages_legacy(run_ids=[run_id], is_reply=True)):
            assert time.monotonic() < end, "no reply"
            time.sleep(0.05)
        return replies[0], self._content(replies[0])

    def _content(self, reply: Any) -> Any:
        from flwr.app import Message
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        if reply.has_error():
            return reply.error.reason
        tree = self.store.get_object_tree(reply.metadata.message_id)
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        contents = {}
        for part in iterate_object_tree(tree):
            while (data := self.store.get(part.object_id)) == b"":
                time.sleep(0.05)
            contents[part.object_id] = data
        whole = inflate_object_from_contents(reply.metadata.message_id, contents)
        assert isinstance(whole, Message)
        return whole.content


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """See `serve`; the one that `executor` takes its tasks from."""
    with serve() as node:
        yield node


@pytest.fixture(scope="module")
def lonely_node() -> Iterator[Node]:
    """See `serve`; nobody takes its tasks."""
    with serve() as node:
        yield node


@contextlib.contextmanager
def serve() -> Iterator[Node]:
    """A SuperNode's inside with its local API on loopback, changed as `supernode.py` changes it."""
    import uvicorn
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.main import create_app
    from flwr.supernode.nodestate import NodeStateFactory

    from fedscan_client.node import supernode

    internal = importlib.import_module("flwr.supernode.start_client_internal")
    state_class = importlib.import_module("flwr.supernode.nodestate.in_memory_nodestate").InMemoryNodeState
    monkeypatch = pytest.MonkeyPatch()
    for owner, name in (
        (internal, "get_fused_config_from_fab"),
        (internal, "_pull_and_store_message"),
        (state_class, "store_fab"),
        (state_class, "_store_error_replies"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    supernode.change()
    stores = ObjectStoreFactory()
    states = NodeStateFactory(objectstore_factory=stores)
    states.state().set_node_id(7)
    app = create_app(state_factory=states, superexec_auth_secret=SECRET)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Node(f"127.0.0.1:{port}", states.state(), stores.store())
    finally:
        server.should_exit = True
        thread.join(10)
        monkeypatch.undo()


@pytest.fixture(scope="session")
def executor(node: Node, make_site: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Our executor as a process of its own, serving a small site whose cohort is in the cache: the site's folder."""
    import subprocess

    from fedscan_client.node import flower

    site = fill(make_site(tmp_path_factory.mktemp("site") / "north", rows=[])).folder
    home = site / "flower"
    home.mkdir()
    (site / "secret").write_bytes(SECRET)
    env = flower.work_environment(os.environ, home=str(home), keep=("PYTHONPATH",))
    argv = [sys.executable, "-P", "-s", "-m", "fedscan_client.node.executor", str(site), node.address]
    with (site / "executor.log").open("wb") as log:
        process = subprocess.Popen([*argv, str(site / "secret")], env=env, stdout=log, stderr=log)
    try:
        yield site
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


KEY = keys.SiteKey(bytes(range(32)), bytes(range(32, 64)))


def fill(site: Site) -> Site:
    """The site with eight patients in its cache in place of the table, all for training."""
    source = {"source": Folder(kind="folder", folder=site.folder / "pacs")}
    site = site.model_copy(update={"source": source})
    save(site)
    keys.put(site.folder, site.key, KEY, "test")
    for number in range(8):
        take_in(site.folder, number)
    return site


def take_in(folder: Path, number: int) -> str:
    """Takes in one more patient, with pixels from `number`: the pseudonym."""
    values = np.random.default_rng(number).integers(0, 256, (1, 16, 16), np.uint8)
    entry = cache.Entry("0", "s", ("well", "ill")[number % 2], "train", "", None, {}, "")
    name = f"{number:032x}"
    cache.write_patient(folder / "cache", KEY, name, [(entry, Volume(values, "DX", windows=(Window(128, 256),)))])
    return name


@pytest.fixture(scope="session")
def one_more() -> Callable[[Path, int], str]:
    """See `take_in`."""
    return take_in


@pytest.fixture
def cached() -> Callable[[Path], Any]:
    """Gives the site in this folder a cache with eight patients in place of its table; see `fill`."""
    return lambda folder: fill(load(folder))
