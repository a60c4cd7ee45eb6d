import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedscan_client.intake import seal

KEY, OTHER = bytes(range(32)), bytes(32)
TOLD = seal.about("image", "a", "b")
DTYPES = st.sampled_from(["?", "u1", "i1", "<i2", ">i2", "<u2", "<i4", "<f2", "<f4", ">f4", "<f8"])


def read(path, mark, array, key=KEY, told=TOLD):
    return seal.read_array(path, key, mark, array.dtype.str, array.shape, told)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_arrays_come_back_bit_for_bit_whatever_the_block(tmp_path, monkeypatch, data):
    values = data.draw(npst.arrays(data.draw(DTYPES), npst.array_shapes(min_dims=0, max_dims=4, min_side=0)))
    if data.draw(st.booleans()):
        values = values.T
    monkeypatch.setattr(seal, "_BLOCK", data.draw(st.sampled_from([1, 7, 64, 1 << 19])))
    path = tmp_path / "x"
    path.unlink(missing_ok=True)
    kept = seal.plain_array(values)
    back = read(path, seal.write_array(path, KEY, kept, TOLD), kept)
    assert back.tobytes() == values.astype(values.dtype.newbyteorder("<")).tobytes()
    assert back.shape == values.shape and back.dtype.kind == values.dtype.kind and back.flags.writeable


def test_a_file_is_what_the_docstring_says_and_holds_a_npy_file(tmp_path):
    values = np.arange(300_000, dtype="<i2").reshape(2, 300, 500)
    mark = bytes.fromhex(seal.write_array(tmp_path / "x", KEY, values, TOLD))
    blob = (tmp_path / "x").read_bytes()
    assert blob[:16] == b"fedscan-cache-2\n" and blob[16:28] == mark[:12] and blob[-16:] == mark[12:]
    plain = AESGCM(KEY).decrypt(blob[16:28], blob[28:], TOLD)
    np.save(tmp_path / "y.npy", values)
    assert plain == (tmp_path / "y.npy").read_bytes()
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    how=st.sampled_from(["flip", "cut", "add", "append"]),
)
def test_any_change_of_a_file_is_noticed(tmp_path, where, flip, how):
    values, path = np.arange(500, dtype="<i4"), tmp_path / "x"
    path.unlink(missing_ok=True)
    mark = seal.write_array(path, KEY, values, TOLD)
    whole = path.read_bytes()
    place = int(where * len(whole))
    changed = {
        "flip": whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :],
        "cut": whole[:place],
        "add": whole[:place] + bytes([flip]) + whole[place:],
        "append": whole + bytes([flip]),
    }[how]
    path.write_bytes(changed)
    with pytest.raises(InvalidTag):
        read(path, mark, values)
    sealed = seal.seal(KEY, b"some text", TOLD)
    place = int(where * len(sealed))
    with pytest.raises(InvalidTag):
        seal.unseal(KEY, sealed[:place] + bytes([sealed[place] ^ flip]) + sealed[place + 1 :], TOLD)


def test_key_mark_type_shape_and_what_it_is_about_must_all_fit(tmp_path):
    values = np.arange(24, dtype="<i2").reshape(4, 6)
    marks = [seal.write_array(tmp_path / name, KEY, values, TOLD) for name in "xy"]
    assert np.array_equal(read(tmp_path / "x", marks[0], values), values)
    for wrong in (
        lambda: read(tmp_path / "x", marks[1], values),  # a file that was sealed for the same place at another time
        lambda: read(tmp_path / "x", marks[0], values, key=OTHER),
        lambda: read(tmp_path / "x", marks[0], values, told=seal.about("image", "ab", "")),
        lambda: read(tmp_path / "x", marks[0], values.reshape(6, 4)),
        lambda: read(tmp_path / "x", marks[0], values.view("<u2")),
        lambda: read(tmp_path / "x", marks[0], values[:3]),
    ):
        with pytest.raises(InvalidTag):
            wrong()


@pytest.mark.parametrize("dtype", [object, "S3", "U3", "M8[s]", [("a", "i2")], "c8"])
def test_nothing_but_numbers_goes_in_or_out(tmp_path, dtype):
    values = np.zeros(3, dtype)
    with pytest.raises(ValueError, match="only numbers"):
        seal.plain_array(values)
    with pytest.raises(InvalidTag):
        seal.read_array(tmp_path / "x", KEY, "", values.dtype.str, (3,), TOLD)


def test_an_array_is_never_read_over_a_file_that_is_there(tmp_path):
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        seal.write_array(tmp_path / "x", KEY, np.zeros(3), TOLD)
    assert (tmp_path / "x").read_bytes() == b"mine"
