"""Every kind of layer and every way of a weight, against a plain loop over units in float64."""

import copy
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from fedscan_client.dp import bookkeeping, engine, plans
from fedscan_client.dp.bookkeeping import Plan, Recorder, clipped_pass, size_class
from fedscan_client.dp.engine import MARGIN, clipped_sum
from fedscan_models import tasks
from fedscan_models.registry import ModelShape, build
from fedscan_models.segmenters import unet3d

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1), (2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), (2, 4, 5, 4)),
    "1x1": (lambda: nn.Conv2d(3, 5, 1), (3, 5, 5)),
    "1x1 strided": (lambda: nn.Conv2d(3, 5, 1, stride=2), (3, 5, 6)),
    "strided": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), (2, 8, 7)),
    "dilated": (lambda: nn.Conv2d(2, 4, 3, dilation=2, padding=(2, 1)), (2, 8, 8)),
    "oblong": (lambda: nn.Conv2d(2, 4, (1, 3), stride=(1, 2), padding=(0, 1)), (2, 6, 7)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 6, 6)),
    "same": (lambda: nn.Conv2d(2, 4, (2, 3), padding="same"), (2, 6, 6)),
    "valid": (lambda: nn.Conv2d(2, 4, 3, padding="valid"), (2, 6, 6)),
    "reflect": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 6)),
    "circular": (lambda: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="circular"), (2, 6, 6)),
    "replicate": (lambda: nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"), (2, 4, 4, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(2, 4, 3, stride=2), (2, 6)),
    "transposed2d": (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1), (2, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), (2, 3, 3, 3)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=2, dilation=2), (4, 4, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 5, 5)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer norm of images": (lambda: nn.LayerNorm([4, 6], elementwise_affine=True), (3, 4, 6)),
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear 3-d": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear 4-d": (lambda: nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "prelu": (lambda: nn.PReLU(3), (3, 4, 4)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), (2, 6, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (4, 6)),
}
SIZES = {"one": [1] * 5, "equal": [3, 3], "ragged": [3, 1, 0, 2, 5, 1]}


class Shared(nn.Module):
    """A convolution and a linear layer that are each used twice, once beside a norm that is its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.line, self.out = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(4, 4), nn.Linear(8, 1)

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        x = torch.tanh(self.line(torch.tanh(self.line(x))))
        return self.out(x.mean(2).flatten(1))


class Attention(nn.Module):
    """Self-attention over positions, rows first or second."""

    def __init__(self, batch_first):
        super().__init__()
        self.first, self.attention = batch_first, nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.out = nn.Linear(6, 1)

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        x, _ = self.attention(x, x, x)
        return self.out(x.mean(1 if self.first else 0))


class Words(nn.Module):
    """An embedding tied to the output layer, and one with a padding index."""

    def __init__(self, tied):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 5, padding_idx=None if tied else 0), nn.Linear(5, 7)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, index):
        return self.out(torch.tanh(self.embed(index)).mean(1))[:, :1]


def around(layer, shape):
    """The layer between two others, so that its input needs a gradient and its output is not the loss."""
    dims = len(shape) - 1
    first = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](shape[0], shape[0], 1) if dims else nn.Linear(*shape * 2)
    with torch.no_grad():
        width = layer(first(torch.zeros(1, *shape))).flatten(1).shape[1]
    return nn.Sequential(first, nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 1)).double()


def reference(module, x_B, y_B, sizes, clip):
    """(clipped sum, norms): one patient after another by plain autograd in the module's own type."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    total, norms, first = [torch.zeros_like(p) for p in parameters], [], 0
    for size in sizes:
        if size:
            loss = tasks.loss_rows(module(x_B[first : first + size]), y_B[first : first + size]).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            bound = (1 - MARGIN) * (1.0 if clip == "auto" else clip)
            factor = bound / (norm + 0.01) if clip == "auto" else min(1.0, bound / norm)
            for so_far, gradient in zip(total, gradients, strict=True):
                so_far += factor * gradient
            norms.append(norm)
        first += size
    return total, norms


def error(found, expected):
    off = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return math.sqrt(off / sum(float(b.square().sum()) for b in expected))


