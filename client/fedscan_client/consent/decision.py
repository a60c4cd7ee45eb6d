"""What a register says of one patient, and the words for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from types import MappingProxyType

from fedscan_core.errors import ConsentError

WHY: Mapping[str, str] = MappingProxyType(
    {
        "permit": "the patient, or a guardian, permits it",
        "cleared": "the patient is on the list of those who may be used",
        "no_objection": "the patient did not object",
        "not_listed": "the register does not name the patient (number and issuer)",
        "denied": "the patient does not permit it",
        "ended": "a consent was ended, or never came about",
        "objected": "the patient objected",
        "withdrawn_here": "the patient withdrew here, and no consent was given since",
        "not_yet": "the consent has a date in the future",
        "expired": "the consent has ended on its date",
        "other_use": "what is permitted is not this use",
        "no_date": "a consent does not say when it was given",
        "not_understood": "a consent says something that is not understood",
        "guardian_birth": "a guardian permits it, and the patient's birth date is not known",
        "guardian_ended": "a guardian permitted it, and the patient has come of age",
    }
)


@dataclass(frozen=True)
class Decision:
    """What a register says of one patient.

    Attributes:
        permit: whether the patient's images may be read. False whatever else is said, where anything is unclear.
        reason: key of `WHY`.
        basis: the record that says so, for people, such as "FHIR Consent (R4)".
        given: day of the permit; None where the register has no date for each patient.
        until: last day of the permit; None: no end, or unknown for now (`by_guardian` without `born`).
        by_guardian: somebody else than the patient permitted it.
        born: the patient's birth date, where the register holds it.
    """

    permit: bool
    reason: str
    basis: str
    given: date | None = None
    until: date | None = None
    by_guardian: bool = False
    born: date | None = None


class NoPermit(ConsentError):
    """One patient's consent does not hold; `reason` is a key of `WHY`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"No consent: {WHY[reason]}.", remedy="The patient is left out and counted.")
        self.reason = reason
