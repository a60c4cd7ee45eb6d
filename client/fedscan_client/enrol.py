"""Enrolment: a hospital's folder, its keys, and its public key at the coordinator, from one file of invitation.

Every step may be stopped and done again: nothing that is there is replaced, and a coordinator that already knows this
site's key is not asked twice. Private keys are made here and stay here; what leaves is the public key and the policy.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedscan_client import budget, door, keys, site, site_template
from fedscan_client import connection as connections
from fedscan_client.audit import log
from fedscan_client.connection import Connection
from fedscan_client.site import Site
from fedscan_core import invite as invites
from fedscan_core import node_key
from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError, FolderError, SiteKeyError
from fedscan_core.files import sync_folder, write_atomic
from fedscan_core.invite import Invite

NEXT_KEY = "node.key.next"  # takes a revoked key's place once the coordinator has its public half


@dataclass(frozen=True)
class Enrolled:
    """What came of it.

    Attributes:
        site: as site.toml has it now.
        connection: where it connects to.
        ca_fingerprint: of the coordinator's authority, "" for a public one; to be read out by telephone.
        made: what was made, in words, for the person who typed the command.
        known: what the coordinator knows of the site.
        launchers: who may launch there, name -> public key; empty where an earlier call enrolled.
    """

    site: Site
    connection: Connection
    ca_fingerprint: str
    made: tuple[str, ...]
    known: Mapping[str, Any]
    launchers: Mapping[str, str] = field(default_factory=dict)


def enrol(invitation: Path, folder: Path | None = None) -> Enrolled:
    """Enrols the site of an invitation; again does only what is missing.

    Args:
        invitation: the coordinator's file.
        folder: the site's folder; default: one of the site's name in the working directory. A site.toml in it is kept.

    Raises:
        ConfigError: no usable invitation, or the folder's site.toml is wrong or another site's.
        FolderError: the folder is enrolled somewhere else, was retired, or cannot be written.
        SiteKeyError: a key that is there cannot be used.
        DoorError: the coordinator cannot be reached or trusted, or the invitation was used. Keys and site.toml stay.
    """
    invite = invites.read(invitation, "site")
    folder = Path(invite.name) if folder is None else folder
    _same_place(folder, invite)
    made = []
    if not (folder / site.FILE).exists():
        _make_folder(folder)
        write_atomic(folder / site.FILE, site_template.text(invite.name).encode())
        made.append(f"{folder / site.FILE}: fill in the lines marked FILL IN")
    here = site.load(folder)
    if here.name != invite.name:
        raise ConfigError(
            f"{folder / site.FILE} is of site '{here.name}', the invitation is for '{invite.name}'.",
            remedy="Give another folder, or ask for an invitation under that name.",
        )
    made += _keys(folder, here)
    connection = _connect(folder, invite)
    known, launchers = _register(here, connection, invite)
    enrolled = Connection(
        connection.address, known["coordinator"], connection.ca, here.name, connection.enrolled or _now()
    )
    if enrolled != connection:
        connections.save(folder, enrolled)
        told = {"address": enrolled.address, "coordinator": enrolled.coordinator}
        log.append(folder, "enrol", fingerprint=known["fingerprint"], **told)
        budget.note_policy(here)
    return Enrolled(here, enrolled, invite.ca_fingerprint, tuple(made), known, launchers)


def _same_place(folder: Path, invite: Invite) -> None:
    """A folder belongs to one coordinator: its budget was granted to that one's runs."""
    if (folder / site.RETIRED).exists():
        raise FolderError(f"{folder} was retired.", remedy="A new site gets a folder and a name of its own.")
    if not (folder / connections.FILE).exists():
        return
    there = connections.load(folder)
    if there.address != invite.address or there.site != invite.name:
        raise FolderError(
            f"{folder} is enrolled as '{there.site}' with {there.coordinator} ({there.address}).",
            remedy="Another federation needs a folder of its own.",
        )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{folder} cannot be made: {error.strerror}.", remedy="Give another folder.") from None
    if folder.stat().st_uid == os.geteuid() and not any(folder.iterdir()):
        folder.chmod(0o700)


def _keys(folder: Path, here: Site) -> list[str]:
    """Makes what is missing of the site's key and its network identity."""
    made = []
    if not (folder / keys.HANDED_OUT).exists() and not _has_key(folder, here):
        keys.create(folder, here.key)
        place = keys.where(folder, here.key)
        if here.key.source == "environment":
            made.append(f"the site's key, in {folder / keys.HANDED_OUT}: move it to where {place} is set from")
        else:
            made.append(f"the site's key, in {place}: back it up (fedscan agent key backup {folder} FILE)")
    path = folder / connections.NODE_KEY
    if not path.exists():
        node_key.create(path)
        made.append(f"{path}: the site's network identity; it needs no backup, a lost one is invited again")
    return made


def _has_key(folder: Path, here: Site) -> bool:
    try:
        keys.load(folder, here.key)
    except SiteKeyError:  # missing, or one that cannot be used: `keys.create` makes the first and refuses the second
        return False
    return True


def _connect(folder: Path, invite: Invite) -> Connection:
    """Writes down where the coordinator is, before it is told anything."""
    ca = folder / connections.CA_FILE if invite.ca else None
    if ca is not None and (not ca.exists() or ca.read_text(encoding="ascii", errors="replace") != invite.ca):
        write_atomic(ca, invite.ca.encode())
    enrolled = connections.load(folder).enrolled if (folder / connections.FILE).exists() else ""
    connection = Connection(invite.address, invite.coordinator, ca, invite.name, enrolled)
    connections.save(folder, connection)
    return connection


def _register(here: Site, connection: Connection, invite: Invite) -> tuple[dict[str, Any], Mapping[str, str]]:
    """What the coordinator knows of this site; it redeems the invitation where it does not know the key yet."""
    launchers: Mapping[str, str] = {}
    theirs = door.hello(connection)["coordinator"]
    mine = budget.public_policy(here)
    try:
        known = door.about(here.folder)
    except door.DoorError as error:
        if error.status not in (401, 403, 404) or error.kind != "refused":
            raise
        revoked = error.status == 403 or (here.folder / NEXT_KEY).exists()  # the latter: stopped half way
        launchers = _redeem(here, connection, invite, mine, revoked=revoked)
        known = door.about(here.folder)
    if known["policy"] != mine:  # site.toml was filled in since
        door.publish_policy(here.folder, mine)
    return {**known, "policy": mine, "coordinator": theirs}, launchers


def _redeem(
    here: Site, connection: Connection, invite: Invite, policy: Mapping[str, Any], *, revoked: bool
) -> Mapping[str, str]:
    """Registers the key; a revoked one is dead for ever, so another takes its place once the coordinator has it."""
    path = here.folder / connections.NODE_KEY
    if revoked:
        path = here.folder / NEXT_KEY
        if not path.exists():
            node_key.create(path)
    public = node_key.public_text(node_key.load(path))
    told = door.enrol(connection, invite.token, here.name, public, policy)
    if revoked:
        os.replace(path, here.folder / connections.NODE_KEY)
        sync_folder(here.folder)
    return _launchers(told["launchers"])


def _launchers(told: Mapping[str, Any]) -> Mapping[str, str]:
    """Those that are names and keys and no more: a person may copy them into site.toml."""
    sound = {}
    for name, key in told.items():
        words = key.split() if isinstance(key, str) else []
        plain = " ".join(words[:2]) if re.fullmatch(NAME_PATTERN, name) else ""
        if re.fullmatch(r"ssh-ed25519 [A-Za-z0-9+/=]{60,100}", plain):
            sound[name] = plain
    return sound


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
