"""Consents as hospitals write them, and a register read from them."""

import json
import os
from collections.abc import Callable
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pytest

from fedscan_client import consent
from fedscan_client.consent import Register, Settings
from fedscan_client.intake.deid import patient_name
from fedscan_client.intake.records import PatientId

KEY = bytes(range(32))
TODAY = date(2026, 1, 15)
MRN = "https://hospital.example/mrn"
MII = "urn:oid:2.16.840.1.113883.3.1937.777.24.5.3"
HRESCH = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActReason", "code": "HRESCH"}
MII_CATEGORY = (
    "https://www.medizininformatik-initiative.de/fhir/modul-consent/CodeSystem/mii-cs-consent-consent_category"
)


def mii_code(number: int) -> dict[str, Any]:
    return {"coding": [{"system": MII, "code": f"{MII[8:]}.{number}", "display": "MDAT"}]}


def mii_consent(**changes: Any) -> dict[str, Any]:
    """The German broad consent (R4): denied but for what is ticked."""
    rules = [
        {"type": "permit", "period": {"start": "2024-02-23", "end": "2029-02-22"}, "code": [mii_code(n)]}
        for n in (6, 19)
    ] + [
        {"type": "permit", "period": {"start": "2024-02-23", "end": "2054-01-31"}, "code": [mii_code(n)]}
        for n in (7, 8)
    ]
    return {
        "resourceType": "Consent",
        "id": "c1",
        "meta": {"lastUpdated": "2026-01-10T09:00:00+01:00", "profile": ["https://example.org/einwilligung"]},
        "extension": [{"url": "http://fhir.de/ConsentManagement/StructureDefinition/DomainReference"}],
        "status": "active",
        "scope": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/consentscope", "code": "research"}]},
        "category": [
            {"coding": [{"system": "http://loinc.org", "code": "57016-8"}]},
            {"coding": [{"system": MII_CATEGORY, "code": "2.16.840.1.113883.3.1937.777.24.2.184"}]},
        ],
        "patient": {"reference": "Patient/p1", "display": "Somebody"},
        "dateTime": "2024-02-23T12:00:00+01:00",
        "performer": [{"reference": "Patient/p1"}],
        "organization": [{"display": "Klinikum"}],
        "policy": [{"uri": "urn:oid:2.16.840.1.113883.3.1937.777.24.2.1791"}],
        "verification": [{"verified": True, "verificationDate": "2024-02-24"}],
        "provision": {
            "type": "deny",
            "period": {"start": "2024-02-23", "end": "2054-01-31"},
            "provision": rules,
        },
    } | changes


def r5_consent(**changes: Any) -> dict[str, Any]:
    """A plain R5 consent: permitted for research."""
    return {
        "resourceType": "Consent",
        "id": "c5",
        "status": "active",
        "category": [{"coding": [{"system": "http://loinc.org", "code": "59284-0"}]}],
        "subject": {"identifier": {"system": MRN, "value": "0815"}},
        "date": "2024-02-23",
        "period": {"start": "2024-02-23", "end": "2029-02-22"},
        "decision": "deny",
        "provision": [{"purpose": [HRESCH], "period": {"start": "2024-02-23"}}],
    } | changes


def patient(**changes: Any) -> dict[str, Any]:
    identifier = [{"system": "urn:insurance", "value": "X1"}, {"use": "usual", "system": MRN, "value": " 0815 "}]
    return {"resourceType": "Patient", "id": "p1", "identifier": identifier, "birthDate": "2010-05-07"} | changes


def bundle(*resources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    entries = [{"fullUrl": f"https://fhir.example/{r['resourceType']}/{r.get('id')}", "resource": r} for r in resources]
    return {
        "resourceType": "Bundle",
        "type": "collection",
        "timestamp": "2026-01-12T08:00:00Z",
        "entry": entries,
    } | changes


def name_of(number: str = "0815", issuer: str = "") -> str:
    return patient_name(KEY, PatientId(number, issuer))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Register]:
    """Writes a register (text, or JSON of something) into a site's folder, `modified` on a day, and reads it."""

    def read(
        content: Any, *, name: str = "", today: date = TODAY, modified: date = date(2026, 1, 9), **settings: Any
    ) -> Register:
        kind = settings.pop("kind", "register" if isinstance(content, str) else "fhir")
        path = tmp_path / (name or ("list.csv" if kind != "fhir" else "fhir.json"))
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        os.utime(path, (datetime.combine(modified, time(12)).timestamp(),) * 2)
        if kind == "fhir":
            settings.setdefault("issuers", {MRN: ""})
        chosen = Settings(kind=kind, path=settings.pop("path", Path(path.name)), **settings)
        return consent.load(chosen, KEY, site_folder=tmp_path, today=today)

    return read
