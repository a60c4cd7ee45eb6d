"""Every hostile shape is refused with a short reason that holds no data, and nothing of it is written or imported.

The server is the test; SuperNode, local API, executor and tasks are the real ones.
"""

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedscan_client.node import inspect
from fedscan_core import bundle, config, wire
from fedscan_core.order import Order

CODE = b"open('/tmp/fedscan-pwned', 'w').write('x')\nraise SystemExit\n"


def zipped(files: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with exactly these members, doubles too."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def ours(project: str = bundle.PROJECT, more: list[tuple[str, bytes]] | None = None) -> bytes:
    """The known bundle's files with another project or further files, well formed."""
    files = {"pyproject.toml": project.encode(), **dict(more or [])}
    return bundle.pack({**files, ".info/CONTENT": bundle.listing(files)})


def changed(old: str, new: str) -> bytes:
    assert old in bundle.PROJECT
    return ours(bundle.PROJECT.replace(old, new))


def symlink() -> bytes:
    buffer = io.BytesIO(bundle.CONTENT)
    with zipfile.ZipFile(buffer, "a") as archive:
        link = zipfile.ZipInfo("fedscan_client")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc")
    return buffer.getvalue()


def bomb() -> bytes:
    return zipped([("pyproject.toml", b"#" * 20_000_000), (".info/CONTENT", b"")], zipfile.ZIP_DEFLATED)


BUNDLES: dict[str, Callable[[], bytes]] = {
    "code": lambda: ours(more=[("evil/__init__.py", CODE)]),
    "shadows the client app": lambda: ours(more=[("fedscan_client/app.py", CODE), ("fedscan_client/__init__.py", b"")]),
    "shadows a standard module": lambda: ours(more=[("colorsys.py", CODE)]),
    "sitecustomize": lambda: ours(more=[("sitecustomize.py", CODE), ("x.pth", b"import os")]),
    "an extra text file": lambda: ours(more=[("README.md", b"hello")]),
    "a file not in the list": lambda: zipped(
        [("pyproject.toml", bundle.PROJECT.encode()), (".info/CONTENT", b""), ("evil.py", CODE)]
    ),
    "doubles": lambda: zipped([("pyproject.toml", bundle.PROJECT.encode()), ("pyproject.toml", CODE)]),
    "absolute path": lambda: ours(more=[("/tmp/fedscan-pwned", b"x")]),
    "climbs": lambda: ours(more=[("../../fedscan-pwned", b"x")]),
    "symlink": symlink,
    "bomb": bomb,
    "no zip": lambda: b"\x00" * 100,
    "empty": lambda: b"",
    "half": lambda: bundle.CONTENT[: len(bundle.CONTENT) // 2],
    "something behind": lambda: bundle.CONTENT + b"\n",
    "something before": lambda: b"#!/bin/sh\n" + bundle.CONTENT,
    "comment": lambda: bundle.CONTENT[:-2] + struct.pack("<H", 4) + b"evil",
    "one bit": lambda: bundle.CONTENT[:100] + bytes([bundle.CONTENT[100] ^ 1]) + bundle.CONTENT[101:],
    "dependencies": lambda: changed("dependencies = []", 'dependencies = ["evil"]'),
    "another publisher": lambda: changed('publisher = "fedscan"', 'publisher = "evil"'),
    "another client app": lambda: changed(bundle.CLIENTAPP, "fedscan_client.other:app"),
    "an agent app": lambda: changed("[tool.flwr.app.components]", '[tool.flwr.app.components]\nagentapp = "evil:app"'),
    "another key": lambda: changed('fedscan-run = ""', 'fedscan-run = ""\nepsilon = 1000.0'),
}


@pytest.fixture(autouse=True)
def _nothing_written(request: pytest.FixtureRequest) -> Any:
    """No refused task leaves a file of its own, here or in Flower's folder; its code never ran."""
    mark = Path("/tmp/fedscan-pwned")
    if "executor" not in request.fixturenames:
        yield
        assert not mark.exists()
        return
    executor = request.getfixturevalue("executor")
    before = {path for path in executor.rglob("*")}
    yield
    assert not mark.exists()
    new = {str(path.relative_to(executor)) for path in executor.rglob("*")} - {
        str(path.relative_to(executor)) for path in before
    }
    allowed = ("audit", "flower/source", "ledger", "outbox", "site.log", "runs", "policy.json")
    assert not [name for name in new if not name.startswith(allowed)], new
    assert not (executor / "flower" / "apps").exists()


def record(make_run: Callable[..., Any], **order: str) -> Any:
    """A query about a plain run."""
    return wire.request_record(wire.Request(Order("demo-1", config.for_sites(make_run()), **order), 0))


@pytest.fixture(scope="module")
def fake(node: Any) -> Any:
    """The class FakeServer of conftest.py."""
    import sys

    return sys.modules[type(node).__module__].FakeServer


@pytest.mark.parametrize("shape", BUNDLES)
def test_the_guard_knows_one_bundle(shape: str) -> None:
    """Under its own hash and under the known one's."""
    content = BUNDLES[shape]()
    for claimed in (bundle.SHA256, hashlib.sha256(content).hexdigest()):
        with pytest.raises(inspect.Refused, match=re.escape(inspect.FOREIGN_BUNDLE)):
            inspect.app(content, claimed, bundle.APP_ID, bundle.VERSION)
    inspect.app(bundle.CONTENT, bundle.SHA256, bundle.APP_ID, bundle.VERSION)


@pytest.mark.deployed
def test_the_known_bundle_runs(node: Any, executor: Path, fake: Any, make_run: Callable[..., Any]) -> None:
    """Otherwise the tests below would pass with an executor that refuses everything."""
    _, content = node.ask(fake(record=record(make_run)), 240)  # the first: torch is being imported
    reply = wire.read_reply(content)
    assert (reply.site, reply.status) == ("north", "ok") and reply.plan is not None


@pytest.mark.deployed
@pytest.mark.parametrize("shape", BUNDLES)
def test_a_foreign_bundle(node: Any, executor: Path, fake: Any, make_run: Callable[..., Any], shape: str) -> None:
    """Each is refused; half of them claim the known bundle's hash."""
    content = BUNDLES[shape]()
    assert content != bundle.CONTENT
    claimed = bundle.SHA256 if len(shape) % 2 else None
    _, reason = node.ask(fake(content, claimed, record=record(make_run)))
    assert reason == inspect.FOREIGN_BUNDLE


SAID = pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"fab_hash": "0" * 64}, inspect.FOREIGN_BUNDLE),
        ({"fab_id": "evil/fedscan-run"}, inspect.OTHER_APP),
        ({"fab_id": "fedscan/../../evil"}, inspect.OTHER_APP),
        ({"fab_version": "1.0.1"}, inspect.OTHER_APP),
        ({"config": {}}, inspect.OTHER_CONFIG),
        ({"config": {bundle.RUN_KEY: "../../etc"}}, inspect.OTHER_CONFIG),
        ({"config": {bundle.RUN_KEY: 7}}, inspect.OTHER_CONFIG),
        ({"config": {bundle.RUN_KEY: "demo-1", "lr": 1e9}}, inspect.OTHER_CONFIG),
        ({"message_type": "train.evil"}, inspect.OTHER_MESSAGE),
        ({"task_type": "flwr-agentapp"}, inspect.OTHER_TASK),
    ],
)


