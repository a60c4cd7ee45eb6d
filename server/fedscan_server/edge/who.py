"""Who sends a request: a site's node (Flower's headers), a site (our signature), or a person (bearer token)."""

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from fedscan_core import node_key
from fedscan_server.coordinator import people
from fedscan_server.coordinator.people import Person, Role
from fedscan_server.coordinator.sites import Enrolled
from fedscan_server.edge.context import Edge
from fedscan_server.edge.refused import Refused

# flwr 1.41: supercore/constant.py and common/constant.py (tests/server/edge/test_fleet.py holds them to it).
NODE_KEY, NODE_TIME, NODE_SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"
_EARLIEST, _LATEST = timedelta(seconds=-305), timedelta(seconds=5)
_LONGEST_HEADER = 1024
_WINDOW = timedelta(seconds=node_key.WINDOW_SECONDS)


async def node(edge: Edge, request: Request) -> Enrolled:
    """The enrolled site whose SuperNode sends this: the check that Flower makes too, before a byte of the body is read.

    Flower signs the time only (superlink/routers/fleet/node_auth.py); that the request names the node of the key is
    checked behind us, by the SuperLink.

    Raises:
        Refused: 401; or see `Failures.check`, `Replays.first`.
    """
    address = edge.address(request)
    edge.failures.check("fleet", address)
    time, signature = one(request, NODE_TIME), _unpacked(one(request, NODE_SIGNATURE))
    key = _pem_key(_unpacked(one(request, NODE_KEY)))
    site = await _holder(edge, key)
    if key is None or site is None or not _verifies(key, time.encode("ascii", "replace"), signature):
        edge.failures.note("fleet", address)
        raise Refused(401, "This node is not enrolled.", "fedscan agent enrol INVITE")
    _in_time(time, _EARLIEST, _LATEST)
    if not edge.replays.first(site.name, decode_dss_signature(signature)[0]):
        raise Refused(401, "This request was sent before.")
    return site


async def site(edge: Edge, request: Request, body: bytes) -> Enrolled:
    """The enrolled site that signed this request (`node_key.sign_request`).

    Raises:
        Refused: 401 (with "utc" where only the time is wrong), 403 for a revoked site; or see `Failures.check`.
    """
    address = edge.address(request)
    edge.failures.check("site", address)
    name, time = one(request, node_key.SITE), one(request, node_key.TIME)
    signature, path = one(request, node_key.SIGNATURE), request.scope["raw_path"].decode("ascii", "replace")
    found = next((each for each in await edge.roster() if each.name == name), None)
    claimed = _time(time)
    if (
        found is None
        or claimed is None  # the signature is looked at first and the time after: strangers learn nothing
        or not node_key.verify_request(found.public_key, name, time, signature, request.method, path, body, claimed)
    ):
        edge.failures.note("site", address)
        raise Refused(401, "The request is not signed by an enrolled site.", "fedscan agent enrol INVITE")
    _in_time(time, -_WINDOW, _WINDOW)
    if not edge.replays.first(name, decode_dss_signature(base64.b64decode(signature))[0]):
        raise Refused(401, "This request was sent before.")
    if found.revoked:
        raise Refused(403, f"Site {name} was revoked.", "Ask the coordinator for a new invitation.")
    await edge.seen(name)
    return found


async def person(edge: Edge, request: Request, role: Role) -> Person:
    """The person whose token this is, if the role is theirs or below theirs.

    Raises:
        Refused: 401 (unknown token), 403 (role); or see `Failures.check`.
    """
    address = edge.address(request)
    edge.failures.check("people", address)
    kind, _, token = one(request, "authorization").partition(" ")
    sound = kind.lower() == "bearer" and re.fullmatch(r"[A-Za-z0-9_.~+/=-]{16,256}", token)
    found = await run_in_threadpool(people.authenticate, edge.coordinator, token) if sound else None
    if found is None:
        edge.failures.note("people", address)
        raise Refused(401, "This token is not known here.", "fedscan login INVITE")
    if not found.may(role):
        raise Refused(403, f"{found.name} is a {found.role}; this takes a {role}.", "Ask the coordinator's operator.")
    return found


def one(request: Request, name: str) -> str:
    """A header that is there once, and short; "" where it is not there.

    Raises:
        Refused: 400, it is there twice (two readers could see two values) or too long.
    """
    values = request.headers.getlist(name)
    if len(values) > 1 or any(len(value) > _LONGEST_HEADER for value in values):
        raise Refused(400, f"The header {name} is there twice, or is too long.")
    return values[0] if values else ""


async def _holder(edge: Edge, key: ec.EllipticCurvePublicKey | None) -> Enrolled | None:
    if key is None:
        return None
    text = node_key.public_text(key)
    return next((each for each in await edge.roster() if each.public_key == text and not each.revoked), None)


def _pem_key(pem: bytes) -> ec.EllipticCurvePublicKey | None:
    try:
        key = load_pem_public_key(pem)
    except Exception:  # cryptography names several kinds for bytes that strangers made up
        return None
    sound = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)
    return key if sound else None  # type: ignore[return-value]  # isinstance above, which mypy does not carry over


def _unpacked(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _verifies(key: ec.EllipticCurvePublicKey, message: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, message, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else None


def _in_time(text: str, earliest: timedelta, latest: timedelta) -> None:
    now, time = datetime.now(UTC), _time(text)
    if time is None or not earliest < time - now < latest:
        utc = now.isoformat(timespec="milliseconds")
        raise Refused(401, "The request's time is not ours.", "Set this machine's clock (NTP).", {"utc": utc})
