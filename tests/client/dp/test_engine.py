"""The clipped sum against a plain loop over patients in float64, and the bound on what one patient changes."""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedscan_client.dp import engine, ways
from fedscan_client.dp.engine import MARGIN, Engine, clipped_sum, sensitivity
from fedscan_models import tasks
from fedscan_models.registry import ModelShape, build, select_trainable

ENGINES: tuple[Engine, ...] = ("bookkeeping", "opacus", "loop")
SOUND: tuple[Engine, ...] = ("bookkeeping", "loop")  # for any weights


def unit_gradients(module, x_B, y_B, sizes):
    """[U, P]: each unit's mean gradient, one patient after another, in float64 and without the engine."""
    exact = copy.deepcopy(module).double()
    parameters = [p for p in exact.parameters() if p.requires_grad]
    rows, first = [], 0
    for size in sizes:
        if size:
            part = slice(first, first + size)
            exact.zero_grad()
            tasks.loss_rows(exact(x_B[part].double()), y_B[part]).mean().backward()
            rows.append(torch.cat([p.grad.reshape(-1) for p in parameters]))
        first += size
    return torch.stack(rows) if rows else torch.zeros(0, sum(p.numel() for p in parameters), dtype=torch.float64)


def reference(module, x_B, y_B, sizes, clip):
    """The sum over patients of the clipped mean gradient, [P]."""
    gradients_UP = unit_gradients(module, x_B, y_B, sizes)
    total = torch.zeros(gradients_UP.shape[1], dtype=torch.float64)
    for gradient in gradients_UP:
        norm = float(gradient.norm())
        factor = 1 / (norm + 0.01) if clip == "auto" else min(1.0, clip / norm)
        total += gradient * (1 - MARGIN) * factor if clip == "auto" or norm > clip * (1 - MARGIN) else gradient
    return total


def flat(sums):
    return torch.cat([s.reshape(-1) for s in sums])


def close(sums, expected, relative):
    return (flat(sums) - expected).norm() <= relative * expected.norm()


