"""One Consent: samples, a plain slow reference over random rules, and mutations of which none may permit."""

import contextlib
import copy
import json
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.consent import Settings, fhir_consent
from fedscan_core.errors import ConsentError

from .conftest import HRESCH, MII, MRN, TODAY, bundle, mii_code, mii_consent, name_of, patient, r5_consent

CHOSEN = Settings(kind="fhir", path=Path("x"), issuers={MRN: ""})


def said(resource: dict[str, Any], today: date = TODAY, chosen: Settings = CHOSEN) -> fhir_consent.Said:
    found = fhir_consent.read(resource, chosen, today)
    assert found is not None
    return found


def reason(resource: dict[str, Any], today: date = TODAY, chosen: Settings = CHOSEN) -> str:
    return said(resource, today, chosen).reason


def rule(kind: str, *codes: int, **fields: Any) -> dict[str, Any]:
    return {"type": kind} | ({"code": [mii_code(n) for n in codes]} if codes else {}) | fields


def test_the_german_broad_consent():
    found = said(mii_consent())
    assert (found.version, found.verdicts, found.reason) == ("R4", ("permit",), "permit")
    assert found.until == date(2054, 1, 31) and not found.by_guardian
    assert reason(mii_consent(), date(2054, 1, 31)) == "permit"
    assert reason(mii_consent(), date(2054, 2, 1)) == "expired"
    assert reason(mii_consent(), date(2024, 2, 22)) == "not_yet"  # before it was given


def test_one_consent_for_each_policy():
    """As gICS writes them: no base rule, the policy's own code beside the MII's."""
    own = {"system": "https://mii.de/fhir/CodeSystem/gics/Policy/MII", "code": "MDAT_wissenschaftlich_nutzen"}
    one = mii_consent(policyRule={"coding": [own]}, provision=rule("permit", 8))
    one["provision"]["code"].append({"coding": [own]})
    assert reason(one) == "not_understood"
    names = [f"{own['system']}|"]
    taught = Settings.model_validate(
        CHOSEN.model_dump() | {"other_codes": (*CHOSEN.other_codes, *names), "policies": (*CHOSEN.policies, *names)}
    )
    assert reason(one, chosen=taught) == "permit"
    other = one | {"provision": rule("permit", 19)}
    assert said(other, chosen=taught).verdicts == ("silent",)
    assert said(one | {"provision": rule("deny", 8)}, chosen=taught).verdicts == ("deny",)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], "denied"),
        ([rule("permit", 19)], "other_use"),
        ([rule("permit", 6, 7)], "other_use"),
        ([rule("permit", 8), rule("deny", 8)], "denied"),
        ([rule("permit", 8), rule("deny", 7)], "denied"),  # to store and process is denied
        ([rule("permit", 8), rule("deny", 1)], "denied"),  # 1 holds 8
        ([rule("permit", 8), rule("deny", 19)], "permit"),
        ([rule("permit", 8), rule("deny")], "denied"),
        ([rule("permit", 1)], "other_use"),
        ([rule("permit")], "permit"),
        ([rule("permit", 8, provision=[rule("deny", 8)])], "denied"),
        ([rule("permit", 8, provision=[rule("deny", 8, period={"end": "2025-12-31"})])], "permit"),
        ([rule("permit", 8, provision=[rule("deny", provision=[rule("permit", 8)])])], "permit"),
        ([rule("permit", 8, period={"end": "2026-01-14"})], "expired"),
        ([rule("permit", 8, period={"start": "2026-01-16"})], "not_yet"),
        ([rule("permit", 8, purpose=[HRESCH])], "permit"),
        ([rule("permit", 8, purpose=[HRESCH, HRESCH | {"code": "HMARKT"}])], "not_understood"),
        ([rule("permit", 8), rule("deny", purpose=[HRESCH])], "denied"),
        ([rule("permit", 8), rule("deny", 999)], "not_understood"),
        ([rule("permit", 8), {"code": [mii_code(9)]}], "not_understood"),
        ([rule("permit", 8, period={"end": "2026-01-15T12:00:00Z"})], "expired"),  # only a part of today
    ],
)
def test_rules_of_r4(rules, expected):
    provision = {"type": "deny", "period": {"end": "2054"}} | ({"provision": rules} if rules else {})
    assert reason(mii_consent(provision=provision)) == expected


