"""The model that a run starts from: `fedscan_server.app.initial_model`."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError
from fedscan_server.app import initial_model


def run_config(init="random", seed=0, trainable="all"):
    return RunConfig.model_validate(
        {
            "task": {"image_size": 16},
            "model": {"name": "cnn", "init": str(init), "trainable": trainable},
            "train": {"seed": seed},
        }
    )


def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_random_weights_follow_the_seed():
    model, trainable = initial_model(run_config())
    assert trainable == set(model)
    assert same(model, initial_model(run_config())[0]) and not same(model, initial_model(run_config(seed=1))[0])


def test_only_what_is_trained_is_named():
    model, trainable = initial_model(run_config(trainable="head"))
    assert trainable == {name for name in model if name.startswith("head.")} and len(trainable) < len(model)


def test_weights_from_a_file_in_the_models_own_types(tmp_path):
    model, _ = initial_model(run_config())
    path = tmp_path / "start.safetensors"
    file = {name: np.full(array.shape, 0.25, np.float64) for name, array in model.items()}
    save_file(file | {"something else": np.zeros(1)}, path)
    loaded, _ = initial_model(run_config(path))
    assert loaded.keys() == model.keys()
    assert all((array == 0.25).all() and array.dtype == model[name].dtype for name, array in loaded.items())


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda path, model: None, "cannot be read"),
        (lambda path, model: path.mkdir(), "cannot be read"),
        (lambda path, model: path.write_bytes(b"no safetensors"), "cannot be read"),
        (lambda path, model: save_file({"other": np.zeros(1)}, path), "does not fit"),
        (lambda path, model: save_file({n: a.reshape(-1)[:1] for n, a in model.items()}, path), "does not fit"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, spoil, word):
    path = tmp_path / "start.safetensors"
    spoil(path, initial_model(run_config())[0])
    with pytest.raises(ConfigError, match=word) as caught:
        initial_model(run_config(path))
    assert caught.value.remedy and str(path) in caught.value.message
