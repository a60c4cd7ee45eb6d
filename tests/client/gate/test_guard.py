"""Only a model that fits this site's own network comes in."""

import numpy as np
import pytest
import torch
from torch import nn

from fedscan_client.gate.guard import load_model
from fedscan_core.errors import WireError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def fitting():
    return {name: np.full(tuple(t.shape), 0.5, "<f4") for name, t in network().state_dict().items()}


def test_a_model_that_fits_is_loaded_as_a_copy():
    module, model = network(), fitting()
    model["0.weight"].setflags(write=False)  # as it comes off the wire
    load_model(module, model)
    assert all((t == 0.5).all() for t in module.state_dict().values())
    with torch.no_grad():
        module[2].weight.zero_()
    assert (model["2.weight"] == 0.5).all()


def changed(name, value):
    return lambda model: {**model, name: value}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: None, "other parameters"),
        (lambda model: {}, "other parameters"),
        (lambda model: {n: a for n, a in model.items() if n != "2.bias"}, "other parameters"),
        (changed("3.weight", np.ones(2, "<f4")), "other parameters"),
        (changed("2.bias", np.ones(2, "<f4")), "'2.bias'.*shape or type"),
        (changed("2.bias", np.ones((1, 1), "<f4")), "'2.bias'.*shape or type"),
        (changed("2.bias", np.ones((), "<f4")), "'2.bias'.*shape or type"),
        (changed("2.bias", np.ones(1, "<f8")), "'2.bias'.*shape or type"),
        (changed("2.bias", np.ones(1, ">f4")), "'2.bias'.*shape or type"),
        (changed("2.bias", np.ones(1, "<i4")), "'2.bias'.*shape or type"),
        (changed("2.bias", np.array([None], object)), "'2.bias'.*shape or type"),
        (changed("2.bias", np.array([np.nan], "<f4")), "'2.bias'.*not finite"),
        (changed("2.bias", np.array([np.inf], "<f4")), "'2.bias'.*not finite"),
    ],
)
def test_anything_else_is_refused_and_changes_nothing(change, words):
    module = network()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(WireError, match=words):
        load_model(module, change(fitting()))
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
