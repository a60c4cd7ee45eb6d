"""Which networks book-keeping is trusted with, and that no weight of theirs ties patients together."""

import copy
import math

import pytest
import torch
from torch import nn

from fedscan_client.dp import bookkeeping, engine, plans
from fedscan_client.dp.bookkeeping import Plan, Recorder, clipped_pass
from fedscan_client.dp.engine import clipped_sum
from fedscan_models import tasks


def test_what_is_outside_a_layer_is_left_to_the_loop(oracle):
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(3, 1)

        def forward(self, x):
            return self.line(x) + (x @ self.line.weight.t()) ** 2

    module = Direct().double()
    x_B, y_B = oracle.rows((3,), 4)
    assert not oracle.planned(module, x_B, y_B, [1])
    oracle.holds(module, x_B, y_B, [1, 2, 1])


def test_a_network_that_mixes_rows_gets_no_plan(oracle):
    class Mean(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    module = nn.Sequential(nn.Linear(3, 4), Mean(), nn.Linear(4, 1))
    x_B, y_B = oracle.rows((3,), 4, kind=torch.float32)
    assert not oracle.planned(module, x_B, y_B, [1])


def test_a_network_whose_slots_differ_gets_no_plan(monkeypatch, oracle):
    """A kernel that adds up differently in the last slot, in the last bit only."""
    module = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 1))
    x_B, y_B = oracle.rows((40,), 4, kind=torch.float32)
    key = plans._PLANS.copy()
    plans._PLANS.clear()
    assert oracle.planned(module, x_B, y_B, [1])
    plans._PLANS.clear()
    plain = nn.functional.linear

    def crooked(x, weight, bias=None):
        y = plain(x, weight, bias).clone()
        if len(x) > 1:
            y[-1] = torch.nextafter(y[-1], y[-1] + 1).detach() + (y[-1] - y[-1].detach())
        return y

    monkeypatch.setattr(nn.functional, "linear", crooked)
    assert not oracle.planned(module, x_B, y_B, [1])
    plans._PLANS.clear()
    plans._PLANS.update(key)


class Drop(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.RReLU(), Drop()], ids=["dropout", "rrelu", "function"])
def test_random_layers_are_left_to_the_loop_and_draw_anew_for_every_unit(layer, oracle):
    module = nn.Sequential(nn.Linear(50, 50), layer, nn.Linear(50, 1)).train()
    x_B, y_B = torch.ones(2, 50), torch.ones(2)
    assert not oracle.planned(module, x_B, y_B, [1])
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
    x_B, y_B = torch.full((patients * size, 1), float(value) + 0.5 * sign), torch.zeros(patients * size).long()
    # Nobody has a gradient, but for one patient of each 48 rows, whose place is on the border of the remainder.
    for row in range(43 if size == 1 else 45, len(x_B) - size, 48):
        x_B[row : row + size] = float(value)

    def change(sum_of):
        """How far the first patient's removal moves the sum."""
        whole, rest = sum_of(x_B, y_B, patients), sum_of(x_B[size:], y_B[size:], patients - 1)
        return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(whole, rest, strict=True)))

    def engines(x_B, y_B, count):
        return clipped_sum(module, tasks.loss_rows, x_B, y_B, [size] * count, clip=1.0)

    def with_a_remainder(x_B, y_B, count):
        """What chunks of 48 rows would do."""
        plan = Plan(48 // size, size, torch.contiguous_format, {"0": "kept", "2": "kept"})
        units = [slice(i * size, (i + 1) * size) for i in range(count)]
        sums: dict[torch.Tensor, torch.Tensor] = {}
        bookkeeping.add_clipped_sum(
            plan, module, tasks.loss_rows, x_B, y_B, units, lambda square: engine._factors(square, 1.0), sums
        )
        return [sums[p] for p in module.parameters()]

    assert change(engines) <= 1.0
    column = nn.functional.softplus(torch.full((48, 3), float(value)))[:, 0]
    if column[43] != column[0]:  # where vector loops are of 32 numbers, this is what the rule is for
        assert change(with_a_remainder) > 1.0


def test_rows_split_the_wrong_way_get_no_plan(oracle):
    """Every layer sees as many rows as there are, but another patient's among them."""

    class Turned(nn.Module):
        def forward(self, x):
            return x.roll(1, 0)

    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Turned(), nn.Linear(4, 1))
    x_B, y_B = oracle.rows((3,), 4, kind=torch.float32)
    assert not oracle.planned(module, x_B, y_B, [1])