def holds(module, x_B, y_B, sizes):
    """Flat clipping where some are clipped and some are not, and automatic clipping."""
    _, norms = reference(module, x_B, y_B, sizes, 1.0)
    for clip in (sorted(norms)[len(norms) // 2] * 1.0001, "auto"):
        expected, _ = reference(module, x_B, y_B, sizes, clip)
        found = clipped_sum(module, tasks.loss_rows, x_B, y_B, sizes, clip=clip)
        assert error(found, expected) <= 1e-12


def rows(shape, count, *, kind=torch.float64):
    generator = torch.Generator().manual_seed(count)
    x_B = torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(kind)
    return x_B, torch.randint(0, 2, (count,), generator=generator)


def planned(module, x_B, y_B, sizes):
    """No size fell back to the plain loop."""
    classes = {size_class(size) for size in sizes if size}
    return all(plans.plan_for(module, tasks.loss_rows, x_B, y_B, size) is not None for size in classes)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_each_layer_is_exact(kind, sizes):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    module = around(make(), shape)
    x_B, y_B = rows(shape, sum(sizes))
    holds(module, x_B, y_B, sizes)
    assert planned(module, x_B, y_B, sizes)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Shared, (2, 4, 4)),
        (lambda: Attention(True), (5, 6)),
        (lambda: Attention(False), (5, 6)),
        (
            lambda: nn.Sequential(
                nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), nn.Flatten(), nn.Linear(30, 1)
            ),
            (5, 6),
        ),
    ],
    ids=["shared", "attention", "attention, rows second", "transformer"],
)
def test_shared_weights_and_attention_are_exact(make, shape, sizes):
    torch.manual_seed(0)
    module = make().double()
    x_B, y_B = rows(shape, sum(sizes))
    holds(module, x_B, y_B, sizes)
    assert planned(module, x_B, y_B, sizes)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_exact(tied, sizes):
    torch.manual_seed(0)
    module = Words(tied).double()
    x_B, y_B = torch.randint(0, 7, (sum(sizes), 4)), rows((1,), sum(sizes))[1]
    holds(module, x_B, y_B, sizes)
    assert not planned(module, x_B, y_B, sizes)  # no random whole numbers fit every network: left to the loop


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_exact_by_book_keeping_too(tied, size):
    torch.manual_seed(0)
    module = Words(tied).double()
    x_B, y_B = torch.randint(0, 7, (4 * size, 4)), rows((1,), 4 * size)[1]
    expected, _ = reference(module, x_B, y_B, [size] * 4, 1.0)
    found = bookkeeping.zero_sums(list(module.parameters()))
    plan = Plan(4, size, torch.contiguous_format, {"out": "kept"})
    units = [slice(i * size, (i + 1) * size) for i in range(4)]
    bookkeeping.add_clipped_sum(
        plan, module, tasks.loss_rows, x_B, y_B, units, lambda square: engine._factors(square, 1.0), found
    )
    assert error(found, expected) <= 1e-12


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("way", ["kept", "gram", "unit by unit", "grouped"])
@pytest.mark.parametrize("kind", ["conv2d", "strided", "dilated", "1x1", "transposed2d", "same"])
def test_each_way_of_a_weight_is_exact(kind, way, size, memory_format):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    module = around(make(), shape)
    x_B, y_B = rows(shape, 4 * size)
    clip = sorted(reference(module, x_B, y_B, [size] * 4, 1.0)[1])[2]
    expected, _ = reference(module, x_B, y_B, [size] * 4, clip)
    ways = {"0": way, "2": way, "5": "kept" if way in ("unit by unit", "grouped") else way}
    plan = Plan(4, size, memory_format, ways)
    units = [slice(i * size, (i + 1) * size) for i in range(4)]
    found = [torch.zeros_like(p) for p in module.parameters()]
    if memory_format == torch.channels_last:  # also the layout of the sums
        found = bookkeeping.zero_sums(found)
    bookkeeping.add_clipped_sum(
        plan, module, tasks.loss_rows, x_B, y_B, units, lambda square: engine._factors(square, clip), found
    )
    assert error(found, expected) <= 1e-12


def network(name):
    """A network of the zoo in float64, with a row's shape and its targets' shape."""
    if name == "unet3d":
        return unet3d(1, 2).double(), (1, 16, 16, 16), (16, 16, 16)
    side = 32 if name in ("resnet18", "densenet121") else 16
    return build(name, ModelShape(1, (side, side), 1), seed=0).module.double(), (1, side, side), ()


