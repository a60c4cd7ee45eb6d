"""What one run of the intake did, counted: for the hospital's own eyes. Exact counts never leave the site."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["accepted", "no consent", "unlabelled", "quarantined", "refused", "unreadable"]
Counts = Counter[tuple["Outcome", str]]
OUTCOMES: tuple[Outcome, ...] = ("accepted", "no consent", "unlabelled", "quarantined", "refused", "unreadable")


@dataclass(frozen=True)
class Line:
    """One outcome with one reason: "" for accepted, else a key of `records.REASONS` or `consent.WHY`."""

    outcome: Outcome
    reason: str
    studies: int
    series: int
    instances: int


@dataclass(frozen=True)
class Report:
    """One run. Every object of the source is in exactly one line.

    Attributes:
        dry: nothing was written, and "accepted" means: up to its pixels, which were not decoded.
        objects: objects found in the source.
        skipped: not looked at in this run, by reason (`sources.folder.SKIPPED`). If there are any, nobody is destroyed
            for being gone from the source.
        patients: distinct ones among the readable objects.
        lines: what came of them.
        cached_patients: what the cache holds now.
        destroyed: patients removed from the cache by this run; in a dry run: who would be.
        unlisted_kept: patients whom the register does not name any more, kept because they are so many at once.
        gone_kept: patients whose objects are gone from the source, kept for the same reason.
        read: objects whose pixels were read; the others were unchanged.
    """

    dry: bool
    objects: int
    skipped: Mapping[str, int]
    patients: int
    lines: tuple[Line, ...]
    cached_patients: int
    destroyed: int
    unlisted_kept: int
    gone_kept: int
    read: int

    def instances(self, outcome: Outcome) -> int:
        """How many objects had this outcome."""
        return sum(line.instances for line in self.lines if line.outcome == outcome)

    def reasons(self, outcome: Outcome) -> dict[str, int]:
        """Objects of one outcome by reason."""
        return {line.reason: line.instances for line in self.lines if line.outcome == outcome}

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**self.__dict__, "lines": [line.__dict__ for line in self.lines]}


@dataclass(frozen=True)
class Tallies:
    """Counts under way: (outcome, reason) -> instances, series and studies. A study may have several outcomes."""

    instances: Counter[tuple[Outcome, str]] = field(default_factory=Counter)
    series: Counter[tuple[Outcome, str]] = field(default_factory=Counter)
    studies: Counter[tuple[Outcome, str]] = field(default_factory=Counter)

    def headers(self, reasons: Mapping[str, int]) -> None:
        """Objects whose header alone set them aside: whose they are is not known."""
        for reason, count in reasons.items():
            outcome: Outcome = "unreadable" if reason in ("not_dicom", "unreadable", "catalogue") else "refused"
            self.instances[outcome, reason] += count

    def patient(self, found: Mapping[tuple[str, str], Mapping[tuple[Outcome, str], int]]) -> None:
        """One patient's objects: (study, series) -> (outcome, reason) -> how many."""
        studies: dict[tuple[Outcome, str], set[str]] = defaultdict(set)
        for (study, _), counts in found.items():
            for key, count in counts.items():
                if count:
                    self.instances[key] += count
                    self.series[key] += 1
                    studies[key].add(study)
        for key, names in studies.items():
            self.studies[key] += len(names)

    def lines(self) -> tuple[Line, ...]:
        """In the order of `OUTCOMES`, the largest first."""
        order = sorted(self.instances.items(), key=lambda item: (OUTCOMES.index(item[0][0]), -item[1], item[0][1]))
        return tuple(
            Line(outcome, reason, self.studies[outcome, reason], self.series[outcome, reason], count)
            for (outcome, reason), count in order
        )
