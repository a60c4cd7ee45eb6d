import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless

from fedscan_client.intake import deid, kinds
from fedscan_client.intake.deid import deidentify, patient_name, pseudonym, pseudonymous_uid
from fedscan_client.intake.profile_values import CODES
from fedscan_client.intake.records import PatientId, Rectangle, Refused
from fedscan_core.errors import DataError

KEY = bytes(range(32))
STORAGE = "1.2.840.10008.5.1.4.1.1."
DECLARED = {
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "LongitudinalTemporalInformationModified",
}
# What a phantom header holds that stays on purpose.
KEPT = {"SOPClassUID", "ImageType", "Modality", "PatientSex", "PatientAge", "BodyPartExamined"}


def written(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def methods(ds: Dataset) -> list[str]:
    return [item.CodeValue for item in ds.DeidentificationMethodCodeSequence]


def marks_of(ds: Dataset) -> set[str]:
    """Every text of a header, nested and private ones too, of at least four characters."""
    found: set[str] = set()
    for element in ds.iterall():
        values = element.value if element.VM > 1 else [element.value]
        if element.VR in ("SQ", "OW", "US", "DS", "IS", "SS") or element.keyword in KEPT:
            continue
        found |= {str(value) for value in values if len(str(value)) >= 4}
    return found - {"MONOCHROME1", "MONOCHROME2"} - set().union(*CODES.values())


def test_no_mark_of_a_phantom_header_survives(hospital):
    for path in sorted((hospital / "dicom").rglob("IM*")):
        original = pydicom.dcmread(path)
        marks = marks_of(original)
        assert len(marks) > 25 and str(original.PatientName) in marks
        raw = path.read_bytes()
        assert sum(mark.encode() in raw for mark in marks) > 25  # the detector works
        out = written(deidentify(original, KEY))
        assert not [mark for mark in marks if mark.encode() in out]
        assert b"PHANTOMPACS" in raw and b"PHANTOMPACS" not in out


def test_result_is_dicom_with_the_same_picture(hospital):
    path = next((hospital / "dicom").rglob("IM*"))
    original = pydicom.dcmread(path)
    again = pydicom.dcmread(io.BytesIO(written(deidentify(original, KEY))))
    assert np.array_equal(again.pixel_array, original.pixel_array)
    assert {e.keyword for e in again} <= {row.keyword for row in kinds.KINDS[original.SOPClassUID].table} | DECLARED
    assert again.PatientIdentityRemoved == "YES" and again.PatientName == "" and again.PatientBirthDate == ""
    assert again.preamble == b"\0" * 128
    assert again.file_meta.MediaStorageSOPInstanceUID == again.SOPInstanceUID
    assert again.PatientID == patient_name(KEY, PatientId(original.PatientID))
    assert methods(again) == ["113100", "113105", "113107", "113108"]
    assert again.LongitudinalTemporalInformationModified == "MODIFIED"
    assert again.StudyDate < original.StudyDate and again.StudyTime == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"SOPClassUID": STORAGE + "88.33"}, "sop_class"),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "image_type"),
        ({"SOPInstanceUID": None}, "uid_missing"),
        ({"StudyInstanceUID": ["1.2", "1.3"]}, "uid_missing"),
        ({"PixelData": None}, "no_pixels"),
        ({"PixelData": b"\0" * 40}, "pixels_undecodable"),
        ({"RescaleSlope": "nan"}, "not_finite"),
        ({"RescaleSlope": "1e10"}, "bad_header"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refused_by_name(cr_instance, changes, reason):
    for released in (False, True) if reason != "image_type" else (False,):
        with pytest.raises(Refused) as caught:
            deidentify(cr_instance(**changes), KEY, released=released)
        assert caught.value.reason == reason
        assert "A-1" not in str(caught.value)


def test_a_damaged_element_that_is_kept_is_a_refusal_and_one_that_is_not_is_nothing(cr_instance):
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    for keyword, refused in (("WindowCenter", True), ("AccessionNumber", True), ("PatientAddress", False)):
        ds, tag = cr_instance(), Tag(keyword)
        ds._dict[tag] = RawDataElement(tag, "RH", 4, b"Carl", 0, False, True)
        if refused:
            with pytest.raises(Refused, match="not allowed"):
                deidentify(ds, KEY)
        else:
            assert b"Carl" not in written(deidentify(ds, KEY))


def test_released(cr_instance):
    """A person overrules the reasons of REVIEW and nothing else; the result says that pixels were looked after."""
    for changes in (
        {"ImageType": ["DERIVED", "PRIMARY", "CARLA"]},
        {"BurnedInAnnotation": "YES"},
        {"RecognizableVisualFeatures": "YES"},
        {"SOPClassUID": STORAGE + "7"},
        {"ImageType": None},
    ):
        with pytest.raises(Refused):
            deidentify(cr_instance(**changes), KEY)
        out = deidentify(cr_instance(**changes), KEY, released=True)
        assert "113101" in methods(out) and out.BurnedInAnnotation == "NO"
    assert "113101" not in methods(deidentify(cr_instance(), KEY)) and "BurnedInAnnotation" not in deidentify(
        cr_instance(), KEY
    )
    assert (
        deidentify(cr_instance(ImageType=["DERIVED", "PRIMARY", "CARLA"]), KEY, released=True).ImageType[2] == "OTHER"
    )


def test_blackout(cr_instance):
    box = [Rectangle(0, 0, 2, 3), Rectangle(3, 5, 4, 6)]
    before = np.arange(24).reshape(4, 6) * 177 + 5
    for photometric, black in (("MONOCHROME2", 0), ("MONOCHROME1", 4095)):
        ds = cr_instance(PhotometricInterpretation=photometric, PixelData=before.astype("<u2").tobytes())
        out = deidentify(ds, KEY, blackout=box)
        expected = before.copy()
        expected[:2, :3] = expected[3:, 5:] = black
        assert np.array_equal(out.pixel_array, expected)
        assert "113101" in methods(out)
        assert np.array_equal(ds.pixel_array, before)  # the original is not touched
    with pytest.raises(DataError, match="not inside"):
        deidentify(ds, KEY, blackout=[Rectangle(3, 5, 99, 99)])


def test_blackout_of_pixels_that_a_decoder_keeps_for_itself(cr_instance, monkeypatch):
    pixels = np.full((1, 4, 6), 7, np.uint16)
    pixels.setflags(write=False)
    monkeypatch.setattr(deid, "frames", lambda ds: pixels)
    out = deidentify(cr_instance(PhotometricInterpretation="MONOCHROME1"), KEY, blackout=[Rectangle(0, 0, 1, 1)])
    assert out.pixel_array[0, 0] == 4095 and (out.pixel_array.ravel()[1:] == 7).all()


COLOUR = {"SamplesPerPixel": 3, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}


def test_colour_and_frames(canaries):
    """RGB, YBR and a palette become RGB; frames stay frames; a rectangle is black in each."""
    ds = canaries.image(
        "3.1", 4, NumberOfFrames=3, FrameTime=40, PhotometricInterpretation="RGB", PlanarConfiguration=0, **COLOUR
    )
    ds.FrameIncrementPointer = 0x00181063
    out = deidentify(ds, KEY, released=True, blackout=[Rectangle(1, 0, 3, 2)])
    expected = ds.pixel_array.copy()
    expected[:, 1:3, :2] = 0
    assert (
        out.NumberOfFrames == 3 and out.PhotometricInterpretation == "RGB" and out.FrameIncrementPointer == 0x00181063
    )
    assert np.array_equal(pydicom.dcmread(io.BytesIO(written(out))).pixel_array, expected)

    ds.PhotometricInterpretation = "YBR_FULL"
    out = deidentify(ds, KEY, released=True)
    assert out.PhotometricInterpretation == "RGB"
    assert np.array_equal(out.pixel_array, pixel_array(ds))
    ds.FrameIncrementPointer = 0x00540010  # to a vector that is not kept
    assert "FrameIncrementPointer" not in deidentify(ds, KEY, released=True)

    ds = canaries.image("6.1", 4, PhotometricInterpretation="PALETTE COLOR", BitsAllocated=8, BitsStored=8, HighBit=7)
    ds.PixelData = bytes(range(16))
    for shift in (0, 8):
        for number, colour in enumerate(("Red", "Green", "Blue")):
            setattr(ds, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
            table = (np.arange(256) * (number + 1) % 256 << shift).astype("<u2")
            ds.add_new(f"{colour}PaletteColorLookupTableData", "OW", table.tobytes())
        out = deidentify(ds, KEY, released=True)
        rgb = np.stack([np.arange(16) * factor % 256 for factor in (1, 2, 3)], -1).reshape(4, 4, 3)
        assert np.array_equal(out.pixel_array, rgb) and out.BitsAllocated == 8
        assert not [e for e in out if "Palette" in e.keyword]


def test_geometry_and_grey_scale_stay(canaries):
    ds = canaries.image(
        seed=3, ImageOrientationPatient=["0.6", "0.8", "0", "-0.8", "0.6", "0"], SpacingBetweenSlices="1.25"
    )
    ds.WindowCenter, ds.WindowWidth, ds.RescaleType = ["40", "500"], ["400", "1500"], "HU"
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = "1.2.3.9", "Carla's hip"
    out = deidentify(ds, KEY)
    for keyword in [
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "SliceThickness",
        "SpacingBetweenSlices",
        "RescaleSlope",
        "RescaleType",
        "RescaleIntercept",
        "WindowCenter",
        "WindowWidth",
        "InstanceNumber",
        "Rows",
        "Columns",
        "BitsStored",
        "PixelRepresentation",
        "PixelData",
    ]:
        assert out[keyword].value == ds[keyword].value, keyword
    assert out.FrameOfReferenceUID == pseudonymous_uid(KEY, "1.2.3.9") and out.PositionReferenceIndicator == ""


def test_functional_groups_stay(canaries):
    item = canaries.item
    ds = canaries.image("4.1", Modality="MR", NumberOfFrames=2)
    measures = item(PixelSpacing=[0.5, 0.5], SliceThickness=3, SpacingBetweenSlices=3.3, PatientName="Carla")
    transformation = item(RescaleSlope=2, RescaleIntercept=-5, RescaleType="Carla")
    ds.SharedFunctionalGroupsSequence = [
        item(PixelMeasuresSequence=[measures], PixelValueTransformationSequence=[transformation], PatientName="Carla")
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, z])],
            FrameContentSequence=[
                item(StackID="1", InStackPositionNumber=z, DimensionIndexValues=[1, z], FrameLabel="Carla")
            ],
        )
        for z in (1, 2)
    ]
    out = pydicom.dcmread(io.BytesIO(written(deidentify(ds, KEY))))
    (shared,) = out.SharedFunctionalGroupsSequence
    assert shared.PixelMeasuresSequence[0].SpacingBetweenSlices == 3.3
    assert shared.PixelValueTransformationSequence[0].RescaleIntercept == -5
    positions = [f.PlanePositionSequence[0].ImagePositionPatient[2] for f in out.PerFrameFunctionalGroupsSequence]
    contents = [f.FrameContentSequence[0].DimensionIndexValues for f in out.PerFrameFunctionalGroupsSequence]
    assert positions == [1, 2] and contents == [[1, 1], [1, 2]] and "Carla" not in str(out)


