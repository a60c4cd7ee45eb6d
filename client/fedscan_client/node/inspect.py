"""The guard: what a task may look like before anything of it is used.

A bundle is bytes in memory. It is compared with the one that this release carries and thrown away; nothing opens,
unpacks, writes or imports it, so no zip trick can be played on it. Reasons are constants: they travel to the server.
"""

import re
from collections.abc import Mapping

from fedscan_core import bundle
from fedscan_core.config import NAME_PATTERN

MESSAGES = ("query", "train", "evaluate")  # and no actions of them ("train.other")


class Refused(Exception):
    """The task is not run; `reason` is one of this module's constants."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


FOREIGN_BUNDLE = f"refused: not the bundle that this site knows ({bundle.SHA256[:12]})"
OTHER_APP = "refused: the run is of another publisher or app"
OTHER_TASK = "refused: this site runs ClientApps only"
OTHER_CONFIG = "refused: the run's configuration is more than a run id"
OTHER_MESSAGE = "refused: unknown kind of message"


def task_kind(kind: str) -> None:
    """Only ClientApp tasks: no AgentApp, connector, model or ServerApp. Raises Refused."""
    if kind != "flwr-clientapp":
        raise Refused(OTHER_TASK)


def app(content: bytes, fab_hash: str, fab_id: str, fab_version: str) -> None:
    """The bundle and what the server calls it must be ours, byte for byte. Raises Refused."""
    if content != bundle.CONTENT or fab_hash != bundle.SHA256:
        raise Refused(FOREIGN_BUNDLE)
    if (fab_id, fab_version) != (bundle.APP_ID, bundle.VERSION):
        raise Refused(OTHER_APP)


def run_config(config: Mapping[str, object]) -> None:
    """One key, a run's id; everything else is in the signed order. Raises Refused."""
    value = config.get(bundle.RUN_KEY)
    if set(config) != {bundle.RUN_KEY} or not isinstance(value, str) or not re.fullmatch(NAME_PATTERN, value):
        raise Refused(OTHER_CONFIG)


def message(kind: str) -> None:
    """The three kinds that the ClientApp knows. Raises Refused."""
    if kind not in MESSAGES:
        raise Refused(OTHER_MESSAGE)
