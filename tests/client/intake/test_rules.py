"""Rules: none means everything, each matches only what it names, and coordinates in doubt match nothing."""

import datetime
import tomllib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydantic import ValidationError
from pydicom.dataset import Dataset

from fedscan_client.intake import blackout, headers, rules
from fedscan_client.intake.records import Rectangle
from fedscan_client.intake.rules import QuarantineSettings, Rule

SHARED = Path(__file__).resolve().parents[4] / "shared/data/dicom/pydicom"
US = "1.2.840.10008.5.1.4.1.1.6.1"
GOOD = {
    "name": "US room 3",
    "manufacturer": "Acme",
    "model": "Sono 9",
    "rows": 60,
    "columns": 80,
    "approved_by": "A. Meier",
    "approved_on": datetime.date(2026, 1, 2),
    "why": "looked at 40 images",
}


def rule(**changes):
    tree = {"blackout": [[0, 0, 10, 80]], **GOOD, **changes}
    return Rule.model_validate({key: value for key, value in tree.items() if value is not None})


def region(left, top, right, bottom, data_type=1):
    it = Dataset()
    it.RegionDataType = data_type
    it.RegionLocationMinX0, it.RegionLocationMinY0 = left, top
    it.RegionLocationMaxX1, it.RegionLocationMaxY1 = right, bottom
    return it


def matched(ds, *found):
    """The rectangles of rules that match."""
    rectangles = rules.blackout_for(ds, found)
    assert rectangles is not None
    return rectangles


def sono(**changes):
    ds = Dataset()
    ds.SOPClassUID, ds.Modality = US, "US"
    ds.Manufacturer, ds.ManufacturerModelName = "ACME ", "sono 9"
    ds.Rows, ds.Columns = 60, 80
    ds.ImageType = ["ORIGINAL", "PRIMARY", "ABDOMINAL"]
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"manufacturer": None, "model": None}, "'US room 3' is too wide"),
        ({"model": None}, "'US room 3' is too wide"),
        ({"model": "  "}, "'US room 3' is too wide"),
        ({"manufacturer": None, "modality": "US", "image_type": ["ORIGINAL"]}, "'US room 3' is too wide"),
        ({"manufacturer": None, "sop_class": US, "clean": True, "blackout": None}, "clean and keep need manuf"),
        ({"model": None, "sop_class": US, "keep": "ultrasound-regions"}, "clean and keep need manuf"),
        ({"rows": None}, "rows"),
        ({"columns": None}, "columns"),
        ({"rows": 0}, "rows"),
        ({"blackout": None}, "say clean = true"),
        ({"clean": True}, "clean means"),
        ({"clean": True, "blackout": None, "keep": "ultrasound-regions"}, "clean means"),
        ({"blackout": [[0, 0, 61, 80]]}, "is not inside 60 rows x 80 columns"),
        ({"blackout": [[5, 0, 5, 80]]}, "is not inside"),
        ({"sop_class": "Ultrasound"}, "neither a SOP class UID"),
        ({"sop_class": "1.2.840.10008.1.2"}, "neither a SOP class UID"),  # a transfer syntax
        ({"approved_by": ""}, "approved_by"),
        ({"why": None}, "why"),
        ({"made_up": 1}, "made_up"),
    ],
)
def test_a_rule_that_is_too_wide_or_makes_no_sense_is_refused_by_name(changes, said):
    with pytest.raises(ValidationError) as error:
        rule(**changes)
    assert said in str(error.value)


def test_the_section_of_site_toml():
    text = """
    ocr = "sample"
    [[rule]]
    name = "US room 3"
    sop_class = "Ultrasound Image Storage"
    rows = 60
    columns = 80
    blackout = [[0, 0, 10, 80]]
    approved_by = "A. Meier"
    approved_on = 2026-01-02
    why = "looked at 40 images"
    """
    found = QuarantineSettings.model_validate(tomllib.loads(text))
    assert found.ocr == "sample" and found.rule[0].sop_class == US
    assert QuarantineSettings().ocr == "off" and QuarantineSettings().rule == ()
    with pytest.raises(ValidationError, match="two rules have the name"):
        QuarantineSettings(rule=(rule(), rule()))


