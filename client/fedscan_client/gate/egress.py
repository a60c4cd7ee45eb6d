"""What may go out: exact names, shapes and types, checked last and written to the site's record of releases."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedscan_core import auditlog
from fedscan_core.errors import PrivacyError
from fedscan_core.wire import Arrays, fingerprint, nbytes

RECORD = "released.jsonl"


def check(arrays: Arrays, allowed: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Refuses everything but exactly the allowed arrays, all finite.

    Args:
        arrays: what is about to leave.
        allowed: name -> (shape, dtype string).

    Raises:
        PrivacyError: another name, shape or type, or a value that is not finite.
    """
    if {name: (array.shape, array.dtype.str) for name, array in arrays.items()} != dict(allowed):
        raise PrivacyError("The reply does not have the names, shapes and types it may have.")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise PrivacyError("The reply is not finite.")


def record(folder: Path, *, run_id: str, round_: int, what: str, arrays: Arrays) -> str:
    """Appends what leaves (kind, bytes, hash) to the site's release record and returns the hash."""
    sha = fingerprint(arrays)
    path = folder / RECORD
    with auditlog.exclusive(path):
        auditlog.append(path, {"run_id": run_id, "round": round_, "what": what, "bytes": nbytes(arrays), "sha256": sha})
    return sha
