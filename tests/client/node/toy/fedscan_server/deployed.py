"""A toy ServerApp: sends the messages of a file to every node and writes down what they answer, one JSON line each.

TOY_IN: pickle of a list of (message type, RecordDict). TOY_OUT: where the answers go. No sites, no answer: it waits.
"""

import json
import os
import pickle
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Asks and writes down."""
    out = Path(os.environ["TOY_OUT"])
    asked = pickle.loads((out.parent / "toy.pickle").read_bytes())
    while not list(grid.get_node_ids()):
        time.sleep(0.2)
    for kind, content in asked:
        messages = [Message(content, node, kind) for node in grid.get_node_ids()]
        start = time.monotonic()
        waiting, replies = set(grid.push_messages(messages)), []
        while waiting and time.monotonic() < start + 120:
            got = list(grid.pull_messages(waiting))
            replies += got
            waiting -= {reply.metadata.reply_to_message_id for reply in got}
            time.sleep(0.1)
        took = time.monotonic() - start
        for reply in replies:
            told = {"kind": kind, "node": str(reply.metadata.src_node_id), "took": took}
            told["run"] = context.run_config.get("fedscan-run", "")
            if reply.has_error():
                told["error"] = reply.error.reason
            else:
                configs = reply.content.config_records
                told["reply"] = {name: dict(record) for name, record in configs.items()}
                told["arrays"] = {name: list(record) for name, record in reply.content.array_records.items()}
            with out.open("a") as file:
                file.write(json.dumps(told) + "\n")
    with out.open("a") as file:
        file.write(json.dumps({"done": len(asked)}) + "\n")
