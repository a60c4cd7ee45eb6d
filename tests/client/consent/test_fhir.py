"""Exports: whose a consent is, which of several decides, and what stops everything."""

import json
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.consent import fhir, fhir_values
from fedscan_client.consent.fhir_consent import Said
from fedscan_core.errors import ConsentError

from .conftest import MRN, bundle, mii_code, mii_consent, name_of, patient, r5_consent

OWN = {"identifier": {"system": MRN, "value": "0815"}}


def dated(when: str | None, **changes: Any) -> dict[str, Any]:
    made = mii_consent(patient=OWN, performer=[OWN], **changes)
    return made | {"dateTime": when} if when else {k: v for k, v in made.items() if k != "dateTime"}


def reason(load, *resources: dict[str, Any]) -> str:
    return str(load(bundle(*resources)).decide(name_of()).reason)


# ---------------------------------------------------------------------------------------------------------- whose it is


def test_the_patient_by_identifier_or_by_reference(load):
    for consent, others in ((mii_consent(patient=OWN), []), (mii_consent(), [patient()]), (r5_consent(), [])):
        register = load(bundle(consent, *others))
        assert register.decide(name_of()).permit and len(register.decisions) == 1
        assert register.decide(name_of("815")).reason == "not_listed"  # leading zeros count
    full = mii_consent(patient={"reference": "https://fhir.example/Patient/p1"})
    assert load(bundle(full, patient())).decide(name_of()).permit
    both = mii_consent(patient={"reference": "Patient/p1", **OWN})
    assert load(bundle(both, patient())).decide(name_of()).permit
    assert load(bundle(both)).decide(name_of()).permit  # says it itself


def test_issuers_are_kept_apart(load):
    system = "urn:oid:1.2.3"
    twice = patient(identifier=[{"system": MRN, "value": "0815"}, {"system": system, "value": "0815"}])
    register = load(bundle(mii_consent(), twice), issuers={MRN: "", system: "SOUTH"})
    assert set(register.decisions) == {name_of(), name_of("0815", "SOUTH")}
    assert register.decide(name_of("0815", "SOUTH")).permit


@pytest.mark.parametrize(
    "changes",
    [
        {"active": False},
        {"link": [{"other": {"reference": "Patient/p2"}, "type": "replaced-by"}]},
        {"modifierExtension": [{"url": "urn:x"}]},
        {"identifier": [{"system": MRN, "value": "0815"}, {"system": MRN, "value": " \n"}]},
        {"birthDate": "7.5.2010"},
    ],
)
def test_a_patient_that_is_not_understood_is_refused(load, changes):
    assert reason(load, mii_consent(), patient(**changes)) == "not_understood"


def test_identifier_and_patient_have_to_be_the_same(load):
    both = mii_consent(patient={"reference": "Patient/p1", **OWN})
    other = patient(identifier=[{"system": MRN, "value": "0816"}])
    register = load(bundle(both, other))
    assert {register.decide(name_of(n)).reason for n in ("0815", "0816")} == {"not_understood"}
    assert register.notes == {"Consent.patient: identifier and Patient are not the same": 1}


def test_a_permit_that_is_nobodys_is_noted_and_a_refusal_stops_everything(load):
    nobody = mii_consent(patient={"reference": "Patient/p9"})
    known = mii_consent(patient=OWN)
    assert load(bundle(known, nobody | {"status": "draft"})).decide(name_of()).permit
    with pytest.raises(ConsentError, match="1 FHIR Consents that may be refusals"):
        load(bundle(known, nobody | {"status": "inactive"}))
    foreign = mii_consent(patient={"identifier": {"system": "urn:other", "value": "1"}}, performer=[{"display": "x"}])
    assert load(bundle(known, foreign)).notes == {"Consent.patient: no identifier of a known system": 1}
    with pytest.raises(ConsentError):
        load(bundle(known, foreign | {"provision": {"type": "deny"}}))


def test_guardians_and_birth_dates(load):
    mother = [{"reference": "RelatedPerson/m1"}]
    decision = load(bundle(mii_consent(performer=mother), patient())).decide(name_of())
    assert decision.permit and decision.by_guardian and decision.until == date(2028, 5, 6)
    grown = bundle(mii_consent(performer=mother), patient(birthDate="2008"))  # of the year, the first day
    assert load(grown).decide(name_of()).reason == "guardian_ended"
    assert load(bundle(mii_consent(), patient(birthDate="2008"))).decide(name_of()).permit
    unknown = load(bundle(mii_consent(patient=OWN, performer=mother))).decide(name_of())
    assert unknown.permit and unknown.by_guardian and unknown.born is None  # for the caller's header


# ------------------------------------------------------------------------------------------------------- which decides


NO = {"type": "deny"}


