"""Three pretend hospitals behind a network that loses them, for the deployed round loop."""

import itertools
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedscan.grid import InlineGrid
from fedscan_core import config, wire
from fedscan_core.accounting import plan_for
from fedscan_core.config import RunConfig
from fedscan_core.order import Order
from fedscan_core.wire import Reply
from fedscan_server.rounds import Job

SIZES = {"ash": 120, "birch": 60, "cedar": 30}


def run_config(rounds=3, seconds=20.0, approval=20.0, **sections):
    """A small real network; `seconds` for a round, `approval` seconds to approve; no private evaluation."""
    train = {"rounds": rounds, "learning_rate": 1e4, "tail_average": 0.0} | sections.pop("train", {})
    tree = {
        "name": "demo",
        "task": {"labels": ["0", "1"], "image_size": 32},
        "privacy": {"noise_multiplier": 1.0},
        "train": train,
        "evaluation": {"private": False},
        "aggregation": {"strategy": "fedavgm", "min_sites": 2} | sections.pop("aggregation", {}),
        "federation": {"round_minutes": seconds / 60, "approval_hours": approval / 3600},
    }
    return RunConfig.model_validate({**tree, **sections})


def good_reply(site, kind, request):
    """What a site answers that works: any numbers fixed by the site, the round and the model it was sent."""
    run = config.from_server(request.config)
    anchor = wire.fingerprint({"a": np.array([list(SIZES).index(site), request.round])})
    if kind == "query":
        return Reply(site, "ok", plan=plan_for(run, SIZES[site]), anchor=anchor)
    if kind == "evaluate":
        return Reply(site, "ok", histogram=np.full((1, 1, 2, run.evaluation.bins), 50.0), anchor=anchor)
    rng = np.random.default_rng([list(SIZES).index(site), request.round, int(wire.fingerprint(request.model)[:8], 16)])
    update = {name: rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in request.model.items()}
    return Reply(site, "ok", update=update, anchor=anchor)


class Network(InlineGrid):
    """A deployed grid: sites by name, with node ids that change, and faults that a test switches on and off.

    away: cannot be reached; silent: take a question and never answer; crashing: their program dies at every question;
    slow: site -> seconds until its answer is there. `answer(site, kind, request, good)` may return another reply.
    """

    def __init__(self, answer=lambda site, kind, request, good: good):
        super().__init__(ClientApp(), 0)
        self.answer = answer
        self.registry = {2**63 + number: site for number, site in enumerate(SIZES)}
        self.away, self.silent, self.crashing = set[str](), set[str](), set[str]()
        self.slow: dict[str, float] = {}
        self.asked: list[tuple[str, int, str]] = []
        self.ttl: list[float] = []
        self.most_at_once = 0
        self._count = itertools.count()
        self._sent: dict[str, tuple[Message, float]] = {}

    def names(self):
        return dict(self.registry)

    def move(self, site):
        """The site registers anew: another node id."""
        self.forget(site)
        self.registry[2**62 + next(self._count)] = site

    def forget(self, site):
        self.registry = {node: name for node, name in self.registry.items() if name != site}

    def push_messages(self, messages):
        names = []
        for message in messages:
            known = message.metadata.dst_node_id in self.registry
            names.append(f"m{next(self._count)}" if known else "")
            if known:
                message.metadata.__dict__.update(_message_id=names[-1], _run_id=1, _src_node_id=1)
                self._sent[names[-1]] = (message, time.monotonic())
                self.ttl.append(message.metadata.ttl)
        return names

    def pull_messages(self, message_ids):
        found = [reply for name in list(message_ids) if (reply := self._reply(name)) is not None]
        self.most_at_once = max(self.most_at_once, len(found))
        return found

    def _reply(self, name):
        if name not in self._sent:
            return None
        sent, when = self._sent[name]
        site = self.registry.get(sent.metadata.dst_node_id)
        if site is None or site in self.away:
            del self._sent[name]
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "away"), reply_to=sent)
        if site in self.silent or time.monotonic() - when < self.slow.get(site, 0.0):
            return None
        del self._sent[name]
        request = wire.read_request(sent.content)
        self.asked.append((sent.metadata.message_type, request.round, site))
        if site in self.crashing:
            return Message(Error(ErrorCode.CLIENT_APP_CRASHED, "it died"), reply_to=sent)
        kind = sent.metadata.message_type
        reply = self.answer(site, kind, request, good_reply(site, kind, request))
        return Message(wire.reply_record(reply), reply_to=sent)

    def job(self, run, folder, **more):
        """A deployed job on this network that looks and asks again without delay."""
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        order = Order("demo-1", config.for_sites(run), issued=now)
        fast: dict[str, Any] = {"poll": 0.01, "again": 0.05, "names": self.names, "deployed": True}
        return Job(run, order, folder, **(fast | more))


@pytest.fixture(scope="session")
def pretend():
    """What the tests of the deployed loop build on."""
    return SimpleNamespace(Network=Network, run_config=run_config, good_reply=good_reply, sizes=SIZES)