def shape(ds: Dataset) -> list[tuple[str, str]]:
    """Every element and value of a result but those that are pseudonyms or dates."""
    found = []
    for element in ds.iterall():
        value: object = element.value
        if isinstance(value, Sequence):
            value = len(value)
        elif element.VR in ("UI", "DA", "DT") or element.keyword == "PatientID":
            value = "class" if element.keyword.endswith("SOPClassUID") else bool(value)
        found.append((element.keyword, str(value)))
    return found


def test_a_second_pass_changes_pseudonyms_and_days_only(canaries, hospital, tmp_path):
    """De-identifying a result again gives a result: the same elements and values, with pseudonyms of pseudonyms."""
    sources = [next((hospital / "dicom").rglob("IM*"))]
    canaries.corpus(tmp_path)
    sources += [tmp_path / f"{name}.dcm" for name in ("ct", "mr_overlay", "us_rgb", "us_frames")]
    for source in sources:
        once = pydicom.dcmread(io.BytesIO(written(deidentify(pydicom.dcmread(source), KEY, released=True))))
        twice = pydicom.dcmread(io.BytesIO(written(deidentify(once, KEY, released=True))))
        assert shape(once) == shape(twice), source.name
        assert twice.PatientID == patient_name(KEY, PatientId(once.PatientID)) != once.PatientID
        assert twice.SOPInstanceUID == pseudonymous_uid(KEY, once.SOPInstanceUID)
        assert 1 <= int(once.StudyDate) - int(twice.StudyDate) <= 110000


