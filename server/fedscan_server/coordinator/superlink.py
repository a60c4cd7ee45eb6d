"""Flower's SuperLink as we run it: `python -m fedscan_server.coordinator.superlink STATE`.

What the stock command leaves open, and what is done about it here (flwr 1.41.0; names are Flower's):

- Its Control API lets in whoever reaches the port (NoOpControlAuthnPlugin): ours wants the bearer of secrets/control.
- Nodes may register themselves unless `enable_supernode_auth` is set, which the command allows only where it serves TLS
  itself. TLS ends at our edge, so the settings are given to `create_app` directly, and with them process isolation,
  the SuperExec secret, the database on disk and no installation of dependencies.
- A delivered update is deleted from the database, but its bytes stay in free pages and in the write-ahead log:
  `secure_delete` overwrites the pages, and a thread empties the log every minute and shrinks an idle database.

Another version of Flower, or one whose hooks moved, is refused at the start.
"""

import contextlib
import dataclasses
import hmac
import importlib
import logging
import os
import sqlite3
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedscan_core.errors import ConfigError, FedscanError
from fedscan_server.coordinator import control, state
from fedscan_server.coordinator.state import Coordinator

FLOWER = "1.41.0"
RECONCILE_SECONDS, PURGE_SECONDS = 5.0, 60.0
SHRINK_BYTES = 16 * 2**20  # free pages that are worth a VACUUM

_SETTINGS = {
    *("control_address", "health_server_address", "host", "port", "insecure", "certificates", "superexec_auth_secret"),
    *("authn_plugin", "event_log_plugin", "fleet_event_log_plugin", "enable_event_log", "artifact_provider"),
    *("enable_supernode_auth", "fleet_api_type", "fleet_api_address", "simulation", "ssl_ca_certfile", "ssl_certfile"),
    *("ssl_keyfile", "database", "isolation", "runtime_dependency_install"),
}
_MIDDLEWARE = {"ControlAuthenticationMiddleware", "NodeAuthMiddleware", "ProtobufTranslationMiddleware"}


def make_app(c: Coordinator) -> Any:
    """Flower's ASGI application with our settings, checked.

    Raises:
        ConfigError: another Flower than the one this was written for, or one that did not take a setting.
    """
    from flwr.superlink import config_loader, main

    command = importlib.import_module("flwr.superlink.cli.flower_superlink")  # its package hides it behind a function
    sql = importlib.import_module("flwr.supercore.sql_mixin")
    _expect(version("flwr") == FLOWER, f"version {version('flwr')}")
    settings = config_loader.SuperLinkLifespanConfig
    _expect({field.name for field in dataclasses.fields(settings)} == _SETTINGS, "SuperLinkLifespanConfig")
    _expect(("journal_mode", "WAL") in vars(sql)["SQLITE_PRAGMAS"], "SQLITE_PRAGMAS")
    vars(sql)["SQLITE_PRAGMAS"] = (*vars(sql)["SQLITE_PRAGMAS"], ("secure_delete", "ON"))

    secret = c.superexec_secret.read_bytes()
    plugin = _only_us(c.control_secret)
    app = main.create_app(
        settings(
            control_address="",
            health_server_address=None,
            host="127.0.0.1",
            port=c.superlink_port,
            insecure=True,  # on loopback; TLS ends at the edge
            certificates=None,
            superexec_auth_secret=secret,
            authn_plugin=plugin,
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type="grpc-rere",
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=str(c.flower_database),
            isolation="process",
            runtime_dependency_install=False,
        ),
        command.SuperLinkLifespan,
    )
    _expect(app.state.account_access_dep.authn_plugin is plugin, "the authentication plugin")
    _expect(app.state.enable_supernode_auth is True, "enable_supernode_auth")
    _expect(app.state.superexec_auth_secret == secret and len(secret) >= 32, "superexec_auth_secret")
    _expect({getattr(layer.cls, "__name__", "") for layer in app.user_middleware} >= _MIDDLEWARE, "the middleware")
    return app


def _expect(true: bool, what: str) -> None:
    if not true:
        raise ConfigError(
            f"The installed Flower is not the one this release was made for ({what}).",
            remedy=f"Install flwr=={FLOWER}; another one is not started, since it may be open.",
        )


