"""A run's folder as one tar file for its people: what was learned, without checkpoints, logs, order or secrets."""

import hashlib
import io
import tarfile
from pathlib import Path

from fedscan_server import tracking
from fedscan_server.coordinator import vault

# The names that leave; whatever else lies in the folder stays.
PLAIN = (tracking.RUN, tracking.ROUNDS, tracking.PROGRESS, tracking.STATE)
SEALED = (tracking.SUMMARY, tracking.MODEL)


def pack(path: Path) -> tuple[bytes, str]:
    """The run as (tar, its SHA-256 in hex). Regular files under RUN_ID/, owned by nobody, dated 1970.

    Raises:
        FedscanError: a file is encrypted at rest and does not open.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in (*PLAIN, *SEALED):
            if not (path / name).is_file() or (path / name).is_symlink():
                continue
            data = vault.read(path / name) if name in SEALED else (path / name).read_bytes()
            info = tarfile.TarInfo(f"{path.name}/{name}")
            info.size, info.mode = len(data), 0o600
            tar.addfile(info, io.BytesIO(data))
    content = buffer.getvalue()
    return content, hashlib.sha256(content).hexdigest()
