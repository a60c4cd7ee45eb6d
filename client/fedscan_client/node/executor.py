"""Takes tasks from the SuperNode on this machine, one at a time: each in a process of its own, all with one worker.

In place of `flower-superexec`, which starts whatever command a task's type names with the task's token on its command
line. Here a task is forked from a process that has already imported torch and the ClientApp (multiprocessing's
forkserver; it never touches CUDA), so it starts in milliseconds, and its token travels through a pipe.

The next task is taken when the one before has ended, so that one task at a time uses the worker (`worker.py`). One that
has died is replaced before the next task; one that nobody needed for some minutes is ended.

    python -P -s -m fedscan_client.node.executor SITE_DIR HOST:PORT SECRET_FILE
"""

import multiprocessing
import signal
import sys
import threading
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from fedscan_client.node import flower
from fedscan_core import loopback

POLL_SECONDS = 0.25  # on this machine; the SuperNode asks the server every three seconds
WAIT_SECONDS = 1.0  # while the SuperNode does not answer
PRELOAD = ("fedscan_client.node.warm",)


class Client(Protocol):
    """What is used of Flower's RuntimeHttpClient."""

    def AcquireTask(self, request: Any) -> Any:
        """The next task that waits, with its token; empty where there is none."""


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    flower.quiet()
    flower.check()
    site, address, secret = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve(connect(address, secret.read_bytes()), site, address, stop)


def connect(address: str, secret: bytes) -> Client:
    """Flower's client of the SuperNode's API, which proves with `secret` that it may take tasks."""
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    proof = SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
    )
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    interceptors: list[ProtobufClientInterceptor] = [version, proof]
    client: Client = RuntimeHttpClient.from_server_address(address, True, None, interceptors)
    return client


def warm() -> ForkServerContext:
    """Starts the process that tasks are forked from; it imports PRELOAD while the caller goes on."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    forkserver.ensure_running()
    return context


def serve(client: Client, site: Path, address: str, stop: threading.Event) -> None:
    """Takes and runs tasks until `stop` is set, then ends the one in progress.

    Every kind of task is taken: those that are no ClientApp's are refused by `task.py`, whereas a task that nobody
    takes would keep the SuperNode waiting for ever (`start_client_internal._push_messages`).

    Args:
        client: of the SuperNode at `address`.
        site: the site's folder.
        address: HOST:PORT on this machine.
        stop: set it to end.
    """
    import httpx
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType

    from fedscan_client.node import task, worker

    context = warm()
    request = AcquireTaskRequest(supported_task_types=[kind.value for kind in TaskType])
    child: BaseProcess | None = None
    # Waits until the warm process is ready: a task that is taken before would lose its token, which lasts a minute.
    work: worker.Worker | None = worker.start(context)
    try:
        while not stop.is_set():
            if child is not None:
                child.join(POLL_SECONDS)
                if child.exitcode is None:
                    continue
                if child.exitcode != 0 and work is not None:
                    # Nobody works for a task that is gone, and no later task may hear the answer.
                    work.end()
                    work = None
                child.close()
                child = None
            if loopback.foreign(int(address.rpartition(":")[2])):  # of another account, in the SuperNode's place
                stop.wait(WAIT_SECONDS)
                continue
            try:
                answer = client.AcquireTask(request)
            except httpx.HTTPError as error:
                print(f"executor: the SuperNode does not answer ({type(error).__name__})", file=sys.stderr)
                stop.wait(WAIT_SECONDS)
                continue
            asked = answer.HasField("task") and bool(answer.token)
            if work is not None and (work.gone() or (not asked and work.idle())):
                work.end()
                work = None
            if not asked:
                stop.wait(POLL_SECONDS)
                continue
            work = work or worker.start(context)
            work.used = time.monotonic()
            what = (answer.token, answer.task.type, address, str(site), work.pipe)
            child = context.Process(target=task.main, args=what)
            child.start()
    finally:
        _end(child)
        if work is not None:
            work.end()


def _end(child: BaseProcess | None) -> None:
    if child is None:
        return
    child.terminate()
    child.join(5.0)
    child.kill()
    child.join()


if __name__ == "__main__":
    main()
