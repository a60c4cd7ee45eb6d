"""The way through to Flower's fleet API: a streaming proxy from enrolled sites' nodes to the SuperLink on loopback.

What goes on is made anew: the path is one of ours, the headers are those that Flower reads, the body is exactly as long
as declared. Nothing of a stranger's request reaches the SuperLink, not even its length.
"""

import shutil

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fedscan_core import loopback
from fedscan_server.edge import limits, who
from fedscan_server.edge.context import Edge
from fedscan_server.edge.refused import Refused, not_found

_PLAIN, _CHUNK = 2**20, 8 * 2**20  # bytes; Flower cuts arrays into objects of 5 MiB
_SECONDS = 180.0  # for one body: Flower gives a chunk as long

# Flower's whole fleet API except register-node and unregister-node: keys are registered by enrolment only.
PATHS = {
    f"/v1/fleet/{name}": limit
    for name, limit in (
        ("activate-node", _PLAIN),
        ("deactivate-node", _PLAIN),
        ("send-node-heartbeat", _PLAIN),
        ("pull-messages", _PLAIN),
        ("push-messages", _CHUNK),
        ("get-run", _PLAIN),
        ("get-fab", _PLAIN),
        ("push-object", _CHUNK),
        ("pull-object", _PLAIN),
        ("confirm-message-received", _PLAIN),
    )
}
GROWING = ("/v1/fleet/push-messages", "/v1/fleet/push-object")  # the SuperLink keeps what these bring
KEPT_FREE = 2**30  # bytes of the coordinator's disk that sites cannot fill: checkpoints and books go on
QUIET = ("pull-messages", "send-node-heartbeat", "push-object", "pull-object")  # too many to log where all is well

_HEADERS = (
    "content-type",
    "accept",
    who.NODE_KEY,
    who.NODE_TIME,
    who.NODE_SIGNATURE,
    "flwr-package-name",
    "flwr-package-version",
    "flwr-component-name",
)
_BACK = ("content-type", "content-length", "flwr-version-incompatibility-message")


async def forward(edge: Edge, request: Request) -> Response:
    """Answers one request of a site's node; `request.state.who` becomes the site.

    Raises:
        Refused: 404 (not a path or method of the fleet API), 401 (`who.node`), 411 and 413 (sizes), 408 (slow),
            502 to 504 (the SuperLink is away or slow, or the disk nearly full: Flower's SuperNode tries again).
    """
    path = request.scope["raw_path"].decode("ascii", "replace")
    if request.method != "POST" or path not in PATHS:
        raise not_found()
    site = await who.node(edge, request)
    request.state.who = site.name
    headers = {name: value for name in _HEADERS if (value := who.one(request, name))}
    length = limits.declared_length(request, PATHS[path])
    headers |= {"content-length": str(length), "accept-encoding": "identity"}
    request.state.until_answered.enter_context(edge.fleet_busy(site.name))
    if loopback.foreign(edge.coordinator.superlink_port):  # it would be told the sites' updates
        raise Refused(502, "The SuperLink cannot be reached.", "Try again.")
    if path in GROWING and shutil.disk_usage(edge.coordinator.folder).free < KEPT_FREE:
        raise Refused(503, "The coordinator's disk is nearly full.", "Try again later.")
    sent = edge.link.build_request("POST", path, headers=headers, content=limits.pieces(request, length, _SECONDS))
    answer = await _send(edge.link, sent)
    request.state.until_answered.push_async_callback(answer.aclose)
    await edge.seen(site.name)
    if answer.status_code >= 500:  # its text is for the operator
        raise Refused(answer.status_code, "The SuperLink failed.", "The coordinator's logs say more.")
    back = {name: answer.headers[name] for name in _BACK if name in answer.headers}
    return StreamingResponse(answer.aiter_raw(), answer.status_code, back)


async def _send(link: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
    try:
        return await link.send(request, stream=True)
    except httpx.TimeoutException:
        raise Refused(504, "The SuperLink does not answer.", "Try again.") from None
    except httpx.TransportError:
        raise Refused(502, "The SuperLink cannot be reached.", "Try again.") from None


def client(port: int) -> httpx.AsyncClient:
    """The client of the SuperLink on this machine.

    Idle connections are dropped before the SuperLink would (uvicorn: 5 s): a body that was streamed is not sent twice.
    """
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        trust_env=False,  # never through a proxy
        verify=False,  # plain HTTP: no list of authorities to load
        follow_redirects=False,
        timeout=httpx.Timeout(60.0, connect=5.0),
        limits=httpx.Limits(max_connections=256, max_keepalive_connections=64, keepalive_expiry=2.0),
    )