@pytest.mark.parametrize("sizes", [[1, 1, 1], [2, 2], [1, 3, 2]], ids=["one", "equal", "ragged"])
@pytest.mark.parametrize(
    "name",
    ["cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "densenet121", "unet3d"))],
)
def test_the_four_families_are_exact(name, sizes, monkeypatch):
    monkeypatch.setattr(bookkeeping, "_TRIES", 1)  # which way is taken does not matter here
    module, shape, target = network(name)
    x_B, _ = rows(shape, sum(sizes))
    y_B = torch.randint(0, 2, (sum(sizes), *target), generator=torch.Generator().manual_seed(0))
    holds(module, x_B, y_B, sizes)
    assert planned(module, x_B, y_B, sizes)


@given(st.integers(1, 5000))
def test_a_size_class_holds_the_size_and_less_air_than_that(size):
    assert size <= size_class(size) < 2 * size and size_class(size_class(size)) == size_class(size)


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    rows_at_once=st.sampled_from([16, 32, 64]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=30, deadline=None)
def test_chunks_and_their_order_change_nothing(sizes, rows_at_once, order):
    """Bit for bit up to the order of a float64 sum: what a unit adds does not depend on where it is computed."""
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 1))
    x_B, y_B = rows((1, 6, 6), sum(sizes), kind=torch.float32)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    units = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True) if n]
    with patch.object(plans, "_MOST_ROWS", rows_at_once):
        plan = plans._planned(module, tasks.loss_rows, x_B, y_B, 8)
    assert plan is not None and plan.units == rows_at_once // 8

    def total(some):
        parts = bookkeeping.zero_sums(list(module.parameters()))
        bookkeeping.add_clipped_sum(
            plan, module, tasks.loss_rows, x_B, y_B, some, lambda square: engine._factors(square, 0.1), parts
        )
        return torch.cat([p.flatten() for p in parts])

    whole = total(units)
    order.shuffle(units)
    assert torch.allclose(total(units), whole, rtol=0, atol=1e-14)


def test_a_gram_norm_lost_in_cancellation_is_not_trusted():
    """Terms 1e9 times the gradient: the true norm is lost, and the bound on it clips the unit to less."""
    a = torch.tensor([[[1e9], [-1e9]]], dtype=torch.float64)
    b = torch.ones(1, 2, 1, dtype=torch.float64)
    assert bookkeeping._gram_square(a, b) == pytest.approx(1e-6 * 4e18)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 100_000, 3_000_000])
def test_norms_of_long_rows_are_not_low(length):
    """torch's own float32 norm of 3 million entries is low by 3e-4: the bound would not hold."""
    row = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.allclose(bookkeeping.squared_norms(row), row.double().square().sum(1), rtol=2e-6)


def test_what_is_outside_a_layer_is_left_to_the_loop():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(3, 1)

        def forward(self, x):
            return self.line(x) + (x @ self.line.weight.t()) ** 2

    module = Direct().double()
    x_B, y_B = rows((3,), 4)
    assert not planned(module, x_B, y_B, [1])
    holds(module, x_B, y_B, [1, 2, 1])


def test_a_network_that_mixes_rows_gets_no_plan():
    class Mean(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    module = nn.Sequential(nn.Linear(3, 4), Mean(), nn.Linear(4, 1))
    x_B, y_B = rows((3,), 4, kind=torch.float32)
    assert not planned(module, x_B, y_B, [1])


def test_a_network_whose_slots_differ_gets_no_plan(monkeypatch):
    """A kernel that adds up differently in the last slot, in the last bit only."""
    module = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 1))
    x_B, y_B = rows((40,), 4, kind=torch.float32)
    key = plans._PLANS.copy()
    plans._PLANS.clear()
    assert planned(module, x_B, y_B, [1])
    plans._PLANS.clear()
    plain = nn.functional.linear

    def crooked(x, weight, bias=None):
        y = plain(x, weight, bias).clone()
        if len(x) > 1:
            y[-1] = torch.nextafter(y[-1], y[-1] + 1).detach() + (y[-1] - y[-1].detach())
        return y

    monkeypatch.setattr(nn.functional, "linear", crooked)
    assert not planned(module, x_B, y_B, [1])
    plans._PLANS.clear()
    plans._PLANS.update(key)


class Drop(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.RReLU(), Drop()], ids=["dropout", "rrelu", "function"])
def test_random_layers_are_left_to_the_loop_and_draw_anew_for_every_unit(layer):
    module = nn.Sequential(nn.Linear(50, 50), layer, nn.Linear(50, 1)).train()
    x_B, y_B = torch.ones(2, 50), torch.ones(2)
    assert not planned(module, x_B, y_B, [1])
    torch.manual_seed(0)
    first = clipped_sum(module, tasks.loss_rows, x_B, y_B, [1, 1], clip=1.0)
    torch.manual_seed(0)
    second = clipped_sum(module, tasks.loss_rows, x_B, y_B, [1, 1], clip=1.0)
    assert not torch.equal(first[0], second[0])  # whoever knows the seed does not know the masks
    state = torch.get_rng_state()
    clipped_sum(module, tasks.loss_rows, x_B, y_B, [1, 1], clip=1.0)
    assert torch.equal(torch.get_rng_state(), state)


