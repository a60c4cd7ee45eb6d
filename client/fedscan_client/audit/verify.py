"""Whether the audit log is what was written: line by line under its key, and the whole against what others remember.

The chain finds an edited, dropped, inserted or moved line. It cannot find a cut at the end, an older copy put back or a
log begun anew: those are found by anchors, which the coordinator got with every answer (`log.anchor`), up to the last
one that is asked about. An anchor that no state of this log ever had means that the log lost records, or that whoever
gave the anchor is wrong; the log alone cannot tell which.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedscan_client.audit import chain, log
from fedscan_core.errors import RecordDamaged

_MOST = 20  # problems that are told one by one


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        records: lines that are what was written.
        files: of the log.
        first, last: UTC of the first and the last of them, "" where there is none.
        anchor: what anchors the log as it is now, "" where there is none.
        anchors: how many were given.
        anchored: how many records, from the first on, the newest of them commits to.
        unknown: those given that no state of this log ever had.
        torn: bytes after the last line: a write that never returned.
        problems: in words, at most `_MOST` and how many more.
    """

    records: int
    files: int
    first: str
    last: str
    anchor: str
    anchors: int
    anchored: int
    unknown: tuple[str, ...]
    torn: int
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Nothing was found: no problem, and every anchor is of this log."""
        return not self.problems and not self.unknown


def verify(site_folder: Path, anchors: Sequence[str] = ()) -> Report:
    """Reads the whole log and compares it with anchors that others kept, in any order. Changes nothing.

    Args:
        site_folder: the site's.
        anchors: of this site; "" is skipped.

    Raises:
        OSError: a file cannot be read.
    """
    asked = [anchor for anchor in anchors if anchor]
    folder = site_folder / log.FOLDER
    found, problems = log.files(folder), list[str]()
    try:
        key = log.read_key(folder) if found else b""
    except RecordDamaged as error:
        problems.append(str(error))
        return Report(0, len(found), "", "", "", len(asked), 0, tuple(asked), 0, tuple(problems))
    if not found and (folder / log.KEY).exists():
        problems.append(f"{folder} holds a key but no log.")
    times, known, torn = list[str](), dict[str, int](), 0
    before, seq = chain.START, 0
    for path in found:
        lines, torn = log.whole_lines(path)
        if torn and path != found[-1]:
            problems.append(f"{path}, after line {len(lines)}: the file ends within a line.")
        for number, line in enumerate(lines, 1):
            try:
                record, mac = chain.unseal(key, line)
            except chain.Broken as error:
                problems.append(f"{path}, line {number}: {error}.")
                before, seq = "", seq + 1  # whatever comes next cannot be compared with this one
                continue
            if record["seq"] != seq or (before and record["prev"] != before):
                problems.append(f"{path}, line {number}: {_jump(seq, record['seq'])}.")
            times.append(record["utc"])
            known[chain.anchor(key, mac)] = len(times)
            before, seq = mac, record["seq"] + 1
            if record["seq"] == 0:
                problems += _old_changed(site_folder, record.get("old", {}))
    now = next(reversed(known), "")
    if len(problems) > _MOST:
        problems = [*problems[:_MOST], f"And {len(problems) - _MOST} more."]
    unknown = tuple(anchor for anchor in asked if anchor not in known)
    anchored = max((known[anchor] for anchor in asked if anchor in known), default=0)
    ends = (times[0], times[-1]) if times else ("", "")
    return Report(len(times), len(found), *ends, now, len(asked), anchored, unknown, torn, tuple(problems))


def _jump(expected: int, got: int) -> str:
    if got > expected:
        return f"{got - expected} record(s) before it are missing"
    if got < expected:
        return f"it is record {got}, which stood further up: moved, repeated, or an older copy"
    return "it does not follow from the one before"


def _old_changed(site_folder: Path, old: dict[str, dict[str, Any]]) -> list[str]:
    """The logs of earlier versions: they are not written to any more, so they are what they were."""
    problems = []
    for name, told in old.items():
        path = site_folder / name
        if not path.is_file():
            problems.append(f"{path}, the log of an earlier version, is missing.")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != told["sha256"]:
            problems.append(f"{path}, the log of an earlier version, was changed.")
        elif told["lines"] and not told["head"]:
            problems.append(f"{path}, the log of an earlier version, was damaged already when this log began.")
    return problems
