"""Telling Flower which keys may come. Where it is away, the SuperLink's process does it later (`control.reconcile`)."""

from starlette.concurrency import run_in_threadpool

from fedscan_core.errors import FedscanError
from fedscan_server.coordinator import control, sites
from fedscan_server.coordinator.sites import Enrolled
from fedscan_server.edge.context import Edge


async def register(edge: Edge, site: Enrolled) -> int | None:
    """The site's node id at Flower; None while Flower is away."""
    if site.node_id:
        return site.node_id
    try:
        node_id: int = await run_in_threadpool(_register, edge, site)
    except FedscanError:
        return None
    edge.forget_roster()
    return node_id


async def unregister(edge: Edge, site: Enrolled) -> None:
    """Flower forgets the key too. Where it is away, the edge still refuses it."""
    try:
        if site.node_id:
            await run_in_threadpool(control.unregister_node, edge.coordinator, site.node_id)
    except FedscanError:
        pass


def _register(edge: Edge, site: Enrolled) -> int:
    node_id = control.register_node(edge.coordinator, site.public_key, site.name)
    sites.set_node(edge.coordinator, site.name, node_id)
    return node_id
