import numpy as np
import pytest

from fedscan_core.errors import FolderError
from fedscan_server import checkpoint
from fedscan_server.checkpoint import Checkpoint


def state(number=3):
    rng = np.random.default_rng(number)
    model = {"model/w": rng.normal(size=(2, 3)).astype(np.float32), "b": np.array(1.5, np.float32)}
    average = {name: array + 1 for name, array in model.items()}
    # the mean of fedadam and another spelling of its parts; momentum in another memory order
    optimizer = {"m/model/w": np.asfortranarray(rng.normal(size=(2, 3))), "s/b": np.array(1e-300)}
    return Checkpoint(number, model, average, optimizer)


def files(folder):
    return sorted(path.name for path in (folder / checkpoint.FOLDER).iterdir())


def assert_same(a, b):
    assert a.round == b.round
    for part in ("model", "average", "optimizer"):
        one, two = getattr(a, part), getattr(b, part)
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].dtype == two[name].dtype and one[name].shape == two[name].shape
            assert np.array_equal(one[name], two[name])


def test_round_trip_with_the_optimizers_state(tmp_path):
    assert checkpoint.latest(tmp_path, "sha") is None
    checkpoint.write(tmp_path, state(), "sha")
    found = checkpoint.latest(tmp_path, "sha")
    assert found is not None
    assert_same(found, state())
    empty = Checkpoint(4, state().model, state().average, {})
    checkpoint.write(tmp_path, empty, "sha")
    found = checkpoint.latest(tmp_path, "sha")
    assert found is not None and found.optimizer == {} and found.round == 4


def test_the_last_two_are_kept_up_to_the_longest_run(tmp_path):
    for number in (9, 10, 11, 99_999, 100_000):
        checkpoint.write(tmp_path, state(number), "sha")
        found = checkpoint.latest(tmp_path, "sha")
        assert found is not None and found.round == number
    assert files(tmp_path) == ["round-099999.safetensors", "round-100000.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        lambda b: b.replace(b'"round":"2"', b'"round":"3"'),
        lambda b: b[:5],
        lambda b: b"",
        lambda b: b"\xff" * len(b),
    ],
)
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage):
    for number in (1, 2):
        checkpoint.write(tmp_path, state(number), "sha")
    newest, older = (tmp_path / checkpoint.FOLDER / name for name in reversed(files(tmp_path)))
    newest.write_bytes(damage(newest.read_bytes()))
    found = checkpoint.latest(tmp_path, "sha")
    assert found is not None
    assert_same(found, state(1))
    older.write_bytes(b"")
    with pytest.raises(FolderError, match="None of the checkpoints"):  # not from round 1 again: sites answered already
        checkpoint.latest(tmp_path, "sha")


def test_another_configuration_is_refused(tmp_path):
    checkpoint.write(tmp_path, state(), "sha of the old")
    with pytest.raises(FolderError, match="another configuration") as caught:
        checkpoint.latest(tmp_path, "sha of the new")
    assert caught.value.remedy


def test_a_crash_while_writing_leaves_the_old_ones(tmp_path, monkeypatch):
    import os

    checkpoint.write(tmp_path, state(1), "sha")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        checkpoint.write(tmp_path, state(2), "sha")
    monkeypatch.undo()
    assert files(tmp_path) == ["round-000001.safetensors"]
