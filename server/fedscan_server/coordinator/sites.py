"""The registry of sites: who is invited, enrolled and revoked, under which public key, and what each site publishes."""

import json
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedscan_core import node_key
from fedscan_core.errors import ConfigError
from fedscan_core.invite import Invite
from fedscan_server.coordinator import registry
from fedscan_server.coordinator.state import Coordinator

POLICY_BYTES = 64 * 1024  # a public policy is a page, not a store
_SEEN_SECONDS = 10  # `seen` writes no more often
_ANCHORS = 1000  # newest anchors of a site that are kept; older ones: the first of each day, for ever
_DAYS = 5000  # first ones of a day that are told


@dataclass(frozen=True)
class Enrolled:
    """A site that took up its invitation. Times are UTC, ISO 8601; "" = never. `node_id` is Flower's, 0 = none yet."""

    name: str
    public_key: str
    node_id: int
    enrolled: str
    policy: dict[str, Any]
    policy_utc: str
    revoked: str
    last_seen: str


def invite(c: Coordinator, name: str, hours: float) -> Invite:
    """A one-time invitation for a new site, or a new one for a site that is there, which goes on until it is used.

    Raises:
        ConfigError: a name that is none, or hours out of range.
    """
    return registry.invite(c, "site", name, "", hours)


def redeem(c: Coordinator, token: str, public_key: str, policy: dict[str, Any]) -> Enrolled:
    """Enrols the invitation's site with this public key (OpenSSH, ECDSA P-384); the caller then registers the node.

    An invitation works once. The same token with the same key again answers the same: an answer that was lost on its
    way can be asked for once more. A site's key that was replaced or revoked never comes back, since Flower keeps an
    unregistered key for ever.

    Raises:
        ConfigError: the invitation is not valid, or the key is no such key, another site's, or a dead one.
    """
    public_key = _plain_key(public_key)
    text = _policy_text(policy)
    with registry.open_(c) as db:
        invitation = registry.invitation(db, "site", token)
        name, now = invitation["name"], registry.utc()
        before = _row(db, name)
        if invitation["used_by"]:
            if invitation["used_by"] != public_key or before is None:  # `revoke` takes used invitations away too
                raise registry.refused()
            return _enrolled(before)
        other = db.execute("SELECT 1 FROM site WHERE public_key = ? AND name <> ?", (public_key, name)).fetchone()
        if other or db.execute("SELECT 1 FROM dead_key WHERE public_key = ?", (public_key,)).fetchone():
            raise ConfigError(
                "This node key was enrolled before and cannot be used again.",
                remedy="Move node.key away and enrol again: a new one is made.",
            )
        same = before is not None and before["public_key"] == public_key
        if before is not None and not same:
            db.execute("INSERT OR IGNORE INTO dead_key VALUES (?, ?)", (before["public_key"], name))
        db.execute(
            "INSERT OR REPLACE INTO site (name, public_key, node_id, enrolled, policy, policy_utc, last_seen) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (name, public_key, before["node_id"] if before is not None and same else "", now, text, now, now),
        )
        db.execute("UPDATE invitation SET used_by = ? WHERE token = ?", (public_key, invitation["token"]))
        return _enrolled(_row(db, name))


def by_name(c: Coordinator, name: str) -> Enrolled | None:
    """The site of this name, also a revoked one; None if it never enrolled."""
    with registry.open_(c) as db:
        row = _row(db, name)
    return None if row is None else _enrolled(row)


def every(c: Coordinator) -> list[Enrolled]:
    """All enrolled sites by name, revoked ones too."""
    with registry.open_(c) as db:
        return [_enrolled(row) for row in db.execute("SELECT * FROM site ORDER BY name")]


def invited(c: Coordinator) -> list[tuple[str, str]]:
    """(name, expires) of each site invitation that nobody has used yet."""
    with registry.open_(c) as db:
        query = "SELECT name, expires FROM invitation WHERE kind = 'site' AND used_by = '' ORDER BY name"
        return [(row["name"], row["expires"]) for row in db.execute(query)]


def set_policy(c: Coordinator, name: str, policy: dict[str, Any]) -> None:
    """Keeps what the site published last.

    Raises:
        ConfigError: no such site, or larger than POLICY_BYTES.
    """
    text = _policy_text(policy)
    _update(c, name, "policy = ?, policy_utc = ?", (text, registry.utc()))


def set_node(c: Coordinator, name: str, node_id: int) -> None:
    """Keeps Flower's id of the site's node.

    Raises:
        ConfigError: no such site.
    """
    _update(c, name, "node_id = ?", (str(node_id) if node_id else "",))


