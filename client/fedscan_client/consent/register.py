"""One register out of whatever the hospital has, and when a permit ends.

Whether a register can be used is a public fact about the hospital, outside of the adjacency of the privacy guarantee: a
site without a usable one does not train, and a server sees that. One malformed row suffices: a withdrawal lost in it
could be anybody's. `fedscan agent consent check` after each export finds it before a round does. A well-formed row
decides this only where it is the only one (an empty export is refused): the register's age is the file's, not a row's,
and a row that is unclear about a known patient refuses this patient only.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from types import MappingProxyType
from unicodedata import normalize

from fedscan_client.consent import fhir, lists, withdrawals
from fedscan_client.consent.decision import Decision, NoPermit
from fedscan_client.consent.settings import Settings
from fedscan_core.errors import ConsentError


@dataclass(frozen=True)
class Register:
    """The hospital's word on its patients, on one day.

    Attributes:
        drawn_up: the day the register speaks of.
        decisions: patient (keyed HMAC, `deid.patient_name`) -> what the register says.
        others: of whoever is not in it.
        withdrawn: who withdrew here -> the last time.
        notes: what in it was not understood -> how often. Places and codes, for the hospital's own eyes.
        issuer: the only one whose ids a list of objections speaks of, "" for ids without one; None: not limited.
    """

    drawn_up: date
    decisions: Mapping[str, Decision]
    others: Decision
    withdrawn: Mapping[str, date] = field(default_factory=lambda: MappingProxyType({}))
    notes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    issuer: str | None = None

    def covers(self, issuer: str) -> bool:
        """Whether the register can speak of patients whose image names this issuer ("": none, or the site's own).

        Where it cannot, `decide` would miss an objection: no such image may be read, or kept.
        """
        return self.issuer is None or not issuer or normalize("NFC", issuer) == normalize("NFC", self.issuer)

    def decide(self, name: str) -> Decision:
        """Whether images of this patient may be read. Default: no.

        A withdrawal made here holds until the register has a permit given on a later day; a list without a date for
        each patient never overrules one. A guardian's permit of a patient whose birth date the register does not hold
        is for `until` to finish.
        """
        decision = self.decisions.get(name, self.others)
        day = self.withdrawn.get(name)
        if day is None or (decision.permit and decision.given is not None and decision.given > day):
            return decision
        return Decision(False, "withdrawn_here", f"withdrawal of {day}")


def load(settings: Settings, key: bytes, *, site_folder: Path, today: date) -> Register:
    """Reads the hospital's register. Identifiers are dropped before it returns.

    Args:
        settings: [consent] of site.toml.
        key: the project's key (`SiteKey.project`), for keyed HMACs of identifiers.
        site_folder: where the withdrawals are, and what a relative `settings.path` starts from.
        today: the day of the question.

    Raises:
        ConsentError: it is missing, unreadable, damaged, empty, from the future or too old, or a row may be a refusal
            or objection and does not say whose. Its text holds nothing out of the register.
    """
    path = site_folder / settings.path
    notes: Counter[str] = Counter()
    issuer = None
    if settings.kind == "fhir":
        drawn_up, decisions = fhir.read(settings, key, path, today, notes)
        others = Decision(False, "not_listed", f"FHIR Consents of {drawn_up}")
    else:
        drawn_up, decisions, others, issuer = lists.read(settings, key, path, today, notes)
    age = (today - drawn_up).days
    if not 0 <= age <= settings.max_age_days:
        raise ConsentError(
            f"The consent register {settings.path} is dated {drawn_up}; on {today} it may be at most "
            f"{settings.max_age_days} days old and not from the future.",
            remedy="Export a fresh register, and check the clock of this machine.",
        )
    settled = {name: _of_age(decision, settings, today) for name, decision in decisions.items()}
    return Register(drawn_up, settled, others, withdrawals.read(site_folder), notes, issuer)


def until(decision: Decision, born: date | None, settings: Settings) -> date | None:
    """The last day of a permit; None: it has no end. The caller compares it with the day of use.

    A guardian's permit ends the day before the birthday that makes the patient `settings.guardian_age` years old. Who
    was born on 29 February comes of age on 28 February where a year has no 29th, the earlier of the two days that laws
    name.

    Args:
        decision: a permit.
        born: birth date of the image's header, used where the register has none.
        settings: [consent] of site.toml.

    Raises:
        NoPermit: there is no permit, or it is a guardian's and no birth date is known, or one after the permit.
    """
    if not decision.permit:
        raise NoPermit(decision.reason)
    if not decision.by_guardian:
        return decision.until
    born = decision.born or born
    if born is None or (decision.given is not None and born > decision.given):
        raise NoPermit("guardian_birth")
    last = birthday(born, settings.guardian_age) - timedelta(days=1)
    return last if decision.until is None else min(last, decision.until)


def birthday(born: date, age: int) -> date:
    """The day on which somebody is `age` years old; 28 February where there is no 29th; `date.max` beyond year 9999."""
    try:
        return born.replace(year=born.year + age)
    except ValueError:
        return date(born.year + age, 2, 28) if born.year + age <= date.max.year else date.max


def _of_age(decision: Decision, settings: Settings, today: date) -> Decision:
    """A guardian's permit with its end, or no permit any more, where the register knows the birth date."""
    if not (decision.permit and decision.by_guardian and decision.born):
        return decision
    try:
        last = until(decision, None, settings)
    except NoPermit as error:
        return replace(decision, permit=False, reason=error.reason)
    if last is not None and last < today:
        return replace(decision, permit=False, reason="guardian_ended", until=last)
    return replace(decision, until=last)
