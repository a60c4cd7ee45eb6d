import datetime

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.valuerep import DSfloat

from fedscan_client.intake import headers
from fedscan_client.intake.actions import _ACTIONS, apply, pseudonym, pseudonymous_uid, secrets
from fedscan_client.intake.kinds import TABLES
from fedscan_client.intake.profile import tables
from fedscan_client.intake.records import Refused
from fedscan_core.errors import DataError

KEY = bytes(range(32))
GIVEN = secrets(KEY, "p" * 32)


def kept(row: str, value=None, *, present=True):
    """What a one-row table makes of an element: its value, None where absent."""
    table = tables(f"[T] C.1 Title\n{row}")["T"]
    ds = Dataset()
    if present:
        ds.add_new(table[0].tag, table[0].vr.split(" ")[0], value)
    with headers.quiet():
        out = apply(ds, table, GIVEN)
    return None if out is None or not len(out) else out[table[0].tag].value


def test_pseudonyms_are_keyed_stable_and_apart():
    # Fixed for ever: a change would give every patient of every site a new name.
    assert pseudonym(KEY, "pid", "A-1") == "1e35dbedb6b8550b9a1bc6f4c7ba1380"
    other = bytes(32)
    names = {pseudonym(k, d, v) for k in (KEY, other) for d in ("pid", "uid") for v in ("A-1", "A-2")}
    assert len(names) == 8 and all(len(name) == 32 for name in names)
    with pytest.raises(DataError, match="31 bytes"):
        pseudonym(bytes(31), "pid", "A-1")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=70))
def test_uids_are_valid_and_stable(text):
    uid = pydicom.uid.UID(pseudonymous_uid(KEY, text))
    assert uid.is_valid and uid.startswith("2.25.") and len(uid) <= 44
    assert uid == pseudonymous_uid(KEY, text)
    bits = int(uid[5:])
    assert bits >> 76 & 0xF == 8 and bits >> 62 & 0x3 == 2  # RFC 9562: version 8, variant 2