def revoke(c: Coordinator, name: str) -> None:
    """Shuts the site out: its key is refused from now on and for ever. An unused invitation of it is void too.

    The edge refuses its next request; `control.reconcile` unregisters the node.

    Raises:
        ConfigError: no such site.
    """
    with registry.open_(c) as db:
        gone = db.execute("DELETE FROM invitation WHERE kind = 'site' AND name = ?", (name,)).rowcount
        row = _row(db, name)
        if row is None:
            if gone:  # invited, never enrolled
                return
            raise _unknown(name)
        db.execute("UPDATE site SET revoked = ? WHERE name = ? AND revoked = ''", (registry.utc(), name))
        db.execute("INSERT OR IGNORE INTO dead_key VALUES (?, ?)", (row["public_key"], name))


def node_names(c: Coordinator) -> dict[int, str]:
    """Flower's node id -> name of every site that is enrolled, registered and not revoked."""
    return {site.node_id: site.name for site in every(c) if site.node_id and not site.revoked}


def seen(c: Coordinator, name: str) -> None:
    """Notes that the site spoke now; written at most every 10 seconds. An unknown name is ignored."""
    site = by_name(c, name)
    if site is None:
        return
    now = datetime.now(UTC)
    if site.last_seen and (now - datetime.fromisoformat(site.last_seen)).total_seconds() < _SEEN_SECONDS:
        return
    with registry.open_(c) as db:
        db.execute("UPDATE site SET last_seen = ? WHERE name = ?", (now.isoformat(timespec="seconds"), name))


def add_anchor(c: Coordinator, name: str, run_id: str, round_: int, anchor: str) -> None:
    """Keeps a digest of the head of the site's audit log: later it shows whether that log was cut or rolled back.

    `anchor` is 64 hex digits; "" (simulation) and a repetition of the site's last one are not kept. Of old ones the
    first of each day stays: nobody at the site can push it out by sending many.
    """
    with registry.open_(c) as db:
        last = db.execute("SELECT anchor FROM anchor WHERE site = ? ORDER BY id DESC LIMIT 1", (name,)).fetchone()
        if anchor and (last is None or last["anchor"] != anchor):
            number = db.execute(
                "INSERT INTO anchor (site, utc, run_id, round, anchor) VALUES (?, ?, ?, ?, ?)",
                (name, registry.utc(), run_id, round_, anchor),
            ).lastrowid
            if number is not None and number % 100 == 0:
                db.execute(
                    f"DELETE FROM anchor WHERE site = :site AND id NOT IN ({_FIRST}) AND id NOT IN "
                    "(SELECT id FROM anchor WHERE site = :site ORDER BY id DESC LIMIT :last)",
                    {"site": name, "last": _ANCHORS},
                )


_FIRST = "SELECT min(id) FROM anchor WHERE site = :site GROUP BY substr(utc, 1, 10)"  # of each day


def anchors(c: Coordinator, name: str, last: int = 100) -> list[dict[str, Any]]:
    """The site's last anchors and the first of each day, oldest first: {"utc", "run_id", "round", "anchor"}.

    The last ones alone would let whoever rewrites a log with its key wait, or send new ones, until none is left that
    knows better.
    """
    with registry.open_(c) as db:
        rows = db.execute(
            "SELECT utc, run_id, round, anchor FROM anchor WHERE id IN "
            "(SELECT id FROM anchor WHERE site = :site ORDER BY id DESC LIMIT :last) "
            f"OR id IN ({_FIRST} ORDER BY 1 DESC LIMIT :days) ORDER BY id",
            {"site": name, "last": last, "days": _DAYS},
        ).fetchall()
    return [dict(row) for row in rows]


def _row(db: sqlite3.Connection, name: str) -> Any:
    return db.execute("SELECT * FROM site WHERE name = ?", (name,)).fetchone()


def _enrolled(row: sqlite3.Row) -> Enrolled:
    return Enrolled(
        name=row["name"],
        public_key=row["public_key"],
        node_id=int(row["node_id"] or 0),
        enrolled=row["enrolled"],
        policy=json.loads(row["policy"]),
        policy_utc=row["policy_utc"],
        revoked=row["revoked"],
        last_seen=row["last_seen"],
    )


def _update(c: Coordinator, name: str, what: str, values: tuple[str, ...]) -> None:
    with registry.open_(c) as db:
        if not db.execute(f"UPDATE site SET {what} WHERE name = ?", (*values, name)).rowcount:
            raise _unknown(name)


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"There is no site '{name}'.", remedy="fedscan server sites")


def _policy_text(policy: dict[str, Any]) -> str:
    text = json.dumps(policy, sort_keys=True, allow_nan=False)
    if len(text.encode()) > POLICY_BYTES:
        raise ConfigError("The public policy is too large.", remedy=f"At most {POLICY_BYTES} bytes.")
    return text


def _plain_key(public_key: str) -> str:
    """One line of OpenSSH text without a comment, so that equal keys are equal texts."""
    try:
        key = load_ssh_public_key(public_key.encode())
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError("The site's public key is no ECDSA P-384 key.", remedy="fedscan agent enrol makes one.")
    return node_key.public_text(key)
