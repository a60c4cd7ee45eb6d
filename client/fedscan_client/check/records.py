"""What the site keeps: its key, the encrypted cache, the ledger, the audit log. All of it is only read."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fedscan_client import connection as connections
from fedscan_client import door, keys
from fedscan_client.audit import log, verify
from fedscan_client.check.finding import Finding, fail, ok, skip, warn
from fedscan_client.dp import ledger
from fedscan_client.intake import cache_keys, seal
from fedscan_client.site import Site
from fedscan_core.errors import FedscanError

_LOOKED_AT = 200  # image files whose beginning is read; each write seals, so one that is not sealed was put there


def key(here: Site) -> Finding:
    """The site's key can be had.

    Raises:
        SiteKeyError: it is missing, damaged or others can read it.
        MissingExtra: the keyring's package is not installed.
    """
    found = keys.load(here.folder, here.key)
    if keys.half_rotated(here.folder, here.key):
        return warn("site key", "A rotation was stopped halfway.", f"fedscan agent key rotate {here.folder}")
    return ok("site key", f"{found.key_id} in {keys.where(here.folder, here.key)}; is there a backup of it?")


def encrypted_cache(here: Site) -> Finding:
    """The cache is this key's, sealed and writable.

    Raises:
        SiteKeyError: no key, or another one's cache.
    """
    if here.table is not None:
        return skip("cache", "a research table is read where it lies; there is no cache")
    if not cache_keys.is_cache(here.cache):
        return warn("cache", "Nothing was taken in yet.", f"fedscan agent ingest {here.folder}")
    cache_keys.check_key(here.cache, keys.load(here.folder, here.key))
    bare = _unsealed(here.cache / "patients")
    if bare:
        return fail("cache", f"{bare} files in {here.cache} are not encrypted.", "Find out who put them there; remove.")
    closed = [path for path in (here.cache, here.cache / "keys", here.cache / "patients") if not os.access(path, 7)]
    if closed:
        return fail("cache", f"{closed[0]} cannot be written.", f"chown -R {os.geteuid()} {here.cache}")
    return ok("cache", f"AES-256-GCM, this site's key, writable ({here.cache})")


def _unsealed(folder: Path) -> int:
    """Files that do not begin as `seal` writes them, among the first that are found."""
    bare = 0
    for number, path in enumerate(path for path in folder.glob("*/*") if path.is_file()):
        if number >= _LOOKED_AT:
            break
        with path.open("rb") as file:
            bare += file.read(len(seal.VERSION)) != seal.VERSION
    return bare


def budget(here: Site) -> Finding:
    """The ledger's whole chain, and what is left.

    Raises:
        RecordDamaged: it was changed, is gone, or is an older copy.
    """
    if not (here.ledger.exists() or here.book.counter.exists()):
        return ok("ledger", "not opened yet: the first admitted run opens it, and then the budget is fixed for ever")
    told = ledger.summary(here.book)
    share = told["reserved"]["share"]
    for name, mine in (("patients_declared", here.patients_declared), ("gate", here.policy.gate)):
        if told[name] != mine:
            return fail(
                "ledger",
                f"It was opened with {name} = {told[name]}, site.toml has {mine}.",
                "What a ledger was opened with never changes: put the old value back.",
            )
    words = f"{told['rows']} rows, chain whole; {share:.0%} of the lifetime budget reserved"
    if share >= 1:
        return warn(
            "ledger", f"{words}: every further run is refused.", "fedscan agent budget raise, if you decide so."
        )
    return ok("ledger", words)


def audit_log(here: Site) -> Iterator[Finding]:
    """The audit log's chain, and whether it still holds everything that was anchored with the coordinator."""
    topic = "audit log"
    anchors: list[str] = []
    known = False
    if (here.folder / connections.FILE).exists():
        with contextlib.suppress(FedscanError):  # said under "coordinator" or "registration"
            anchors, known = [one["anchor"] for one in door.anchors(here.folder)], True
    report = verify.verify(here.folder, anchors)
    if report.problems:
        yield fail(
            topic, report.problems[0], f"fedscan agent audit verify {here.folder} says more; restore it from a backup."
        )
    elif report.unknown:
        yield fail(
            topic,
            f"{len(report.unknown)} of {report.anchors} anchors of the coordinator are not in it: it was cut, begun "
            "anew, or is an older copy.",
            f"Restore {here.folder / log.FOLDER} from the latest backup: fedscan agent audit verify {here.folder}",
        )
    elif not report.records:
        yield ok(topic, "not begun yet")
    elif not known:
        yield warn(topic, "Its chain is whole; the coordinator's anchors could not be had.", "Repeat when it answers.")
    else:
        yield ok(
            topic, f"chain whole, {report.records} records; all {report.anchors} anchors of the coordinator are in it"
        )
