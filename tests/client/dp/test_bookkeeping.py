"""Every kind of layer and every way of a weight, against a plain loop over units in float64."""

import weakref
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from fedscan_client.dp import bookkeeping, engine, plans, ways
from fedscan_client.dp.bookkeeping import Plan, size_class
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


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_each_layer_is_exact(kind, sizes, oracle):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    module = around(make(), shape)
    x_B, y_B = oracle.rows(shape, sum(sizes))
    oracle.holds(module, x_B, y_B, sizes)
    assert oracle.planned(module, x_B, y_B, sizes)


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
def test_shared_weights_and_attention_are_exact(make, shape, sizes, oracle):
    torch.manual_seed(0)
    module = make().double()
    x_B, y_B = oracle.rows(shape, sum(sizes))
    oracle.holds(module, x_B, y_B, sizes)
    assert oracle.planned(module, x_B, y_B, sizes)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_exact(tied, sizes, oracle):
    torch.manual_seed(0)
    module = Words(tied).double()
    x_B, y_B = torch.randint(0, 7, (sum(sizes), 4)), oracle.rows((1,), sum(sizes))[1]
    oracle.holds(module, x_B, y_B, sizes)
    assert not oracle.planned(module, x_B, y_B, sizes)  # no random whole numbers fit every network: left to the loop


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_exact_by_book_keeping_too(tied, size, oracle):
    torch.manual_seed(0)
    module = Words(tied).double()
    x_B, y_B = torch.randint(0, 7, (4 * size, 4)), oracle.rows((1,), 4 * size)[1]
    expected, _ = oracle.reference(module, x_B, y_B, [size] * 4, 1.0)
    found: dict[torch.Tensor, torch.Tensor] = {}
    plan = Plan(4, size, torch.contiguous_format, {"out": "kept"})
    units = [slice(i * size, (i + 1) * size) for i in range(4)]
    bookkeeping.add_clipped_sum(
        plan, module, tasks.loss_rows, x_B, y_B, units, lambda square: engine._factors(square, 1.0), found
    )
    assert oracle.error([found[p] for p in module.parameters()], expected) <= 1e-12


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("way", ["kept", "gram", "unit by unit", "grouped"])
@pytest.mark.parametrize("kind", ["conv2d", "strided", "dilated", "1x1", "transposed2d", "same"])
def test_each_way_of_a_weight_is_exact(kind, way, size, memory_format, oracle):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    module = around(make(), shape)
    x_B, y_B = oracle.rows(shape, 4 * size)
    clip = sorted(oracle.reference(module, x_B, y_B, [size] * 4, 1.0)[1])[2]
    expected, _ = oracle.reference(module, x_B, y_B, [size] * 4, clip)
    chosen = {"0": way, "2": way, "5": "kept" if way in ("unit by unit", "grouped") else way}
    plan = Plan(4, size, memory_format, chosen)
    units = [slice(i * size, (i + 1) * size) for i in range(4)]
    # Sums that the pass makes, and adds to; and sums that were there, in another layout.
    for found in ({}, {p: torch.zeros_like(p) for p in module.parameters()}):
        for times in (1, 2):
            bookkeeping.add_clipped_sum(
                plan, module, tasks.loss_rows, x_B, y_B, units, lambda square: engine._factors(square, clip), found
            )
            assert oracle.error([found[p] / times for p in module.parameters()], expected) <= 1e-12


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
def test_the_four_families_are_exact(name, sizes, monkeypatch, oracle):
    monkeypatch.setattr(ways, "_TRIES", 1)  # which way is taken does not matter here
    module, shape, target = network(name)
    x_B, _ = oracle.rows(shape, sum(sizes))
    y_B = torch.randint(0, 2, (sum(sizes), *target), generator=torch.Generator().manual_seed(0))
    oracle.holds(module, x_B, y_B, sizes)
    assert oracle.planned(module, x_B, y_B, sizes)


@pytest.mark.parametrize("way", ["kept", "gram", "unit by unit", "grouped"])
def test_activations_are_not_held_to_the_end_of_the_pass(way, monkeypatch):
    """A layer's work done, its output is free; only "gram" still needs what came in."""
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh(), nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 1))
    outputs: list[weakref.ref[torch.UntypedStorage]] = []
    alive: list[list[bool]] = []
    real = bookkeeping.Recorder.finish

    def finish(self, *arguments):
        alive.append([reference() is not None for reference in outputs])
        real(self, *arguments)

    monkeypatch.setattr(bookkeeping.Recorder, "finish", finish)
    for layer in (module[1], module[3]):
        layer.register_forward_hook(lambda layer, x, y: outputs.append(weakref.ref(y.untyped_storage())))
    plan = Plan(4, 1, torch.contiguous_format, {"0": way, "2": way, "5": "kept"})
    units, x_B = [slice(i, i + 1) for i in range(4)], torch.rand(4, 1, 6, 6)
    bookkeeping.add_clipped_sum(plan, module, tasks.loss_rows, x_B, torch.ones(4), units, torch.ones_like, {})
    assert alive == [[way == "gram", False]]


@given(st.integers(1, 5000))
def test_a_size_class_holds_the_size_and_less_air_than_that(size):
    assert size <= size_class(size) < 2 * size and size_class(size_class(size)) == size_class(size)


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    rows_at_once=st.sampled_from([16, 32, 64]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=30, deadline=None)
def test_chunks_and_their_order_change_nothing(sizes, rows_at_once, order, oracle):
    """Bit for bit up to the order of a float64 sum: what a unit adds does not depend on where it is computed."""
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 1))
    x_B, y_B = oracle.rows((1, 6, 6), sum(sizes), kind=torch.float32)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    units = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True) if n]
    with patch.object(plans, "_MOST_ROWS", rows_at_once):
        plan = plans._planned(module, tasks.loss_rows, x_B, y_B, 8)
    assert plan is not None and plan.units == rows_at_once // 8

    def total(some):
        parts: dict[torch.Tensor, torch.Tensor] = {}
        bookkeeping.add_clipped_sum(
            plan, module, tasks.loss_rows, x_B, y_B, some, lambda square: engine._factors(square, 0.1), parts
        )
        return torch.cat(
            [parts.get(p, torch.zeros_like(p, dtype=torch.float64)).flatten() for p in module.parameters()]
        )

    whole = total(units)
    order.shuffle(units)
    assert torch.allclose(total(units), whole, rtol=0, atol=1e-14)


def test_a_gram_norm_lost_in_cancellation_is_not_trusted():
    """Terms 1e9 times the gradient: the true norm is lost, and the bound on it clips the unit to less."""
    a = torch.tensor([[[1e9], [-1e9]]], dtype=torch.float64)
    b = torch.ones(1, 2, 1, dtype=torch.float64)
    assert ways.gram_square(a, b) == pytest.approx(1e-6 * 4e18)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 100_000, 3_000_000])
def test_norms_of_long_rows_are_not_low(length):
    """torch's own float32 norm of 3 million entries is low by 3e-4: the bound would not hold."""
    row = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.allclose(ways.squared_norms(row), row.double().square().sum(1), rtol=2e-6)
