import json
from pathlib import Path

import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword

from fedscan_client.intake.profile import CODES, PROFILE, SOP_CLASSES

E1_1 = Path(__file__).parents[3] / "../shared/data/ps315/e1_1.json"


def test_tags_and_keywords_agree_with_the_dictionary():
    for element in PROFILE:
        number = int(element.tag.strip("()").replace(",", ""), 16)
        assert tag_for_keyword(element.keyword) == number, element
    assert len({element.tag for element in PROFILE}) == len(PROFILE)


def test_no_text_passes_unchecked():
    free = {
        "LO",
        "LT",
        "SH",
        "ST",
        "UT",
        "UC",
        "PN",
        "UN",
        "SQ",
        "DA",
        "TM",
        "DT",
        "AS",
        "UR",
        "AE",
    }
    for element in PROFILE:
        if dictionary_VR(element.keyword) in free:
            assert element.action in {"empty", "pid", "maker", "age"}, element
        if dictionary_VR(element.keyword) == "CS":
            assert element.action == "constant" or CODES[element.keyword], element
    assert all(uid.startswith("1.2.840.10008.") for uid in SOP_CLASSES)


def test_against_the_standard_table():
    """What the table removes is emptied, replaced, or a declared patient characteristic."""
    if not E1_1.exists():
        pytest.skip("the copy of PS3.15 Table E.1-1 is not on this machine")
    listed = {row["tag"].lower(): row for row in json.loads(E1_1.read_text())}
    harmless = {"empty", "uid", "pid"}
    for element in PROFILE:
        row = listed.get(element.tag.lower())
        if row and row["basicProfile"] != "K" and element.action not in harmless:
            assert row.get("rtnPatCharsOpt"), element