def test_a_base_rule_without_a_type_denies():
    assert reason(mii_consent(provision={"provision": [rule("permit", 8)]})) == "permit"
    assert reason(mii_consent(provision={"purpose": [HRESCH]})) == "denied"
    ending = {"type": "deny", "period": {"end": "2026-01-15T12:00:00Z"}, "provision": [rule("permit", 8)]}
    assert reason(mii_consent(provision=ending)) == "expired"  # the permit inside holds for a part of today
    assert said(mii_consent(provision=ending), date(2026, 1, 14)).until == date(2026, 1, 14)
    bare = mii_consent()
    del bare["provision"]
    assert reason(bare) == "denied"


def test_all_codes_asked_for_are_needed():
    both = Settings.model_validate(CHOSEN.model_dump() | {"codes": [f"{MII}|{MII[8:]}.{n}" for n in (8, 46)]})
    rules = [rule("permit", 8, period={"end": "2030"}), rule("permit", 46, period={"end": "2028"})]
    full = mii_consent(provision={"type": "deny", "provision": rules})
    assert (said(full, chosen=both).reason, said(full, chosen=both).until) == ("permit", date(2028, 12, 31))
    half = mii_consent(provision={"type": "deny", "provision": rules[:1]})
    assert said(half, chosen=both).verdicts == ("permit", "silent")
    none = Settings.model_validate(CHOSEN.model_dump() | {"codes": []})
    assert reason(mii_consent(provision=rule("permit", purpose=[HRESCH])), chosen=none) == "permit"
    assert reason(full, chosen=none) == "not_understood"  # nobody says any more what 8 is
    assert reason(mii_consent(provision=rule("permit", 19)), chosen=none) == "other_use"


