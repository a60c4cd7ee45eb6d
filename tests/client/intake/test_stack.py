"""Volumes of shuffled synthetic series against what made them, and every way in which slices do not belong together."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.valuerep import DSfloat

from fedscan_client.intake import geometry, stack
from fedscan_client.intake.records import Refused, Window
from fedscan_client.intake.stack import assemble
from fedscan_core.errors import DataError

DICOM = Path(__file__).parents[4] / "shared/data/dicom"
needs_files = pytest.mark.skipif(not DICOM.exists(), reason="the DICOM collection is not beside the repository")
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def ds_of(numbers):
    return [DSfloat(float(number), auto_format=True) for number in numbers]


@pytest.fixture(scope="session")
def ct(cr_instance):
    """Makes one CT slice of the given values at z mm."""

    def make(values, z=0.0, *, at=None, axes=AXIAL, spacing=(0.5, 0.7), **changes):
        values = np.asarray(values)
        bits = values.dtype.itemsize * 8
        return cr_instance(
            Modality="CT",
            Rows=values.shape[0],
            Columns=values.shape[1],
            BitsAllocated=bits,
            BitsStored=bits,
            HighBit=bits - 1,
            PixelRepresentation=int(values.dtype.kind == "i"),
            PixelData=values.astype(values.dtype.newbyteorder("<")).tobytes(),
            ImagePositionPatient=ds_of((0, 0, z) if at is None else at),
            ImageOrientationPatient=ds_of(axes),
            PixelSpacing=ds_of(spacing),
            **changes,
        )

    return make


def refusal(instances):
    with pytest.raises(Refused) as caught:
        assemble(instances)
    return caught.value.reason


def rotation(seed):
    """A random rotation: orthonormal, right-handed."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 9), st.floats(0.3, 8), st.integers(0, 2**31), st.booleans())
def test_a_shuffled_series_gives_the_same_volume_and_an_affine_that_leads_back(ct, data, slices, gap, seed, tilted):
    rng = np.random.default_rng(seed)
    turn = rotation(seed)
    values = rng.integers(-1024, 3000, (slices, 3, 4)).astype(np.int16)
    origin, spacing = rng.normal(scale=100, size=3), rng.uniform(0.2, 3, 2)
    step = turn[:, 2] * gap + (turn[:, 1] * gap / 3 if tilted else 0)  # a tilted gantry: sheared
    made = [
        ct(values[z], at=origin + z * step, axes=[*turn[:, 0], *turn[:, 1]], spacing=spacing) for z in range(slices)
    ]
    order = data.draw(st.permutations(range(slices)))
    ((volume, numbers),) = assemble([made[z] for z in order])
    assert np.array_equal(volume.values, values) and numbers == tuple(range(slices))
    assert volume.spacing_mm == pytest.approx((gap, *spacing), rel=1e-6)
    assert volume.affine is not None
    affine = np.array(volume.affine).reshape(4, 4)
    for z in range(slices):  # the slow way: PS3.3 equation C.7.6.2.1-1, voxel by voxel
        for row, column in ((0, 0), (2, 3), (1, 0)):
            expected = origin + z * step + turn[:, 0] * spacing[1] * column + turn[:, 1] * spacing[0] * row
            assert np.allclose(affine @ [column, row, z, 1], [*expected, 1], atol=1e-6)


def test_never_two_patients_and_never_two_series(ct):
    for changes in ({"PatientID": "B"}, {"SeriesInstanceUID": "9.9"}):
        with pytest.raises(DataError, match="two patients or of two series") as caught:
            assemble([ct(np.zeros((2, 2), np.int16)), ct(np.zeros((2, 2), np.int16), 1.0, **changes)])
        assert not isinstance(caught.value, Refused)
    assert refusal([ct(np.zeros((2, 2), np.int16), PatientID="")]) == "patient_id"


def series(ct, places, **changes):
    return [ct(np.full((2, 3), number, np.int16), z, **changes) for number, z in enumerate(places)]


@pytest.mark.parametrize("places", [(0, 1, 3), (0, 1, 2, 4, 5), (0, 2, 3, 4, 5, 6, 7, 8), (0, 0, 1), (0, 1, 1.4), (5, 5)])
def test_a_missing_or_doubled_slice_is_refused(ct, places):
    assert refusal(series(ct, places)) == "geometry"


def test_rounded_places_are_one_stack(ct):
    places = [round(0.625 * z, 1) for z in range(40)]  # off by up to 16 % of the distance
    ((volume, _),) = assemble(series(ct, places))
    assert volume.values.shape == (40, 2, 3) and volume.spacing_mm[0] == pytest.approx(0.625, rel=0.01)
    assert geometry.TOLERANCE == 0.2


def test_a_slice_beside_the_line_is_refused(ct):
    slices = series(ct, (0, 1, 2))
    slices[1].ImagePositionPatient = ds_of((0.5, 0, 1))
    assert refusal(slices) == "geometry"


