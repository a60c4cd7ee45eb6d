"""The one version of Flower that the node was written for, and the environment in which its processes run.

The node builds on names inside Flower (research/flower.md, section 2), so another version is refused at the start
instead of half working.
"""

import importlib
import operator
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from fedscan_core.errors import MissingExtra

VERSION = "1.41.0"

# Every name inside Flower that this room uses or replaces. `flwr.supercore.x:y` is attribute y of that module.
NAMES = (
    "flwr.supernode.start_client_internal:_pull_and_store_message",
    "flwr.supernode.start_client_internal:get_fused_config_from_fab",
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState._store_error_replies",
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState.get_message_processing_duration",
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState.get_messages_legacy",
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState.store_fab",
    "flwr.supernode.cli.flower_supernode:flower_supernode",
    "flwr.supernode.runtime.run_clientapp:pull_and_inflate_object_from_tree",
    "flwr.supernode.runtime.run_clientapp:pull_task_input",
    "flwr.supernode.runtime.run_clientapp:push_message",
    "flwr.supernode.runtime.run_clientapp:push_task_output",
    "flwr.supercore.heartbeat:HeartbeatSender",
    "flwr.supercore.heartbeat:make_task_heartbeat_fn_http",
    "flwr.supercore.interceptors:RuntimeTokenHttpInterceptor",
    "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor",
    "flwr.supercore.interceptors:SuperExecAuthHttpInterceptor",
    "flwr.supercore.retry:make_simple_http_retry_invoker",
    "flwr.supercore.run:RunNotRunningException",
    "flwr.supercore.runtime:RuntimeHttpClient",
    "flwr.supercore.constant:TaskType",
    "flwr.proto.runtime_pb2:AcquireTaskRequest",
)

# Read by Flower and Ray when they are imported: nothing calls home.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}

_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR")
_KEPT_FOR_WORK = (
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("TESSDATA_PREFIX", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"),  # the last two: a key in the keyring
)


def check() -> None:
    """Refuses any Flower but the one this was written for.

    Raises:
        MissingExtra: another version is installed, or a name inside it is gone.
    """
    remedy = f"Install exactly this one: pip install flwr=={VERSION}"
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise MissingExtra("Flower is not installed.", remedy=remedy) from None
    if found != VERSION:
        raise MissingExtra(f"Flower {found} is installed; the node was tested with {VERSION} only.", remedy=remedy)
    for name in NAMES:
        module, _, path = name.partition(":")
        try:
            operator.attrgetter(path)(importlib.import_module(module))
            present = True
        except (ImportError, AttributeError):
            present = False
        if not present:
            raise MissingExtra(f"Flower {found} has no {name}: it is not the published one.", remedy=remedy)


def environment(given: Mapping[str, str], *, home: str, keep: tuple[str, ...] = ()) -> dict[str, str]:
    """The whole environment of the SuperNode: a few variables of `given`, the proxy, and what keeps Flower quiet.

    HTTPS_PROXY is kept for the way out. HTTP_PROXY and ALL_PROXY are not: with them the calls to the node's own API on
    this machine, task token and all, would go to the proxy in clear.

    Args:
        given: usually os.environ.
        home: Flower's folder (FLWR_HOME).
        keep: further names to keep.
    """
    kept = {name: given[name] for name in (*_KEPT, *keep) if name in given}
    proxy = given.get("HTTPS_PROXY") or given.get("https_proxy")
    if proxy:
        kept["HTTPS_PROXY"] = proxy
    around = (name.strip() for name in (given.get("NO_PROXY") or given.get("no_proxy") or "").split(","))
    kept["NO_PROXY"] = ",".join(dict.fromkeys([*filter(None, around), "127.0.0.1", "localhost"]))
    return kept | QUIET | {"FLWR_HOME": home, "PYTHONUNBUFFERED": "1"}


def work_environment(given: Mapping[str, str], *, home: str, keep: tuple[str, ...] = ()) -> dict[str, str]:
    """That of the executor and its tasks, which train and hold the site's key but need no way out."""
    kept = environment(given, home=home, keep=(*_KEPT_FOR_WORK, *keep))
    kept.pop("HTTPS_PROXY", None)
    return kept


def quiet() -> None:
    """For the entry points: sets what Flower reads when it is imported, whatever the caller's environment."""
    os.environ.update(QUIET)
