"""An in-process Grid: hands each message to the ClientApp, one site after another, in this process.

Same contract as Flower's own runtimes: records are copied between server and site (the real ones serialise; here the
bytes of an array, which cannot change, are shared), a ClientApp that raises becomes an error reply, a node keeps its
Context over rounds. A pushed message is run when it is pulled, one per call, so that the server adds one update before
the next one exists.
"""

import copy
import itertools
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_RUN_ID = 1
_SERVER = 1
_FIRST_NODE = 1000


class InlineGrid(Grid):
    """Runs `client_app` for `sites` nodes; node i has node_config {"partition-id": i, "num-partitions": sites}."""

    def __init__(self, client_app: ClientApp, sites: int) -> None:
        # Message() reads the process's identity; outside Flower's own processes nobody has set it.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, _RUN_ID, _SERVER
        self._client_app = client_app
        self._contexts = {
            _FIRST_NODE + i: Context(
                run_id=_RUN_ID,
                node_id=_FIRST_NODE + i,
                node_config={"partition-id": i, "num-partitions": sites},
                state=RecordDict(),
                run_config={},
            )
            for i in range(sites)
        }
        self._numbers = itertools.count(1)
        self._pushed: dict[str, Message] = {}
        self._run: Run | None = None

    def set_run(self, run: Run) -> None:
        """Keeps the run; nothing here needs it."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that was set."""
        if self._run is None:
            raise RuntimeError("no run was set")
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Deprecated in Flower; kept because the base class asks for it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in order."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All nodes, in order."""
        return [NodeInfo(node_id=node) for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes messages; they run when they are pulled."""
        taken = []
        for message in messages:
            name = f"inline-{next(self._numbers)}"
            message.metadata.__dict__.update(_message_id=name, _run_id=_RUN_ID, _src_node_id=_SERVER)
            self._pushed[name] = _copy(message)
            taken.append(name)
        return taken

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Runs the oldest of these messages and returns its reply."""
        wanted = set(message_ids)
        name = next((n for n in self._pushed if n in wanted), None)
        return [] if name is None else [self._call(self._pushed.pop(name))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pushes, then pulls every reply; `timeout` has no meaning in one process."""
        names = list(self.push_messages(messages))
        return [reply for name in names for reply in self.pull_messages([name])]

    def _call(self, sent: Message) -> Message:
        try:
            reply = self._client_app(sent, self._contexts[sent.metadata.dst_node_id])
        except Exception:  # the text could depend on patients: as in a deployed agent, it stays at the site
            return Message(Error(code=2, reason="the site's app failed"), reply_to=sent)
        return _copy(reply)


def _copy(message: Message) -> Message:
    metadata = copy.deepcopy(message.metadata)
    if message.has_error():
        return make_message(metadata=metadata, error=copy.deepcopy(message.error))
    return make_message(metadata=metadata, content=copy.deepcopy(message.content))
