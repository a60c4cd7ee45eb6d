import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless

from fedscan_client.intake.deid import deidentify, pseudonym, pseudonymous_uid
from fedscan_client.intake.profile import PROFILE
from fedscan_client.intake.records import Refused
from fedscan_core.errors import DataError

KEY = bytes(range(32))
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


def canaries(ds: Dataset) -> set[str]:
    """Every text of a header, nested and private ones too, of at least four characters."""
    found: set[str] = set()
    for element in ds.iterall():
        values = element.value if element.VM > 1 else [element.value]
        if element.VR in ("SQ", "OW", "US", "DS", "IS", "SS") or element.keyword in KEPT:
            continue
        found |= {str(value) for value in values if len(str(value)) >= 4}
    return found - {"MONOCHROME1", "MONOCHROME2"}


def test_no_canary_of_a_phantom_header_survives(hospital):
    for path in sorted((hospital / "dicom").rglob("IM*")):
        original = pydicom.dcmread(path)
        marks = canaries(original)
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
    assert {e.keyword for e in again} <= {e.keyword for e in PROFILE} | DECLARED
    assert again.PatientIdentityRemoved == "YES" and again.PatientName == ""
    assert again.preamble == b"\0" * 128
    assert again.file_meta.MediaStorageSOPInstanceUID == again.SOPInstanceUID
    assert again.PatientID == pseudonym(KEY, "pid", original.PatientID)
    codes = [item.CodeValue for item in again.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113108"]


def test_one_canary_in_every_element_of_the_dictionary(cr_instance):
    """Whatever the element, at the top or nested, its text does not pass."""
    ds, item, marks = cr_instance(), Dataset(), []
    essential = {element.keyword for element in PROFILE} | {"RecognizableVisualFeatures"}
    for tag, (vr, _, _, _, keyword) in sorted(DicomDictionary.items()):
        if keyword in essential - {"PatientName", "PatientBirthDate", "StudyID"} or tag >> 16 <= 2:
            continue
        if vr in ("LO", "SH", "PN", "CS", "LT", "ST", "UT", "UC", "UR", "AE"):
            mark = f"ZQ{tag:08X}"
        elif vr == "UI":
            mark = f"1.9.{tag}.77"
        else:
            continue
        marks.append(mark.encode())
        for target in (ds, item):
            target.add_new(tag, vr, mark)
    ds.RequestAttributesSequence = [item]
    ds.preamble = b"ZQPREAMBLE" + b"\0" * 118
    assert len(marks) > 1500
    out = written(deidentify(ds, KEY))
    assert not [mark for mark in [*marks, b"ZQ", b"Canary"] if mark in out]


def test_values_of_kept_elements_are_checked(cr_instance):
    ds = cr_instance(
        Manufacturer="Canary Siemens of Carla",
        BodyPartExamined="CARLA",
        PatientSex="CARLA",
        Modality="CARLA",
        WindowCenter=["100", "200"],
        WindowWidth=["50", "60"],
    )
    out = deidentify(ds, KEY)
    assert out.Manufacturer == "Siemens" and out.WindowCenter == 100
    assert "BodyPartExamined" not in out and "PatientSex" not in out and "Modality" not in out
    assert deidentify(cr_instance(Manufacturer="Carla's General"), KEY).Manufacturer == "other"
    assert b"CARLA" not in written(out)


@pytest.mark.parametrize(
    ("age", "kept"),
    [
        ("063Y", "063Y"),
        ("090Y", "090Y"),
        ("104Y", "090Y"),
        ("018M", "001Y"),
        ("010W", "000Y"),
        ("411Y", None),
        ("ABCY", None),
        ("63", None),
        ("", None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_ages(cr_instance, age, kept):
    assert deidentify(cr_instance(PatientAge=age), KEY).get("PatientAge") == kept


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
            assert refusal.reason in ("colour", "multi_frame", "no_pixels", "bad_header"), path
            continue
        assert ds.file_meta.TransferSyntaxUID == JPEG2000Lossless
        assert np.array_equal(out.pixel_array, ds.pixel_array) and not out.file_meta.TransferSyntaxUID.is_compressed
        done += 1
    assert done


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "sop_class"),  # secondary capture
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.33"}, "sop_class"),  # structured report
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "sop_class"),  # encapsulated PDF
        ({"SOPClassUID": None}, "sop_class"),
        ({"SOPClassUID": ["1.2.840.10008.5.1.4.1.1.1"] * 2}, "sop_class"),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "image_type"),
        ({"ImageType": ["ORIGINAL", "SECONDARY"]}, "image_type"),
        ({"ImageType": "ORIGINAL"}, "image_type"),
        ({"ImageType": None}, "image_type"),
        ({"BurnedInAnnotation": "YES"}, "burned_in"),
        ({"BurnedInAnnotation": "PERHAPS"}, "burned_in"),
        ({"RecognizableVisualFeatures": "YES"}, "recognizable"),
        ({"PatientID": None}, "patient_id"),
        ({"PatientID": "  "}, "patient_id"),
        ({"PatientID": ["A-1", "A-2"]}, "patient_id"),
        ({"PatientID": "A\ufffd1"}, "patient_id"),
        ({"SOPInstanceUID": None}, "uid_missing"),
        ({"PixelData": None}, "no_pixels"),
    ],
)
def test_refused_by_name(cr_instance, changes, reason):
    with pytest.raises(Refused) as caught:
        deidentify(cr_instance(**changes), KEY)
    assert caught.value.reason == reason
    assert "A-1" not in str(caught.value)


def test_pseudonyms_are_keyed_stable_and_apart():
    # Fixed for ever: a change would give every patient of every site a new name.
    assert pseudonym(KEY, "pid", "A-1") == "1e35dbedb6b8550b9a1bc6f4c7ba1380"
    other = bytes(32)
    names = {pseudonym(k, d, v) for k in (KEY, other) for d in ("pid", "uid") for v in ("A-1", "A-2")}
    assert len(names) == 8 and all(len(name) == 32 for name in names)
    with pytest.raises(DataError, match="31 bytes"):
        pseudonym(bytes(31), "pid", "A-1")


@given(st.text(max_size=70))
def test_uids_are_valid_and_stable(text):
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        return
    uid = pydicom.uid.UID(pseudonymous_uid(KEY, text))
    assert uid.is_valid and uid.startswith("2.25.") and len(uid) <= 44
    assert uid == pseudonymous_uid(KEY, text)
    bits = int(uid[5:])
    assert bits >> 76 & 0xF == 8 and bits >> 62 & 0x3 == 2  # RFC 9562: version 8, variant 2
