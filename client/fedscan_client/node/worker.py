"""The worker: one process that runs the installed ClientApp on one request after another and keeps what it has made.

What it keeps is the site's cohort, read, decrypted and decoded (`cohort.load_patients`, which loads it again when it
changed), and the engine's plans (`dp.plans`). It is forked from the executor's warm process and dies with it; nobody
but a task of the same executor writes to its pipe. CUDA is touched here for the first time, if at all.

It holds the ledger's lock while it works on a request, and at no other time. Whatever is not a plain answer ends it: an
exception that the ClientApp let through, and also the answer `failed`, since memory that ran out or a CUDA error would
stay with the process. The executor puts another in its place before the next task.
"""

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from fedscan_client.dp import ledger_lock
from fedscan_core import wire

IDLE_SECONDS = 600.0  # without a task: then the cohort's memory is given back

App = Callable[[Message, Context], Message]


@dataclass
class Worker:
    """A worker as the executor sees it: the process, its pipe for a task to use, and when a task last did."""

    process: BaseProcess
    pipe: Connection
    used: float = field(default_factory=time.monotonic)

    def idle(self) -> bool:
        """Whether no task used it for IDLE_SECONDS."""
        return time.monotonic() - self.used > IDLE_SECONDS

    def gone(self) -> bool:
        """Whether it has ended, or left something in the pipe, which no task would understand."""
        return self.pipe.poll() or self.process.exitcode is not None

    def end(self) -> None:
        """Ends it, whatever it does."""
        self.pipe.close()  # for one that waits this is the end
        self.process.join(0.5)
        self.process.kill()
        self.process.join()
        self.process.close()


def start(context: ForkServerContext) -> Worker:
    """Forks a worker from the warm process."""
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs,))
    process.start()
    theirs.close()
    print(f"executor: a worker, process {process.pid}", file=sys.stderr)
    return Worker(process, ours)


def ask(pipe: Connection, message: Message, context: Context) -> RecordDict | None:
    """The content of the app's reply, for a task; None where the worker ended without one."""
    try:
        pipe.send_bytes(pickle.dumps((message, context), protocol=pickle.HIGHEST_PROTOCOL))
        content = pickle.loads(pipe.recv_bytes())  # from our own worker
        return content if isinstance(content, RecordDict) else None
    except Exception as error:
        if not isinstance(error, EOFError | ConnectionError):  # those say no more than that it is gone
            traceback.print_exc()  # to the site's own log
        return None


def main(pipe: Connection, app: App | None = None) -> None:
    """Answers requests until the pipe closes. Nothing returns from here, and no exit hook of a parent runs.

    Args:
        pipe: each message is a pickled (Message, Context), each answer a pickled RecordDict.
        app: the ClientApp; None = the installed one.
    """
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        die_with(os.getppid())
        _first_to_go()
        while True:
            try:
                asked = pipe.recv_bytes()
            except (EOFError, ConnectionError):  # the executor has ended, or wants no more
                status = 0
                break
            content = _answer(app or _installed, asked)
            del asked
            pipe.send_bytes(pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL))
            if not content.array_records and wire.read_reply(content).status == "failed":
                break
            del content
    except BaseException:
        traceback.print_exc()  # to the site's own log
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(status)


def _answer(app: App, asked: bytes) -> RecordDict:
    message, context = pickle.loads(asked)  # from our own task
    try:
        return app(message, context).content
    finally:
        ledger_lock.release()


def _installed(message: Message, context: Context) -> Message:
    from fedscan_client.app import app

    return app(message, context)


_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """This process is killed when its parent ends (Linux: PR_SET_PDEATHSIG)."""
    _LIBC.prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _first_to_go() -> None:
    """When memory runs out the kernel takes the worker, and not the task that can still answer for it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
