"""One task: pull it, guard it, have the worker run the installed ClientApp on it, send the reply.

In place of `flwr-clientapp`, which unpacks the server's bundle, puts its folder first on Python's path and imports from
it (`run_clientapp.py` of Flower 1.41.0). Here nothing of a bundle is ever written or imported: see `inspect.py`.

This process speaks with the SuperNode and does no work. The work is done by `worker.py`, which may run out of memory or
be killed; whatever befalls it, the server is told `failed`, the same as for any other failure.
"""

import os
import sys
import time
import traceback
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Error, Message

from fedscan_client import site as sites
from fedscan_client.audit import log
from fedscan_client.node import inspect, worker
from fedscan_client.node.inspect import Refused
from fedscan_core import wire
from fedscan_core.wire import Reply

SITE_KEY = "fedscan-site"  # node_config: the site's folder, as `fedscan_client.app` reads it
_LOOK_AGAIN = 0.05  # seconds
_REFUSED_CODE = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION: an answer, not a lost node


def main(token: str, kind: str, address: str, site: str, work: Connection) -> None:
    """Runs one task to its end; the process should end with it.

    Without a reply the SuperNode waits until the task's token expires (60 s) and then answers for it, so whatever fails
    before the reply is sent ends this process and nothing else.

    Args:
        token: which task; it is the password for the task's input and output.
        kind: the task's type.
        address: HOST:PORT of the SuperNode on this machine.
        site: the site's folder.
        work: the worker's pipe; no other task uses it before this one has ended.
    """
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.runtime import run_clientapp

    worker.die_with(os.getppid())
    began = time.monotonic()
    version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    interceptors: list[ProtobufClientInterceptor] = [version, RuntimeTokenHttpInterceptor(token)]
    client = RuntimeHttpClient.from_server_address(
        address, True, None, interceptors, retry_invoker=make_simple_http_retry_invoker()
    )
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    # A task is handed out while its message is still arriving; stock, it then looks again after 1, 2, 4, ... seconds.
    stock = vars(run_clientapp)["pull_and_inflate_object_from_tree"]
    vars(run_clientapp).update(
        pull_and_inflate_object_from_tree=partial(
            stock, initial_backoff=_LOOK_AGAIN, backoff_cap=20 * _LOOK_AGAIN, max_tries_per_object=None
        )
    )
    message, context, run, fab = run_clientapp.pull_task_input(client)
    folder, pulled = Path(site), time.monotonic()
    try:
        inspect.task_kind(kind)
        inspect.app(fab.content, fab.hash_str, run.fab_id, run.fab_version)
        inspect.run_config(context.run_config)
        inspect.message(message.metadata.message_type)
    except Refused as refused:
        log.append(folder, "request", outcome=refused.reason, bundle=fab.hash_str[:80])
        reply = Message(Error(_REFUSED_CODE, refused.reason), reply_to=message)
    else:
        del fab
        context.node_config = {SITE_KEY: site}
        reply = answer(work, message, context, folder)
    worked = time.monotonic()
    run_clientapp.push_message(client, reply, context)
    run_clientapp.push_task_output(client, None, "completed", "")  # no context: a run is kept nowhere but at the site
    heartbeat.stop()
    client.close()
    seconds = (pulled - began, worked - pulled, time.monotonic() - worked)  # to the site's own log
    told = "received in {:.1f} s, worked on for {:.1f} s, handed over in {:.1f} s".format(*seconds)
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S} task: {message.metadata.message_type} {told}", file=sys.stderr)


def answer(work: Connection, message: Message, context: Context, site: Path) -> Message:
    """The app's reply, made by the worker, or the constant `failed` where that has ended without one.

    Args:
        work: the worker's pipe.
        message: what the server asks.
        context: with the site's folder in node_config.
        site: that folder.
    """
    content = worker.ask(work, message, context)
    if content is None:
        print("task: the worker ended without an answer; the server hears 'failed'", file=sys.stderr)
        content = wire.reply_record(failed(site))
    return Message(content, reply_to=message)


def failed(site: Path) -> Reply:
    """The constant answer, like `fedscan_client.app` gives it: the site's name and its log's anchor."""
    name, anchor = "unknown", ""
    try:
        name = sites.load(site).name
        anchor = log.append_all(site, [("answer", {"status": "failed"})])
    except Exception:
        traceback.print_exc()  # to the site's own log
    return Reply(name, "failed", anchor=anchor)