def case(name, rows, *, side=16, outputs=1, seed=0):
    """A fresh network and random rows that are its inputs."""
    network = build(name, ModelShape(1, (side, side), outputs), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x_B = torch.rand(rows, 1, side, side, generator=generator)
    y_B = torch.randint(0, max(2, outputs), (rows,), generator=generator)
    return network, network.features(x_B) if network.features else x_B, y_B


SIZES = {"one": [1] * 6, "equal": [2, 2, 2], "ragged": [3, 1, 2], "zero": [0, 2, 0, 1, 3, 0]}


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("name", "side", "outputs"),
    [
        ("cnn", 16, 1),
        ("cnn", 16, 3),
        ("scatter", 32, 1),
        ("scatter", 32, 3),
        pytest.param("resnet18", 32, 1, marks=pytest.mark.slow),
        pytest.param("densenet121", 32, 1, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_plain_loop(name, side, outputs, sizes, which):
    network, x_B, y_B = case(name, 6, side=side, outputs=outputs)
    norms_U = unit_gradients(network.module, x_B, y_B, sizes).norm(dim=1)
    for clip in (float(norms_U.median()), float(2 * norms_U.max()), float(norms_U.min() / 2), "auto"):
        sums = clipped_sum(network.module, tasks.loss_rows, x_B, y_B, sizes, clip=clip, engine=which)
        assert [s.shape for s in sums] == [p.shape for p in network.module.parameters()]
        assert all(s.dtype == torch.float64 for s in sums)
        assert close(sums, reference(network.module, x_B, y_B, sizes, clip), 2e-4 if side > 16 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("which", ENGINES)
def test_resnet18_is_the_plain_loop(which, monkeypatch):
    monkeypatch.setattr(ways, "_TRIES", 1)  # which way is taken does not matter here
    network, x_B, y_B = case("resnet18", 3, side=32)
    expected = reference(network.module, x_B, y_B, [2, 1], 0.5)
    sums = clipped_sum(network.module, tasks.loss_rows, x_B, y_B, [2, 1], clip=0.5, engine=which)
    assert close(sums, expected, 2e-4)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_convolutions_with_another_padding_than_zeros(mode):
    """Opacus' hooks ignore the padding mode (research/dp.md, D1: 7 to 8 % off)."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 4, 3, padding=1, padding_mode=mode)
    module = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 1))
    x_B, y_B = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 0, 1, 1])
    expected = reference(module, x_B, y_B, [2, 1, 2], 0.3)
    for which in ENGINES:
        assert close(clipped_sum(module, tasks.loss_rows, x_B, y_B, [2, 1, 2], clip=0.3, engine=which), expected, 1e-5)


@pytest.mark.parametrize("which", ["head", "norm"])
@pytest.mark.parametrize("how", ENGINES)
def test_frozen_parameters_have_no_part_in_the_norm(which, how):
    network, x_B, y_B = case("cnn", 5)
    select_trainable(network.module, network.head, which)
    trained = [p for p in network.module.parameters() if p.requires_grad]
    clip = float(unit_gradients(network.module, x_B, y_B, [2, 3]).norm(dim=1).mean())
    sums = clipped_sum(network.module, tasks.loss_rows, x_B, y_B, [2, 3], clip=clip, engine=how)
    assert [s.shape for s in sums] == [p.shape for p in trained] and len(trained) < 14
    assert close(sums, reference(network.module, x_B, y_B, [2, 3], clip), 1e-5)
    assert [p for p in network.module.parameters() if p.requires_grad] == trained


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_chunking_changes_nothing_and_splits_nobody(most, monkeypatch):
    network, x_B, y_B = case("cnn", 10)
    sizes = [3, 1, 0, 2, 1, 3]
    units = [slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7), slice(7, 10)]
    whole = clipped_sum(network.module, tasks.loss_rows, x_B, y_B, sizes, clip=0.2, engine="opacus")
    monkeypatch.setattr(engine, "_MOST_ROWS", most)
    chunks = engine._chunks(units, list(network.module.parameters()))
    assert len(chunks) > 1 and [unit for inside in chunks for unit in inside] == units
    assert all(sum(u.stop - u.start for u in inside) <= max(most, 3) for inside in chunks)
    parts = clipped_sum(network.module, tasks.loss_rows, x_B, y_B, sizes, clip=0.2, engine="opacus")
    assert close(parts, flat(whole), 1e-5)


def test_gradients_of_a_large_network_are_held_for_few_rows_at_once():
    parameters = [torch.zeros(engine._GRADIENT_BYTES // 12 // 3)]
    chunks = engine._chunks([slice(i, i + 1) for i in range(7)], parameters)
    assert [len(inside) for inside in chunks] == [3, 3, 1]


@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    data=st.data(),
    clip=st.sampled_from([1e-6, 0.05, 1.0, "auto"]),
    most=st.sampled_from([1, 4, 256]),
    which=st.sampled_from(ENGINES),
    loud=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_one_patient_changes_the_whole_sum_by_at_most_c(sizes, data, clip, most, which, loud, seed):
    """Removed from the batch, in other chunks: what float32 makes of everybody else counts too."""
    gone = data.draw(st.integers(0, len(sizes) - 1))
    network, x_B, y_B = case("cnn", sum(sizes), seed=seed)
    with torch.no_grad():
        network.module[-1].weight.mul_(loud)
    first = sum(sizes[:gone])
    keep = [i for i in range(len(x_B)) if not first <= i < first + sizes[gone]]
    rest = sizes[:gone] + sizes[gone + 1 :]
    with_it = flat(clipped_sum(network.module, tasks.loss_rows, x_B, y_B, sizes, clip=clip, engine=which))
    with patch.object(engine, "_MOST_ROWS", most):
        without = clipped_sum(network.module, tasks.loss_rows, x_B[keep], y_B[keep], rest, clip=clip, engine=which)
    assert (with_it - flat(without)).norm() <= sensitivity(clip)


@pytest.mark.parametrize("which", SOUND)
def test_the_bound_holds_for_weights_that_amplify_rounding(which):
    """A server may choose them: each logit is what rounding left of numbers that cancel, and depends on the batch."""
    network, x_B, y_B = case("cnn", 8)
    with torch.no_grad():
        f = network.module[:-1](x_B).double()
        v = torch.randn(1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        network.module[-1].weight.copy_((v - v @ torch.linalg.pinv(f) @ f) * 1e9)
        network.module[-1].bias.zero_()
    whole = flat(clipped_sum(network.module, tasks.loss_rows, x_B, y_B, [1] * 8, clip=1.0, engine=which))
    for gone in range(8):
        keep = [i for i in range(8) if i != gone]
        rest = clipped_sum(network.module, tasks.loss_rows, x_B[keep], y_B[keep], [1] * 7, clip=1.0, engine=which)
        assert (whole - flat(rest)).norm() <= 1.0


@pytest.mark.parametrize("which", ENGINES)
def test_the_factor_of_a_huge_gradient_is_not_rounded_up(which):
    """C / norm is below what float32 can hold: rounded to its smallest number it would double the sensitivity."""
    module, x_B = nn.Linear(4, 1, bias=False), torch.full((1, 4), 6.65e37)
    (total,) = clipped_sum(module, lambda out, y: out[:, 0], x_B, torch.zeros(1), [1], clip=1e-7, engine=which)
    assert 0 < total.norm() <= 1e-7


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("clip", [0.1, "auto"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_patient_whose_gradient_is_not_finite_contributes_zero(value, clip, which):
    network, x_B, y_B = case("cnn", 6)
    rest = clipped_sum(network.module, tasks.loss_rows, x_B[[0, 1, 5]], y_B[[0, 1, 5]], [2, 1], clip=clip, engine=which)
    x_B[3] = value
    sums = clipped_sum(network.module, tasks.loss_rows, x_B, y_B, [2, 3, 1], clip=clip, engine=which)
    assert all(torch.isfinite(s).all() for s in sums)
    if value != 3e38:  # group norm may bring that one back
        assert close(sums, flat(rest), 1e-5)


@pytest.mark.parametrize("which", ENGINES)
def test_nobody_gives_zeros(which):
    network, x_B, y_B = case("cnn", 0)
    for sizes in ([], [0, 0]):
        sums = clipped_sum(network.module, tasks.loss_rows, x_B, y_B, sizes, clip=1.0, engine=which)
        assert [s.shape for s in sums] == [p.shape for p in network.module.parameters()]
        assert not flat(sums).any()


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf"), 1e-23])
def test_a_clipping_norm_that_cannot_be_kept_is_refused(clip):
    network, x_B, y_B = case("cnn", 2)
    with pytest.raises(ValueError, match="clipping norm"):
        clipped_sum(network.module, tasks.loss_rows, x_B, y_B, [1, 1], clip=clip)


@pytest.mark.parametrize("which", SOUND)
def test_norms_of_half_precision_are_not_low(which):
    module = nn.Linear(5000, 1, bias=False).bfloat16()
    x_B = (1 + 0.01 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))).bfloat16()
    sums = clipped_sum(module, lambda out, y: out[:, 0], x_B[:1], torch.zeros(1), [1], clip=1.0, engine=which)
    assert sums[0].norm() <= 1.0


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [], [2, -1, 2]])
def test_sizes_that_do_not_add_up_are_refused(sizes):
    network, x_B, y_B = case("cnn", 3)
    with pytest.raises(ValueError, match="belongs to whom"):
        clipped_sum(network.module, tasks.loss_rows, x_B, y_B, sizes, clip=1.0)


def traces(module):
    """Everything that hooks and gradients could have left in a module."""
    hooks = [{k: len(v) for k, v in vars(m).items() if k.endswith("hooks")} for m in module.modules()]
    extra = [sorted(k for k in vars(m) if not k.endswith("hooks")) for m in module.modules()]
    return [type(m) for m in module.modules()], hooks, extra, [sorted(vars(p)) for p in module.parameters()]


@pytest.mark.parametrize("which", ENGINES)
def test_nothing_is_left_behind(which):
    network, x_B, y_B = case("cnn", 4)
    before, weights = traces(network.module), copy.deepcopy(network.module.state_dict())
    held = [torch.full_like(p, 7.0) for p in network.module.parameters()]
    for parameter, gradient in zip(network.module.parameters(), held, strict=True):
        parameter.grad = gradient
    clipped_sum(network.module, tasks.loss_rows, x_B, y_B, [3, 1], clip=1.0, engine=which)
    assert traces(network.module) == before
    assert all(torch.equal(w, weights[n]) for n, w in network.module.state_dict().items())
    for parameter in network.module.parameters():
        assert parameter.grad is not None and (parameter.grad == 7).all()


def test_nothing_is_left_behind_by_a_loss_that_fails():
    network, x_B, y_B = case("cnn", 4)
    before = traces(network.module)
    with pytest.raises(ZeroDivisionError):
        clipped_sum(network.module, lambda out, y: 1 / 0, x_B, y_B, [3, 1], clip=1.0)  # type: ignore[arg-type,return-value]
    assert traces(network.module) == before and all(p.grad is None for p in network.module.parameters())


def test_a_parameter_without_per_row_gradients_is_refused():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.used(x)

    module = Unused()
    before = traces(module)
    with pytest.raises(RuntimeError, match="per-row"):
        clipped_sum(module, tasks.loss_rows, torch.rand(2, 3), torch.zeros(2), [1, 1], clip=1.0, engine="opacus")
    assert traces(module) == before
    for which in SOUND:
        sums = clipped_sum(module, tasks.loss_rows, torch.rand(2, 3), torch.zeros(2), [1, 1], clip=1.0, engine=which)
        assert sums[0].any() and not sums[2].any() and not sums[3].any()


def test_sensitivity():
    assert sensitivity(0.3) == 0.3 and sensitivity("auto") == 1.0
