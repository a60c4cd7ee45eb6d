"""The site's own door at the coordinator: HTTPS to /fedscan/v1/site*, beside Flower's fleet API on the same address.

Only public things pass through it: keys, the public policy, anchors (keyed digests). A signed request says who sends it
(`node_key.sign_request`: method, path, time and body). Trusted is the coordinator's own authority and nobody else, so
a proxy that opens TLS is refused. HTTPS_PROXY and NO_PROXY of the environment are honoured, as Flower's SuperNode does.
"""

import contextlib
import json
import ssl
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from fedscan_client import connection as connections
from fedscan_client.connection import Connection
from fedscan_core import node_key, wire
from fedscan_core.errors import WireError

PREFIX = "/fedscan/v1"
TIMEOUT_SECONDS = 10.0  # for each of connecting, sending and waiting
_LARGEST = 4 * 2**20  # bytes of an answer
_LONGEST = 400  # characters of a text that the coordinator sent

Kind = Literal["name", "unreachable", "proxy", "certificate", "expired", "clock", "refused", "answer"]

# OpenSSL's numbers (X509_V_ERR_*).
_NOT_YET, _EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 9, 10, 62, 64


class DoorError(WireError):
    """The coordinator could not be asked, or said no.

    Attributes:
        kind: "name" (no such host), "unreachable", "proxy" (it refused), "certificate" (not the coordinator's),
            "expired" (certificate), "clock" (ours or theirs is wrong), "refused", "answer" (not one of ours).
        status: the HTTP status, 0 where there was none.
        utc: the coordinator's time, where it said so.
    """

    def __init__(self, message: str, *, remedy: str, kind: Kind, status: int = 0, utc: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.kind, self.status, self.utc = kind, status, utc


def hello(connection: Connection) -> dict[str, Any]:
    """Who is there: coordinator, version, flower, protocol, utc (ISO 8601). Anybody may ask.

    `certificate_until` is not told by the coordinator: it is the last moment of the certificate that it showed.

    Raises:
        DoorError: not reached, not trusted, or not a coordinator of ours.
    """
    told = _call(connection, "GET", "/hello")
    return _with(told, {"coordinator": str, "version": str, "flower": str, "protocol": int, "utc": str})


def enrol(connection: Connection, token: str, site: str, public_key: str, policy: Mapping[str, Any]) -> dict[str, Any]:
    """Registers the site's public key against the invitation's token, which works once.

    Returns:
        site, coordinator, node_id, launchers (name -> OpenSSH public key).

    Raises:
        DoorError: see `hello`; or the token was used, is unknown or has expired.
    """
    body = {"token": token, "site": site, "public_key": public_key, "policy": dict(policy)}
    told = _call(connection, "POST", "/enrol", body)
    return _with(told, {"site": str, "coordinator": str, "node_id": str, "launchers": dict})


def about(site_folder: Path) -> dict[str, Any]:
    """What the coordinator knows of this site: site, enrolled, fingerprint, node_id, online, last_seen, policy, ...

    Raises:
        ConfigError: the site is not enrolled.
        SiteKeyError: no usable node key.
        DoorError: see `hello`; or the coordinator does not know the key (status 401 or 403).
    """
    told = _signed(site_folder, "GET", "/site")
    return _with(told, {"site": str, "fingerprint": str, "node_id": str, "online": bool, "policy": dict})


def publish_policy(site_folder: Path, policy: Mapping[str, Any]) -> None:
    """Tells the coordinator the public policy. Errors as `about`."""
    _signed(site_folder, "PUT", "/site/policy", dict(policy))


def put_anchor(site_folder: Path, anchor: str) -> None:
    """Leaves the audit log's keyed digest with the coordinator. Errors as `about`."""
    _signed(site_folder, "POST", "/site/anchor", {"anchor": anchor})


def anchors(site_folder: Path) -> list[dict[str, Any]]:
    """The last anchors that the coordinator holds, oldest first: utc, run_id, round, anchor. Errors as `about`."""
    told = _with(_signed(site_folder, "GET", "/site/anchors"), {"anchors": list})["anchors"]
    if not all(isinstance(one, dict) and isinstance(one.get("anchor"), str) for one in told):
        raise _strange(connections.load(site_folder))
    return list(told)


def retire(site_folder: Path) -> None:
    """Asks the coordinator to forget the key for ever. Errors as `about`."""
    _signed(site_folder, "POST", "/site/retire", {})


def proxy_of(connection: Connection) -> str:
    """The proxy of the environment that requests go through, without user and password; "" for none."""
    if urllib.request.proxy_bypass(connection.host):
        return ""
    found = urllib.request.getproxies()
    text = found.get("https") or found.get("all") or ""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    with contextlib.suppress(ValueError):
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or ""
    return text.rpartition("@")[2]


# ------------------------------------------------------------------------------------------------------------ requests


def _signed(site_folder: Path, method: str, path: str, body: Any = None) -> dict[str, Any]:
    connection = connections.load(site_folder)
    key = node_key.load(site_folder / connections.NODE_KEY)
    data = b"" if body is None else _json(body)
    headers = node_key.sign_request(key, connection.site, method, PREFIX + path, data)
    return _send(connection, method, path, data, headers)


def _call(connection: Connection, method: str, path: str, body: Any = None) -> dict[str, Any]:
    return _send(connection, method, path, b"" if body is None else _json(body), {})


def _json(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _send(connection: Connection, method: str, path: str, data: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
    try:
        with (
            httpx.Client(verify=_trusted(connection), timeout=TIMEOUT_SECONDS) as client,
            client.stream(
                method,
                connection.address + PREFIX + path,
                content=data,
                headers={"content-type": "application/json", **headers},
            ) as response,
        ):
            content, until = _read(connection, response), _until(response)
    except httpx.TimeoutException:
        raise _unreachable(connection, f"did not answer within {TIMEOUT_SECONDS:g} seconds") from None
    except httpx.ProxyError as error:
        raise _proxy_said_no(connection, str(error)) from None
    except httpx.TransportError as error:
        raise _not_reached(connection, error) from None
    except (httpx.InvalidURL, ValueError) as error:  # of HTTPS_PROXY: the address itself has been checked
        raise DoorError(
            f"HTTPS_PROXY is not usable: {short(str(error))}.",
            remedy="Its form is http://HOST:PORT.",
            kind="proxy",
        ) from None
    return {**_told(connection, response, content), "certificate_until": until}


def _trusted(connection: Connection) -> ssl.SSLContext | bool:
    if connection.ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(connection.ca))  # with a file: that one, and not the system's too
    except (OSError, ssl.SSLError):
        raise DoorError(
            f"{connection.ca} holds no certificate that can be read.",
            remedy="Enrol again with a new invitation.",
            kind="certificate",
        ) from None


def _read(connection: Connection, response: httpx.Response) -> bytes:
    content = b""
    for piece in response.iter_bytes():
        content += piece
        if len(content) > _LARGEST:
            raise _strange(connection)
    return content


def _until(response: httpx.Response) -> str:
    """ISO 8601; "" where it cannot be had."""
    channel = response.extensions.get("network_stream")
    tls = channel.get_extra_info("ssl_object") if channel is not None else None
    shown = (tls.getpeercert() or {}) if tls is not None else {}
    if "notAfter" not in shown:
        return ""
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC).isoformat()


def _told(connection: Connection, response: httpx.Response, content: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict) or 300 <= response.status_code < 400:
        raise _strange(connection, response.status_code)
    if response.status_code < 300:
        cleaned: dict[str, Any] = _printable(tree)
        return cleaned
    says, status, utc = tree.get("error"), response.status_code, tree.get("utc")
    if not isinstance(says, str):
        raise _strange(connection, status)
    if isinstance(utc, str) and _is_off(utc):
        raise DoorError(
            f"{connection.coordinator} refused the request's time: there it is {utc}.",
            remedy="Set this machine's clock (NTP): timedatectl set-ntp true",
            kind="clock",
            status=status,
            utc=utc,
        )
    remedy = tree.get("remedy")
    raise DoorError(
        f"{connection.coordinator} says: {short(says)}",
        remedy=short(remedy) if isinstance(remedy, str) else "",
        kind="refused",
        status=status,
    )


def _is_off(utc: str) -> bool:
    """Whether the coordinator's clock and ours are so far apart that a signed request is refused for it."""
    try:
        drift = datetime.now(UTC) - datetime.fromisoformat(utc)
    except (ValueError, TypeError):  # no time, or one without a zone
        return False
    return abs(drift.total_seconds()) > node_key.WINDOW_SECONDS - 2 * TIMEOUT_SECONDS


def _with(tree: dict[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    if not all(isinstance(tree.get(name), kind) for name, kind in types.items()):
        raise DoorError(
            "The coordinator's answer is not one of this version.",
            remedy="Install the same fedscan version on both sides.",
            kind="answer",
        )
    return tree


def short(text: str) -> str:
    """What somebody else sent, fit for a terminal: one line, printable, bounded."""
    return wire.plain(text, _LONGEST)


def _printable(tree: Any) -> Any:
    """The same tree with all its texts fit for a terminal: hospital IT reads them there."""
    if isinstance(tree, dict):
        return {_printable(name): _printable(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_printable(value) for value in tree]
    return short(tree) if isinstance(tree, str) else tree


# -------------------------------------------------------------------------------------------------------------- errors


def _not_reached(connection: Connection, error: BaseException) -> DoorError:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _certificate(connection, cause)
        if isinstance(cause, ssl.SSLError):
            return DoorError(
                f"{_place(connection)} does not speak TLS as it should ({cause.reason or 'broken off'}).",
                remedy="A firewall or proxy may be cutting in; nothing on the way may open TLS.",
                kind="certificate",
            )
    names = [type(cause).__name__ for cause in _causes(error)]
    if "gaierror" in names and not proxy_of(connection):
        return DoorError(
            f"The name {connection.host} cannot be resolved.",
            remedy="Ask for a DNS entry, or set HTTPS_PROXY where only the proxy resolves outside names.",
            kind="name",
        )
    words = {"ConnectionRefusedError": "refused the connection", "ConnectionResetError": "broke the connection off"}
    return _unreachable(connection, next((words[name] for name in names if name in words), "cannot be reached"))


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found


def _certificate(connection: Connection, error: ssl.SSLCertVerificationError) -> DoorError:
    place = _place(connection)
    if error.verify_code == _EXPIRED:
        return DoorError(
            f"The certificate of {place} has expired.",
            remedy=f"{connection.coordinator} must renew it (fedscan server cert renew); or this clock is wrong.",
            kind="expired",
        )
    if error.verify_code == _NOT_YET:
        return DoorError(
            f"The certificate of {place} is not valid yet.",
            remedy="This machine's clock is slow: timedatectl set-ntp true",
            kind="clock",
        )
    if error.verify_code in (_OTHER_HOST, _OTHER_ADDRESS):
        return DoorError(
            f"The certificate of {place} is for another name than {connection.host}.",
            remedy=f"{connection.coordinator} must issue it for this name, or send an invitation with the right one.",
            kind="certificate",
        )
    return DoorError(
        f"Whoever answers at {place} is not vouched for by {connection.coordinator}'s authority.",
        remedy="Exempt this host from TLS inspection. If there is none, stop, and ask the coordinator by telephone.",
        kind="certificate",
    )


def _unreachable(connection: Connection, what: str) -> DoorError:
    return DoorError(
        f"{_place(connection)} {what}.",
        remedy=f"Allow outbound TCP from this machine to {connection.host} port {connection.port}, or set HTTPS_PROXY "
        "(fedscan agent check SITE_DIR --for-it prints the request).",
        kind="unreachable",
    )


def _proxy_said_no(connection: Connection, says: str) -> DoorError:
    return DoorError(
        f"The proxy {proxy_of(connection)} lets nothing through to {connection.host} port {connection.port}: "
        f"{short(says)}.",
        remedy="407: put user and password into HTTPS_PROXY (http://USER:PASSWORD@HOST:PORT). Else have CONNECT to "
        "this host and port allowed.",
        kind="proxy",
    )


def _place(connection: Connection) -> str:
    proxy = proxy_of(connection)
    return f"{connection.host}:{connection.port}" + (f" (through the proxy {proxy})" if proxy else "")


def _strange(connection: Connection, status: int = 0) -> DoorError:
    return DoorError(
        f"What answers at {_place(connection)} is not fedscan's coordinator"
        + (f" (HTTP {status})." if status else "."),
        remedy="Check the address with the coordinator; a portal or gateway may have answered in its place.",
        kind="answer",
        status=status,
    )