@pytest.mark.parametrize(
    ("consents", "expected"),
    [
        ([dated("2024-02-23"), dated("2020-01-01", provision=NO)], "permit"),
        ([dated("2024-02-23"), dated("2025-01-01", provision=NO)], "denied"),
        ([dated("2024-02-23"), dated("2024-02-23", provision=NO)], "denied"),
        ([dated("2024-02-23"), dated("2025-01-01", status="inactive")], "ended"),  # a withdrawal
        ([dated("2024-02-23", status="inactive"), dated("2025-01-01")], "permit"),  # given again
        ([dated("2024-02-23"), dated("2024-02-23", status="rejected")], "ended"),
        ([dated("2024-02-23"), dated("2025-01-01", status="draft")], "permit"),
        ([dated("2024-02-23"), dated("2025-01-01", status="entered-in-error", provision=NO)], "permit"),
        ([dated("2024-02-23"), dated("2025-01-01", modifierExtension=[{"url": "x"}])], "not_understood"),
        ([dated("2024-02-23"), dated("2020-01-01", modifierExtension=[{"url": "x"}])], "permit"),
        ([dated("2024-02-23"), dated(None, provision=NO)], "no_date"),
        ([dated("2024-02-23"), dated(None, status="inactive")], "ended"),
        ([dated("2024-02-23"), dated(None)], "no_date"),
        ([dated("2024-02-23"), dated("2026-01-16")], "not_yet"),
        ([dated("2024-02-23"), dated("2024", provision=NO)], "denied"),  # which is newer?
        ([dated("2024"), dated("2024-02-23", status="inactive")], "ended"),
        ([dated("2024-02-23T10:00:00+01:00", status="inactive"), dated("2024-02-23T10:00:01+01:00")], "permit"),
        ([dated("2024-02-23T10:00:00+01:00", status="inactive"), dated("2024-02-23T10:00:00+02:00")], "ended"),
        ([dated("2024-02-23", status="inactive"), dated("2024-02-23T23:00:00Z")], "ended"),
        # The newest one is about something else: what an older one permitted is not said again.
        ([dated("2020-01-01"), dated("2024-02-23", provision={"type": "permit", "code": [mii_code(19)]})], "other_use"),
    ],
)
def test_the_newest_decides_and_a_denial_beats_a_permit(load, consents, expected):
    for order in (consents, consents[::-1]):
        assert reason(load, *order) == expected


def test_one_consent_for_each_policy_is_read_together(load):
    def policy(number: int, kind: str = "permit", when: str = "2024-02-23") -> dict[str, Any]:
        return dated(when, provision={"type": kind, "code": [mii_code(number)]})

    assert reason(load, policy(8), policy(19), policy(6)) == "permit"
    assert reason(load, policy(8), policy(19, "deny")) == "permit"
    assert reason(load, policy(8), policy(7, "deny")) == "denied"
    assert reason(load, policy(19), policy(6)) == "other_use"
    assert reason(load, policy(8), policy(19, when="2025-01-01")) == "other_use"  # not of the same day
    assert reason(load, policy(8, when="2024"), policy(19)) == "other_use"  # perhaps not
    both = {"codes": [f"{mii_code(n)['coding'][0]['system']}|{mii_code(n)['coding'][0]['code']}" for n in (8, 46)]}
    assert load(bundle(policy(8), policy(46)), **both).decide(name_of()).permit
    assert not load(bundle(policy(8), policy(9)), **both).decide(name_of()).permit


VERDICTS = st.sampled_from(["permit", "deny", "silent"])
MOMENTS = st.sampled_from(
    ["2024-02-23", "2024-02-24", "2024-02", "2023", "2024-02-23T12:00:00Z", "2024-02-24T02:00:00Z"]
)


@settings(max_examples=150)
@given(st.lists(st.tuples(MOMENTS, VERDICTS), min_size=1, max_size=5))
def test_deciding_against_the_rule_said_plainly(given_):
    """Permitted where the newest consents all permit; those of one very same date may also be about something else."""
    reasons = {"permit": "permit", "deny": "denied", "silent": "other_use"}
    consents = [Said("R4", fhir_values.moment(when, ""), (verdict,), reasons[verdict]) for when, verdict in given_]
    decision = fhir.decide(consents, [None] * len(consents))
    newest = [
        one
        for one in consents
        if not any(fhir_values.later(other.moment, one.moment) for other in consents if other.moment and one.moment)
    ]
    days = {when for when, _ in given_ if fhir_values.moment(when, "") in [one.moment for one in newest]}
    together = len(days) == 1 and len(min(days)) >= 10  # a day or an instant, and no other
    verdicts = {one.verdicts[0] for one in newest}
    plain = "permit" in verdicts <= ({"permit", "silent"} if together else {"permit"})
    assert decision.permit == plain
    assert (decision.reason == "permit") == decision.permit


