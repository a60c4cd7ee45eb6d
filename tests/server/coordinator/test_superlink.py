"""Flower's SuperLink as we set it up, and its client, without a server: what it forgets, what it refuses to start."""

import contextlib
import importlib
import secrets
import sqlite3

import pytest

from fedscan_core import bundle
from fedscan_core.errors import ConfigError
from fedscan_server.coordinator import control, superlink


def test_the_runs_id_goes_under_the_key_that_the_bundle_has():
    assert control.CONFIG_KEY == bundle.RUN_KEY


def test_a_superlink_that_is_down_is_said(coordinator):
    with pytest.raises(ConfigError, match="does not answer"):
        control.online_nodes(coordinator)


def test_a_proxy_in_the_environment_never_sees_the_secret(coordinator, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ConfigError, match=rf"does not answer on {coordinator.superlink}"):
        control.online_nodes(coordinator)


@pytest.fixture
def app(coordinator, monkeypatch):
    sql = importlib.import_module("flwr.supercore.sql_mixin")
    monkeypatch.setattr(sql, "SQLITE_PRAGMAS", sql.SQLITE_PRAGMAS)  # put back afterwards
    return superlink.make_app(coordinator)


def found(c, planted: bytes) -> list[str]:
    """Files of the SuperLink that hold these bytes."""
    files = [path for path in c.flower_database.parent.iterdir() if path.is_file()]
    return [path.name for path in files if planted in path.read_bytes()]


@pytest.mark.slow
def test_a_delivered_update_leaves_no_byte_behind(coordinator, app):
    """Through Flower's own store: put, found on disk, deleted, gone from the file and from the write-ahead log."""
    from flwr.app.message.arraychunk import ArrayChunk
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.supercore.inflatable.inflatable_object import get_object_id

    store = app.state.linkstate_factory.state().object_store
    planted = secrets.token_bytes(64)
    ids = []
    for number in range(20):
        content = ArrayChunk(memoryview(planted * 2000 + bytes([number]))).deflate()
        ids.append(get_object_id(content))
        store.preregister(7, ObjectTree(object_id=ids[-1]))
        store.put(ids[-1], content)
    superlink.tidy(coordinator, idle=False)
    assert found(coordinator, planted) == ["state.db"]
    for object_id in ids[:10]:  # delivered one by one
        store.delete(object_id)
    store.delete_objects_in_run(7)  # what a finished run left
    superlink.tidy(coordinator, idle=False)
    assert found(coordinator, planted) == []


@pytest.mark.slow
def test_an_idle_database_is_shrunk_and_a_busy_one_is_left(coordinator, app):
    app.state.linkstate_factory.state()
    with contextlib.closing(sqlite3.connect(coordinator.flower_database)) as db:
        db.execute("CREATE TABLE large (x BLOB)")
        db.executemany("INSERT INTO large VALUES (?)", [(bytes(2**20),)] * 20)
        db.execute("DROP TABLE large")
        db.commit()
    superlink.tidy(coordinator, idle=False)
    assert coordinator.flower_database.stat().st_size > superlink.SHRINK_BYTES
    superlink.tidy(coordinator, idle=True)
    assert coordinator.flower_database.stat().st_size < 2 * 2**20


def test_another_flower_is_refused(coordinator, monkeypatch):
    monkeypatch.setattr(superlink, "version", lambda name: "1.42.0")
    with pytest.raises(ConfigError, match=r"1\.42\.0"):
        superlink.make_app(coordinator)


def test_a_flower_whose_settings_moved_is_refused(coordinator, monkeypatch):
    monkeypatch.setattr(superlink, "_SETTINGS", superlink._SETTINGS | {"another"})
    with pytest.raises(ConfigError, match="SuperLinkLifespanConfig"):
        superlink.make_app(coordinator)


def test_an_empty_secret_opens_nothing(coordinator):
    (coordinator.folder / "secrets" / "control").write_text("")
    with pytest.raises(ConfigError, match="too short"):
        superlink.make_app(coordinator)
