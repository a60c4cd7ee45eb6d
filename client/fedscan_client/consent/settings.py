"""[consent] of site.toml: where the hospital's register is, and which of its words are understood."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# HL7 terminology, and the German Medical Informatics Initiative's (MII) broad consent.
RESEARCH = "http://terminology.hl7.org/CodeSystem/consentscope|research"
OPT_IN = "http://terminology.hl7.org/CodeSystem/v3-ActCode|OPTIN"
HEALTHCARE_RESEARCH = "http://terminology.hl7.org/CodeSystem/v3-ActReason|HRESCH"
# How a consent form is filed; says nothing about research.
NEUTRAL_CATEGORIES = (
    "http://loinc.org|57016-8",
    "http://loinc.org|59284-0",
    "http://fhir.de/ConsentManagement/CodeSystem/ResultType|document",
    "http://fhir.de/ConsentManagement/CodeSystem/ResultType|policy",
    "http://fhir.de/ConsentManagement/CodeSystem/TemplateType|CONSENT-OPT-IN",
)
_MII = "urn:oid:2.16.840.1.113883.3.1937.777.24.5.3|2.16.840.1.113883.3.1937.777.24.5.3."
_MII_CATEGORY = (
    "https://www.medizininformatik-initiative.de/fhir/modul-consent/CodeSystem/mii-cs-consent-consent_category"
)
_MII_USE = 8  # MDAT wissenschaftlich nutzen EU DSGVO NIVEAU
_MII_DENIALS = (1, 7)  # PATDAT erheben, speichern, nutzen (holds 8); MDAT speichern, verarbeiten (what the cache does)
_MII_CODES = 61

Token = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """Where the hospital's word on its patients is, and how it is read.

    Codes are written "system|code"; "system|" stands for every code of a system.

    Attributes:
        kind: "register": CSV with patient_id, status, date. "cleared-list": CSV of patients who may be used. "opt-out":
            CSV of patients who objected; everybody else may be used, so `legal_basis` is needed. "fhir": FHIR Consents.
        path: file, or for "fhir" also a folder; relative to the site's folder.
        max_age_days: how old the register may be; it does not know of withdrawals after its own date.
        issuer: who issued patient ids for which a list names no issuer.
        issuers: FHIR identifier system -> issuer; "fhir" needs at least one.
        codes: what has to be permitted, each of them, where provisions name codes.
        denying_codes: a denial of these is a denial of our use; a permit of these is none.
        other_codes: known codes that are about something else.
        purposes: v3-ActReason and other purposes that our use has.
        categories: known categories, and in R4 scopes. Those that are not `NEUTRAL_CATEGORIES` say "research".
        policies: known policy URIs and policy rules.
        legal_basis: for "opt-out": on what law or approval patients who did not object are used.
        guardian_age: with this birthday a consent given by a guardian has ended.
        contact: whom a patient may ask; printed in the patient's letter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["register", "cleared-list", "opt-out", "fhir"]
    path: Path
    max_age_days: int = Field(default=30, ge=0)
    issuer: str = ""
    issuers: Mapping[Token, str] = Field(default_factory=dict)
    codes: tuple[Token, ...] = (f"{_MII}{_MII_USE}",)
    denying_codes: tuple[Token, ...] = tuple(f"{_MII}{n}" for n in _MII_DENIALS)
    other_codes: tuple[Token, ...] = tuple(
        f"{_MII}{n}" for n in range(1, _MII_CODES + 1) if n not in (_MII_USE, *_MII_DENIALS)
    )
    purposes: tuple[Token, ...] = (HEALTHCARE_RESEARCH,)
    categories: tuple[Token, ...] = (
        *NEUTRAL_CATEGORIES,
        RESEARCH,
        "http://terminology.hl7.org/CodeSystem/consentcategorycodes|research",
        f"{_MII_CATEGORY}|2.16.840.1.113883.3.1937.777.24.2.184",
    )
    policies: tuple[Token, ...] = (
        OPT_IN,
        "urn:oid:2.16.840.1.113883.3.1937.777.24.2.184",
        "urn:oid:2.16.840.1.113883.3.1937.777.24.2.1790",
        "urn:oid:2.16.840.1.113883.3.1937.777.24.2.1791",
    )
    legal_basis: str = ""
    guardian_age: int = Field(default=18, ge=0, le=130)
    contact: str = ""

    @model_validator(mode="after")
    def _complete(self) -> "Settings":
        if self.kind == "opt-out" and not self.legal_basis.strip():
            raise ValueError("an opt-out list needs legal_basis: on what law or approval its patients are used")
        if self.kind == "fhir" and not self.issuers:
            raise ValueError('FHIR consents need issuers: { "identifier system" = "issuer, or nothing" }')
        return self