def test_types():
    """When an element is written that has no value."""
    assert kept("0008,0020 StudyDate date 2", present=False) == ""
    assert kept("0008,0020 StudyDate date 2c", present=False) is None
    assert kept("0008,0020 StudyDate date 2c", "nonsense") == ""
    assert kept("0008,0020 StudyDate date 3", "nonsense") is None
    assert len(kept("0040,0555 AcquisitionContextSequence empty 2", present=False)) == 0
    assert kept("0008,1090 ManufacturerModelName dummy:removed 1", present=False) == "removed"
    assert kept("0008,1090 ManufacturerModelName dummy:removed 2c", "Carla's") == "removed"
    assert kept("0020,000D StudyInstanceUID uid 1", present=False) is None
    row = "0028,1053 RescaleSlope number:0:10 1c"
    assert kept(row, "2") == 2 and kept(row, present=False) is None and kept(row, "") is None
    for wrong, reason in (("11", "bad_header"), ("nan", "not_finite"), ("inf", "not_finite")):
        with pytest.raises(Refused) as caught:
            kept(row, wrong)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        ("063Y", "063Y"),
        ("089Y", "089Y"),
        ("090Y", "090Y"),
        ("104Y", "090Y"),
        ("018M", "001Y"),
        ("010W", "000Y"),
        ("411Y", None),
        ("ABCY", None),
        ("63", None),
        ("", None),
        (["063Y", "064Y"], None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_ages(age, expected):
    assert kept("0010,1010 PatientAge age 3", age) == expected


@given(
    st.dates(datetime.date(1800, 1, 1), datetime.date(2199, 12, 31)), st.integers(0, 3000), st.text("0123456789abcdef")
)
def test_intervals_between_days_stay(day, days, patient):
    """Whatever the two studies, whoever the patient: the same number of days apart, 1 to 3650 days earlier."""
    other = min(day + datetime.timedelta(days), datetime.date(2199, 12, 31))
    given = secrets(KEY, patient)
    (row,) = tables("[T] C.1 T\n0008,0020 StudyDate date 3")["T"]
    first, second = (_ACTIONS["date"](f"{d:%Y%m%d}", row, given) for d in (day, other))
    first, second = (datetime.datetime.strptime(text, "%Y%m%d").date() for text in (first, second))
    assert second - first == other - day and 1 <= (day - first).days == given.days <= 3650


def test_shifts_differ_between_patients_and_projects():
    shifts = {secrets(key, f"{n:032x}").days for key in (KEY, bytes(32)) for n in range(300)}
    assert len(shifts) > 500  # 600 draws of 3650 values
    assert min(shifts) < 100 and max(shifts) > 3550


@pytest.mark.parametrize(
    ("value", "shifted"),
    [
        ("20200229", True),
        ("2020.02.29", True),
        ("20200229101112.5", True),
        ("20200229101112.555555+0100", True),
        ("20200230", False),
        ("2020", False),
        ("202002", False),
        ("17991231", False),
        ("20200229 Carla", False),
        ("", False),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_of_a_date_and_time_only_the_date_stays(value, shifted):
    expected = f"{datetime.date(2020, 2, 29) - datetime.timedelta(GIVEN.days):%Y%m%d}" if shifted else None
    assert kept("0008,002A AcquisitionDateTime date 3", value) == expected


@pytest.mark.filterwarnings("ignore")
def test_codes_of_a_value_set():
    assert kept("0010,0040 PatientSex code 3", "F") == "F" and kept("0010,0040 PatientSex code 3", "CARLA") is None
    assert kept("0010,0040 PatientSex code 3", ["F", "M"]) is None
    assert kept("0018,0021 SequenceVariant code 3", ["SK", "CARLA", "SP"]) == ["SK", "SP"]  # any number
    assert kept("0020,0020 PatientOrientation code 3", ["L", "F"]) == ["L", "F"]
    assert kept("0020,0020 PatientOrientation code 3", ["L", "CARLA"]) is None  # two, or none
    assert kept("0008,9205 PixelPresentation code:MONOCHROME 3", "CARLA") == "MONOCHROME"


def test_image_types():
    row = "0008,0008 ImageType imagetype 3"
    assert kept(row, ["ORIGINAL", "PRIMARY", "AXIAL", "CARLA", "CARLA"]) == ["ORIGINAL", "PRIMARY", "AXIAL", "OTHER"]
    assert kept(row, ["CARLA", "PRIMARY"]) is None and kept(row, "ORIGINAL") is None
    assert kept(row, ["DERIVED", "SECONDARY"]) == ["DERIVED", "SECONDARY"]


def test_descriptions_keep_known_words_in_alphabetical_order():
    row = "0008,103E SeriesDescription words 3"
    assert kept(row, "t2 FLAIR ax, Mrs Carla 19450812 t2") == "AX FLAIR T2"
    assert kept(row, "Carla Canary 12345") is None
    assert kept(row, "Ax" + "é" * 3) == "AX"


def test_makers():
    row = "0008,0070 Manufacturer maker 2"
    assert kept(row, "Canary Siemens of Carla") == "Siemens" and kept(row, "Carla's General") == "other"
    assert kept(row, "GE MEDICAL SYSTEMS") == "GE" and kept(row, "other") == "other" and kept(row, "") == ""


@pytest.mark.filterwarnings("ignore")
def test_numbers_are_written_anew():
    row = "0018,0050 SliceThickness number:0:1000 3"
    assert kept(row, "+01.500") == 1.5 and str(kept(row, "+01.500")) == "1.5"
    assert kept(row, DSfloat("2")) == 2 and kept(row, "-1") is None and kept(row, "1001") is None
    assert kept(row, ["1", "2"]) is None
    assert kept("0028,0030 PixelSpacing number:0:9 3", ["0.5", "0.25"]) == [0.5, 0.25]
    assert kept("0028,0030 PixelSpacing number:0:9 3", ["0.5"]) is None
    assert kept("0028,0030 PixelSpacing number:0:9 3", ["0.5", "19"]) is None
    assert kept("0020,9157 DimensionIndexValues number:0:9 3", list(range(9)) * 4) is None  # 36 are too many
    assert kept("0020,9056 StackID index 3", " 07 ") == "7" and kept("0020,9056 StackID index 3", "Carla") is None


def test_frames_of_reference_of_the_standard_stay():
    row, atlas = "0020,0052 FrameOfReferenceUID frame 3", "1.2.840.10008.1.4.1.1"
    assert kept(row, atlas) == atlas and kept(row, "1.2.3") == pseudonymous_uid(KEY, "1.2.3")
    assert kept("0020,000E SeriesInstanceUID uid 1", atlas) == pseudonymous_uid(KEY, atlas)
    several = kept("0008,3010 IrradiationEventUID uid 3", ["1.2", "1.3"])
    assert several == [pseudonymous_uid(KEY, "1.2"), pseudonymous_uid(KEY, "1.3")]


def code(value, scheme, meaning="Carla", **more) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    for keyword, inner in more.items():
        setattr(item, keyword, inner)
    return item


def test_codes_are_looked_up_and_get_the_standards_meaning():
    row = "0008,2218 AnatomicRegionSequence codes:4,4009,4031 3"
    for value, scheme in (("51185008", "SCT"), ("816094009", "SCT"), ("T-D3000", "SRT"), ("T-D3000", "SNM3")):
        (item,) = kept(row, [code(value, scheme, LongCodeValue="Carla")])
        assert (item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning) == ("816094009", "SCT", "Chest")
        assert len(item) == 3
    assert kept(row, [code("51185008", "99LOCAL")]) is None and kept(row, [code("4711", "SCT")]) is None
    assert kept(row, [Dataset()]) is None
    view = code(
        "399162004", "SCT", ViewModifierCodeSequence=[code("399161006", "SCT", PatientName="Carla"), code("1", "X")]
    )
    (item,) = kept("0054,0220 ViewCodeSequence codes:4010,4014:VIEW_MODIFIER 3", [view])
    (modifier,) = item.ViewModifierCodeSequence
    assert item.CodeMeaning == "cranio-caudal" and len(modifier) == 3 and modifier.CodeMeaning == "Cleavage"
    (item,) = kept("0054,0220 ViewCodeSequence codes:4010,4014:VIEW_MODIFIER 3", [code("399162004", "SCT")])
    assert "ViewModifierCodeSequence" not in item


def lut(descriptor, data, vr="OW") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if min(descriptor) < 0 else "US", descriptor)
    item.add_new("LUTData", vr, data)
    item.LUTExplanation = "Carla"
    return item


def test_lookup_tables():
    row = "0028,3010 VOILUTSequence items:VOI_LUT 3"
    rising = np.arange(0, 2560, 10).astype("<u2")
    (item,) = kept(row, [lut([256, 0, 12], rising.tobytes())])
    assert item.LUTDescriptor == [256, 0, 12] and item["LUTData"].VR == "OW" and "LUTExplanation" not in item
    assert item.LUTData == rising.tobytes()
    (item,) = kept(row, [lut([256, -1024, 12], rising[::-1].tolist(), "US")])
    assert item.LUTData == rising[::-1].tobytes() and item["LUTDescriptor"].VR == "SS"
    for wrong in (
        lut([255, 0, 12], rising.tobytes()),  # not as many as it says
        lut([256, 0, 17], rising.tobytes()),
        lut([16, 0, 16], b"CARLA CANARY OF NOWHERE STREET 1"),  # letters go up and down
        lut([4, 0, 16], b"CARLA_Q_"),  # these happen to rise, but are too few
    ):
        assert kept(row, [wrong]) is None
        with pytest.raises(Refused):
            kept("0028,3000 ModalityLUTSequence items:MODALITY_LUT 1c", [wrong])
    whole = np.arange(65536).astype("<u2")
    (item,) = kept("0028,3000 ModalityLUTSequence items:MODALITY_LUT 1c", [lut([0, -5, 16], whole.tobytes())])
    assert item.LUTData == whole.tobytes() and item.ModalityLUTType == ""


def test_a_sequence_that_is_none_is_left_out():
    ds = Dataset()
    ds.add_new("VOILUTSequence", "LO", "Carla")
    with headers.quiet():
        assert apply(ds, tables("[T] C.1 T\n0028,3010 VOILUTSequence items:VOI_LUT 3")["T"], GIVEN) == Dataset()


anything = st.recursive(
    st.none()
    | st.text(max_size=20)
    | st.binary(max_size=12)
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["F", "ORIGINAL", "20200101", "063Y", "1.2.3", "AX T1"]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(anything)
def test_no_value_makes_an_action_fail(found):
    """Whatever pydicom hands over: a value, None, or a refusal; and no letters that are not of our own lists."""
    for table in TABLES.values():
        for row in table:
            if row.action not in ("pixels", "items", "codes"):
                try:
                    value = _ACTIONS[row.action](found, row, GIVEN)
                except Refused:
                    continue
                for one in value if isinstance(value, list) else [value]:
                    assert one is None or isinstance(one, str | int | float | bytes), row
    for action in ("items", "codes"):
        row = next(row for row in TABLES["IMAGE"] if row.action == action)
        assert _ACTIONS[action](found, row, GIVEN) is None
        assert _ACTIONS[action](Sequence(), row, GIVEN) is None
