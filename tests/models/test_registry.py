"""Every model of the zoo: builds, runs, is deterministic, and gives true per-sample gradients.

Per-sample gradients from Opacus' hooks are compared with a loop over samples, one backward pass
each: a layer that mixed samples, or changed a tensor that a hook had kept, would show here.
"""

import copy

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import nn

from fedscan_core.config import MODEL_NAMES
from fedscan_core.errors import ConfigError, NotPrivate
from fedscan_models import dp_ready, tasks
from fedscan_models.registry import MODELS, ModelShape, build, select_trainable

# small sizes: the shape of the network does not depend on them
SHAPES = {
    "scatter": ModelShape(1, (16, 24), 1),
    "cnn": ModelShape(1, (16, 16), 1),
    "resnet18": ModelShape(3, (32, 32), 3),
    "densenet121": ModelShape(1, (32, 32), 1),
    "unet2d": ModelShape(1, (16, 24), 2),
    "unet3d": ModelShape(1, (16, 16, 16), 3),
}
MILLIONS = {  # of parameters, where they do not depend on the image
    "cnn": 0.09,
    "resnet18": 11.2,
    "densenet121": 7.0,
    "unet2d": 1.62,
    "unet3d": 1.2,
}


@pytest.fixture(scope="module", params=MODELS)
def network(request):
    return build(request.param, SHAPES[request.param], seed=3)


def pixels(name, batch=3, seed=0):
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, shape.channels, *shape.image_size, generator=generator)


def module_input(network, batch=3):
    x = pixels(network.name, batch)
    return network.features(x) if network.features else x


def test_every_model_has_a_shape_here_and_a_name_in_the_config():
    assert SHAPES.keys() == MODELS.keys() == set(MODEL_NAMES)


def test_forward(network):
    shape, x = SHAPES[network.name], module_input(network)
    logits = network.module(x)
    voxels = shape.image_size if network.name.startswith("unet") else ()
    assert logits.shape == (3, shape.outputs, *voxels)
    assert torch.isfinite(logits).all()
    assert network.module(x[:0]).shape == (0, *logits.shape[1:])  # a round may draw nobody


def test_size(network):
    count = sum(p.numel() for p in network.module.parameters()) / 1e6
    if network.name in MILLIONS:
        assert count == pytest.approx(MILLIONS[network.name], rel=0.05)


def test_the_state_dict_is_parameters_only(network):
    names = [name for name, _ in network.module.named_parameters()]
    assert list(network.module.state_dict()) == names


def test_samples_stay_apart_and_nothing_is_remembered(network):
    dp_ready.check(network.module)
    sample = tuple(module_input(network).shape[1:])
    assert not dp_ready.mixes_samples(network.module, sample)
    assert dp_ready.changed_buffers(network.module, sample) == []


def test_nothing_is_in_place(network):
    assert not any(getattr(layer, "inplace", False) for layer in network.module.modules())


@pytest.mark.filterwarnings("ignore:Full backward hook")  # pixels need no gradient
def test_per_sample_gradients_equal_a_loop(network):
    shape, x = SHAPES[network.name], module_input(network, batch=2).double()
    module = copy.deepcopy(network.module).double().train()
    voxels = shape.image_size if network.name.startswith("unet") else ()
    target = torch.randint(0, max(2, shape.outputs), (len(x), *voxels))
    want = []
    for i in range(len(x)):
        loss = tasks.loss_rows(module(x[i : i + 1]), target[i : i + 1]).sum()
        want.append(torch.autograd.grad(loss, list(module.parameters())))
    hooked = GradSampleModule(module, loss_reduction="sum")
    tasks.loss_rows(hooked(x), target).sum().backward()
    for parameter, *rows in zip(module.parameters(), *want, strict=True):
        torch.testing.assert_close(parameter.grad_sample, torch.stack(rows), rtol=1e-7, atol=1e-9)


def test_the_seed_decides_the_weights_and_nothing_else_does(network):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    again = build(network.name, SHAPES[network.name], seed=3).module.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    for name, value in network.module.state_dict().items():
        assert torch.equal(again[name], value)


def test_another_seed_gives_other_weights():
    one, two = (build("cnn", SHAPES["cnn"], seed=s).module.state_dict() for s in (0, 1))
    assert not torch.equal(one["head.weight"], two["head.weight"])


def test_select_trainable(network):
    module = copy.deepcopy(network.module)

    def chosen(which):
        select_trainable(module, network.head, which)
        return {name for name, p in module.named_parameters() if p.requires_grad}

    everything = {name for name, _ in module.named_parameters()}
    head, norm = chosen("head"), chosen("norm")
    assert chosen("all") == everything
    assert 1 <= len(head) <= 2 and head <= norm <= everything  # weight, and bias if there is one
    assert all(name.startswith(network.head) for name in head)
    scale_and_shift = {
        f"{path}.{name}"
        for path, layer in module.named_modules()
        if isinstance(layer, nn.GroupNorm)
        for name in ("weight", "bias")
    }
    assert norm == head | scale_and_shift


def test_select_trainable_refuses_what_is_not_there():
    module = build("cnn", SHAPES["cnn"]).module
    with pytest.raises(ConfigError, match="no choice"):
        select_trainable(module, ("head",), "tail")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="classifier"):
        select_trainable(module, ("classifier",), "head")


@pytest.mark.parametrize("wrong, right", [("resnet-18", "resnet18"), ("CNN", "cnn"), ("unet-2d", "unet2d")])
def test_an_unknown_name_gets_the_nearest(wrong, right):
    with pytest.raises(ConfigError) as error:
        build(wrong, SHAPES["cnn"])
    assert wrong in error.value.message and f'"{right}"' in error.value.remedy


@pytest.mark.parametrize(
    "name, size, remedy",
    [
        ("cnn", (8, 64), "16x64"),
        ("resnet18", (28, 28), "32x32"),
        ("scatter", (15, 15), "16x16"),
        ("unet2d", (50, 64), "56x64"),
        ("unet3d", (12, 32, 33), "16x32x40"),
        ("cnn", (32, 32, 32), "unet3d"),
        ("scatter", (32, 32, 32), "unet3d"),
        ("unet3d", (64, 64), "unet2d"),
    ],
)
def test_a_shape_the_model_cannot_take(name, size, remedy):
    with pytest.raises(ConfigError) as error:
        build(name, ModelShape(1, size, 1))
    assert f'"{name}"' in error.value.message
    assert "x".join(map(str, size)) in error.value.message
    assert remedy in error.value.remedy


@pytest.mark.parametrize(
    "channels, size, outputs", [(0, (32, 32), 1), (1, (32,), 1), (1, (32, 32), 0), (1, (0, 32), 1)]
)
def test_a_shape_nothing_can_take(channels, size, outputs):
    with pytest.raises(ConfigError):
        ModelShape(channels, size, outputs)


def test_a_new_model_with_batch_norm_is_refused(monkeypatch):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    entry = lambda shape: type("N", (), {"module": net})()  # noqa: E731
    monkeypatch.setitem(MODELS, "new", entry)
    with pytest.raises(NotPrivate, match="BatchNorm2d"):
        build("new", SHAPES["cnn"])
