import pydicom
import pytest

from fedscan_client.intake.deid_file import preview
from fedscan_client.intake.records import Refused

KEY = bytes(range(32))


def test_before_and_after(hospital):
    ds = pydicom.dcmread(next((hospital / "dicom").rglob("IM*")))
    rows = preview(ds, KEY)
    assert [(row.tag, row.keyword) for row in rows] == sorted((row.tag, row.keyword) for row in rows)
    by_name = {row.keyword: row for row in rows}
    name, patient = by_name["PatientName"], by_name["PatientID"]
    assert (name.tag, name.before, name.after) == ("(0010,0010)", str(ds.PatientName), "")
    assert patient.before == ds.PatientID and len(patient.after or "") == 32
    assert by_name["PatientAddress"].after is None and by_name["PatientIdentityRemoved"].before is None
    assert by_name["PixelData"].after == f"<{len(ds.PixelData)} bytes>"
    assert {row.keyword for row in rows if row.before is not None} >= {element.keyword for element in ds}


def test_sequences_private_elements_and_what_a_terminal_must_not_see(cr_instance, canaries):
    ds = cr_instance(PatientComments="red \x1b[31m\nalert " + "x" * 100)
    ds.RequestAttributesSequence = [canaries.item(RequestedProcedureDescription="CT of Carla"), canaries.item()]
    ds.private_block(0x0009, "ACME", create=True).add_new(1, "LO", "secret")
    rows = {row.tag: row for row in preview(ds, KEY)}
    comments = rows["(0010,4000)"].before or ""
    assert comments.isprintable() and comments.startswith("red ?[31m?alert") and len(comments) == 60
    assert rows["(0040,0275)"].before == "<2 items>" and rows["(0040,0275)"].after is None
    assert rows["(0040,0275)[1](0032,1060)"].before == "CT of Carla"
    assert (rows["(0009,1001)"].keyword, rows["(0009,1001)"].before, rows["(0009,1001)"].after) == ("", "secret", None)
    assert rows["(0012,0064)[1](0008,0100)"].after == "113100"


def test_it_shows_what_deidentify_would_do_and_refuses_what_it_refuses(cr_instance):
    with pytest.raises(Refused):
        preview(cr_instance(BurnedInAnnotation="YES"), KEY)
    rows = {row.keyword: row for row in preview(cr_instance(BurnedInAnnotation="YES"), KEY, released=True)}
    assert (rows["BurnedInAnnotation"].before, rows["BurnedInAnnotation"].after) == ("YES", "NO")
    here, there = (preview(cr_instance(), KEY, issuer=issuer) for issuer in ("", "site"))
    assert here != there