def test_r5():
    assert (said(r5_consent()).version, said(r5_consent()).until) == ("R5", date(2029, 2, 22))
    assert reason(r5_consent(), date(2029, 2, 23)) == "expired"
    inner = [{"purpose": [HRESCH], "provision": [{"code": [mii_code(8)], "period": {"end": "2025"}}]}]
    assert reason(r5_consent(provision=inner)) == "permit"
    assert reason(r5_consent(provision=inner), date(2025, 12, 31)) == "denied"
    assert reason(r5_consent(decision="permit")) == "denied"  # the exception denies
    assert reason(r5_consent(decision="permit", provision=[{"code": [mii_code(19)]}])) == "denied"  # permits: for what?
    research = [{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/consentscope", "code": "research"}]}]
    bare = r5_consent(decision="permit", category=research)
    del bare["provision"]
    assert reason(bare) == "permit"
    assert reason(bare | {"category": r5_consent()["category"]}) == "denied"
    changes: list[dict[str, Any]] = [{"implicitRules": "urn:x"}, {"provision": [{"actor": [{"role": {"text": "x"}}]}]}]
    for change in (
        *changes,
        {"decision": "maybe"},
        {"category": []},
        {"grantee": [{"display": "x"}]},
        {"scope": research[0]},
    ):
        assert reason(r5_consent(**change)) == "not_understood"
    for lacking in ("decision", "category"):
        assert reason({k: v for k, v in r5_consent().items() if k != lacking}) == "not_understood"
    assert reason(r5_consent(provision=[{"type": "permit", "purpose": [HRESCH]}])) == "not_understood"


@pytest.mark.parametrize(
    ("status", "expected"),
    [(word, "ended") for word in ("inactive", "rejected", "not-done")]
    + [(word, "not_understood") for word in ("Active", "unknown", "withdrawn-ish", "", None, 1, ["active"])],
)
def test_only_an_active_one_permits(status, expected):
    assert reason(mii_consent(status=status)) == expected


@pytest.mark.parametrize("status", ["draft", "proposed", "entered-in-error"])
def test_what_is_no_word_of_the_patient(status):
    assert fhir_consent.read(mii_consent(status=status), CHOSEN, TODAY) is None


def test_guardians_are_known_as_such():
    mother = {"reference": "RelatedPerson/m1"}
    for agreed, guardian in (
        ([{"reference": "Patient/p1"}], False),
        ([mother], True),
        ([{"reference": "Patient/p1"}, mother], True),
        ([{"display": "The patient"}], True),
        ([{"reference": "Patient/p2"}], True),
        ([{"identifier": {"system": MRN, "value": "0815"}}], True),
    ):
        assert said(mii_consent(performer=agreed)).by_guardian == guardian
    own = r5_consent()["subject"]
    for agreed, guardian in ([own], False), ([mother], True), ([own | {"display": "x"}], False):
        assert said(r5_consent(grantor=agreed)).by_guardian == guardian
    assert reason(mii_consent(patient={"reference": "Group/g", "type": "Group"})) == "not_understood"


def test_nesting_has_an_end():
    def nested(depth: int) -> dict[str, Any]:
        inner = rule("permit", 8)
        for level in range(depth - 1):
            inner = rule("deny" if level % 2 == 0 else "permit", provision=[inner])
        return inner

    assert reason(mii_consent(provision=nested(16))) == "permit"
    assert reason(mii_consent(provision=nested(18))) == "not_understood"


# ---------------------------------------------------------------------------------------------------------- reference

CODES = st.lists(st.sampled_from([1, 7, 8, 9, 19]), max_size=2)
ENDS = st.sampled_from([None, "2025-06-30", "2026-01-15", "2026-01-20", "2027", "2026-01-15T10:00:00Z"])
STARTS = st.sampled_from([None, "2024", "2026-01-15", "2026-01-16", "2025-03-01T10:00:00Z"])


@st.composite
def provisions(draw: st.DrawFn, depth: int = 1, typed: bool = True, denials: bool = True) -> dict[str, Any]:
    node: dict[str, Any] = {"id": str(draw(st.integers(0, 9)))}
    if typed:
        node["type"] = draw(st.sampled_from(["permit", "deny"] if denials or depth == 1 else ["permit"]))
    days = {name: text for name, text in (("start", draw(STARTS)), ("end", draw(ENDS))) if text}
    if days and days.get("start", "2000")[:10] <= days.get("end", "3000")[:10]:
        node["period"] = days
    if codes := draw(CODES):
        node["code"] = [mii_code(n) for n in codes]
    if draw(st.booleans()):
        node["purpose"] = [HRESCH]
    if depth < 4 and (inside := draw(st.lists(provisions(depth + 1, typed, denials), max_size=3))):
        node["provision"] = inside
    return node


def plain_answer(node: dict[str, Any], kinds: list[str | None], today: date, named: bool) -> bool:
    """The rule said plainly: walk every path of rules that all apply; where one ends, its last rule speaks.

    Permitted if somebody speaks and nobody denies.
    """

    def applies(rule: dict[str, Any], permits: bool) -> bool:
        days = rule.get("period", {})
        if "start" in days and today.isoformat() < days["start"][:10]:
            return False
        if "end" in days:
            end = days["end"]
            last = date.fromisoformat(f"{end}-12-31" if len(end) == 4 else end[:10])
            if today > (last - timedelta(days=1) if "T" in end and permits else last):
                return False
        numbers = {int(c["coding"][0]["code"].rsplit(".", 1)[1]) for c in rule.get("code", [])}
        return not numbers or bool(numbers & ({8} if permits else {8, 1, 7}))

    voices: list[bool] = []

    def walk(rule: dict[str, Any], depth: int, named: bool) -> bool:
        kind = kinds[depth] if depth < len(kinds) and kinds[depth] else rule.get("type", "deny")
        permits = kind == "permit"
        if not applies(rule, permits):
            return False
        if not permits and rule.get("period", {}).get("end", "").startswith(f"{today}T"):
            voices.append(False)  # a denial that ends in the course of the day denies all of it
            return True
        named = named or "code" in rule or "purpose" in rule
        deeper = [walk(inner, depth + 1, named) for inner in rule.get("provision", [])]
        if not any(deeper):
            voices.append(permits and named)
        return True

    walk(node, 0, named)
    return bool(voices) and all(voices)


@settings(max_examples=50)
@given(provisions(), st.integers(0, 12))
def test_r4_against_the_rule_said_plainly(provision, later):
    today = TODAY + timedelta(days=later)
    found = said(mii_consent(provision=provision), today)
    assert found.reason != "not_understood"
    assert (found.reason == "permit") == plain_answer(provision, [None] * 9, today, True)


@settings(max_examples=50)
@given(st.lists(provisions(typed=False), max_size=3), st.sampled_from(["permit", "deny"]))
def test_r5_against_the_rule_said_plainly(rules, decision):
    resource = r5_consent(decision=decision, provision=rules) if rules else r5_consent(decision=decision)
    found = said(resource)
    assert found.reason != "not_understood"
    kinds: list[str | None] = [decision, *(["deny", "permit"] if decision == "permit" else ["permit", "deny"]) * 4]
    assert (found.reason == "permit") == plain_answer(resource, kinds, TODAY, False)


@settings(max_examples=50)
@given(provisions(denials=False))
def test_what_is_permitted_until_a_day_is_permitted_on_all_days_up_to_it(provision):
    """Where nothing but the base rule denies."""
    found = said(mii_consent(provision=provision))
    if found.reason == "permit":
        last = min(found.until or date(2028, 1, 1), date(2028, 1, 1))
        days = {TODAY + timedelta(days=n) for n in range(8)} | {last}
        assert all(plain_answer(provision, [None] * 9, day, True) for day in days if day <= last)


# ----------------------------------------------------------------------------------------------------------- mutations

# What the module's docstring leaves aside.
LEFT_ASIDE = {
    *("extension", "text", "language", "organization", "lastUpdated", "versionId", "profile", "source", "display"),
    *("verificationDate", "timestamp", "fullUrl", "birthDate", "use"),
}


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside, but for what is left aside."""
    yield path
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key not in LEFT_ASIDE:
                yield from places(value, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        tree = tree[step]
    return tree


def mutants(tree: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], str, dict[str, Any]]]:
    """The tree with something unknown at every place in turn."""
    tree = json.loads(json.dumps(tree))  # nothing in it is the same object twice
    for path in places(tree):
        node = at(tree, path)
        inserted: dict[str, Any] = {
            "modifierExtension": [{"url": "urn:x", "valueBoolean": True}],
            "zzUnknown": "x",
            "_status": {"extension": [{"url": "urn:x"}]},
        }
        if isinstance(node, dict):
            for name, value in inserted.items():
                changed = copy.deepcopy(tree)
                at(changed, path)[name] = value
                yield path, name, changed
        replaced: list[Any] = [None, [], "zz-unknown"] + ([[*node, {}]] if isinstance(node, list) else [])
        for value in replaced if path else []:
            changed = copy.deepcopy(tree)
            at(changed, path[:-1])[path[-1]] = value
            yield path, repr(value), changed


def harmless(path: tuple[Any, ...], what: str) -> bool:
    """Changes that leave a permit what it is, by the docstrings."""
    return (
        path[-1:] == ("id",)  # a consent's own id
        or (path[-3:-1] == ("identifier", 0) and what == "'zz-unknown'")  # an identifier that is not ours
        or (bool({"performer", "grantor"} & {*path}) and what == "'zz-unknown'")  # a guardian's permit: see there
    )


OWN = r5_consent()["subject"]


@pytest.mark.parametrize(
    ("resources", "least"),
    [
        pytest.param((mii_consent(patient=OWN, performer=[OWN]),), 380, marks=pytest.mark.slow, id="R4"),
        pytest.param((r5_consent(grantor=[OWN]),), 150, id="R5"),
        pytest.param((mii_consent(), patient()), 400, id="R4 and the Patient"),
    ],
)
def test_nothing_unknown_ever_permits(load, resources, least):
    root = bundle(*resources)
    assert load(root).decide(name_of()).permit
    count, survivors = 0, []
    for path, what, changed in mutants(root):
        count += 1
        with contextlib.suppress(ConsentError):
            if load(changed).decide(name_of()).permit and not harmless(path, what):
                survivors.append((path, what))
    assert not survivors and count > least
