"""Whose an image is: id and issuer of the header, and the name that both get here."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from fedscan_client.intake.deid import deidentify, identity, patient_name
from fedscan_client.intake.records import PatientId, Refused

KEY = bytes(range(32))


def test_who_the_patient_is(cr_instance):
    assert identity(cr_instance()) == PatientId("A-1")
    assert identity(cr_instance(), "site") == PatientId("A-1", "site")
    assert identity(cr_instance(IssuerOfPatientID=" clinic "), "site") == PatientId("A-1", "clinic")
    pairs = [("1", ""), ("1", "a"), ("1", "b"), ("a1", ""), ("", "a1"), ("1a", ""), ("a", "1")]
    assert len({patient_name(KEY, PatientId(*pair)) for pair in pairs}) == len(pairs)
    assert deidentify(cr_instance(), KEY, issuer="site").PatientID == patient_name(KEY, PatientId("A-1", "site"))
    for wrong in (
        {"PatientID": None},
        {"PatientID": "  "},
        {"PatientID": ["A", "B"]},
        {"IssuerOfPatientID": ["A", "B"]},
    ):
        with pytest.raises(Refused) as caught:
            identity(cr_instance(**wrong))
        assert caught.value.reason == "patient_id"


def test_an_issuer_named_by_its_qualifiers_only_is_not_taken_for_ours(cr_instance):
    def item(**values):
        made = Dataset()
        for keyword, value in values.items():
            setattr(made, keyword, value)
        return made

    facility = item(UniversalEntityID="1.2.276.0.99", UniversalEntityIDType="ISO")
    for items in ([item(UniversalEntityID="1.2.3")], [item(), item(AssigningFacilitySequence=[facility])]):
        for changes in ({}, {"IssuerOfPatientID": ""}):
            with pytest.raises(Refused) as caught:
                identity(cr_instance(IssuerOfPatientIDQualifiersSequence=items, **changes), "site")
            assert caught.value.reason == "patient_id"
        named = cr_instance(IssuerOfPatientID="clinic", IssuerOfPatientIDQualifiersSequence=items)
        assert identity(named, "site") == PatientId("A-1", "clinic")
    for items in ([], [item()], [item(UniversalEntityID="", AssigningFacilitySequence=[item(UniversalEntityID="")])]):
        made = cr_instance(IssuerOfPatientIDQualifiersSequence=items)
        assert identity(made, "site") == PatientId("A-1", "site")


@given(st.text(max_size=6), st.text(max_size=6), st.sampled_from(["NFC", "NFD"]))
def test_canonically_equivalent_ids_are_one_patient(number, issuer, form):
    def other(text):
        return unicodedata.normalize(form, text)

    same = patient_name(KEY, PatientId(other(number), other(issuer)))
    assert same == patient_name(KEY, PatientId(number, issuer))
    assert same != patient_name(KEY, PatientId(number + "0", issuer))
