"""`fedscan agent start`: keeps a site connected until it is told to stop.

    SITE/agent/          0700: lock (the agent's pid), secret, state.json, supernode.log, executor.log, flower/
         paused          while this file is there the node runs nothing and answers nothing

The agent supervises the SuperNode (the way out) and the executor (the work); it opens no ledger and holds no key. A
SuperNode that ends, for whatever reason and with whatever exit code, is started again after a pause that grows to a
minute: Flower's can end with code 0 on failure, and after a kill its key is refused for up to a minute.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from fedscan_client import connection as connections
from fedscan_client import site as sites
from fedscan_client.audit import log, syslog
from fedscan_client.connection import Connection
from fedscan_client.node import flower, publish
from fedscan_client.site import Site
from fedscan_core import node_key, supervise
from fedscan_core.errors import FolderError
from fedscan_core.files import write_atomic
from fedscan_core.supervise import Child

FOLDER, PAUSED = "agent", sites.PAUSED
_LOOK_SECONDS = 0.5  # how soon a pause is noticed

Tell = Callable[[str], None]


def start(
    folder: Path,
    stop: threading.Event,
    tell: Tell = print,
    *,
    given: Mapping[str, str] = os.environ,
    keep: tuple[str, ...] = (),
) -> None:
    """Keeps the site connected until `stop` is set. Call it from the main thread: the children die with that.

    Args:
        folder: the site's, enrolled.
        stop: set it to end.
        tell: hears one line for each thing that happens; no line depends on patients.
        given: the environment to take a few variables from, see `flower.environment`.
        keep: further variables for both children.

    Raises:
        ConfigError: no site.toml, or the site is not enrolled.
        SiteKeyError: no usable node key.
        MissingExtra: another version of Flower than the one this was written for.
        FolderError: the site was retired, another agent serves it, or the folder cannot be written.
    """
    here = sites.load(folder.absolute())
    if (here.folder / sites.RETIRED).exists():
        raise FolderError(
            f"{here.folder} was retired.", remedy="A new site gets a folder and a name of its own: fedscan agent enrol"
        )
    connection = connections.load(here.folder)
    node_key.load(here.folder / connections.NODE_KEY)
    flower.check()
    with only_agent(here.folder) as agent:
        state = State(agent / "state.json", tell)
        log.append(here.folder, "start", coordinator=connection.coordinator, address=connection.address)
        state.say("agent", f"serves {here.name} for {connection.coordinator} at {connection.address}")
        beside = ((publish.keep_published, (here.folder, stop, state.say)), (_copy_log, (here, stop, state)))
        for work, arguments in beside:
            threading.Thread(target=work, args=arguments, daemon=True).start()
        try:
            _serve(here, children(here, connection, agent, given, keep), stop, state)
        finally:
            log.append(here.folder, "stop")
            state.say("agent", "stopped")


def _copy_log(here: Site, stop: threading.Event, state: "State") -> None:
    """The audit log to the hospital's own collector, where site.toml names one."""
    syslog.follow(here.folder, here.audit, stop, lambda text: state.say("syslog", text))


def _serve(here: Site, pair: tuple[Child, Child], stop: threading.Event, state: "State") -> None:
    paused = here.folder / PAUSED
    while not stop.is_set():
        if paused.exists():
            state.say("agent", "paused: nothing runs until `fedscan agent resume`")
            while paused.exists() and not stop.wait(_LOOK_SECONDS):
                pass
            continue
        halt = threading.Event()
        watcher = threading.Thread(target=_watch, args=(paused, stop, halt), daemon=True)
        watcher.start()
        try:
            supervise.run(pair, halt, state.say)
        finally:
            halt.set()
            watcher.join()


def _watch(paused: Path, stop: threading.Event, halt: threading.Event) -> None:
    while not halt.is_set():
        if stop.wait(_LOOK_SECONDS) or paused.exists():
            halt.set()


def children(
    here: Site, connection: Connection, agent: Path, given: Mapping[str, str], keep: tuple[str, ...] = ()
) -> tuple[Child, Child]:
    """The SuperNode and the executor, which share a port on 127.0.0.1 and a secret made for this start.

    Args:
        here: the site.
        connection: where its coordinator is.
        agent: the agent's own folder.
        given: as for `start`.
        keep: as for `start`.
    """
    secret = agent / "secret"
    write_atomic(secret, secrets.token_bytes(32))
    port, home = _free_port(), agent / "flower"
    home.mkdir(exist_ok=True)
    python = (sys.executable, "-P", "-s", "-m")  # neither the working folder nor a user's own packages
    network = [*python, "fedscan_client.node.supernode", "--superlink", f"{connection.host}:{connection.port}"]
    if connection.ca is not None:
        network += ["--root-certificates", str(connection.ca)]
    network += ["--auth-supernode-private-key", str(here.folder / connections.NODE_KEY)]
    network += ["--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    network += ["--superexec-auth-secret-file", str(secret)]
    work = [*python, "fedscan_client.node.executor", str(here.folder), f"127.0.0.1:{port}", str(secret)]
    key = (here.key.variable,) if here.key.source == "environment" else ()
    outside = flower.environment(given, home=str(home), keep=keep)
    inside = flower.work_environment(given, home=str(home), keep=(*keep, *key))
    return (
        Child("supernode", network, outside, agent / "supernode.log"),
        Child("executor", work, inside, agent / "executor.log"),
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def only_agent(site: Path) -> Iterator[Path]:
    """The agent's folder of a site, held against other agents; the lock dies with the process.

    Raises:
        FolderError: another agent holds it, or the folder cannot be written.
    """
    folder = site / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise FolderError(
            f"{folder} cannot be written: {error.strerror}.", remedy="Start as the folder's owner."
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            raise FolderError(
                f"Another agent (process {who}) serves {site}.", remedy=f"fedscan agent stop {site}, or use that one."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield folder
    finally:
        os.close(descriptor)


class State:
    """SITE/agent/state.json: the last thing that was said of each part, and since when. For `fedscan agent status`."""

    def __init__(self, path: Path, tell: Tell) -> None:
        self._path, self._tell = path, tell
        self._said: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def say(self, part: str, what: str) -> None:
        """Keeps and tells one event; a full disk stops neither."""
        with self._lock:
            self._said[part] = {"what": what, "utc": datetime.now(UTC).isoformat(timespec="seconds")}
            with contextlib.suppress(OSError):
                write_atomic(self._path, json.dumps(self._said).encode())
            self._tell(f"{time.strftime('%H:%M:%S')} {part}: {what}")
