"""Volumes of shuffled synthetic series against what made them, and every way in which slices do not belong together."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.valuerep import DSfloat

from fedscan_client.intake import stack
from fedscan_client.intake.records import Refused, Window
from fedscan_client.intake.stack import assemble
from fedscan_core.errors import DataError

DICOM = Path(__file__).parents[4] / "shared/data/dicom"
needs_files = pytest.mark.skipif(not DICOM.exists(), reason="the DICOM collection is not beside the repository")
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def ds_of(numbers):
    return [DSfloat(float(number), auto_format=True) for number in numbers]


def refusal(instances):
    with pytest.raises(Refused) as caught:
        assemble(instances)
    return caught.value.reason


def test_never_two_patients_and_never_two_series(ct):
    for changes in ({"PatientID": "B"}, {"SeriesInstanceUID": "9.9"}):
        with pytest.raises(DataError, match="two patients or of two series") as caught:
            assemble([ct(np.zeros((2, 2), np.int16)), ct(np.zeros((2, 2), np.int16), 1.0, **changes)])
        assert not isinstance(caught.value, Refused)
    assert refusal([ct(np.zeros((2, 2), np.int16), PatientID="")]) == "patient_id"


def test_radiographs_are_one_volume_each_and_slices_without_a_place_none(cr_instance):
    found = assemble(
        [cr_instance(), cr_instance(ImagerPixelSpacing=["0.1", "0.2"], PhotometricInterpretation="MONOCHROME1")]
    )
    assert [(volume.values.shape, numbers) for volume, numbers in found] == [((1, 4, 6), (0,)), ((1, 4, 6), (1,))]
    assert found[0][0].spacing_mm == (None, None, None) and found[1][0].spacing_mm == (None, 0.1, 0.2)
    assert (found[0][0].inverted, found[1][0].inverted) == (False, True) and found[0][0].modality == "CR"
    assert refusal([cr_instance(Modality="CT"), cr_instance(Modality="CT")]) == "geometry"
    assert len(assemble([cr_instance(Modality="CT")])) == 1
    assert assemble([]) == []


def test_frames_without_a_place_stay_in_their_order(cr_instance):
    loop = cr_instance(Modality="XA", NumberOfFrames=3, PixelData=np.arange(72, dtype="<u2").tobytes())
    ((volume, numbers),) = assemble([loop])
    assert np.array_equal(volume.values, np.arange(72).reshape(3, 4, 6)) and numbers == (0,)


def item(**elements):
    found = Dataset()
    for keyword, value in elements.items():
        setattr(found, keyword, value)
    return found


def enhanced(cr_instance, places, **changes):
    """Frames at z mm, each with the slope z + 1 and a window of its own."""
    frames = np.repeat(np.arange(len(places), dtype="<u2"), 24)
    ds = cr_instance(Modality="MR", NumberOfFrames=len(places), PixelData=frames.tobytes(), **changes)
    ds.SharedFunctionalGroupsSequence = [
        item(
            PlaneOrientationSequence=[item(ImageOrientationPatient=ds_of(AXIAL))],
            PixelMeasuresSequence=[item(PixelSpacing=ds_of((0.5, 0.7)))],
        )
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=ds_of((0, 0, z)))],
            PixelValueTransformationSequence=[item(RescaleSlope=f"{z + 1}", RescaleIntercept="5", RescaleType="MGML")],
            FrameVOILUTSequence=[item(WindowCenter=f"{10 * z}", WindowWidth="20")],
            FrameContentSequence=[item(TemporalPositionIndex=1 + number // 3)],
        )
        for number, z in enumerate(places)
    ]
    return ds


def test_enhanced_objects_are_sorted_by_their_functional_groups(cr_instance):
    ((volume, numbers),) = assemble([enhanced(cr_instance, (2, 0, 1))])
    assert volume.values[:, 0, 0].tolist() == [1 * 1 + 5, 2 * 2 + 5, 0 * 3 + 5] and numbers == (0,)
    assert volume.spacing_mm == (1.0, 0.5, 0.7) and volume.unit == "MGML"
    assert volume.windows == (Window(10, 20),)  # of the middle slice
    two_times = assemble([enhanced(cr_instance, (2, 0, 1, 0, 1, 2))])
    assert [volume.values[0, 0, 0] for volume, _ in two_times] == [1 + 5, 3 + 5]
    ds = enhanced(cr_instance, (2, 0, 1))
    del ds.PerFrameFunctionalGroupsSequence[2]
    assert refusal([ds]) == "geometry"


@pytest.mark.parametrize(
    ("values", "slope", "intercept", "dtype"),
    [
        ([0, 255], 1, 0, np.uint8),
        ([0, 256], 1, 0, np.int16),
        ([0, 40000], 1, 0, np.uint16),
        ([0, 40000], 1, -1024, np.int32),
        ([1024, 1224], 1, -1024, np.uint8),
        ([0, 2000], 1, -1024, np.int16),
        ([0, 30000], 1000, 0, np.int32),
        ([0, 40000], 100000, 0, np.float32),
        ([0, 200], 0.5, 0, np.float32),
        ([0, 200], -1, 0, np.int16),
    ],
)
def test_values_stay_exact_in_the_smallest_type(ct, values, slope, intercept, dtype):
    stored = np.array([values, values], np.uint16)
    ((volume, _),) = assemble([ct(stored, RescaleSlope=str(slope), RescaleIntercept=str(intercept))])
    assert volume.values.dtype == dtype and volume.unit == "HU"
    assert np.allclose(volume.values[0].astype(float), stored * float(slope) + intercept, rtol=1e-7)


def test_every_slice_has_its_own_slope(ct):
    slices = []
    for z, slope in ((0, "1.5"), (1, "2.25")):
        ds = ct(np.full((2, 3), 100, np.int16), z, RescaleSlope=slope, RescaleIntercept="0", Units="BQML")
        ds.Modality = "PT"
        slices.append(ds)
    ((volume, _),) = assemble(slices)
    assert volume.values[:, 0, 0].tolist() == [150, 225] and volume.values.dtype == np.float32
    assert volume.unit == "BQML" and volume.modality == "PT"


def test_modality_and_voi_tables(ct):
    stored = np.array([[0, 5, 6, 7, 8, 20]], np.uint16)
    ds = ct(stored)
    ds.ModalityLUTSequence = [item(LUTDescriptor=[4, 5, 16], LUTData=[100, 200, 400, 300])]
    ds.VOILUTSequence = [item(LUTDescriptor=[3, 100, 12], LUTData=[0, 2047, 4095])]
    ((volume, _),) = assemble([ds])
    assert volume.values[0, 0].tolist() == [100, 100, 200, 400, 300, 300] and volume.values.dtype == np.int16
    assert volume.voi_lut is not None
    assert volume.voi_lut[0] == 100 and volume.voi_lut[1] == pytest.approx([0, 2047 / 4095, 1])
    for wrong in ([5, 5, 16], [4, 5, 7], [4, 5], [0, 0, 16]):
        ds.ModalityLUTSequence[0].LUTDescriptor = wrong
        assert refusal([ds]) == "bad_header"


def test_padding_stretches_nothing(ct):
    stored = np.array([[-2000, 10, 20], [-2000, -1500, 30]], np.int16)
    whole = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1500}
    ((volume, _),) = assemble([ct(stored, **whole), ct(stored + 100, 1.0)])
    assert volume.values[0].tolist() == [[-1900, 10, 20], [-1900, -1900, 30]]  # the least that was measured
    ((volume, _),) = assemble([ct(stored, PhotometricInterpretation="MONOCHROME1", **whole)])
    assert volume.values[0].tolist() == [[30, 10, 20], [30, 30, 30]]  # shown black
    ((volume, _),) = assemble([ct(np.full((2, 3), -2000, np.int16), PixelPaddingValue=-2000)])
    assert (volume.values == 0).all()
    nothing = ct(np.full((2, 3), -2000, np.int16), PixelPaddingValue=-2000)
    ((volume, _),) = assemble([nothing, ct(stored + 2010, 1.0)])
    assert (volume.values[0] == 10).all()


def test_windows_that_cannot_be_applied_are_none(ct):
    one = np.zeros((2, 3), np.int16)
    window = {"WindowCenter": ["40", "50"], "WindowWidth": ["0.5", "400"]}
    assert assemble([ct(one, **window)])[0][0].windows == (Window(50, 400),)
    exact = assemble([ct(one, **window, VOILUTFunction="LINEAR_EXACT")])[0][0].windows
    assert exact == (Window(40, 0.5, "LINEAR_EXACT"), Window(50, 400, "LINEAR_EXACT"))
    assert assemble([ct(one, WindowCenter="1", WindowWidth="-5")])[0][0].windows == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"RescaleSlope": "nan"}, "not_finite"),
        ({"RescaleSlope": "0"}, "bad_header"),
        ({"RescaleSlope": "1e308", "RescaleIntercept": "1e308"}, "not_finite"),
        ({"RescaleSlope": "1e39"}, "not_finite"),
        ({"WindowCenter": "inf", "WindowWidth": "5"}, "not_finite"),
        ({"ImagePositionPatient": ["1", "2"]}, "bad_header"),
        ({"PixelPaddingValue": float("nan")}, "not_finite"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_headers_that_make_no_image(cr_instance, changes, reason):
    ds = cr_instance(ImagePositionPatient=["1", "2", "3"], ImageOrientationPatient=ds_of(AXIAL))
    for keyword, value in changes.items():
        if keyword == "PixelPaddingValue":
            ds.add_new(keyword, "FL", value)
        else:
            setattr(ds, keyword, value)
    assert refusal([ds]) == reason


def test_real_numbers_that_are_none(cr_instance):
    ds = cr_instance(BitsAllocated=32)
    del ds.PixelData
    values = np.linspace(0, 1, 24).astype("<f4")
    ds.add_new("FloatPixelData", "OF", values.tobytes())
    assert np.array_equal(assemble([ds])[0][0].values.ravel(), values)
    values[3] = np.nan
    ds.FloatPixelData = values.tobytes()
    assert refusal([ds]) == "not_finite"


def test_a_series_beyond_the_limit_is_refused_before_it_is_a_volume(ct, monkeypatch):
    monkeypatch.setattr(stack, "MAX_VOXELS", 13)
    taken = []

    def instances():
        for z in range(9):
            taken.append(z)
            yield ct(np.zeros((2, 3), np.int16), float(z))

    assert refusal(instances()) == "too_large" and taken == [0, 1, 2]


_MEMORY = """
import sys
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from fedscan_client.intake.stack import assemble
def make(z):
    ds = Dataset()
    ds.PatientID, ds.SeriesInstanceUID, ds.Modality = "a", "1.2", "CT"
    ds.Rows = ds.Columns = 512
    ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, int(sys.argv[1]), int(sys.argv[1]) - 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept = [1, 1], 1, -1024
    ds.add_new("PixelData", "OW", np.full(2**18, z % 1000, "<i2").tobytes())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    return ds
assemble([make(0), make(1)])
def now(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) * 1024
before = now("VmRSS")
((volume, _),) = assemble(make(z) for z in np.random.default_rng(0).permutation(200).tolist())
print((now("VmHWM") - before) / volume.values.nbytes)
"""


@pytest.mark.parametrize("bits", [16, 12])
def test_memory_is_that_of_the_volume(bits):
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(bits)], capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < 1.35
