"""`fedscan agent check --for-it`: a page to hand to the firewall and PACS teams. It holds nothing about patients."""

import contextlib
import socket
import textwrap
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path

from fedscan_client import connection as connections
from fedscan_client import door, site
from fedscan_client.connection import Connection
from fedscan_client.intake.sources.settings import DicomWeb, DimseGet, DimseMove, DimseStore, Source
from fedscan_core import invite
from fedscan_core.errors import ConfigError

_WIDTH = 80
_PACS = (DicomWeb, DimseGet, DimseMove, DimseStore)


def page(folder: Path) -> str:
    """The page as plain text, 80 letters wide. Asks the name service for the coordinator's addresses.

    Raises:
        ConfigError: the site is not enrolled, or site.toml cannot be read.
    """
    connection, here = connections.load(folder), site.load(folder)
    lines = [
        f"fedscan site '{connection.site}', for the network and PACS teams, {date.today()}",
        "=" * _WIDTH,
        *_firewall(connection),
        *_pacs(here.source),
        "",
        "Approved by: ______________________________      Date: ______________",
    ]
    return "\n".join(lines) + "\n"


def _firewall(connection: Connection) -> Iterator[str]:
    proxy, mark = door.proxy_of(connection), ["a public authority"]
    if connection.ca is not None:
        try:
            printed = invite.ca_fingerprint(connection.ca.read_text(encoding="ascii"))
            mark = [line.strip() for line in invite.spelled(printed).splitlines()]
            mark[0] = f"SHA-256 {mark[0]}"
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{connection.ca} cannot be read.", remedy="Enrol again.") from None
    yield ""
    yield "1. Firewall: one rule, outbound only"
    yield from _table(
        ("From", _from(connection)),
        ("To", f"{connection.host}{_addresses(connection.host)}"),
        ("Port", f"TCP {connection.port}"),
        ("Protocol", "HTTPS (TLS 1.2 or newer); the connection is always opened from here"),
        ("Inbound", "none: nothing outside ever connects to this machine"),
        ("Proxy", f"{proxy} (CONNECT to the host and port above)" if proxy else "none; if one is needed: HTTPS_PROXY"),
        ("Do not", "open TLS on the way (no inspection, no re-signing): the agent refuses any other certificate"),
        *zip(("Signed by", ""), mark, strict=False),
        ("Volume", "per round about one model down and one up; a small request every few seconds in between"),
        ("Time", "NTP (UDP 123) to the hospital's time server: clocks may differ by less than 5 seconds"),
        ("Also", "DNS for the host above; no other host, no telemetry, no updates"),
    )


def _pacs(sources: Mapping[str, Source]) -> Iterator[str]:
    asked = [(name, it) for name, it in sources.items() if isinstance(it, _PACS)]
    yield ""
    yield "2. PACS registration"
    if not asked:
        yield "   None: this site reads images from a folder, no DICOM node is needed."
    for name, it in asked:
        yield f"   [{name}]"
        yield from _table(*_node(it))


def _node(it: DicomWeb | DimseGet | DimseMove | DimseStore) -> Iterator[tuple[str, str]]:
    if isinstance(it, DicomWeb):
        yield "Kind", "DICOMweb: QIDO-RS (query) and WADO-RS (retrieve), read only"
        yield "Connection", f"from this machine to {it.url}"
        who = "user name and password" if it.username else "bearer token" if it.token_file or it.token_env else "none"
        yield "Account", f"{who}{', and a client certificate' if it.client_certificate else ''}"
        return
    if isinstance(it, DimseStore):
        yield "Kind", "C-STORE: the PACS routes images to us by its own rules; C-ECHO is answered"
        yield "Our AE title", it.ae_title
        yield (
            "Listens at",
            f"{it.listen_address} TCP {it.listen_port} (rule: from the senders below, inside the hospital)",
        )
        yield "Senders", "; ".join(f"{peer.ae_title} from {peer.address}" for peer in it.allow)
    else:
        yield "Kind", "C-FIND and C-GET" if isinstance(it, DimseGet) else "C-FIND and C-MOVE, images come by C-STORE"
        yield "Our AE title", f"{it.ae_title} at {socket.gethostname()}"
        yield "PACS", f"{it.pacs_ae_title} at {it.host} TCP {it.port} (rule: from this machine to there)"
        if isinstance(it, DimseMove):
            yield "Listens at", f"{it.listen_address} TCP {it.listen_port} (rule: from the PACS to there)"
            yield "Move to", f"{it.ae_title} = {it.listen_address}:{it.listen_port}, to be entered as a destination"
            if it.senders:
                yield "Senders", "; ".join(f"{peer.ae_title} from {peer.address}" for peer in it.senders)
    yield "Encryption", "TLS with certificates on both sides" if it.tls else "none: keep it inside one network segment"
    yield "Objects", "all storage SOP classes, as stored (every transfer syntax)"


def _table(*rows: tuple[str, str]) -> Iterator[str]:
    for name, text in rows:
        yield textwrap.fill(
            f"   {name:<13}{text}", _WIDTH, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False
        )


def _from(connection: Connection) -> str:
    """This machine: its name, and the address that it would connect from; no packet is sent to find it."""
    address = ""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((connection.host, connection.port))
        address = f" ({probe.getsockname()[0]})"
    return f"{socket.gethostname()}{address}"


def _addresses(host: str) -> str:
    with contextlib.suppress(OSError, UnicodeError):
        found = {str(it[4][0]) for it in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)} - {host}
        return f" (today {', '.join(sorted(found))}; better by name, addresses change)" if found else ""
    return " (this machine cannot resolve the name: DNS or the proxy must)"
