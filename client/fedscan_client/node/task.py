"""One task: pull it, guard it, run the installed ClientApp on it in a child, send the reply.

In place of `flwr-clientapp`, which unpacks the server's bundle, puts its folder first on Python's path and imports from
it (`run_clientapp.py` of Flower 1.41.0). Here nothing of a bundle is ever written or imported: see `inspect.py`.

This process speaks with the SuperNode and does no work. The work is done in a child, which may run out of memory or be
killed; whatever befalls it, the server is told `failed`, the same as for any other failure.
"""

import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict

from fedscan_client import site as sites
from fedscan_client.audit import log
from fedscan_client.dp import plans
from fedscan_client.node import inspect
from fedscan_client.node.inspect import Refused
from fedscan_core import wire
from fedscan_core.wire import Reply

SITE_KEY = "fedscan-site"  # node_config: the site's folder, as `fedscan_client.app` reads it
_REFUSED_CODE = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION: an answer, not a lost node

App = Callable[[Message, Context], Message]


def main(token: str, kind: str, address: str, site: str, known: bytes, back: Connection) -> None:
    """Runs one task to its end; the process should end with it.

    Without a reply the SuperNode waits until the task's token expires (60 s) and then answers for it, so whatever fails
    before the reply is sent ends this process and nothing else.

    Args:
        token: which task; it is the password for the task's input and output.
        kind: the task's type.
        address: HOST:PORT of the SuperNode on this machine.
        site: the site's folder.
        known: the plans of earlier tasks (`dp.plans.kept`), so that they are not made again; b"" at first.
        back: takes the plans that there are after this task.
    """
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

    _die_with(os.getppid())
    began = time.monotonic()
    version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    interceptors: list[ProtobufClientInterceptor] = [version, RuntimeTokenHttpInterceptor(token)]
    client = RuntimeHttpClient.from_server_address(
        address, True, None, interceptors, retry_invoker=make_simple_http_retry_invoker()
    )
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    message, context, run, fab = pull_task_input(client)
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
        reply, known = answer(_installed, message, context, folder, known)
        back.send_bytes(known)
    worked = time.monotonic()
    push_message(client, reply, context)
    push_task_output(client, None, "completed", "")  # without a context: nothing of a run is kept outside the site
    heartbeat.stop()
    client.close()
    seconds = (pulled - began, worked - pulled, time.monotonic() - worked)  # to the site's own log
    told = "received in {:.1f} s, worked on for {:.1f} s, handed over in {:.1f} s".format(*seconds)
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S} task: {message.metadata.message_type} {told}", file=sys.stderr)


def answer(app: App, message: Message, context: Context, site: Path, known: bytes = b"") -> tuple[Message, bytes]:
    """The app's reply, made in a child process that has ended when this returns; or the constant `failed`.

    With it the plans that the child had at its end, see `dp.plans.kept`.

    Args:
        app: the ClientApp.
        message: what the server asks.
        context: with the site's folder in node_config.
        site: that folder.
        known: the plans of earlier tasks.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(app, message, context, known, writing, parent)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as file:
            data = file.read()
    finally:
        # The reply is whole, or there is none: the child has nothing left to do. It ends before the next task may
        # begin, because it holds the ledger's lock.
        _, status = os.waitpid(child, 0)
    if status == 0:
        try:
            content, known_now = pickle.loads(data)  # from our own child
            if isinstance(content, RecordDict):
                return Message(content, reply_to=message), known_now
        except Exception:
            traceback.print_exc()
    print(f"task: the work ended with status {status}; the server hears 'failed'", file=sys.stderr)
    return Message(wire.reply_record(failed(site)), reply_to=message), known


def failed(site: Path) -> Reply:
    """The constant answer, like `fedscan_client.app` gives it: the site's name and its log's anchor."""
    name, anchor = "unknown", ""
    try:
        name = sites.load(site).name
        log.append(site, "answer", status="failed")
        anchor = log.anchor(site)
    except Exception:
        traceback.print_exc()  # to the site's own log
    return Reply(name, "failed", anchor=anchor)


def _installed(message: Message, context: Context) -> Message:
    from fedscan_client.app import app

    return app(message, context)


def _work(app: App, message: Message, context: Context, known: bytes, writing: int, parent: int) -> None:
    """In the child. Nothing returns from here, and no handler or exit hook of the parent's runs."""
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _die_with(parent)
        _first_to_go()
        plans.take(known)
        reply = app(message, context)
        data = pickle.dumps((reply.content, plans.kept()), protocol=pickle.HIGHEST_PROTOCOL)
        with os.fdopen(writing, "wb") as file:
            file.write(data)
        status = 0
    except BaseException:
        traceback.print_exc()  # to the site's own log
    finally:
        os._exit(status)


_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with(parent: int) -> None:
    """This process is killed when its parent ends (Linux: PR_SET_PDEATHSIG)."""
    _LIBC.prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _first_to_go() -> None:
    """When memory runs out the kernel takes the work, and not the process that can still answer for it."""
    try:
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    except OSError:
        return