@pytest.mark.parametrize(
    "changes",
    [
        {"Rows": 61},
        {"Columns": 79},
        {"Rows": None},
        {"Manufacturer": "Acme Inc"},
        {"Manufacturer": None},
        {"ManufacturerModelName": "Sono 99"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
        {"Modality": "OT"},
        {"ImageType": ["DERIVED", "PRIMARY"]},
        {"ImageType": "ORIGINAL"},
        {"ImageType": None},
        {"RecognizableVisualFeatures": "YES"},
    ],
)
def test_a_rule_matches_what_it_names_and_nothing_else(changes):
    narrow = rule(sop_class=US, modality="us", image_type=["ORIGINAL", "PRIMARY"])
    assert rules.blackout_for(sono(), [narrow]) == (Rectangle(0, 0, 10, 80),)
    assert rules.blackout_for(sono(**changes), [narrow]) is None


def test_clean_is_said_and_never_against_the_header():
    clean = rule(blackout=None, clean=True)
    assert rules.blackout_for(sono(), [clean]) == ()
    assert rules.blackout_for(sono(BurnedInAnnotation="NO"), [clean]) == ()
    assert rules.blackout_for(sono(BurnedInAnnotation="YES"), [clean]) is None
    assert rules.blackout_for(sono(BurnedInAnnotation="YES"), [rule()]) is not None
    assert rules.blackout_for(sono(), []) is None


def test_several_rules_black_out_what_any_of_them_does():
    both = [rule(blackout=None, clean=True, name="a"), rule(), rule(name="b", blackout=[[50, 0, 60, 80]])]
    expected = {Rectangle(0, 0, 10, 80), Rectangle(50, 0, 60, 80)}
    assert set(matched(sono(), *both)) == set(matched(sono(), *both[::-1])) == expected


def test_all_but_the_regions_of_echoes_is_blacked_out():
    keep = rule(blackout=None, keep="ultrasound-regions")
    # A tissue region, colour flow beside it and overlapping, and an ECG trace, which is not kept.
    ds = sono(SequenceOfUltrasoundRegions=[region(5, 10, 39, 49), region(30, 20, 70, 44, 2), region(5, 52, 70, 58, 10)])
    found = matched(ds, keep)
    frames = np.random.default_rng(1).integers(1, 255, (3, 60, 80, 3)).astype(np.uint8)
    out = blackout.apply(frames, found, 0)
    kept = np.zeros((60, 80), bool)
    kept[10:50, 5:40] = kept[20:45, 30:71] = True
    assert (out[:, kept] == frames[:, kept]).all() and (out[:, ~kept] == 0).all()
    also = matched(ds, rule(blackout=[[12, 6, 14, 9]], keep="ultrasound-regions"))
    kept[12:14, 6:9] = False
    assert (blackout.apply(frames, also, 0)[:, ~kept] == 0).all()


@pytest.mark.parametrize(
    "regions",
    [
        None,
        [],
        [region(0, 0, 79, 59)],  # nothing is left outside
        [region(5, 10, 80, 49)],  # one column beyond: the picture was made smaller, or the header lies
        [region(5, 10, 40, 60)],
        [region(5, 10, 40, 40), region(0, 0, 500, 20, 10)],  # coordinates of another picture
        [region(40, 10, 40, 49)],
        [region(5, 40, 40, 10)],
        [region(5, 10, 40, 40, 10)],  # no region of echoes
        [Dataset()],
        [region(1, 1, 3, 3)] * 33,
    ],
)
def test_regions_in_doubt_do_not_match(regions):
    ds = sono() if regions is None else sono(SequenceOfUltrasoundRegions=regions)
    assert rules.blackout_for(ds, [rule(blackout=None, keep="ultrasound-regions")]) is None


def test_a_damaged_header_matches_nothing():
    ds = sono()
    ds["Rows"].VR = "UN"
    ds["Rows"].value = b"\xff"
    assert rules.blackout_for(ds, [rule()]) is None
    ds = sono(SequenceOfUltrasoundRegions=[region(5, 10, 40, 40)])
    for vr, value in (("US", 7), ("OB", b"abc"), ("LO", "abc")):
        ds["SequenceOfUltrasoundRegions"] = pydicom.DataElement(0x00186011, vr, value)
        assert rules.blackout_for(ds, [rule(blackout=None, keep="ultrasound-regions")]) is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared DICOM collection is not here")
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("JPGLosslessP14SV1_1s_1f_8b.dcm", [Rectangle(38, 14, 759, 1011)]),
        ("gdcm-US-ALOKA-16.dcm", [Rectangle(24, 32, 416, 336), Rectangle(24, 336, 416, 640)]),
        ("OBXXXX1A.dcm", None),  # its region ends one column beyond the frame
        ("examples_palette.dcm", None),  # cropped after the header was written
        ("examples_ybr_color.dcm", None),  # made smaller after the header was written
        ("US1_J2KR.dcm", None),  # declares none
    ],
)
def test_real_ultrasound(name, kept):
    ds = pydicom.dcmread(SHARED / name)
    found = rules.ultrasound_regions(ds)
    assert (None if found is None else list(found)) == kept
    keep = rule(
        blackout=None,
        keep="ultrasound-regions",
        manufacturer=ds.Manufacturer,
        model=ds.get("ManufacturerModelName") or "x",
        rows=ds.Rows,
        columns=ds.Columns,
    )
    ds.ManufacturerModelName = keep.model
    if kept is None:
        assert rules.blackout_for(ds, [keep]) is None
        return
    mask = np.zeros((ds.Rows, ds.Columns), bool)
    for it in kept:
        mask[it.top : it.bottom, it.left : it.right] = True
    x_HW = ds.pixel_array
    out = blackout.apply(x_HW[None], matched(ds, keep), 0)[0]
    assert (out[~mask] == 0).all() and (out[mask] == x_HW[mask]).all() and x_HW[~mask].any()
    assert headers.count(ds, "Rows") == len(out)
