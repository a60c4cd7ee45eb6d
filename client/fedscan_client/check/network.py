"""Is the coordinator there, is it the right one, do the clocks agree, does it know this site, do versions fit?"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedscan_client import budget, door, site
from fedscan_client import connection as connections
from fedscan_client.check.finding import Finding, fail, ok, skip, warn
from fedscan_client.connection import Connection
from fedscan_client.door import DoorError
from fedscan_core import invite, node_key, wire
from fedscan_core.errors import FedscanError

TOPICS = ("coordinator", "certificate", "clock", "registration", "versions")

# Flower refuses a node whose clock is more than 5 s ahead of the SuperLink's or more than 305 s behind it (its
# routers/fleet/node_auth.py). Clocks drift: what is near is said before it fails.
AHEAD_FAILS, AHEAD_WARNS, BEHIND_FAILS, BEHIND_WARNS = 4.0, 1.5, 290.0, 60.0
_SOON = timedelta(days=14)
_SET_CLOCK = "Have this machine's clock set by NTP: timedatectl set-ntp true (or ask for the hospital's time server)."


def look(folder: Path) -> Iterator[Finding]:
    """The findings of `TOPICS`.

    Raises:
        FedscanError: not enrolled, or a file of the connection is damaged.
    """
    connection = connections.load(folder)
    started = datetime.now(UTC)
    try:
        told = door.hello(connection)
    except DoorError as error:
        yield from _not_reached(error)
        return
    ended = datetime.now(UTC)
    proxy = door.proxy_of(connection)
    way = f" through the proxy {proxy}" if proxy else ""
    yield ok("coordinator", f"{door.short(told['coordinator'])} answers at {connection.address}{way}.")
    if proxy:
        yield from _proxy_of_the_service(proxy)
    yield from _certificate(connection, told["certificate_until"])
    yield _clock(told["utc"], started, ended)
    yield from _registration(folder, connection)
    yield from _versions(told)


def _not_reached(error: DoorError) -> Iterator[Finding]:
    topic = {"certificate": "certificate", "expired": "certificate", "clock": "clock"}.get(error.kind, "coordinator")
    yield fail(topic, error.message, error.remedy)
    for other in TOPICS:
        if other != topic:
            yield skip(other, "not known, since the coordinator could not be asked")


def _proxy_of_the_service(proxy: str) -> Iterator[Finding]:
    """A service does not inherit the variables of the shell in which this check runs."""
    if os.environ.get("INVOCATION_ID"):  # systemd's: these are the service's own variables
        return
    yield warn(
        "proxy",
        f"The proxy {proxy} comes from this shell's environment; a service has one of its own.",
        "Give the service the same: Environment=HTTPS_PROXY=... in its unit (systemctl edit fedscan-agent).",
    )


def _certificate(connection: Connection, until: str) -> Iterator[Finding]:
    mark = "a public authority"
    if connection.ca is not None:
        mark = "SHA-256 " + invite.ca_fingerprint(connection.ca.read_text(encoding="ascii"))
    if until and datetime.fromisoformat(until) - datetime.now(UTC) < _SOON:
        yield warn(
            "certificate",
            f"The coordinator's certificate ends on {until[:10]}.",
            f"Tell {connection.coordinator} to renew it: fedscan server cert renew",
        )
        return
    yield ok("certificate", f"valid until {until[:10]}, vouched for by {mark}")


def _clock(theirs: str, started: datetime, ended: datetime) -> Finding:
    """Their clock was read at some moment between ours: the drift is known up to half the time in between."""
    try:
        utc = datetime.fromisoformat(theirs)
        middle = started + (ended - started) / 2
        ahead = (middle - utc).total_seconds()
    except (ValueError, TypeError):
        return fail("clock", "The coordinator does not say what time it is.", "Install the same fedscan version.")
    unsure = (ended - started).total_seconds() / 2
    words = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's (+-{unsure:.1f} s)"
    if ahead - unsure > AHEAD_FAILS or ahead + unsure < -BEHIND_FAILS:
        return fail("clock", f"This machine's clock is {words}; Flower refuses more than 5 s ahead.", _SET_CLOCK)
    if ahead > AHEAD_WARNS or ahead < -BEHIND_WARNS:
        return warn("clock", f"This machine's clock is {words}; Flower refuses more than 5 s ahead.", _SET_CLOCK)
    return ok("clock", words)


def _registration(folder: Path, connection: Connection) -> Iterator[Finding]:
    topic = "registration"
    if not connection.enrolled:
        yield fail(topic, "Enrolment was begun and not ended.", f"fedscan agent enrol INVITE.toml {folder}")
        return
    try:
        mine = node_key.fingerprint(node_key.public_text(node_key.load(folder / connections.NODE_KEY)))
        told = door.about(folder)
    except DoorError as error:
        remedy = error.remedy
        if error.kind == "refused":
            remedy = f"Ask {connection.coordinator} whether this site was revoked; with a new invitation: "
            remedy += f"fedscan agent enrol INVITE.toml {folder}"
        yield fail("clock" if error.kind == "clock" else topic, error.message, remedy)
        return
    except FedscanError as error:
        yield fail(topic, error.message, error.remedy)
        return
    if told["fingerprint"] != mine:
        yield fail(
            topic,
            "The coordinator knows this site under another key.",
            f"Ask {connection.coordinator} for a new invitation, then: fedscan agent enrol INVITE.toml {folder}",
        )
        return
    online = "an agent is connected" if told["online"] else "no agent is connected now"
    yield ok(topic, f"'{connection.site}' with the key {mine}; {online}")
    yield from _published(folder, told["policy"])


def _published(folder: Path, there: dict[str, Any]) -> Iterator[Finding]:
    """Researchers see what was published: an older policy there makes them ask for what is refused here."""
    try:
        here = budget.public_policy(site.load(folder))
    except FedscanError:
        return  # said where site.toml and ledger are looked at
    if {**there, "remaining": None} != {**here, "remaining": None}:
        yield warn(
            "published policy",
            "The coordinator still shows an older policy of this site to researchers.",
            "It is sent when the agent starts and every hour, or now, by typing fedscan agent enrol once more.",
        )


def _versions(told: dict[str, Any]) -> Iterator[Finding]:
    flower, own = version("flwr"), own_version()
    both = f"fedscan {own}, Flower {flower}, protocol {wire.PROTOCOL}"
    theirs = f"fedscan {door.short(told['version'])}, Flower {door.short(told['flower'])}, protocol {told['protocol']}"
    if told["protocol"] != wire.PROTOCOL or told["flower"] != flower:
        yield fail(
            "versions",
            f"Here is {both}; the coordinator has {theirs}.",
            f"Install the coordinator's version: pip install fedscan=={door.short(told['version'])}",
        )
    elif told["version"] != own:
        yield warn("versions", f"Here is {both}; the coordinator has {theirs}.", "Plan the same version on both sides.")
    else:
        yield ok("versions", f"{both}, as at the coordinator")


def own_version() -> str:
    """Of this package."""
    try:
        return version("fedscan")
    except PackageNotFoundError:
        return "(source tree)"
