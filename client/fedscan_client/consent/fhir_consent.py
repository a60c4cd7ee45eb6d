"""One FHIR Consent, R4, R4B or R5: what it says about our use on one day.

It permits only where every element of it is understood. Left aside, because they change nothing: id, extension (by
FHIR's rule whatever does change something is a modifierExtension), language, text, the consent's own identifier,
organization, manager, controller, sourceAttachment, sourceReference, policyText, policy.authority, meta's versionId,
lastUpdated, source and profile, who verified a consent, when and with whom, and the display, version and userSelected
of a code.
Everything else that is not listed below makes the consent `not_understood`: actors, actions, data, data periods,
security labels, document types, grantees, contained resources, implicit rules, modifier extensions, unknown codes,
purposes, categories, policies, statuses and elements.

Rules. R4: provision is the base rule (deny where it has no type), the provisions inside are exceptions to it. R5:
decision is the base rule, and each level of provision is the opposite of the one around it. Of the exceptions that
apply on the day, to our purpose and to a code, the innermost decide, and a denial beats a permit beside it. A permit
counts only where something says that it is about research: the scope (R4), a category, a purpose or a code.

Sources: hl7.org/fhir/R4/consent.html, hl7.org/fhir/R5/consent.html.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from fedscan_client.consent import fhir_values as values
from fedscan_client.consent.fhir_values import Moment, Node, NotUnderstood, Period
from fedscan_client.consent.settings import NEUTRAL_CATEGORIES, Settings

MAX_DEPTH = 16
# No decision of the patient: not made yet, or recorded by mistake.
_NO_WORD = frozenset({"draft", "proposed", "entered-in-error"})
_ENDED = frozenset({"inactive", "rejected", "not-done"})
_COMMON = values.elements(
    "resourceType meta language text identifier status category sourceAttachment sourceReference verification provision"
)
_R4 = _COMMON | values.elements("scope patient dateTime performer organization policy policyRule")
_R5 = _COMMON | values.elements(
    "subject date period grantor manager controller regulatoryBasis policyBasis policyText decision"
)
_VERIFICATION = ("verified", "verificationType", "verifiedBy", "verifiedWith", "verificationDate")

Verdict = Literal["permit", "deny", "silent"]


@dataclass(frozen=True)
class Rule:
    """A provision: permit or deny, on some days, for some codes (none: all), but for the rules inside."""

    permit: bool
    period: Period
    codes: tuple[str, ...]
    names_use: bool  # by purpose or code
    rules: tuple["Rule", ...] = ()


@dataclass(frozen=True)
class Said:
    """What a consent says of one patient.

    Attributes:
        version: "R4" (and R4B) or "R5".
        moment: when it was given; None: it does not say, so it could be the newest.
        verdicts: one for each of `Settings.codes` (one in all where there are none). "silent": it is about other codes.
        reason: key of `WHY` for what is not permitted.
        until: the last day of what is permitted.
        by_guardian: somebody else than the patient agreed.
        not_understood: where, or "".
    """

    version: str
    moment: Moment | None
    verdicts: tuple[Verdict, ...]
    reason: str
    until: date | None = None
    by_guardian: bool = False
    not_understood: str = ""


def read(resource: Node, settings: Settings, today: date) -> Said | None:
    """What a Consent says on a day; None: nothing, it is a draft or recorded in error.

    Whatever is in it, nothing is raised: what is not understood permits nothing.
    """
    status = resource.get("status")
    if isinstance(status, str) and status in _NO_WORD:
        return None
    version = "R5" if {"subject", "decision"} & resource.keys() else "R4"
    none: tuple[Verdict, ...] = tuple("deny" for _ in settings.codes or ("",))
    when: Moment | None = None
    try:
        text = values.string(resource, "date" if version == "R5" else "dateTime", "Consent")
        when = values.moment(text, "Consent.dateTime") if text else None
        if isinstance(status, str) and status in _ENDED:
            return Said(version, when, none, "ended")
        values.check(resource, _R5 if version == "R5" else _R4, "Consent")
        if status != "active":
            raise NotUnderstood("Consent.status")
        research = _envelope(resource, settings, version)
        rule = _base_r5(resource, settings) if version == "R5" else _base_r4(resource, settings)
        by_guardian = _by_guardian(resource, version)
    except NotUnderstood as error:
        return Said(version, when, none, "not_understood", not_understood=error.where)
    if when is None:
        return Said(version, None, none, "no_date")
    if when.last > today:
        return Said(version, when, none, "not_yet")
    found = [_answer(rule, code, settings, today, research) for code in settings.codes or ("",)]
    ends = [end for _, end in found if end is not None]
    verdicts = tuple(verdict for verdict, _ in found)
    reason = "permit" if set(verdicts) == {"permit"} else _reason(rule, settings, research, verdicts, today)
    return Said(version, when, verdicts, reason, min(ends, default=None), by_guardian)


# -------------------------------------------------------------------------------------------------------- the envelope


def _envelope(resource: Node, settings: Settings, version: str) -> bool:
    """Checks everything around the rules; says whether scope or category name research.

    Raises:
        NotUnderstood: something in it is not known.
    """
    if "meta" in resource:
        values.check(resource["meta"], ("versionId", "lastUpdated", "source", "profile"), "Consent.meta")
    named = [
        token
        for node in values.items(resource, "category", "Consent")
        for token in values.concept(node, "Consent.category")
    ]
    if not named:
        raise NotUnderstood("Consent.category")
    if version == "R4":
        named += values.concept(resource.get("scope"), "Consent.scope")
    _known(named, settings.categories, "Consent.category")
    rules = []
    for node in values.items(resource, "policy", "Consent"):
        uri = values.string(values.check(node, ("authority", "uri"), "Consent.policy"), "uri", "Consent.policy")
        rules.append(uri or "")
    for node in values.items(resource, "regulatoryBasis", "Consent"):
        rules += values.concept(node, "Consent.regulatoryBasis")
    if "policyRule" in resource:
        rules += values.concept(resource["policyRule"], "Consent.policyRule")
    if "policyBasis" in resource:
        node = values.check(resource["policyBasis"], ("url",), "Consent.policyBasis")
        rules.append(values.string(node, "url", "Consent.policyBasis") or "")
    _known(rules, settings.policies, "Consent.policy")
    for node in values.items(resource, "verification", "Consent"):
        if values.check(node, _VERIFICATION, "Consent.verification").get("verified") is not True:
            raise NotUnderstood("Consent.verification")
    return not set(named) <= set(NEUTRAL_CATEGORIES)


def _known(tokens: list[str], accepted: tuple[str, ...], where: str) -> None:
    for token in tokens:
        if not values.known((token,), accepted):
            raise NotUnderstood(f"{where}: {token}")


def _by_guardian(resource: Node, version: str) -> bool:
    """Whether somebody agreed who is not, by reference or identifier, the patient.

    Raises:
        NotUnderstood: an unknown element, or the consent is not a patient's (R5 knows others).
    """
    patient = _reference(resource.get("subject" if version == "R5" else "patient"), "Consent.patient")
    if patient.get("type", "Patient") != "Patient":
        raise NotUnderstood("Consent.patient.type")
    own = set(_names(patient)) - {None}
    name = "grantor" if version == "R5" else "performer"
    agreed = [_reference(node, f"Consent.{name}") for node in values.items(resource, name, "Consent")]
    return any(not own.intersection(_names(node)) for node in agreed)


def _reference(found: Any, where: str) -> Node:
    return values.check(found, ("reference", "type", "identifier", "display"), where)


def _names(reference: Node) -> tuple[Any, ...]:
    """What a reference names: a resource, or system and value of an identifier."""
    text = values.string(reference, "reference", "Consent: a reference")
    if "identifier" not in reference:
        return (text,)
    pair = values.identifier(reference["identifier"], "Consent: an identifier")
    return (text, pair if all(pair) else None)


# ----------------------------------------------------------------------------------------------------------- the rules


def _base_r4(resource: Node, settings: Settings) -> Rule:
    if "provision" not in resource:
        return Rule(False, Period(), (), False)
    return _rule(resource["provision"], settings, 1, None)


def _base_r5(resource: Node, settings: Settings) -> Rule:
    permit = _type(resource, "decision", "Consent")
    if permit is None:
        raise NotUnderstood("Consent.decision")
    when = values.period(resource["period"], "Consent.period") if "period" in resource else Period()
    nodes = values.items(resource, "provision", "Consent")
    return Rule(permit, when, (), False, tuple(_rule(node, settings, 1, not permit) for node in nodes))


def _type(node: Node, name: str, where: str) -> bool | None:
    text = values.string(node, name, where)
    if text not in ("permit", "deny", None):
        raise NotUnderstood(f"{where}.{name}")
    return None if text is None else text == "permit"


def _rule(node: Any, settings: Settings, depth: int, permit: bool | None) -> Rule:
    """A provision and those in it. `permit`: what it is in R5, where it has no type of its own; None: R4."""
    where = "Consent.provision"
    if depth > MAX_DEPTH:
        raise NotUnderstood(f"{where}: nested more than {MAX_DEPTH} deep")
    fields = ("period", "purpose", "code", "provision", *(("type",) if permit is None else ()))
    node = values.check(node, fields, where)
    own = _type(node, "type", where) if permit is None else permit
    if own is None and depth > 1:
        raise NotUnderstood(f"{where}.type")
    purposes = [values.coding(item, f"{where}.purpose") for item in values.items(node, "purpose", where)]
    _known(purposes, settings.purposes, f"{where}.purpose")
    codes = [token for item in values.items(node, "code", where) for token in values.concept(item, f"{where}.code")]
    _known(codes, (*settings.codes, *settings.denying_codes, *settings.other_codes), f"{where}.code")
    inside = None if permit is None else not permit
    return Rule(
        bool(own),
        values.period(node["period"], f"{where}.period") if "period" in node else Period(),
        tuple(codes),
        bool(purposes or codes),
        tuple(_rule(item, settings, depth + 1, inside) for item in values.items(node, "provision", where)),
    )


# ---------------------------------------------------------------------------------------------------------- the answer


@dataclass(frozen=True)
class _Question:
    """One code asked on a day; None: on any day."""

    code: str
    denying: tuple[str, ...]
    today: date | None


def _answer(
    rule: Rule, code: str, settings: Settings, today: date | None, research: bool
) -> tuple[Verdict, date | None]:
    """What the rules say to one code, and the last day of a permit."""
    asked = _Question(code, settings.denying_codes, today)
    result = _apply(rule, asked, research)
    if result is None:
        return "silent", None
    permit, end = result
    if permit:
        return "permit", end
    applied = [_apply(inner, asked, research or rule.names_use) for inner in rule.rules]
    by_default = not rule.permit and not rule.codes and not any(inner and not inner[0] for inner in applied)
    about_others = by_default and any(inner.permit for inner in _all(rule.rules))
    return ("silent" if about_others else "deny"), None


def _apply(rule: Rule, asked: _Question, named: bool) -> tuple[bool, date | None] | None:
    """Permit or deny, and until when; None: the rule does not apply."""
    when, today = rule.period, asked.today
    if today is not None:
        end = when.whole_end if rule.permit else when.end
        if (when.start and today < when.start) or (end and today > end):
            return None
    if rule.codes and asked.code not in rule.codes and (rule.permit or not set(asked.denying) & set(rule.codes)):
        return None
    if not rule.permit and today is not None and when.whole_end and today > when.whole_end:
        return False, None  # it ends in the course of the day: what it permits inside does not hold for all of it
    named = named or rule.names_use
    inside = [found for inner in rule.rules if (found := _apply(inner, asked, named)) is not None]
    if any(not permit for permit, _ in inside):
        return False, None
    if not inside:
        return rule.permit and named, when.whole_end  # a permit that does not say for what is none
    if rule.permit and named:
        return True, when.whole_end
    ends = [end for _, end in inside]
    last = None if None in ends else max(end for end in ends if end)
    return True, min((end for end in (last, when.whole_end) if end), default=None)


def _all(rules: tuple[Rule, ...]) -> Iterator[Rule]:
    for rule in rules:
        yield rule
        yield from _all(rule.rules)


def _reason(rule: Rule, settings: Settings, research: bool, verdicts: tuple[Verdict, ...], today: date) -> str:
    """Why not all is permitted: denied, over, not begun, or about something else."""
    if "deny" in verdicts:
        return "denied"
    if all(_answer(rule, code, settings, None, research)[0] == "permit" for code in settings.codes or ("",)):
        starts = [inner.period.start for inner in (rule, *_all(rule.rules)) if inner.period.start]
        return "not_yet" if starts and max(starts) > today else "expired"
    return "other_use"
