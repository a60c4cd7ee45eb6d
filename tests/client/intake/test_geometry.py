"""Which slices belong together and in which order: shuffled synthetic series against what made them, and real ones."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.valuerep import DSfloat

from fedscan_client.intake import geometry
from fedscan_client.intake.records import Refused
from fedscan_client.intake.stack import assemble

DICOM = Path(__file__).parents[4] / "shared/data/dicom"
needs_files = pytest.mark.skipif(not DICOM.exists(), reason="the DICOM collection is not beside the repository")


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


def series(ct, places, **changes):
    return [ct(np.full((2, 3), number, np.int16), z, **changes) for number, z in enumerate(places)]


@pytest.mark.parametrize(
    "places", [(0, 1, 3), (0, 1, 2, 4, 5), (0, 2, 3, 4, 5, 6, 7, 8), (0, 0, 1), (0, 1, 1.4), (5, 5)]
)
def test_a_missing_or_doubled_slice_is_refused(ct, places):
    assert refusal(series(ct, places)) == "geometry"


def test_rounded_places_are_one_stack(ct):
    places = [round(0.625 * z, 1) for z in range(40)]  # off by up to 16 % of the distance
    ((volume, _),) = assemble(series(ct, places))
    assert volume.values.shape == (40, 2, 3) and volume.spacing_mm[0] == pytest.approx(0.625, rel=0.01)
    assert geometry.TOLERANCE == 0.2


def test_a_slice_beside_the_line_is_refused(ct):
    slices = series(ct, (0, 1, 2))
    slices[1].ImagePositionPatient = [DSfloat("0.5"), DSfloat("0"), DSfloat("1")]
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
    assert (
        refusal([ct(np.zeros((2, 3), np.int16), float(n), axes=(*rotation(n).T[:2].ravel(),)) for n in range(65)])
        == "geometry"
    )


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