SMOOTH = [nn.Softplus(), nn.Sigmoid(), nn.SiLU(), nn.ELU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh(), nn.Mish()]


@pytest.mark.parametrize("width", [1, 3, 7, 33])
@pytest.mark.parametrize("layer", SMOOTH, ids=repr)
def test_elementwise_functions_leave_no_remainder_in_a_chunk(layer, width):
    """torch computes the last numbers after its vector loop by other code, which differs in the last bit."""
    with bookkeeping.one_thread():
        for value in torch.linspace(-4, 4, 500):
            x = torch.full((plans._ROWS, width), float(value), requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert (y == y[0, 0]).all() and x.grad is not None and (x.grad == x.grad[0, 0]).all()


@pytest.mark.parametrize("size", [1, 3])
def test_the_bound_holds_for_weights_that_amplify_a_remainder(size):
    """Weights for which the last bit of one activation decides between no gradient and one of norm C."""
    for value in torch.linspace(-2, 2, 4000):
        ends = nn.functional.softplus(torch.full((48 * 3,), float(value)).expand(1, -1).contiguous()[:, :33])[0]
        if ends[0] != ends[-1]:
            break
    else:
        pytest.skip("this processor computes both ends alike")
    sign = 1.0 if ends[-1] > ends[0] else -1.0
    first, last = nn.Linear(1, 3), nn.Linear(3, 2)
    module = nn.Sequential(first, nn.Softplus(), last)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        first.weight.fill_(1)
        last.weight[0, 0] = sign * 2.0**40
        last.bias.copy_(torch.tensor([-float(ends[0]) * sign * 2.0**40, 10.0]))
    patients = 512
    x_B, y_B = torch.full((patients * size, 1), float(value)), torch.zeros(patients * size, dtype=torch.long)
    x_B[:size] += 0.5 * sign  # the first one's gradient is zero, and so it moves the others' places only
    whole = clipped_sum(module, tasks.loss_rows, x_B, y_B, [size] * patients, clip=1.0)
    rest = clipped_sum(module, tasks.loss_rows, x_B[size:], y_B[size:], [size] * (patients - 1), clip=1.0)
    assert math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(whole, rest, strict=True))) <= 1.0


def test_rows_split_the_wrong_way_get_no_plan():
    """Every layer sees as many rows as there are, but another patient's among them."""

    class Turned(nn.Module):
        def forward(self, x):
            return x.roll(1, 0)

    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Turned(), nn.Linear(4, 1))
    x_B, y_B = rows((3,), 4, kind=torch.float32)
    assert not planned(module, x_B, y_B, [1])


def test_a_forward_replaced_by_its_owner_is_kept_and_left_to_the_loop():
    module = nn.Sequential(nn.Linear(3, 1)).double()
    line = module[0]
    assert isinstance(line, nn.Linear)
    line.forward = lambda x: 2 * nn.functional.linear(x, line.weight, line.bias)  # type: ignore[method-assign, assignment]
    x_B, y_B = rows((3,), 3)
    holds(module, x_B, y_B, [1, 2])
    assert "forward" in vars(module[0]) and not planned(module, x_B, y_B, [1])


def test_a_unit_is_filled_up_with_its_own_image():
    """An image of zeros may have no finite gradient."""

    class Unit(nn.Module):
        def forward(self, x):
            return x / x.norm(dim=1, keepdim=True)

    module = nn.Sequential(nn.Linear(4, 3, bias=False), Unit(), nn.Linear(3, 1)).double()
    x_B, y_B = rows((4,), 8)
    holds(module, x_B, y_B, [3, 5])
    assert planned(module, x_B, y_B, [3, 5])


def test_forwards_are_put_back_also_after_a_failure():
    module = nn.Sequential(nn.Linear(3, 1))
    names = list(module.state_dict())

    def broken(out, y):
        raise ZeroDivisionError

    recorder = Recorder(2, {"0": "kept"})
    with pytest.raises(ZeroDivisionError):
        clipped_pass(module, recorder, broken, torch.rand(2, 3), torch.ones(2), torch.ones(2), torch.ones_like, {})
    assert "forward" not in vars(module[0]) and list(module.state_dict()) == names


def test_weights_do_not_enter_a_plan():
    """A server could choose them."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(float("nan"))
    assert plans._structure(module) == plans._structure(other)
    x_B, y_B = rows((3,), 2, kind=torch.float32)
    assert planned(other, x_B, y_B, [1])
