"""A run's folder from the coordinator: checked against its hash, unpacked with care, there whole or not at all."""

import os
import re
import shutil
import tarfile
import tempfile
from pathlib import Path

import httpx

from fedscan import people
from fedscan.people import CoordinatorError
from fedscan_core.errors import FolderError

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}"  # of a path: nothing hidden, nothing that leads elsewhere
_MEMBERS = 100_000


def fetch(http: httpx.Client, run_id: str, out: Path) -> Path:
    """Brings a run folder here and returns its path.

    Args:
        http: from `people.connect`.
        run_id: the whole id.
        out: the folder to make; it must not exist, or be empty.

    Raises:
        FolderError: `out` is taken or cannot be written; nothing was left behind.
        CoordinatorError: the archive is damaged, or holds what no run folder holds; nothing was kept.
    """
    try:
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise FolderError(
                f"{out} is there already.",
                remedy="Give another --out; a run that was fetched before its end can be fetched anew that way.",
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as part:
            archive, folder = Path(part) / "archive.tar", Path(part) / "run"
            with archive.open("wb") as file:
                people.archive(http, run_id, file)
            unpack(archive, folder)
            if not (folder / run_id / "run.toml").is_file():
                raise CoordinatorError("The archive holds no run folder; nothing was kept.")
            os.rename(folder / run_id, out)
    except OSError as error:
        raise FolderError(
            f"{out} cannot be filled: {error.strerror or error}.", remedy="Free some space, or give another --out."
        ) from None
    return out


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks an uncompressed tar of plain files and folders into a new folder; links, devices and holes are refused.

    Raises:
        CoordinatorError: any name that could lead out of the folder, comes twice or is no plain file.
    """
    folder.mkdir(mode=0o700)
    try:
        with tarfile.open(archive, "r:") as tar:
            for number, member in enumerate(tar):
                path = _path(member, number)
                if member.isdir():
                    (folder / path).mkdir(parents=True, exist_ok=True, mode=0o700)
                    continue
                source = tar.extractfile(member)
                assert source is not None  # a regular file
                (folder / path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                descriptor = os.open(folder / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    shutil.copyfileobj(source, file, 2**20)
    except (tarfile.TarError, FileExistsError, NotADirectoryError, UnicodeError):
        raise _strange("it is damaged") from None


def _path(member: tarfile.TarInfo, number: int) -> Path:
    parts = [part for part in member.name.removesuffix("/").split("/") if part != "."]
    if number >= _MEMBERS:
        raise _strange("it holds too many files")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _strange("it holds something else than plain files")
    if not member.isdir() and not parts:
        raise _strange("a file has no name")
    if not all(re.fullmatch(_PART, part) for part in parts):
        raise _strange("a file's name is not plain")
    return Path(*parts)


def _strange(why: str) -> CoordinatorError:
    return CoordinatorError(f"The archive is not a run folder's: {why}; nothing was kept.", remedy="Tell its operator.")