@SAID
def test_the_guard_knows_what_a_run_may_be(said: dict[str, Any], reason: str) -> None:
    told: dict[str, Any] = {"fab_hash": bundle.SHA256, "fab_id": bundle.APP_ID, "fab_version": bundle.VERSION}
    told |= {"config": {bundle.RUN_KEY: "demo-1"}, "message_type": "train", "task_type": "flwr-clientapp", **said}
    with pytest.raises(inspect.Refused, match=re.escape(reason)):
        inspect.task_kind(told["task_type"])
        inspect.app(bundle.CONTENT, told["fab_hash"], told["fab_id"], told["fab_version"])
        inspect.run_config(told["config"])
        inspect.message(told["message_type"])


@pytest.mark.deployed
@SAID
def test_what_the_server_says_of_the_run(
    node: Any, executor: Path, fake: Any, make_run: Callable[..., Any], said: dict[str, Any], reason: str
) -> None:
    _, told = node.ask(fake(record=record(make_run), **said))
    assert told == reason


@pytest.mark.deployed
def test_a_message_that_is_none(node: Any, executor: Path, fake: Any) -> None:
    """Of the right bundle, but the content is not one of ours: the constant `failed`, and no text."""
    from flwr.app import ConfigRecord, RecordDict

    other = RecordDict({"run": ConfigRecord({"protocol": 99, "round": 0, "order": "{}"})})
    for content, kind in ((RecordDict(), "query"), (RecordDict(), "train"), (other, "evaluate")):
        _, told = node.ask(fake(record=content, message_type=kind))
        reply = wire.read_reply(told)
        assert (reply.status, reply.reason, reply.plan, reply.update) == ("failed", "", None, None)


@pytest.mark.deployed
def test_a_run_that_ends_while_its_message_comes_holds_up_nobody(
    node: Any, executor: Path, fake: Any, make_run: Callable[..., Any]
) -> None:
    """The task was taken meanwhile, and waits for a message that will not come."""
    node.ask(fake(record=record(make_run)), 240)
    node.pull(fake(record=record(make_run), ends=1.5))
    _, content = node.ask(fake(record=record(make_run)), 60)
    assert wire.read_reply(content).status == "ok"


def test_reasons_are_short_and_hold_no_data() -> None:
    reasons = [str(value) for name, value in vars(inspect).items() if name.startswith(("FOREIGN", "OTHER"))]
    assert len(reasons) == 5
    for reason in reasons:
        assert len(reason) < 90 and reason.startswith("refused: ") and "/" not in reason


@pytest.mark.deployed
def test_refused_bundles_are_in_the_sites_audit_log(node: Any, executor: Path, fake: Any) -> None:
    from fedscan_client.node import supernode

    node.ask(fake(b"evil bytes"))
    told = "".join(path.read_text(errors="replace") for path in executor.rglob("audit*") if path.is_file())
    told += "".join(path.read_text() for path in (executor / "audit").rglob("*.jsonl"))
    assert inspect.FOREIGN_BUNDLE in told and supernode.foreign(b"evil bytes") in told and "evil bytes" not in told


def test_the_local_api_asks_for_the_secret(lonely_node: Any) -> None:
    """A process of this machine without the secret gets no task, and none without a task's token its input."""
    import httpx
    from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    from fedscan_client.node import executor as executors

    asked = AcquireTaskRequest(supported_task_types=["flwr-clientapp"])
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    for client in (
        executors.connect(lonely_node.address, b"another secret of another length"),
        RuntimeHttpClient.from_server_address(lonely_node.address, True, None, [version]),
    ):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            client.AcquireTask(asked)
    stranger = RuntimeHttpClient.from_server_address(
        lonely_node.address, True, None, [version, RuntimeTokenHttpInterceptor("00" * 32)]
    )
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        stranger.PullTaskInput(PullTaskInputRequest())
