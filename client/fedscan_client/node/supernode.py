"""Flower's SuperNode with six changes.

It opens no bundle, waits for no lost task, is held up by no ended run, keeps no reply back, keeps times to itself, and
asks again soon.

Stock, it unzips and parses whatever bundle the server sends to find its default configuration
(`start_client_internal.py` of 1.41.0, `get_fused_config_from_fab`): a broken zip ends the process, a bomb fills its
memory. Ours compares the bytes. Of a foreign bundle only the digest is kept, and its task is refused by `task.py`,
which tells the server why.

Stock, a task that ends between fetching its input and fetching its message is never answered for, and the SuperNode
waits for ever for a reply (`in_memory_nodestate.py`, `_store_error_replies`, leaves out what was not retrieved). Ours
answers for it when the task's token expires, like for any other.

Stock, a run that ends while its message is being fetched leaves a task whose message never comes
(`start_client_internal.py`: RunNotRunningException is no Exception, so it passes by the clause that clears up). Whoever
takes that task waits for hours. Ours clears up.

Stock, replies are sent after a message has come and at no other time, and any one reply is enough (`_push_messages`).
After one for a run that had ended, each waits for the next round's message: the site is late for ever. Ours are sent.

Stock, each reply tells the server to the microsecond how long the ClientApp worked (`fleet_http_connection.py`,
`clientapp_runtime_list`), which depends on who was sampled. Ours says 0.

Stock, it asks for the next message 3 seconds after it found none, so a round takes 3 seconds where the work takes one.
Ours asks again sooner when it has just worked, and falls back to Flower's pace when nothing comes.

    python -P -s -m fedscan_client.node.supernode ...      arguments as `flower-supernode`
"""

import hashlib
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

from fedscan_client.node import flower
from fedscan_core import bundle

SOON = (0.1, 0.2, 0.4, 0.8, 1.5)  # seconds between two questions after a message was handled


def configuration(content: bytes, run: Any) -> dict[str, Any]:
    """A run's configuration: the known bundle's single key and what the run says of it.

    A run of a foreign bundle, or of the known one under a wrong hash, gets {}, and from now on goes by `foreign`.
    """
    if content != bundle.CONTENT or run.fab_hash != bundle.SHA256:
        run.fab_hash = foreign(content)
        return {}
    return {bundle.RUN_KEY: "", **run.override_config}


def foreign(content: bytes) -> str:
    """The name by which a foreign bundle is known here. It is no bundle's hash."""
    return f"foreign-{hashlib.sha256(content).hexdigest()}"


def keep_no_bundle(state_class: Any) -> None:
    """Makes a node state keep the known bundle only; of a foreign one it keeps the name.

    Stock, a bundle under a wrong hash ends the SuperNode with a ValueError.
    """
    stock = state_class.store_fab

    def store(self: Any, fab: Any) -> str:
        name = foreign(fab.content)
        with self.lock_fab_store:
            self.fab_store[name] = type(fab)(name, b"", {})
        if fab.content == bundle.CONTENT and fab.hash_str == bundle.SHA256:
            return str(stock(self, fab))
        return name

    state_class.store_fab = store


def answer_for_all(state_class: Any) -> None:
    """Makes a node state answer for every message of a run whose task is gone, also for those not yet retrieved."""
    stock = state_class._store_error_replies

    def store(self: Any, run_ids: set[int], error: Any) -> None:
        with self.lock_msg_store:
            for entry in self.msg_store.values():
                if entry.message.metadata.run_id in run_ids:
                    entry.is_retrieved = True
        stock(self, run_ids, error)

    state_class._store_error_replies = store


def tell_no_time(state_class: Any) -> None:
    """Makes a node state say of every message that it took no time."""
    state_class.get_message_processing_duration = lambda self, message_id: 0.0


def pulling(stock: Callable[..., int | None], wait: Callable[[float], None] = time.sleep) -> Callable[..., Any]:
    """`_pull_and_store_message` that clears up after a run that has ended, lets replies go, and asks again soon.

    After a message it asks after each of the pauses of `SOON`, until the next one has come. What it returns is the
    run's id, or 0 where no message has come but a reply waits: Flower's loop looks only whether it is None.
    """
    worked = False

    def pull(**given: Any) -> int | None:
        nonlocal worked
        given |= {name: _failing(given[name]) for name in ("pull_object", "confirm_message_received")}
        pauses, worked = SOON if worked else (), False
        for pause in (0.0, *pauses):
            wait(pause)
            run_id = stock(**given)
            if run_id is None and _waits(given["state"]):
                run_id = 0
            if run_id is not None:
                worked = True
                return run_id
        return None

    return pull


def _waits(state: Any) -> bool:
    """Whether a reply is there that has not been fetched to be sent. Looking fetches none: Flower fetches each once."""
    state.get_messages_legacy(run_ids=[])  # of no run: but now tasks that nobody works on are answered for
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    return any(not entry.is_retrieved and entry.message.metadata.reply_to_message_id for entry in entries)


def _failing(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, for which an ended run is an error like any other."""
    from flwr.supercore.run import RunNotRunningException

    def called(*args: Any) -> Any:
        try:
            return call(*args)
        except RunNotRunningException:
            raise RuntimeError("the run has ended") from None

    return called


def change() -> None:
    """Makes the changes to Flower in this process."""
    loop = importlib.import_module("flwr.supernode.start_client_internal")
    loop.__dict__.update(
        get_fused_config_from_fab=configuration, _pull_and_store_message=pulling(loop._pull_and_store_message)
    )
    state = importlib.import_module("flwr.supernode.nodestate.in_memory_nodestate").InMemoryNodeState
    keep_no_bundle(state)
    answer_for_all(state)
    tell_no_time(state)


def main() -> None:
    """Runs the SuperNode until it is told to stop; see `flower-supernode --help` for its arguments.

    Raises:
        MissingExtra: see `flower.check`.
    """
    flower.quiet()
    flower.check()
    change()
    sys.argv[0] = "flower-supernode"
    command = importlib.import_module("flwr.supernode.cli.flower_supernode")
    command.flower_supernode()


if __name__ == "__main__":
    main()