def _only_us(secret: str) -> Any:
    """Flower's authentication plugin that lets in the bearer of `secret` only."""
    from flwr.common.constant import ACCESS_TOKEN_KEY, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
    from flwr.supercore.auth.typing import AccountInfo
    from flwr.superlink.auth_plugin import ControlAuthnPlugin

    class OnlyUs(ControlAuthnPlugin):
        def __init__(self) -> None: ...

        def get_login_details(self) -> None:
            return None

        def get_auth_tokens(self, device_code: str) -> None:
            return None

        def refresh_tokens(self, metadata: Sequence[tuple[str, str | bytes]]) -> tuple[None, None]:
            return None, None

        def validate_tokens_in_metadata(
            self, metadata: Sequence[tuple[str, str | bytes]]
        ) -> tuple[bool, AccountInfo | None]:
            shown = dict(metadata).get(ACCESS_TOKEN_KEY, "")
            shown = shown if isinstance(shown, bytes) else shown.encode()
            if not hmac.compare_digest(shown, secret.encode()):
                return False, None
            # The one account of the open-source SuperLink: its federation manager knows no other.
            return True, AccountInfo(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME)

    if len(secret) < 32:
        raise ConfigError("secrets/control is too short.", remedy="Restore it from a backup.")
    return OnlyUs()


def look_after(c: Coordinator, stop: threading.Event) -> None:
    """Keeps Flower's nodes those of the registry and its database small, until `stop`. Errors go to the log."""
    log = logging.getLogger("fedscan")
    since_purge = 0.0
    while not stop.wait(RECONCILE_SECONDS):
        try:
            control.reconcile(c)
            since_purge += RECONCILE_SECONDS
            if since_purge >= PURGE_SECONDS:
                since_purge = 0.0
                purge(c)
        except FedscanError as error:
            log.warning("%s", error)
        except Exception:
            log.exception("looking after the SuperLink failed; tried again in %g s", RECONCILE_SECONDS)


def purge(c: Coordinator) -> None:
    """Frees what finished runs left in Flower's database, and tidies up.

    Raises:
        ConfigError: the SuperLink does not answer.
    """
    tidy(c, idle=not control.active_runs(c))  # asking deletes finished runs' messages and objects


def tidy(c: Coordinator, idle: bool) -> None:
    """Empties the write-ahead log of Flower's database and, when idle, shrinks it. Busy: next time."""
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(_flower_database(c)) as db:
        free = db.execute("PRAGMA freelist_count").fetchone()[0] * db.execute("PRAGMA page_size").fetchone()[0]
        if idle and free >= SHRINK_BYTES:
            db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _flower_database(c: Coordinator) -> sqlite3.Connection:
    db = sqlite3.connect(c.flower_database, timeout=5.0, isolation_level=None)
    db.execute("PRAGMA secure_delete = ON").fetchone()
    db.execute("PRAGMA temp_store = MEMORY")  # a VACUUM must not leave a copy in a temporary folder
    return db


class _NotOurOwn(logging.Filter):
    """Drops the lines about our own look every few seconds."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (text.startswith("ControlServicer.List") or "/v1/control/list-" in text)


def main(folder: Path) -> None:
    """Serves until SIGTERM."""
    os.umask(0o077)
    c = state.load(folder)
    app = make_app(c)
    import uvicorn
    from flwr.supercore.http_logging import get_uvicorn_log_config

    ours = logging.StreamHandler()
    ours.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("fedscan").addHandler(ours)  # not the root logger: Flower's debug lines would follow
    stop = threading.Event()
    threading.Thread(target=look_after, args=(c, stop), daemon=True).start()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=c.superlink_port, log_config=get_uvicorn_log_config(logging.INFO))
    )
    for name in ("uvicorn.access", "flwr"):
        for handler in [*logging.getLogger(name).handlers, logging.getLogger(name)]:
            handler.addFilter(_NotOurOwn())
    try:
        server.run()
    finally:
        stop.set()


if __name__ == "__main__":
    # Read by Flower when it is imported: nothing here calls home, and no second, open API is started.
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    for name in [name for name in os.environ if name.startswith("FLWR_INTERNAL_")]:
        del os.environ[name]
    try:
        main(Path(sys.argv[1]))
    except FedscanError as problem:
        sys.exit(f"fedscan: {problem}")
