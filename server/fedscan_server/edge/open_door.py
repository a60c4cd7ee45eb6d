"""What anybody may ask: who is there, and to be let in with an invitation."""

from datetime import UTC, datetime
from importlib import metadata

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedscan_core import policy, wire
from fedscan_core.errors import ConfigError
from fedscan_server.coordinator import people, registry, sites
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.edge import limits, registration
from fedscan_server.edge.context import Edge
from fedscan_server.edge.json_body import fields
from fedscan_server.edge.refused import Refused

SMALL = 64 * 1024  # bytes of a body


async def hello(edge: Edge, request: Request) -> Response:
    """Who is there, and what time it is here."""
    return JSONResponse(
        {
            "coordinator": edge.coordinator.name,
            "version": metadata.version("fedscan"),
            "flower": metadata.version("flwr"),
            "protocol": wire.PROTOCOL,
            "utc": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
    )


async def enrol(edge: Edge, request: Request) -> Response:
    """A site's key against its invitation's token; asked again with the same token and key it answers the same."""
    address = edge.address(request)
    edge.failures.check("invitation", address)
    asked = fields(await limits.body(request, SMALL), {"token": str, "site": str, "public_key": str, "policy": dict})
    key = _node_key(asked["public_key"])
    checked_policy(asked["site"], asked["policy"])
    try:
        await run_in_threadpool(_invites, edge.coordinator, asked["token"], asked["site"])
        site = await run_in_threadpool(sites.redeem, edge.coordinator, asked["token"], key, asked["policy"])
    except ConfigError:  # one text for unknown, used and expired: a stranger learns nothing
        edge.failures.note("invitation", address)
        raise _not_invited() from None
    request.state.who = site.name
    edge.forget_roster()
    node_id = await registration.register(edge, site)
    told = {"site": site.name, "coordinator": edge.coordinator.name, "node_id": str(node_id or "")}
    return JSONResponse({**told, "launchers": await run_in_threadpool(launchers, edge.coordinator)})


async def login(edge: Edge, request: Request) -> Response:
    """A person's key against an invitation's token: the bearer token, which is not kept here and not shown again."""
    address = edge.address(request)
    edge.failures.check("invitation", address)
    asked = fields(await limits.body(request, SMALL), {"token": str, "public_key": str})
    key = _person_key(asked["public_key"])
    try:
        person, token = await run_in_threadpool(people.redeem, edge.coordinator, asked["token"], key)
    except ConfigError:
        edge.failures.note("invitation", address)
        raise _not_invited() from None
    request.state.who = person.name
    told = {"name": person.name, "role": person.role, "token": token, "coordinator": edge.coordinator.name}
    return JSONResponse(told, headers={"cache-control": "no-store"})


def launchers(coordinator: Coordinator) -> dict[str, str]:
    """The people who may launch here, with their public keys."""
    return {each.name: each.public_key for each in people.every(coordinator) if each.may("researcher")}


def checked_policy(site: str, tree: dict[str, object]) -> None:
    """Raises Refused (400) unless this is the public policy of this site."""
    try:
        policy.from_public(tree)
    except ConfigError as error:
        raise Refused(400, error.message, error.remedy) from None
    if tree.get("site", site) != site:
        raise Refused(400, "The policy is another site's.")


def _not_invited() -> Refused:
    return Refused(403, "The invitation is not valid, or not any more.", "Ask the coordinator for a new one.")


def _invites(coordinator: Coordinator, token: str, site: str) -> None:
    """Raises ConfigError unless the token invites this very site: a mixed-up file must not enrol another name."""
    with registry.open_(coordinator) as db:
        if registry.invitation(db, "site", token)["name"] != site:
            raise registry.refused()


def _node_key(text: str) -> str:
    try:
        key = load_ssh_public_key(text.encode())
    except Exception:  # several kinds, for text that strangers made up
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise Refused(400, "The public key is not an OpenSSH one on NIST P-384.", "fedscan agent enrol makes it.")
    return _line(text)


def _person_key(text: str) -> str:
    try:
        key = load_ssh_public_key(text.encode())
    except Exception:  # as above
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise Refused(400, "The public key is not an OpenSSH Ed25519 one.", "fedscan login makes it.")
    return _line(text)


def _line(text: str) -> str:
    return " ".join(text.split()[:2])  # without the comment
