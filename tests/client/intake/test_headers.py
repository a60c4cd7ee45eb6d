import logging

import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from fedscan_client.intake import headers
from fedscan_client.intake.records import Refused


def test_identifier_strips_padding_only(cr_instance):
    assert headers.identifier(cr_instance(PatientID=" 007 "), "PatientID") == "007"
    odd = "../../etc/passwd"
    assert headers.identifier(cr_instance(PatientID=odd), "PatientID") == odd


@pytest.mark.parametrize("bad", ["", " ", ["A", "B"], "A\ufffd", "A\x1b[0m", "A\nB"])
@pytest.mark.filterwarnings("ignore")
def test_identifier_refuses_what_could_be_two_patients(cr_instance, bad):
    with pytest.raises(Refused) as caught:
        headers.identifier(cr_instance(PatientID=bad), "PatientID")
    assert caught.value.reason == "patient_id"


def test_a_damaged_element_is_a_refusal_and_stays_out_of_the_log(cr_instance, caplog, recwarn):
    ds = cr_instance()
    tag = Tag("AccessionNumber")
    ds._dict[tag] = RawDataElement(tag, "RH", 4, b"Carl", 0, False, True)
    with pytest.raises(NotImplementedError):
        ds.get("AccessionNumber")
    with pytest.raises(Refused, match="not allowed"):
        headers.value(ds, "AccessionNumber")
    tag = Tag("StudyInstanceUID")
    ds._dict[tag] = RawDataElement(tag, "UI", 10, b"Carla.Name", 0, False, True)
    with caplog.at_level(logging.DEBUG):
        assert headers.value(ds, "StudyInstanceUID") == "Carla.Name"
    assert not caplog.records and not recwarn.list
    assert pydicom.config.settings.reading_validation_mode == pydicom.config.WARN  # it would have


@pytest.mark.parametrize(("stored", "read"), [("1.5", 1.5), (["2", "3"], 2.0), ("", None)])
def test_decimal(cr_instance, stored, read):
    assert headers.decimal(cr_instance(WindowCenter=stored), "WindowCenter") == read
    assert headers.decimal(cr_instance(), "WindowCenter") is None


def test_count(cr_instance):
    assert headers.count(cr_instance(), "Rows") == 4
    for value in (None, [4, 4]):
        with pytest.raises(Refused):
            headers.count(cr_instance(Rows=value), "Rows")
