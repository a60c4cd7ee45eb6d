import stat

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedscan_client.intake.cache import (
    Payload,
    destroy_patient,
    patients,
    read_patient,
    write_patient,
)
from fedscan_core.errors import DataError

KEY, OTHER = bytes(range(32)), bytes(32)
A, B = "a" * 32, "b" * 32


def payload(seed=0, word="needle in the haystack"):
    images = np.random.default_rng(seed).random((2, 1, 5, 5), np.float32)
    return Payload({"images": images}, [{"label": word, "age": None}, {"label": "0", "age": 7}])


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip_and_nothing_in_clear(tmp_path):
    write_patient(tmp_path, KEY, A, payload())
    back = read_patient(tmp_path, KEY, A)
    assert np.array_equal(back.arrays["images"], payload().arrays["images"])
    assert back.arrays["images"].dtype == np.float32 and back.meta == payload().meta
    assert patients(tmp_path) == [A]
    for path in tmp_path.rglob("*"):
        private = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == private
        if path.is_file():
            data = path.read_bytes()
            assert b"needle" not in data and b"images" not in data and b"NUMPY" not in data
            assert KEY not in data


def test_the_same_again_changes_no_byte_and_something_else_every_block(tmp_path):
    write_patient(tmp_path, KEY, A, payload())
    before = files(tmp_path)
    write_patient(tmp_path, KEY, A, payload())
    assert files(tmp_path) == before
    write_patient(tmp_path, KEY, A, payload(seed=1))
    after = files(tmp_path)
    assert after.keys() == before.keys() and after != before
    assert np.array_equal(read_patient(tmp_path, KEY, A).arrays["images"], payload(1).arrays["images"])


def test_equal_payloads_of_two_patients_look_unrelated(tmp_path):
    write_patient(tmp_path, KEY, A, payload())
    write_patient(tmp_path, KEY, B, payload())
    one, two = ((tmp_path / "patients" / f"{name}.enc").read_bytes()[16:] for name in (A, B))
    assert not any(one[i : i + 16] in two for i in range(0, len(one) - 16, 16))


def test_wrong_key(tmp_path):
    write_patient(tmp_path, KEY, A, payload())
    for action in (
        lambda: read_patient(tmp_path, OTHER, A),
        lambda: write_patient(tmp_path, OTHER, A, payload(1)),
    ):
        with pytest.raises(DataError, match="another site key") as caught:
            action()
        assert caught.value.remedy


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.sampled_from(["patients", "keys"]),
    where=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    cut=st.booleans(),
)
def test_any_altered_byte_or_cut_is_noticed(tmp_path, which, where, flip, cut):
    write_patient(tmp_path, KEY, A, payload())
    (path,) = (tmp_path / which).iterdir()
    whole = path.read_bytes()
    place = int(where * len(whole))
    path.write_bytes(whole[:place] if cut else whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
    with pytest.raises(DataError):
        read_patient(tmp_path, KEY, A)
    path.write_bytes(whole)


def test_files_of_one_patient_cannot_stand_in_for_another(tmp_path):
    for name, seed in ((A, 0), (B, 1)):
        write_patient(tmp_path, KEY, name, payload(seed))
    for folder, ending in (("patients", "enc"), ("keys", "key")):
        (tmp_path / folder / f"{A}.{ending}").replace(tmp_path / folder / f"{B}.{ending}")
    with pytest.raises(DataError):
        read_patient(tmp_path, KEY, B)


def test_destroying_the_key_destroys_every_copy_of_the_data(tmp_path):
    write_patient(tmp_path, KEY, A, payload())
    data = tmp_path / "patients" / f"{A}.enc"
    backup = data.read_bytes()
    assert destroy_patient(tmp_path, A) and not destroy_patient(tmp_path, A)
    assert files(tmp_path) == {} and patients(tmp_path) == []
    data.write_bytes(backup)
    with pytest.raises(DataError, match="no key"):
        read_patient(tmp_path, KEY, A)
    write_patient(tmp_path, KEY, A, payload(1))  # a new key, not the old one
    data.write_bytes(backup)
    with pytest.raises(DataError, match="altered"):
        read_patient(tmp_path, KEY, A)


def test_a_crash_between_the_two_files_loses_nothing(tmp_path, monkeypatch):
    from fedscan_client.intake import cache

    real = cache._write
    monkeypatch.setattr(cache, "_write", lambda p, b: real(p, b) if p.suffix == ".key" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_patient(tmp_path, KEY, A, payload())
    assert patients(tmp_path) == []
    monkeypatch.undo()
    write_patient(tmp_path, KEY, A, payload())
    assert read_patient(tmp_path, KEY, A).meta == payload().meta


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 32, "a" * 23, f"{A}\n"])
def test_only_pseudonyms_name_files(tmp_path, name):
    for action in (
        lambda: write_patient(tmp_path, KEY, name, payload()),
        lambda: destroy_patient(tmp_path, name),
    ):
        with pytest.raises(DataError, match="not a pseudonym"):
            action()


def test_object_arrays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        write_patient(tmp_path, KEY, A, Payload({"x": np.array([None])}, None))
    assert files(tmp_path) == {}
