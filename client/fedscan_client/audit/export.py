"""The audit log as one zip file, for an auditor or for the archive when a site retires."""

import dataclasses
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fedscan_client.audit import log
from fedscan_client.audit.verify import Report, verify
from fedscan_core.errors import FolderError
from fedscan_core.files import sync_folder

ABOUT = "report.json"


def export(site_folder: Path, out: Path, *, with_key: bool = False, anchors: Sequence[str] = ()) -> Report:
    """Writes the log's files as they are, the logs of earlier versions, and what `verify` says of them.

    Unpacked, the zip is a folder that `fedscan agent audit verify` takes, if the key is in it. A log that was changed
    is exported all the same, with a report that says so.

    Args:
        site_folder: the site's.
        out: the zip file (0600); must not exist.
        with_key: also the key that checks the chain. Who has it can check everything, and make up records that were
            not anchored yet: leave it out unless the site retires or the auditor is to check by himself.
        anchors: see `verify`.

    Raises:
        FolderError: there is no log, or `out` exists or cannot be written; nothing of it is left.
    """
    folder = site_folder / log.FOLDER
    found = log.files(folder)
    if not found:
        raise FolderError(f"{site_folder} has no audit log yet.", remedy="Give the site's folder.")
    report = verify(site_folder, anchors)
    files = [*found, *(site_folder / name for name in log.OLD if (site_folder / name).is_file())]
    files += [folder / log.KEY] if with_key and (folder / log.KEY).is_file() else []
    told = {**dataclasses.asdict(report), "whole": report.whole}
    try:
        with open(out, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            try:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                    for path in files:
                        archive.write(path, str(path.relative_to(site_folder)))
                    archive.writestr(ABOUT, json.dumps(told, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                out.unlink(missing_ok=True)
                raise
        sync_folder(out.parent)
    except FileExistsError:
        raise FolderError(f"{out} exists already; it was left alone.", remedy="Give another name.") from None
    except OSError as error:
        raise FolderError(f"{out} cannot be written: {error.strerror}.", remedy="Give another place.") from None
    return report
