"""Consent: only a patient whom the hospital's register permits is ever read, and only as long as it does.

    settings.py      [consent] of site.toml
    register.py      `load` reads whatever the hospital has into one `Register`; `until`: when a permit ends
    decision.py      what a register says of one patient, and the words for it
    lists.py         CSV: a register, a list of cleared patients, a list of objections
    fhir.py          a folder, Bundle or NDJSON of FHIR Consents: whose they are, and which of them decides
    fhir_consent.py  one FHIR Consent, R4 to R5: what it permits, or that it is not understood
    fhir_values.py   strict JSON, FHIR dates and codes
    withdrawals.py   who withdrew here, for ever

Default deny: no row, an unknown word, a date that cannot be read, a register that is missing, damaged or too old: no
patient is read. Patients are found by the hospital's own identifier, issuer and number, as it is written: spaces around
it do not count, nor how Unicode composes its letters; case and leading zeros do. Only its keyed HMAC outlives the
reading.

Whether a register can be used at all is the hospital's public fact, outside of the privacy guarantee: see register.py.
"""

from fedscan_client.consent.decision import WHY, Decision, NoPermit
from fedscan_client.consent.register import Register, load, until
from fedscan_client.consent.settings import Settings

__all__ = ["WHY", "Decision", "NoPermit", "Register", "Settings", "load", "until"]
