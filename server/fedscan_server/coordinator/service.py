"""Making a coordinator, and running its three processes: SuperLink and SuperExec (Flower's) and the edge (ours)."""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.files import write_atomic
from fedscan_core.supervise import Child, run
from fedscan_server.coordinator import pki, registry, state, vault
from fedscan_server.coordinator.state import Coordinator

# What our processes get of the environment. No proxy: a coordinator connects to nothing.
_KEPT = (
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    vault.KEY,
    vault.KEY_FILE,
)


def init(
    folder: Path,
    name: str,
    address: str,
    bind: str = "",
    superlink_port: int = 0,
    *,
    own: tuple[Path, Path, Path | None] | None = None,
    key_file: str = "",
) -> Coordinator:
    """Makes a coordinator's state folder; nothing is left behind if that fails.

    Args:
        folder: where; it must not exist, or be empty.
        name: shown to people.
        address: HOST:PORT as sites see it.
        bind: HOST:PORT to listen on; "" = all addresses of this machine, on the port of `address`.
        superlink_port: Flower's port on loopback; 0 = one that is free now.
        own: the operator's certificate, key and authority (None = a public one); else an authority is made.
        key_file: encrypt at rest with the key in this file, which is made if it is not there; "" = do not encrypt.

    Raises:
        FolderError: the folder holds something, or cannot be made.
        ConfigError: an address that is none, or a certificate that does not fit.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} exists and is not empty; it was left alone.", remedy="Name another: --state DIR")
    new = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.part"
    try:
        new.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise FolderError(f"{folder} cannot be made: {error.strerror}.", remedy="Check its parent.") from None
    try:
        with contextlib.suppress(ValueError):  # a bad one is said by write_settings
            bind = bind or f"0.0.0.0:{state.split(address)[1]}"
        state.write_settings(
            new, name, address, bind or address, superlink_port or free_port(), bool(key_file), key_file
        )
        for part in state.FOLDERS:
            (new / part).mkdir(mode=0o700)
        c = state.load(new)
        if own:
            pki.install(c, *own)
        else:
            pki.create(c)
        for secret in ("control", "superexec"):
            write_atomic(new / "secrets" / secret, secrets.token_hex(32).encode())
        registry.create(c)
        if c.key_file and not c.key_file.exists():
            vault.new_key(c.key_file)
        if folder.exists():
            folder.rmdir()
        os.rename(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return state.load(folder)


def free_port() -> int:
    """A TCP port of loopback that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def children(c: Coordinator) -> list[Child]:
    """The three processes, in the order in which they start.

    Raises:
        ConfigError: the coordinator is to encrypt and there is no key.
    """
    env = environment(c)
    run_python = [sys.executable, "-m"]
    return [
        Child(
            "superlink",
            [*run_python, "fedscan_server.coordinator.superlink", str(c.folder)],
            env,
            c.logs / "superlink.log",
        ),
        Child(
            "superexec",
            [
                *(*run_python, "fedscan_server.coordinator.superexec", c.superlink),
                *("--superexec-auth-secret-file", str(c.superexec_secret)),
            ],
            env,
            c.logs / "superexec.log",
        ),
        Child("edge", [*run_python, "fedscan_server.edge", str(c.folder)], env, c.logs / "edge.log"),
    ]


def environment(c: Coordinator) -> dict[str, str]:
    """The whole environment of our processes, from an allow-list.

    Raises:
        ConfigError: the coordinator is to encrypt and there is no usable key.
    """
    env = {name: os.environ[name] for name in _KEPT if name in os.environ}
    if not c.encrypt:
        env.pop(vault.KEY, None)
        env.pop(vault.KEY_FILE, None)
    elif c.key_file and vault.KEY not in env and vault.KEY_FILE not in env:
        env[vault.KEY_FILE] = str(c.key_file)
    if c.encrypt and not vault.is_key_set(env):
        raise ConfigError(
            "This coordinator encrypts what it keeps, and there is no key.",
            remedy=f"Set {vault.KEY_FILE} or {vault.KEY}, or key_file in {c.folder / state.FILE}.",
        )
    return {
        **env,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
        "HOME": str(c.folder / "superlink"),
        "FLWR_HOME": str(c.folder / "superlink" / "home"),  # Flower unpacks the bundle here to read its settings
        "FEDSCAN_COORDINATOR": str(c.folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def start(c: Coordinator, stop: threading.Event, tell: Callable[[str, str], None]) -> None:
    """Runs the coordinator until `stop` is set. One at a time for each folder.

    Raises:
        FolderError: it runs already.
        ConfigError: a port is taken, or the vault key is missing.
    """
    with lock(c):
        started = children(c)
        for host, port in ((c.bind[0], c.bind[1]), ("127.0.0.1", c.superlink_port)):
            _free(host, port)
        os.umask(0o077)
        run(started, stop, tell)


@contextlib.contextmanager
def lock(c: Coordinator) -> Iterator[None]:
    """Holds STATE/lock, which ends with the process, and writes its id there.

    Raises:
        FolderError: another process holds it.
    """
    descriptor = os.open(c.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for attempt in range(5):  # `pid` in another process holds it for a moment
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05 * attempt)
        else:
            raise FolderError(
                f"The coordinator in {c.folder} runs already (process {_written(c)}).",
                remedy="fedscan server status, or fedscan server stop",
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def pid(c: Coordinator) -> int | None:
    """Process id of the running `fedscan server start`, or None."""
    try:
        descriptor = os.open(c.folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return _written(c)
    finally:
        os.close(descriptor)
    return None


def stop(c: Coordinator, seconds: float = 30.0) -> bool:
    """Ends the running coordinator and waits for it; False if none runs.

    Raises:
        FolderError: it still runs after `seconds`.
    """
    running = pid(c)
    if running is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(running, signal.SIGTERM)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if pid(c) is None:
            return True
        time.sleep(0.1)
    raise FolderError(f"Process {running} does not end.", remedy=f"Look at {c.logs}; then: kill -9 {running}")


def _written(c: Coordinator) -> int | None:
    for _ in range(20):  # between the lock and the number
        with contextlib.suppress(OSError, ValueError):
            return int((c.folder / "lock").read_text())
        time.sleep(0.05)
    return None


def _free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be listened on: {error.strerror}.",
                remedy=f"Free it, or change it in {state.FILE}.",
            ) from None
