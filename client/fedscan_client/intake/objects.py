"""The objects of a site, whatever kinds its sources are, and everything that goes when a patient goes.

A locator here is a source's name, a line end, and the source's own locator. What came over the network lies in one
spool.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from fedscan_client.intake import cache, deid, index, quarantine, read
from fedscan_client.intake.index import Row
from fedscan_client.intake.records import Refused
from fedscan_client.intake.sources import folder, spool
from fedscan_client.intake.sources.found import Found
from fedscan_client.keys import SiteKey
from fedscan_client.site import Site
from fedscan_core.errors import DataError

_SPOOL = ""  # no source is named so


def found(site: Site, key: SiteKey, skipped: MutableMapping[str, int]) -> Iterator[Found]:
    """Every object of the site's folders and spool.

    Args:
        site: the site.
        key: its key.
        skipped: counted up for what is left out, see `sources.folder.SKIPPED`.

    Raises:
        DataError: a folder is not there or is empty.
    """
    networked = False
    for name, source in sorted(site.source.items()):
        if source.kind == "folder":
            for item in folder.found(source.folder, settle_seconds=source.settle_seconds, skipped=skipped):
                yield _named(name, item)
        elif source.kind != "table":
            networked = True
    if networked:
        for item in spool.found(site.spool, key.wrapping):
            yield _named(_SPOOL, item)


@contextlib.contextmanager
def opened(site: Site, key: SiteKey, locator: str) -> Iterator[tuple[BinaryIO, int]]:
    """An object's bytes and how many they are.

    Raises:
        Refused: it is not there any more, or cannot be read.
        DataError: the locator leads elsewhere.
    """
    name, own = locator.split("\n", 1)
    if name == _SPOOL:
        stream = spool.open_locator(site.spool, key.wrapping, own)
    else:
        source = site.source.get(name)
        if source is None or source.kind != "folder":
            raise Refused("unreadable")
        stream = folder.open_locator(source.folder, own)
    with stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        yield stream, size


def destroy(site: Site, patient: str, *, for_good: bool) -> bool:
    """Destroys what the cache holds of a patient, the key first; says whether it held any.

    `for_good`: what is in quarantine as well, with what was decided on it.
    """
    held = cache.destroy_patient(site.cache, patient)
    if for_good:
        quarantine.remove_patient(site.folder, patient)
    return held


def drop_spooled(site: Site, rows: Iterable[Row], *, dry: bool = False) -> int:
    """Removes objects that came over the network from the spool; a folder is the hospital's own and stays."""
    own = [row.locator.split("\n", 1)[1] for row in rows if row.locator.startswith(f"{_SPOOL}\n")]
    for locator in own if not dry else ():
        spool.drop(site.spool, locator)
    return len(own)


def everything_of(site: Site, key: SiteKey, patient: str, *, destroy: bool) -> dict[str, int]:
    """What is held of a patient, and how much of it; with `destroy` it is destroyed, the patient's key first.

    The hospital's own folders stay as they are.
    """
    counts = {"key and files in the cache": int(patient in cache.patients(site.cache))}
    if destroy:
        counts["key and files in the cache"] = int(cache.destroy_patient(site.cache, patient))
    with index.opened(site.folder, key.wrapping, dry=not destroy) as seen:
        rows = seen.rows_of(patient)
        counts["objects in the spool"] = drop_spooled(site, rows, dry=not destroy)
        counts["objects in the spool"] += _unseen(site, key, seen, patient, destroy)
        counts["lines in the intake's index"] = len(rows)
        if destroy:
            seen.forget(patient)
    items = [it.instances for it in quarantine.items(site.folder) if it.patient == patient]
    counts["objects in quarantine"] = quarantine.remove_patient(site.folder, patient) if destroy else sum(items)
    return counts


def _unseen(site: Site, key: SiteKey, seen: index.Index, patient: str, destroy: bool) -> int:
    """Objects of a patient that came since the last ingest."""
    count, names = 0, site.names(key)
    for item in spool.found(site.spool, key.wrapping):
        if seen.knows(f"{_SPOOL}\n{item.locator}"):
            continue
        try:
            with item.open() as stream:
                whose = deid.patient_name(names, deid.identity(read.header(stream, item.size), site.issuer))
        except (DataError, OSError):
            continue
        if whose == patient:
            count += 1
            if destroy:
                spool.drop(site.spool, item.locator)
    return count


def rewrapped(site_folder: Path) -> Callable[[SiteKey], None]:
    """For `key_rotation.rotate`: what is under the site's wrapping key outside the cache (spool, index, quarantine).

    May be called again after a crash.
    """

    def again(key: SiteKey) -> None:
        old, new = key.wrapping, key.after().wrapping
        renamed = spool.rekey(site_folder / "spool", old, new)
        moved = {f"{_SPOOL}\n{before}": f"{_SPOOL}\n{after}" for before, after in renamed.items()}
        index.rekey(site_folder, old, new, moved)
        quarantine.rekey(site_folder, old, new, moved)

    return again


def _named(name: str, item: Found) -> Found:
    return replace(item, locator=f"{name}\n{item.locator}")
