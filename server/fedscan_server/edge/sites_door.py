"""A site's own door: what the coordinator knows of it, its public policy, its audit log's anchors, its end."""

import re

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedscan_core import node_key
from fedscan_server.coordinator import sites
from fedscan_server.coordinator.sites import Enrolled
from fedscan_server.edge import limits, registration, who
from fedscan_server.edge.context import Edge
from fedscan_server.edge.json_body import any_object, fields
from fedscan_server.edge.open_door import SMALL, checked_policy
from fedscan_server.edge.refused import Refused


async def about(edge: Edge, request: Request) -> Response:
    """All that is known here of the site."""
    site, _ = await _signed(edge, request)
    return JSONResponse(
        {
            "site": site.name,
            "enrolled": site.enrolled,
            "fingerprint": node_key.fingerprint(site.public_key),
            "node_id": str(site.node_id or ""),
            "online": site.node_id in edge.online,
            "last_seen": site.last_seen,
            "policy": site.policy,
            "policy_utc": site.policy_utc,
        }
    )


async def put_policy(edge: Edge, request: Request) -> Response:
    """Takes the site's public policy in place of the one before."""
    site, body = await _signed(edge, request)
    policy = any_object(body)
    checked_policy(site.name, policy)
    await run_in_threadpool(sites.set_policy, edge.coordinator, site.name, policy)
    edge.forget_roster()
    return JSONResponse({})


async def post_anchor(edge: Edge, request: Request) -> Response:
    """Keeps an anchor that belongs to no round."""
    site, body = await _signed(edge, request)
    anchor = fields(body, {"anchor": str})["anchor"]
    if not re.fullmatch(r"[0-9a-f]{64}", anchor):
        raise Refused(400, "The anchor is no digest.")
    await run_in_threadpool(sites.add_anchor, edge.coordinator, site.name, "", 0, anchor)
    return JSONResponse({})


async def anchors(edge: Edge, request: Request) -> Response:
    """The site's last anchors, oldest first."""
    site, _ = await _signed(edge, request)
    return JSONResponse({"anchors": await run_in_threadpool(sites.anchors, edge.coordinator, site.name)})


async def retire(edge: Edge, request: Request) -> Response:
    """The site leaves for good: its key is refused from now on."""
    site, body = await _signed(edge, request)
    fields(body, {})
    await run_in_threadpool(sites.revoke, edge.coordinator, site.name)
    edge.forget_roster()
    await registration.unregister(edge, site)
    return JSONResponse({})


async def _signed(edge: Edge, request: Request) -> tuple[Enrolled, bytes]:
    body = await limits.body(request, SMALL, seconds=15.0)
    site = await who.site(edge, request, body)
    request.state.who = site.name
    return site, body