def test_the_same_input_and_key_give_the_same_bytes_in_every_process(canaries, tmp_path):
    canaries.corpus(tmp_path)
    code = (
        "import hashlib, io, sys, pydicom; from fedscan_client.intake.deid import deidentify\n"
        "for path in sys.argv[1:]:\n"
        "    out = io.BytesIO(); ds = deidentify(pydicom.dcmread(path), bytes(range(32)), released=True)\n"
        "    ds.save_as(out, enforce_file_format=True); print(hashlib.sha256(out.getvalue()).hexdigest())\n"
    )
    files = [str(tmp_path / f"{name}.dcm") for name in ("ct", "us_frames", "mr_implicit")]
    printed = {
        subprocess.run(
            [sys.executable, "-c", code, *files],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and len(printed.pop().split()) == 3


def test_two_projects_share_nothing(cr_instance):
    """Pseudonyms, UIDs and days are functions of the key; what is left in common is the picture and the values kept."""
    ds = cr_instance(StudyDate="20200101", FrameOfReferenceUID="1.2.9")
    here, there = (deidentify(ds, key) for key in (KEY, bytes(32)))
    for keyword in (
        "PatientID",
        "StudyDate",
        "FrameOfReferenceUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
    ):
        assert here[keyword].value != there[keyword].value, keyword


def test_one_site_is_consistent(cr_instance, canaries):
    """The same UID has the same name wherever it stands, and all of a patient's dates move by the same days."""
    reference = canaries.item(ReferencedSOPClassUID=STORAGE + "1", ReferencedSOPInstanceUID="1.2.3.5")
    first = deidentify(
        cr_instance(FrameOfReferenceUID="1.2.9", ReferencedImageSequence=[reference], StudyDate="20200101"), KEY
    )
    second = deidentify(cr_instance(FrameOfReferenceUID="1.2.9", SOPInstanceUID="1.2.3.5", StudyDate="20200131"), KEY)
    other = deidentify(cr_instance(PatientID="B-2", StudyDate="20200101"), KEY)
    assert first.FrameOfReferenceUID == second.FrameOfReferenceUID and first.PatientID == second.PatientID
    assert first.ReferencedImageSequence[0].ReferencedSOPInstanceUID == second.SOPInstanceUID
    days = [
        np.datetime64(f"{ds.StudyDate[:4]}-{ds.StudyDate[4:6]}-{ds.StudyDate[6:]}") for ds in (first, second, other)
    ]
    assert days[1] - days[0] == 30 and days[2] != days[0] and other.PatientID != first.PatientID


def test_nothing_but_grey_values_passes_with_the_pixels(cr_instance):
    pixels = np.arange(24, dtype="<u2")
    ds = cr_instance(PixelData=(pixels | 0x8000).tobytes() + b"TRAILING NAME ")
    assert deidentify(ds, KEY).PixelData == pixels.tobytes()


@pytest.mark.filterwarnings("ignore")
def test_compressed_streams_are_written_again_as_plain_values(cr_instance):
    """A JPEG 2000 stream may carry comments; the example is pydicom's own MR image."""
    file = Path(__file__).parents[3] / "../shared/data/dicom/pydicom"
    streams = [p for p in sorted(file.glob("*")) if b"1.2.840.10008.1.2.4.90" in p.read_bytes()[:800]]
    if not streams:
        pytest.skip("the sample DICOM files are not on this machine")
    done = 0
    for path in streams:
        ds = pydicom.dcmread(path)
        ds.ImageType, ds.SOPClassUID = ["ORIGINAL", "PRIMARY"], cr_instance().SOPClassUID
        ds.PatientID = "A-1"
        try:
            out = deidentify(ds, KEY)
        except Refused as refusal:
            assert refusal.reason in ("uid_missing", "no_pixels", "bad_header", "bit_layout"), path
            continue
        assert ds.file_meta.TransferSyntaxUID == JPEG2000Lossless
        assert np.array_equal(out.pixel_array, pixel_array(ds))
        assert not out.file_meta.TransferSyntaxUID.is_compressed
        done += 1
    assert done


def test_the_seams_are_here():
    assert set(deid.__all__) >= {
        "check_kind",
        "deidentify",
        "identity",
        "patient_name",
        "pseudonym",
        "pseudonymous_uid",
    }
    assert pseudonym(KEY, "pid", "A-1") == "1e35dbedb6b8550b9a1bc6f4c7ba1380"
