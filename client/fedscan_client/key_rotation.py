"""Rotation: a new `wrapping` for the site's key, after which the old one opens nothing any more.

    1. the new key is staged beside the old one (SITE/key.next) and forced to the disk;
    2. what is wrapped outside the cache (spool, locators) is wrapped anew: `also`;
    3. so is each patient's own key, file by file, each exchanged whole; images are not touched;
    4. the cache is marked as the new key's, and the staged key takes the old one's place.

An environment variable is set by a person, after 3. Until then `keys.load` gives the new key, and SITE/key.before keeps
the old one, so that the same command, run again, also wraps anew what was written under the old one meanwhile.

Nobody else may be at work with the key (`key_use`). Stopped anywhere, even by SIGKILL or a power cut, everything can be
read: `keys.load` gives both keys as long as one is staged, and the same command goes on. Pseudonyms do not change.
Files that were copied away before stay readable with the old key: it is gone with step 4 here, and with its backups
where the hospital destroys them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedscan_client import key_use, keys
from fedscan_client.intake import cache_keys
from fedscan_client.keys import Settings, SiteKey
from fedscan_core import auditlog
from fedscan_core.errors import SiteKeyError

Also = Callable[[SiteKey], None]  # wraps from key.wrapping to key.staged; may be called again after a crash
Progress = Callable[[Sequence[str]], Iterable[str]]  # gives the same pseudonyms, and shows how far it is


@dataclass(frozen=True)
class Plan:
    """What a rotation would do.

    Attributes:
        patients: in the cache; every one's key was opened.
        left: of them not yet under the staged key.
        unfinished: a rotation was begun.
    """

    patients: int
    left: int
    unfinished: bool


def plan(site_folder: Path, settings: Settings, cache: Path | None) -> Plan:
    """Opens every patient's key and changes nothing.

    Raises:
        SiteKeyError: no usable key, no cache where it should be, or one that belongs to another key.
        Damaged: a patient's key does not open: nobody's is rotated before that patient is removed.
    """
    key = keys.load_both(site_folder, settings)
    if cache is not None and not cache_keys.is_cache(cache):
        # An empty mount point: with the old key gone, what is on the missing disk could never be opened again.
        raise SiteKeyError(
            f"There is no cache in {cache}, so its patients' keys cannot be wrapped anew.",
            remedy="Check that its disk is mounted. A site that never took anything in needs no rotation.",
        )
    found = {} if cache is None else cache_keys.wrapped_by(cache, key)
    unfinished = keys.staged_path(site_folder, settings).exists()
    done = key.after().wrapping_id if unfinished else ""
    return Plan(len(found), sum(wrapped != done for wrapped in found.values()), unfinished)


def rotate(
    site_folder: Path,
    settings: Settings,
    cache: Path | None,
    *,
    also: Sequence[Also] = (),
    progress: Progress = lambda names: names,
) -> bool:
    """Replaces `wrapping`, or goes on where a rotation was stopped.

    Args:
        site_folder: the site's.
        settings: where the key is kept.
        cache: the cache's folder; None: the site has none.
        also: each wraps anew what else is under the site's key.
        progress: see `Progress`.

    Returns:
        Whether the new key is in place. False only for an environment variable: a person sets it to the line in
        SITE/key.next, and the same command then ends the rotation.

    Raises:
        SiteKeyError, Damaged: as `plan`, or somebody works with the key; nothing was begun.
    """
    with key_use.alone(site_folder), auditlog.exclusive(site_folder / "key"):
        before = plan(site_folder, settings, cache)
        key = keys.load_both(site_folder, settings)
        if not before.unfinished:
            key = keys.stage(site_folder, settings, key)
            keys.note(site_folder, "rotation begun", key)
        if key.staged is not None:
            for more in also:
                more(key)
        if cache is not None:
            with cache_keys.locked(cache):
                done = key.after().wrapping_id
                found = cache_keys.wrapped_by(cache, key)  # again: others may have written until now
                for name in progress([name for name, wrapped in found.items() if wrapped != done]):
                    cache_keys.rewrap(cache, key, name)
                cache_keys.mark_rotated(cache, key)
        in_place = keys.replace_by_staged(site_folder, settings, key)
        if in_place:
            now = keys.load(site_folder, settings)
            if now.wrapping != key.after().wrapping:
                raise SiteKeyError("The new key is not where it was put.", remedy="Check the key's place.")
            keys.note(site_folder, "key rotated", now)
    return in_place
