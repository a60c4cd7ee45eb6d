import pytest
from pydicom.uid import MPEG4HP41, UID

from fedscan_client.intake.kinds import KINDS, TABLES, check_kind, kind_of
from fedscan_client.intake.records import REVIEW, Refused

STORAGE = "1.2.840.10008.5.1.4.1.1."
AT_ONCE = ["1", "1.1", "1.1.1", "1.2", "1.2.1", "2", "2.1", "2.2", "4", "4.1", "4.4", "128", "128.1", "130"]


def reason(ds) -> str:
    with pytest.raises(Refused) as caught:
        check_kind(ds)
    assert "A-1" not in str(caught.value)
    return caught.value.reason


def test_kinds_are_images_of_the_standard():
    assert {uid for uid, kind in KINDS.items() if not kind.review} == {STORAGE + number for number in AT_ONCE}
    for uid, kind in KINDS.items():
        assert UID(uid).type == "SOP Class" and not UID(uid).is_private
        assert [row.tag for row in kind.table] == sorted(row.tag for row in kind.table)
        assert {"PatientID", "SOPInstanceUID", "PixelData"} <= {row.keyword for row in kind.table}


def test_every_table_is_used():
    """A table that no kind reaches is a mistake in a name."""
    reached: set[str] = set()
    waiting = [row for kind in KINDS.values() for row in kind.table]
    while waiting:
        row = waiting.pop()
        names = row.arguments[:1] if row.action == "items" else row.arguments[1:] if row.action == "codes" else ()
        for name in set(names) - reached:
            reached.add(name)
            waiting += TABLES[name]
    tops = {name for name in TABLES if any(set(TABLES[name]) <= set(kind.table) for kind in KINDS.values())}
    assert set(TABLES) == reached | tops


@pytest.mark.parametrize("number", AT_ONCE)
def test_accepted_at_once(cr_instance, number):
    check_kind(cr_instance(SOPClassUID=STORAGE + number))


@pytest.mark.parametrize(
    "number", ["3.1", "6.1", "7", "7.4", "12.1", "12.2", "20", "13.1.3", "77.1.1", "77.1.4", "77.1.5.1", "4.3"]
)
def test_kinds_that_wait_for_a_person(cr_instance, number):
    assert reason(cr_instance(SOPClassUID=STORAGE + number)) == "kind" and "kind" in REVIEW


@pytest.mark.parametrize(
    "number",
    # structured report, PDF, presentation state, ECG, RT dose / structure set / plan, segmentation, key objects, raw
    # data, video, whole slide, spectroscopy, real-world map, parametric map
    [
        "88.33",
        "104.1",
        "11.1",
        "9.1.1",
        "481.2",
        "481.3",
        "481.5",
        "66.4",
        "88.59",
        "66",
        "77.1.2.1",
        "77.1.6",
        "4.2",
        "67",
        "30",
    ],
)
def test_kinds_that_nobody_can_release(cr_instance, number):
    assert reason(cr_instance(SOPClassUID=STORAGE + number)) == "sop_class" and "sop_class" not in REVIEW


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"SOPClassUID": None}, "sop_class"),
        ({"SOPClassUID": "1.2.3.4"}, "sop_class"),  # private
        ({"SOPClassUID": [STORAGE + "1"] * 2}, "sop_class"),
        ({"SOPClassUID": "1.2.840.10008.1.2"}, "sop_class"),  # a UID of another type
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "image_type"),
        ({"ImageType": ["ORIGINAL", "SECONDARY"]}, "image_type"),
        ({"ImageType": "ORIGINAL"}, "image_type"),
        ({"ImageType": None}, "image_type"),
        ({"BurnedInAnnotation": "YES"}, "burned_in"),
        ({"BurnedInAnnotation": "PERHAPS"}, "burned_in"),
        ({"RecognizableVisualFeatures": "YES"}, "recognizable"),
    ],
)
def test_refused_by_name(cr_instance, changes, expected):
    assert reason(cr_instance(**changes)) == expected


def test_video_is_refused_whatever_the_kind(cr_instance):
    ds = cr_instance(SOPClassUID=STORAGE + "3.1")
    ds.file_meta.TransferSyntaxUID = MPEG4HP41
    assert reason(ds) == "sop_class"
    del ds.file_meta
    assert kind_of(ds).title == "Ultrasound Multi-frame"
