"""One line of the checklist."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        topic: a word or two, the same at every call: scripts look for it.
        state: "fail": no run can work, or none may; "warn": it works, and somebody should look; "skip": not checked.
        says: one sentence.
        remedy: what to do, or whom to ask for what; always there at "fail" and "warn".
        local: `says` depends on patients (counts): not for people outside the hospital.
    """

    topic: str
    state: State
    says: str
    remedy: str = ""
    local: bool = False


def ok(topic: str, says: str, *, local: bool = False) -> Finding:
    """A tick."""
    return Finding(topic, "ok", says, local=local)


def warn(topic: str, says: str, remedy: str, *, local: bool = False) -> Finding:
    """It works, and somebody should look."""
    return Finding(topic, "warn", says, remedy, local)


def fail(topic: str, says: str, remedy: str, *, local: bool = False) -> Finding:
    """It does not work."""
    return Finding(topic, "fail", says, remedy, local)


def skip(topic: str, says: str, remedy: str = "") -> Finding:
    """It was not looked at, or does not apply here."""
    return Finding(topic, "skip", says, remedy)