def test_localisers_and_other_kinds_are_volumes_of_their_own(ct):
    axial = series(ct, (0, 1, 2))
    sagittal = ct(np.full((2, 3), 7, np.int16), axes=(0, 1, 0, 0, 0, -1))
    larger = ct(np.full((4, 3), 8, np.int16))
    coarser = ct(np.full((2, 3), 9, np.int16), spacing=(1, 1))
    elsewhere = ct(np.full((2, 3), 10, np.int16), FrameOfReferenceUID="1.2.9")
    found = assemble([sagittal, *axial, larger, coarser, elsewhere])
    assert [numbers for _, numbers in found] == [(0,), (1, 2, 3), (4,), (5,), (6,)]
    assert [volume.values.shape for volume, _ in found] == [(1, 2, 3), (3, 2, 3), (1, 4, 3), (1, 2, 3), (1, 2, 3)]
    assert found[0][0].affine is None and found[0][0].spacing_mm == (None, 0.5, 0.7)
    almost = [1, 4e-4, 0, -4e-4, 1, 0]  # as it is rounded in headers
    assert len(assemble([axial[0], ct(axial[1].pixel_array, 1.0, axes=almost)])) == 1
    assert refusal([ct(np.zeros((2, 3), np.int16), axes=(1, 0, 0, 0.5, 0.5, 0))]) == "geometry"
    assert refusal([ct(np.zeros((2, 3), np.int16), float(n), axes=(*rotation(n).T[:2].ravel(),)) for n in range(65)]) == "geometry"


@pytest.mark.parametrize("mark", ["AcquisitionNumber", "TemporalPositionIdentifier", "EchoTime", "TriggerTime"])
def test_times_and_echoes_at_one_place_become_volumes(ct, mark):
    made = [(z, t) for z in range(3) for t in (2, 1)]
    slices = [ct(np.full((2, 3), 10 * t + z, np.int16), float(z), **{mark: t}) for z, t in made]
    found = assemble(slices)
    assert sorted(volume.values[:, 0, 0].tolist() for volume, _ in found) == [[10, 11, 12], [20, 21, 22]]
    assert {numbers for _, numbers in found} == {(0, 2, 4), (1, 3, 5)}
    assert refusal(slices[:-1] + slices[-2:-1]) == "geometry"


def test_two_marks_together(ct):
    made = [(z, t, e) for z in range(2) for t in (1, 2) for e in (30, 60)]
    slices = [
        ct(np.full((2, 3), 100 * t + e + z, np.int16), float(z), TemporalPositionIdentifier=t, EchoTime=e)
        for z, t, e in made
    ]
    found = [volume.values[:, 0, 0].tolist() for volume, _ in assemble(slices)]
    assert sorted(found) == [[130, 131], [160, 161], [230, 231], [260, 261]]


def test_radiographs_are_one_volume_each_and_slices_without_a_place_none(cr_instance):
    found = assemble([cr_instance(), cr_instance(ImagerPixelSpacing=["0.1", "0.2"], PhotometricInterpretation="MONOCHROME1")])
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
import resource, sys
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
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
((volume, _),) = assemble(make(z) for z in np.random.default_rng(0).permutation(300).tolist())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / volume.values.nbytes)
"""


@pytest.mark.parametrize("bits", [16, 12])
def test_memory_is_that_of_the_volume(bits):
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(bits)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.35


SERIES = {
    "Study1/12-T1post-05670": None,  # 8 of its 22 slices: gaps
    "Study1/13_HCropVolume": ((32, 51, 35), (1, 1, 1)),
    "Study2/14_HCropVolume": ((35, 48, 36), (1, 1, 1)),
    "Study3/11_HCropVolume": ((40, 50, 34), (1, 1, 1)),
    "Study3/11-T1post-18670": ((22, 320, 280), (6.5, 0.6875, 0.6875)),
    "Study3/26401-T1prereg-52906": ((22, 320, 280), (6.5, 0.6875, 0.6875)),
    "Study3/37830-T2reg-78532": ((22, 320, 280), (6.5, 0.6875, 0.6875)),
    "Study3/36468-FLAIRreg-58706": ((22, 320, 280), (6.5, 0.6875, 0.6875)),
    "torchio": ((17, 128, 88), (2, 2, 2)),
}


@needs_files
@pytest.mark.parametrize("folder", SERIES)
def test_real_series(folder):
    instances = [pydicom.dcmread(path) for path in sorted((DICOM / "series" / folder).iterdir())]
    expected = SERIES[folder]
    if expected is None:
        assert refusal(instances) == "geometry"
        return
    ((volume, numbers),) = assemble(instances)
    assert volume.values.shape == expected[0] and volume.spacing_mm == pytest.approx(expected[1], rel=1e-4)
    assert len(numbers) == len(instances)
    # Every slice is where its own header puts it.
    affine = np.array(volume.affine).reshape(4, 4)
    for ds in instances:
        z = round(float((np.linalg.inv(affine) @ [*ds.ImagePositionPatient, 1])[2]))
        assert np.allclose((affine @ [0, 0, z, 1])[:3], ds.ImagePositionPatient, atol=0.01)
        assert np.array_equal(volume.values[z], ds.pixel_array)


@needs_files
@pytest.mark.slow
def test_monai_puts_the_voxels_at_the_same_places():
    """MONAI's reader may count slices from the other end: what must agree is which value lies where."""
    from monai.data import PydicomReader

    for folder, expected in SERIES.items():
        if expected is None:
            continue
        path = DICOM / "series" / folder
        ((volume, _),) = assemble([pydicom.dcmread(file) for file in sorted(path.iterdir())])
        reader = PydicomReader(affine_lps_to_ras=False)
        values_WHZ, facts = reader.get_data(reader.read(path))
        ours, theirs = np.array(volume.affine).reshape(4, 4), np.asarray(facts["affine"])
        for z in range(len(volume.values)):
            there = np.linalg.inv(theirs) @ ours @ [3, 5, z, 1]
            assert np.allclose(there, np.round(there), atol=0.02)
            assert values_WHZ[tuple(np.round(there[:3]).astype(int))] == volume.values[z, 5, 3]
