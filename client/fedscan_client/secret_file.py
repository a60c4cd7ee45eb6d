"""A file that holds a secret: of this user, mode 0600, or it is refused; overwritten when it goes."""

import os
import stat
from pathlib import Path

from fedscan_core.errors import SiteKeyError

_LONGEST = 4096  # bytes read of one


def read(path: Path) -> str | None:
    """The text of a file that nobody else can read or put there; None where there is none.

    Raises:
        SiteKeyError: it is a link, no regular file, another user's, or others can read it.
    """
    try:
        # Looked at through the open file: what is checked is what is read. A pipe must not make us wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if path.is_symlink():
            raise SiteKeyError(
                f"{path} is a symbolic link.", remedy="Give the file itself as 'path' in [key] of site.toml."
            ) from None
        raise SiteKeyError(f"{path} cannot be read: {error.strerror}.", remedy="Check its permissions.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SiteKeyError(f"{path} is not a regular file.", remedy="Restore it: fedscan agent key restore.")
        if status.st_uid != os.geteuid():
            raise SiteKeyError(
                f"{path} belongs to another user.", remedy=f"Run this as that user, or: chown {os.geteuid()} {path}"
            )
        if status.st_mode & 0o077:
            raise SiteKeyError(
                f"{path} can be read or changed by other users of this machine (mode {status.st_mode & 0o777:04o}).",
                remedy=f"Type: chmod 600 {path}   If others may have read it, rotate it: fedscan agent key rotate.",
            )
        return os.read(descriptor, _LONGEST).decode("ascii", "replace")
    finally:
        os.close(descriptor)


def forget(path: Path) -> None:
    """Removes a file, if it is there, and overwrites it: a disk that writes in place forgets it at once.

    What else has a name is left alone: the target of a link, a file with a second name.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        path.unlink(missing_ok=True)
        return
    try:
        path.unlink()  # first: half a secret would be refused when it is read
        status = os.fstat(descriptor)
        if status.st_nlink == 0:
            os.write(descriptor, bytes(status.st_size))
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
