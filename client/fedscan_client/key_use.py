"""Who works with the site's wrapping key, and who replaces it, one after the other.

    SITE/key.use    a lock (flock); it holds nothing, and is freed when the process ends, however it ends

Guarantee: while anybody is inside `held`, nobody is inside `alone`, so that what was loaded inside `held` is the key of
everything written there. Assumed: a local disk, or a network file system that passes flock on; and that whoever uses
the key for longer than one call takes part.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedscan_client import keys
from fedscan_core.errors import SiteKeyError

FILE = "key.use"


@contextlib.contextmanager
def held(site_folder: Path) -> Iterator[None]:
    """For whoever uses the key for longer than one call; many may at once. Load the key inside, not before.

    Raises:
        SiteKeyError: the key is being replaced just now, or that was stopped halfway.
        ConfigError: site.toml cannot be read.
    """
    with _locked(site_folder, fcntl.LOCK_SH) as got:
        if not got:
            raise SiteKeyError(
                "A rotation of the site's key is at work. Nothing was begun.", remedy="Start again when it has ended."
            )
        if keys.half_rotated(site_folder, keys.read_settings(site_folder)):
            raise SiteKeyError(
                "A rotation of the site's key was stopped halfway. Nothing was begun.",
                remedy=f"Let it end: fedscan agent key rotate {site_folder}",
            )
        yield


@contextlib.contextmanager
def alone(site_folder: Path) -> Iterator[None]:
    """For who replaces the key. Does not wait: a listener runs for weeks.

    Raises:
        SiteKeyError: somebody works with the key.
    """
    with _locked(site_folder, fcntl.LOCK_EX) as got:
        if not got:
            raise SiteKeyError(
                "The site's key is in use, so it cannot be replaced now. Nothing was changed.",
                remedy="Stop `fedscan agent listen`, `pull` and `ingest` of this site, or let them end; then repeat.",
            )
        yield


@contextlib.contextmanager
def _locked(site_folder: Path, how: int) -> Iterator[bool]:
    """Whether the lock was had at once; it is freed at the end."""
    path = site_folder / FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SiteKeyError(f"{path} cannot be opened: {error.strerror}.", remedy="Check the site's folder.") from None
    try:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            got = True
        except BlockingIOError:
            got = False
        except OSError as error:
            raise SiteKeyError(
                f"{path} cannot be locked: {error.strerror}.", remedy="Put the site's folder on a local disk."
            ) from None
        yield got
    finally:
        os.close(descriptor)