def test_a_forward_replaced_by_its_owner_is_kept_and_left_to_the_loop(oracle):
    module = nn.Sequential(nn.Linear(3, 1)).double()
    line = module[0]
    assert isinstance(line, nn.Linear)
    line.forward = lambda x: 2 * nn.functional.linear(x, line.weight, line.bias)  # type: ignore[method-assign, assignment]
    x_B, y_B = oracle.rows((3,), 3)
    oracle.holds(module, x_B, y_B, [1, 2])
    assert "forward" in vars(module[0]) and not oracle.planned(module, x_B, y_B, [1])


def test_a_unit_is_filled_up_with_its_own_image(oracle):
    """An image of zeros may have no finite gradient."""

    class Unit(nn.Module):
        def forward(self, x):
            return x / x.norm(dim=1, keepdim=True)

    module = nn.Sequential(nn.Linear(4, 3, bias=False), Unit(), nn.Linear(3, 1)).double()
    x_B, y_B = oracle.rows((4,), 8)
    oracle.holds(module, x_B, y_B, [3, 5])
    assert oracle.planned(module, x_B, y_B, [3, 5])


def test_forwards_are_put_back_also_after_a_failure():
    module = nn.Sequential(nn.Linear(3, 1))
    names = list(module.state_dict())

    def broken(out, y):
        raise ZeroDivisionError

    recorder = Recorder(2, {"0": "kept"})
    with pytest.raises(ZeroDivisionError):
        clipped_pass(module, recorder, broken, torch.rand(2, 3), torch.ones(2), torch.ones(2), torch.ones_like, {})
    assert "forward" not in vars(module[0]) and list(module.state_dict()) == names


def test_weights_do_not_enter_a_plan(oracle):
    """A server could choose them."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(float("nan"))
    assert plans._structure(module) == plans._structure(other)
    x_B, y_B = oracle.rows((3,), 2, kind=torch.float32)
    assert oracle.planned(other, x_B, y_B, [1])


def test_the_reason_for_the_loop_is_said_once_per_network_and_not_by_the_data(oracle, monkeypatch):
    monkeypatch.setattr(plans, "_PLANS", {})
    monkeypatch.setattr(plans, "_REASONS", {})
    said = []
    monkeypatch.setattr(plans._log, "warning", lambda text, *values: said.append(text % values))
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    texts = []
    for x_B in (torch.zeros(4, 3), torch.full((4, 3), float("nan"))):
        plans._PLANS.clear()
        for sizes in ([1] * 4, [1] * 4, [2, 2]):
            clipped_sum(module, tasks.loss_rows, x_B, torch.ones(4), sizes, clip=1.0)
        texts.append(plans.reasons())
    assert texts[0] == texts[1] and len(texts[0]) == 1 and "dropout" in texts[0][0]
    assert said == [f"patients are computed one by one, which takes several times as long: {texts[0][0]}"]
    plain = nn.Sequential(nn.Linear(3, 1))
    clipped_sum(plain, tasks.loss_rows, torch.zeros(4, 3), torch.ones(4), [1] * 4, clip=1.0)
    assert plans.reasons() == texts[0]
    clipped_sum(plain, tasks.loss_rows, torch.zeros(600, 3), torch.ones(600), [600], clip=1.0)
    assert "more than 256 images" in plans.reasons()[1]
