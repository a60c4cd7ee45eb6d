"""The client of Flower's Control API on loopback. Only our own processes use it: the secret lies in STATE/secrets."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from fedscan_core import loopback
from fedscan_core.errors import ConfigError
from fedscan_server.coordinator import sites
from fedscan_server.coordinator.state import Coordinator

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

CONFIG_KEY = "fedscan-run"  # the only key of the bundle's run config
_TIMEOUT = 30.0  # seconds; Flower's own


@dataclass(frozen=True)
class RunStatus:
    """Flower's word on a run.

    `status` is pending, starting, running, finished, or unknown: Flower has no such run. `sub_status`, once finished:
    completed, failed or stopped. `details` is Flower's text, for the coordinator's own eyes.
    """

    status: str
    sub_status: str = ""
    details: str = ""

    @property
    def over(self) -> bool:
        """Whether Flower does nothing more for this run."""
        return self.status in ("finished", "unknown")


def start_run(c: Coordinator, run_id: str) -> int:
    """Starts the one known bundle for the run whose folder is STATE/runs/`run_id`; Flower's own run id.

    Raises:
        ConfigError: the SuperLink does not answer, or refused.
    """
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    from fedscan_core import bundle

    fab = fab_to_proto(Fab(bundle.SHA256, bundle.CONTENT, {}))
    config = user_config_to_proto({CONFIG_KEY: run_id})
    with _client(c) as client:
        answer = client.StartRun(StartRunRequest(fab=fab, override_config=config))
    if not answer.run_id:
        raise ConfigError("Flower did not start the run.", remedy=f"Look at {c.logs / 'superlink.log'}.")
    return int(answer.run_id)


def run_status(c: Coordinator, flower_run_id: int) -> RunStatus:
    """What Flower says of a run. Asking frees what a finished run left in Flower's database.

    Raises:
        ConfigError: the SuperLink does not answer.
    """
    from flwr.proto.control_pb2 import ListRunsRequest

    with _client(c, missing_ok=True) as client:
        run = client.ListRuns(ListRunsRequest(run_id=flower_run_id)).run_dict[flower_run_id]
        return RunStatus(run.status.status, run.status.sub_status, run.status.details)
    return RunStatus("unknown")


def stop_run(c: Coordinator, flower_run_id: int) -> bool:
    """Stops a run at once; False if it was over already or Flower does not know it.

    Raises:
        ConfigError: the SuperLink does not answer.
    """
    from flwr.proto.control_pb2 import StopRunRequest

    with _client(c, missing_ok=True) as client:
        return bool(client.StopRun(StopRunRequest(run_id=flower_run_id)).success)
    return False


def active_runs(c: Coordinator) -> set[int]:
    """Flower's ids of the runs that are not finished. Asking frees what the finished ones left in Flower's database.

    Raises:
        ConfigError: the SuperLink does not answer.
    """
    from flwr.proto.control_pb2 import ListRunsRequest

    with _client(c) as client:
        answer = client.ListRuns(ListRunsRequest(limit=1000))
    return {int(run_id) for run_id, run in answer.run_dict.items() if run.status.status != "finished"}


def register_node(c: Coordinator, public_key: str, name: str) -> int:
    """Lets the node with this public key (OpenSSH) in; Flower's node id. A key that is registered keeps its id.

    Raises:
        ConfigError: the SuperLink does not answer, or the key was unregistered before: Flower never takes one again.
    """
    from flwr.proto.control_pb2 import RegisterNodeRequest

    pem = _pem(public_key)
    known = _registered(c, pem)
    if known is not None:
        return known
    try:
        with _client(c) as client:
            return int(client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name)).node_id)
    except ConfigError:
        known = _registered(c, pem)  # `reconcile` in another process may have been first
        if known is None:
            raise
        return known


def unregister_node(c: Coordinator, node_id: int) -> None:
    """Shuts a node out, for ever: Flower refuses its key from the next message on. An unknown one is fine.

    Raises:
        ConfigError: the SuperLink does not answer.
    """
    from flwr.proto.control_pb2 import UnregisterNodeRequest

    with _client(c, missing_ok=True) as client:
        client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


def online_nodes(c: Coordinator) -> set[int]:
    """Flower's ids of the nodes whose heartbeat is fresh.

    Raises:
        ConfigError: the SuperLink does not answer.
    """
    return {int(node.node_id) for node in _nodes(c) if node.status == "online"}


def reconcile(c: Coordinator) -> None:
    """Makes Flower's nodes those of the registry: registers enrolled sites, shuts all others out.

    Safe at any time, by several processes: a crash between the two databases, a revocation while the SuperLink was
    down and a lost state.db all end here.

    Raises:
        ConfigError: the SuperLink does not answer.
    """
    # Flower first: a site that enrols in between is in the registry before its node is in Flower.
    known = {bytes(node.public_key): node for node in _nodes(c) if node.status != "unregistered"}
    wanted = {_pem(site.public_key): site for site in sites.every(c) if not site.revoked}
    for pem, node in known.items():
        if pem not in wanted:
            unregister_node(c, int(node.node_id))
    for pem, site in wanted.items():
        node_id = int(known[pem].node_id) if pem in known else register_node(c, site.public_key, site.name)
        if node_id != site.node_id:
            sites.set_node(c, site.name, node_id)


def _registered(c: Coordinator, pem: bytes) -> int | None:
    for node in _nodes(c):
        if node.public_key == pem and node.status != "unregistered":
            return int(node.node_id)
    return None


def _nodes(c: Coordinator) -> list[Any]:
    from flwr.proto.control_pb2 import ListNodesRequest

    with _client(c) as client:
        return list(client.ListNodes(ListNodesRequest()).nodes_info)


def _pem(public_key: str) -> bytes:
    """As Flower stores a key (flwr/supercore/primitives/asymmetric.py, public_key_to_bytes)."""
    return load_ssh_public_key(public_key.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class _Bearer:
    """Shows the secret with every request."""

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers["authorization"] = f"Bearer {self.secret}"
        return call_next(context)


@contextlib.contextmanager
def _client(c: Coordinator, missing_ok: bool = False) -> "Iterator[ControlHttpClient]":
    """Flower's client; its errors become ours. `missing_ok`: an unknown or finished run or node ends it quietly."""
    import httpx
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    if loopback.foreign(c.superlink_port):  # it would be told the secret
        raise ConfigError(
            f"Another account of this machine listens on {c.superlink}, the SuperLink's port.",
            remedy="Find out whose it is (ss -ltnp), end it, and start again.",
        )
    interceptors: list[Any] = [RuntimeVersionHttpInterceptor(component_name="flwr"), _Bearer(c.control_secret)]
    client = ControlHttpClient(f"http://{c.superlink}", interceptors=interceptors, verify=False)
    client._client.close()
    # Flower's own httpx client would send loopback traffic, secret included, to a proxy named in the environment.
    client._client = httpx.Client(timeout=_TIMEOUT, trust_env=False, verify=False)  # plain HTTP: no TLS to set up
    try:
        yield client
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        if missing_ok and code in (404, 412):
            return
        raise ConfigError(
            f"Flower's SuperLink refused ({code}).", remedy=f"Look at {c.logs / 'superlink.log'}."
        ) from None
    except httpx.HTTPError as error:
        raise ConfigError(
            f"Flower's SuperLink does not answer on {c.superlink} ({type(error).__name__}).",
            remedy=f"fedscan server status; the log is {c.logs / 'superlink.log'}.",
        ) from None
    finally:
        client._client.close()
