"""What a coordinator is doing now, from outside: its processes, its sites, its runs."""

import ssl
from dataclasses import dataclass

from fedscan_core.errors import ConfigError
from fedscan_server.coordinator import control, service, sites
from fedscan_server.coordinator.state import Coordinator

_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Status:
    """A look at a coordinator.

    `process`: id of `fedscan server start`, None if it does not run. `superlink`, `edge`: "" = answers, else why not.
    `online`: names of the sites whose node is there. `active_runs`: how many runs Flower has not finished.
    """

    process: int | None
    superlink: str
    edge: str
    online: tuple[str, ...]
    active_runs: int

    @property
    def healthy(self) -> bool:
        """Whether everything answers."""
        return self.process is not None and not self.superlink and not self.edge


def look(c: Coordinator) -> Status:
    """Asks everything once; takes a few seconds at most if nothing answers."""
    online: tuple[str, ...] = ()
    runs, superlink = 0, ""
    try:
        names = sites.node_names(c)
        online = tuple(sorted(names[node] for node in control.online_nodes(c) if node in names))
        runs = len(control.active_runs(c))
    except ConfigError as error:
        superlink = error.message
    return Status(service.pid(c), superlink, probe_edge(c), online, runs)


def superlink_answers(c: Coordinator) -> bool:
    """Whether Flower's SuperLink is up; light, and needs no secret."""
    import httpx

    try:
        with httpx.Client(trust_env=False, timeout=_TIMEOUT, verify=False) as client:  # loopback, no TLS
            return client.get(f"http://{c.superlink}/health").is_success
    except httpx.HTTPError:
        return False


def probe_edge(c: Coordinator) -> str:
    """Why the edge does not answer as a site would want it, with TLS checked; "" if it does."""
    import httpx

    host, port = c.bind
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    context = ssl.create_default_context(cadata=c.ca_pem or None)
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}/fedscan/v1/hello"
    try:
        with httpx.Client(verify=context, trust_env=False, timeout=_TIMEOUT) as client:
            answer = client.get(url, headers={"host": c.host}, extensions={"sni_hostname": c.host})
            answer.raise_for_status()
            if answer.json()["coordinator"] != c.name:
                return f"{host}:{port} is another coordinator"
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return f"{host}:{port}: {type(error).__name__}: {error}"
    return ""
