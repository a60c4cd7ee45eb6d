"""The imprint attack works where there is no privacy, fails where there is, and the picture shows it."""

import numpy as np
import pytest
from PIL import Image

from fedscan import inversion
from fedscan_client import train
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError


@pytest.fixture(scope="module")
def attack():
    return inversion.invert(RunConfig(), patients_declared=200)


def test_images_are_read_out_of_a_plain_update_and_not_out_of_a_private_one(attack):
    images = len(attack.original)
    assert images > inversion.PATIENTS == len(attack.first_of)
    assert (attack.db_without > 60).mean() > 0.8
    assert (attack.db_private < attack.db_grey).all()  # worse than a guess at nothing but the brightness
    assert np.abs(attack.without - attack.original).mean((1, 2)).min() < 1e-5


def test_it_is_the_noise_that_protects(monkeypatch):
    """Clipped, but without noise, the same images come out: the attack on the private side is a real one."""
    monkeypatch.setattr(train, "add_noise", lambda sums, scale, stream, **c: list(sums))
    assert (inversion.invert(RunConfig(), patients_declared=200).db_private > 60).mean() > 0.8


def test_the_numbers(attack):
    numbers = attack.as_json()
    assert numbers["images"] == len(attack.original) and numbers["recovered_private"] == 0
    assert numbers["recovered_without"] == (attack.db_without > 30).sum()
    assert numbers["epsilon"] == attack.plan.epsilon


def test_psnr():
    original = np.zeros((2, 4, 4))
    other = np.stack([np.full((4, 4), 0.1), np.zeros((4, 4))])
    assert inversion._psnr(original, other).tolist() == pytest.approx([20.0, 99.0])


def test_the_picture_shows_originals_and_both_attempts(attack, tmp_path):
    path = tmp_path / "inversion.png"
    path.write_bytes(inversion.png(attack))
    shown = np.asarray(Image.open(path).convert("L"), dtype=float)
    assert 600 < shown.shape[1] < 900 < shown.shape[0] < 1500
    cell, step, left, top = inversion._CELL, inversion._CELL + inversion._GAP, inversion._LEFT, 152
    original, without, private = (shown[top : top + cell, left + c * step : left + c * step + cell] for c in range(3))
    assert np.abs(original - without).max() <= 1
    assert np.corrcoef(original.ravel(), private.ravel())[0, 1] < 0.3
    assert shown[:, -20:].min() == 255, "something runs out of the picture"


def test_a_run_without_privacy_is_refused():
    with pytest.raises(ConfigError):
        inversion.invert(RunConfig.model_validate({"privacy": {"enabled": False}}))
