"""The changes to Flower's SuperNode: it opens no bundle, and answers also for a task that nobody finishes."""

import sys
from datetime import timedelta
from typing import Any

import pytest

from fedscan_client.node import supernode
from fedscan_core import bundle


@pytest.fixture(scope="module")
def fake(lonely_node):
    """The class FakeServer of conftest.py."""
    return sys.modules[type(lonely_node).__module__].FakeServer


class Run:
    def __init__(self, fab_hash, **override):
        self.fab_hash, self.override_config = fab_hash, override


def test_the_known_bundle_has_one_key_of_configuration():
    run = Run(bundle.SHA256)
    assert supernode.configuration(bundle.CONTENT, run) == {bundle.RUN_KEY: ""}
    run = Run(bundle.SHA256, **{bundle.RUN_KEY: "demo-1", "lr": 1.0})
    assert supernode.configuration(bundle.CONTENT, run) == {bundle.RUN_KEY: "demo-1", "lr": 1.0}  # refused by the guard


@pytest.mark.parametrize(("content", "claimed"), [(b"PK", bundle.SHA256), (b"PK", "x"), (bundle.CONTENT, "x")])
def test_a_foreign_bundle_is_a_name_and_no_bytes(lonely_node, content, claimed):
    from flwr.supercore.fab import Fab

    run = Run(claimed)
    assert supernode.configuration(content, run) == {}
    assert run.fab_hash == supernode.foreign(content) and run.fab_hash not in (claimed, bundle.SHA256)
    lonely_node.state.store_fab(Fab(claimed, content, {"valid_license": "x"}))
    kept = lonely_node.state.get_fab(run.fab_hash)
    assert (kept.content, kept.hash_str, kept.verifications) == (b"", run.fab_hash, {})
    known = lonely_node.state.get_fab(bundle.SHA256)
    assert known is None or known.content == bundle.CONTENT  # never another's bytes under its hash


def test_a_task_that_dies_before_it_fetched_its_message_is_answered_for(lonely_node, fake):
    """Stock Flower waits for ever for that answer."""
    run_id = lonely_node.pull(fake())
    (task,) = [one for one in lonely_node.state.get_tasks() if one.run_id == run_id]
    assert lonely_node.state.claim_task(task.task_id) and lonely_node.state.activate_task(
        task.task_id
    )  # it has asked for its input
    assert not lonely_node.state.get_messages_legacy(run_ids=[run_id], is_reply=True)
    lonely_node.state.task_token_store[task.task_id].active_until -= timedelta(hours=1)
    _, reason = lonely_node.reply(run_id, 5)
    assert reason == "ClientApp stopped responding."


def test_a_run_that_ends_while_its_message_comes_leaves_no_task(lonely_node, fake):
    """Stock Flower leaves a task whose message never comes."""
    run_id = lonely_node.pull(fake(ends=0.0))
    tasks = [one for one in lonely_node.state.get_tasks() if one.run_id == run_id]
    assert tasks and all(task.status.status == "finished" for task in tasks)
    assert not lonely_node.state.get_messages_legacy(run_ids=[run_id])


def test_a_reply_that_waits_is_sent_without_another_message(lonely_node, fake):
    """Stock Flower sends replies only after a message has come: a site with one too many is a round late for ever."""
    asked: dict[str, Any] = {"pull_object": print, "confirm_message_received": print, "state": lonely_node.state}
    pull = supernode.pulling(lambda **given: None, lambda seconds: None)
    assert pull(**asked) is None
    run_id = lonely_node.pull(fake())
    (task,) = [one for one in lonely_node.state.get_tasks() if one.run_id == run_id]
    assert lonely_node.state.claim_task(task.task_id) and lonely_node.state.activate_task(task.task_id)
    assert pull(**asked) is None  # it is being worked on
    lonely_node.state.task_token_store[task.task_id].active_until -= timedelta(hours=1)
    assert pull(**asked) is not None
    lonely_node.reply(run_id, 5)  # as `_push_messages` fetches it: the look before has left it there
    assert pull(**asked) is None


def test_after_a_message_it_asks_again_soon_and_then_at_flowers_pace(lonely_node):
    told = iter([None, 7, 7, None, None, 7, *[None] * 20])
    waited: list[float] = []
    asked: dict[str, Any] = {"pull_object": print, "confirm_message_received": print, "state": lonely_node.state}
    pull = supernode.pulling(lambda **given: next(told), waited.append)
    first, *soon = 0.0, *supernode.SOON
    assert pull(**asked) is None and waited == [first]  # idle: one question, and Flower's loop sleeps for 3 s
    assert pull(**asked) == 7 and pull(**asked) == 7
    waited.clear()
    assert pull(**asked) == 7 and waited == [first, *soon[:2]]
    waited.clear()
    assert pull(**asked) is None and waited == [first, *soon]
    waited.clear()
    assert pull(**asked) is None and waited == [first]