# ------------------------------------------------------------------------------------------------------------- exports


def ndjson(*resources: dict[str, Any]) -> str:
    return "\n".join(json.dumps(resource) for resource in resources) + "\n"


def test_ndjson_and_folders(load):
    assert load(ndjson(mii_consent(), patient()), kind="fhir", name="all.ndjson").decide(name_of()).permit
    with pytest.raises(ConsentError):
        load(ndjson(patient()), kind="fhir", name="export/Patient.ndjson", path="export")  # no Consent
    register = load(ndjson(mii_consent()), kind="fhir", name="export/Consent.ndjson", path="export")
    assert register.decide(name_of()).permit and register.drawn_up == date(2026, 1, 9)  # the files' day
    register = load(ndjson(patient()), kind="fhir", name="export/P.ndjson", path="export", modified=date(2026, 1, 8))
    assert register.drawn_up == date(2026, 1, 9)  # of the newest file
    manifest = {"transactionTime": "2026-01-14T01:00:00Z", "output": []}
    register = load(manifest, name="export/manifest.json", path="export")
    assert register.drawn_up == date(2026, 1, 14)
    for stranger in ("export/Consent.ndjson.gz", "export/deeper/x.ndjson"):
        with pytest.raises(ConsentError, match="neither"):
            load("", kind="fhir", name=stranger, path="export")


@pytest.mark.parametrize("day", ["2024-02-23", "2026-01-14", "2026-02-01"])
def test_an_export_is_never_as_old_as_a_consent(load, day):
    """With one patient more or less, a server must not see the site refuse."""
    consent = dated(day, meta={"lastUpdated": f"{day}T00:00:00Z"})
    plain = {k: v for k, v in bundle(consent).items() if k != "timestamp"}
    for content, drawn_up in ((plain, date(2026, 1, 5)), (bundle(consent), date(2026, 1, 12))):
        age = (date(2026, 1, 15) - drawn_up).days
        assert load(content, modified=date(2026, 1, 5), max_age_days=age).drawn_up == drawn_up
        with pytest.raises(ConsentError, match=str(drawn_up)):
            load(content, modified=date(2026, 1, 5), max_age_days=age - 1)
    with pytest.raises(ConsentError, match="future"):
        load(plain, modified=date(2026, 1, 16))


def test_a_reference_means_the_same_files_patient_first(load):
    one = bundle(mii_consent(), patient())
    two = bundle(mii_consent(id="c2", status="inactive"), patient(identifier=[{"system": MRN, "value": "9"}]))
    load(one, name="export/one.json", path="export")
    register = load(two, name="export/two.json", path="export")
    assert (register.decide(name_of()).permit, register.decide(name_of("9")).reason) == (True, "ended")
    with pytest.raises(ConsentError):  # whose? two Patients have this id
        load(ndjson(mii_consent(status="inactive")), kind="fhir", name="export/three.ndjson", path="export")


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "history"},
        {"type": None},
        {"implicitRules": "urn:x"},
        {"link": [{"relation": "next", "url": "x"}]},
        {"total": 3},
        {"entry": []},
        {"entry": {}},
        {"entry": [{}]},
        {"entry": [None]},
        {"entry": [{"request": {"method": "DELETE", "url": "Consent/c1"}}]},
        {"entry": [{"resource": bundle(mii_consent(patient=OWN))}]},
        {"timestamp": "yesterday"},
        {"timestamp": "2026-01-16"},
        {"timestamp": "2025-11-01"},
    ],
)
def test_bundles_that_cannot_be_whole_stop_everything(load, changes):
    with pytest.raises(ConsentError):
        load(bundle(mii_consent(patient=OWN)) | changes)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"a": 1, "a": 2}', b"\xff\xfe{}", b'"SECRET-4711"', b"[" * 9999])
@pytest.mark.parametrize("name", ["SECRET-4711.json", "SECRET-4711.ndjson"])
def test_damaged_files_stop_everything_and_name_nobody(load, tmp_path, data, name):
    load(bundle(mii_consent(patient=OWN)), name="export/a.json", path="export")
    (tmp_path / "export" / name).write_bytes(data + (b"\n{}" if name.endswith("ndjson") else b""))
    with pytest.raises(ConsentError) as caught:
        load(bundle(mii_consent(patient=OWN)), name="export/a.json", path="export")
    assert "SECRET" not in str(caught.value) and "of 2 of the consent register export" in str(caught.value)


def test_letters_that_no_file_can_hold(load):
    lone = ndjson(patient(identifier=[{"system": MRN, "value": "\ud800"}]))
    assert "\\ud800" in lone
    with pytest.raises(ConsentError):
        load(ndjson(mii_consent()) + lone, kind="fhir", name="all.ndjson")
