"""The tables as such, and against the standard's own table of what must happen to which element."""

import json
import re
from pathlib import Path

import pytest
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from fedscan_client.intake.deid import deidentify, pseudonymous_uid
from fedscan_client.intake.kinds import KINDS, TABLES
from fedscan_client.intake.profile import tables
from fedscan_client.intake.profile_values import CODES, IMAGE_TYPES, MAKERS, WORDS

KEY = bytes(range(32))
E1_1 = Path(__file__).parents[3] / "../shared/data/ps315/e1_1.json"
ROWS = [(name, row) for name, table in TABLES.items() for row in table]


@pytest.mark.parametrize(
    "row",
    [
        "0010,0010 PatientID empty 2",  # another element's tag
        "0010,0020 PatientID keep 1",
        "0010,0020 PatientID pid 4",
        "0010,0020 PatientID pid 1\n0010,0020 PatientID pid 1",
    ],
)
def test_a_wrong_row_is_noticed_at_import(row):
    assert tables("[T] C.1 Title\n0010,0020 PatientID pid 1")["T"][0].section == "C.1"
    with pytest.raises(ValueError, match="table"):
        tables(f"[T] C.1 Title\n{row}")


def test_arguments_name_what_exists():
    for name, row in ROWS:
        where = f"{name} {row.keyword}"
        assert row.section.startswith("C."), where
        if row.action == "code":
            assert CODES[row.keyword], where
        if row.action == "number":
            assert float(row.arguments[0]) < float(row.arguments[1]), where
            assert row.vr in ("DS", "IS", "FD", "FL", "SL", "SS", "UL", "US", "US or SS"), where
        if row.action == "items":
            assert row.vr == "SQ" and row.arguments[0] in TABLES, where
        if row.action == "dummy":
            assert row.arguments[0] in ("removed", "000000", "UNKNOWN"), where
    assert set(CODES) == {row.keyword for _, row in ROWS if row.action == "code"}


def test_no_text_passes_unchecked():
    """By VR, which actions there are; the others cannot hold a letter."""
    text = {"words", "maker", "empty", "dummy", "pid", "index", "code"}
    allowed = {"LO": text, "SH": text, "CS": {"code", "imagetype", "pixels", "dummy"}, "UI": {"uid", "frame", "class"}}
    allowed |= {"PN": {"empty"}, "DA": {"empty", "date"}, "DT": {"date"}, "TM": {"empty", "dummy"}, "AS": {"age"}}
    for name, row in ROWS:
        if row.vr not in ("DS", "IS", "FD", "FL", "SL", "SS", "UL", "US", "US or SS"):
            known = allowed.get(row.vr, {"items", "codes", "empty", "lut", "pointer", "pixels"})
            assert row.action in known, f"{name} {row.keyword}"
    words = WORDS | set().union(*CODES.values(), *IMAGE_TYPES, MAKERS.values())
    assert all(word.isascii() and word == word.strip() and len(word) <= 16 for word in words)


def plant(tag: BaseTag, vr: str) -> DataElement:
    """An element of the standard's table with a value nothing else here has."""
    text = {"DA": "20110203", "DT": "20110203040506", "TM": "040506", "AS": "041Y", "UI": "1.9.8.7.6"}
    if vr in ("DS", "IS", "FD", "FL", "SL", "SS", "UL", "US"):
        return DataElement(tag, vr, 7)
    if vr == "SQ":
        item = Dataset()
        item.PatientName, item.TextValue = "CANARYX", "CANARYX"
        return DataElement(tag, "SQ", [item])
    binary = vr in ("OB", "OW", "UN", "OB or OW")
    return DataElement(tag, "OB" if binary else vr, b"CANARYX_" if binary else text.get(vr, "CANARYX"))


def test_every_action_of_the_standards_table_holds(cr_instance):
    """PS3.15 Table E.1-1, Basic Profile with our options: X absent, Z empty or dummy, D dummy, U mapped, C cleaned.

    An element that a kind's table does not name is absent, which serves X, Z and D alike: the standard's Z and D are
    for elements that the object must keep.
    """
    if not E1_1.exists():
        pytest.skip("the copy of PS3.15 Table E.1-1 is not on this machine")
    kinds = [uid for uid in KINDS if uid.split(".4.1.1.")[1] in ("1.2", "4.1", "128")]
    checked = kept = 0
    for row in json.loads(E1_1.read_text()):
        if not re.fullmatch(r"\([0-9A-F]{4},[0-9A-F]{4}\)", row["tag"]) or row["tag"].startswith("(0002"):
            continue  # curves, overlays, private groups and the file meta group: test_deid.py and the canaries
        tag = Tag(row["tag"].strip("()").replace(",", ""))
        if not dictionary_has_tag(tag) or row["tag"] == "(7FE0,0010)":
            continue
        vr, keyword = dictionary_VR(tag).split(" or ")[0], keyword_for_tag(tag)
        for sop_class in kinds:
            ds = cr_instance(SOPClassUID=sop_class)
            ds.add(plant(tag, vr))
            if keyword in ("StudyInstanceUID", "PatientID"):
                setattr(ds, keyword, "1.9.8.7.6")
            out = deidentify(ds, KEY, released=True)
            checked += 1
            if tag not in out:
                assert tag not in {r.tag for r in KINDS[sop_class].table if r.type in ("1", "2")}, keyword
                continue
            kept += 1
            before, after, basic = ds[tag].value, out[tag].value, row["basicProfile"]
            if vr == "SQ":
                assert b"CANARYX" not in str(after).encode(), keyword
                assert not len(after) or "U*" in basic, keyword
            elif row.get("rtnPatCharsOpt") == "K":
                assert keyword in ("PatientSex", "PatientAge"), keyword
            elif "U" in basic:
                assert after == pseudonymous_uid(KEY, before), keyword
            elif row.get("rtnLongModifDatesOpt") == "C" and vr in ("DA", "DT"):
                assert len(str(after)) == 8 and str(after) < "20110203", keyword
            elif row.get("cleanDescOpt") == "C":
                assert "CANARYX" not in str(after), keyword
            else:
                assert basic != "X", keyword  # what must go is gone
                assert after != before and (not after or after in ("removed", "000000") or keyword == "PatientID"), (
                    keyword
                )
    assert checked > 1700 and kept > 50


def test_what_the_standard_lists_is_never_kept_as_it_was():
    """The same, for every table of a sequence: by action instead of by value."""
    if not E1_1.exists():
        pytest.skip("the copy of PS3.15 Table E.1-1 is not on this machine")
    listed = {row["tag"].lower(): row for row in json.loads(E1_1.read_text())}
    harmless = {"empty", "dummy", "uid", "frame", "pid", "words", "date", "items", "codes"}
    met = 0
    for name, element in ROWS:
        row = listed.get(f"({element.tag.group:04x},{element.tag.element:04x})")
        if row is None or row["basicProfile"] == "K":
            continue
        met += 1
        assert element.action in harmless or row.get("rtnPatCharsOpt"), f"{name} {element.keyword}"
        if row["basicProfile"] == "U":
            assert element.action in ("uid", "frame"), f"{name} {element.keyword}"
        if element.action == "date":
            assert row.get("rtnLongModifDatesOpt") == "C", f"{name} {element.keyword}"
        if element.action == "words":
            assert row.get("cleanDescOpt") == "C", f"{name} {element.keyword}"
    assert met > 30
