"""What breaks the guarantee is refused by name, and the experiment agrees with the list."""

import pytest
import torch
from torch import nn

from fedscan_core.errors import NotPrivate
from fedscan_models import dp_ready


class RunningMean(nn.Module):
    """Remembers what it saw, in a buffer that is kept out of the state dict."""

    mean: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean())
        return x - self.mean


class Whisper(nn.Module):
    """Mixes samples too faintly to be seen in the output's value."""

    def forward(self, x):
        return x + 1e-6 * x.sum(dim=0)


class BatchShare(nn.Module):
    """Mixes samples in the forward pass but not in the gradient."""

    def forward(self, x):
        return x + x.detach().sum(dim=0)


def small(layer):
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.ReLU())


REFUSED = {
    "BatchNorm2d": (small(nn.BatchNorm2d(4)), "1 (BatchNorm2d)", "GroupNorm"),
    "no running stats": (small(nn.BatchNorm2d(4, track_running_stats=False)), "1 (", "GroupNorm"),
    "SyncBatchNorm": (small(nn.SyncBatchNorm(4)), "1 (SyncBatchNorm)", "GroupNorm"),
    "lazy": (small(nn.LazyBatchNorm2d()), "1 (LazyBatchNorm2d)", "GroupNorm"),
    "InstanceNorm": (
        small(nn.InstanceNorm2d(4, track_running_stats=True)),
        "1 (InstanceNorm2d with",
        "track_running_stats=False",
    ),
    "spectral": (
        small(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))),
        "1.parametrizations.weight.0 (spectral norm)",
        "Remove spectral norm",
    ),
    "old spectral": (
        small(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3))),
        "1 (spectral norm)",
        "Remove spectral norm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    module, path, remedy = REFUSED[case]
    with pytest.raises(NotPrivate) as error:
        dp_ready.check(module)
    assert path in error.value.message
    assert remedy in error.value.remedy


def test_every_offender_is_named_once():
    net = nn.Sequential(small(nn.BatchNorm2d(4)), small(nn.BatchNorm2d(4)))
    with pytest.raises(NotPrivate) as error:
        dp_ready.check(net)
    assert error.value.message.count("BatchNorm2d") == 2
    assert "0.1 (" in error.value.message and "1.1 (" in error.value.message
    assert error.value.remedy.count("GroupNorm") == 1


def test_a_buffer_in_the_state_dict_is_refused_and_a_constant_outside_it_is_not():
    net = nn.Linear(2, 2)
    net.register_buffer("scale", torch.ones(2))
    with pytest.raises(NotPrivate, match="scale"):
        dp_ready.check(net)
    net = nn.Linear(2, 2)
    net.register_buffer("scale", torch.ones(2), persistent=False)
    dp_ready.check(net)


def test_a_lone_batch_norm_is_named():
    with pytest.raises(NotPrivate, match="the model itself"):
        dp_ready.check(nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.PReLU()],
)
def test_what_is_fine(layer):
    dp_ready.check(small(layer))
    assert not dp_ready.mixes_samples(small(layer), (1, 8, 8))
    assert dp_ready.changed_buffers(small(layer), (1, 8, 8)) == []


def test_the_experiment_finds_mixing():
    assert dp_ready.mixes_samples(small(nn.BatchNorm2d(4)), (1, 8, 8))
    assert dp_ready.mixes_samples(BatchShare(), (3,))
    assert dp_ready.mixes_samples(Whisper(), (3,))
    assert dp_ready.mixes_samples(SequenceFirst(), (5, 8))


class SequenceFirst(nn.Module):
    """Attention that takes the batch axis for the sequence: the classic slip with batch_first."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_the_experiment_finds_memory_and_leaves_the_model_alone():
    net = small(nn.BatchNorm2d(4)).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    changed = dp_ready.changed_buffers(net, (1, 8, 8))
    assert changed == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert dp_ready.changed_buffers(RunningMean(), (4,)) == ["mean"]
    assert not net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_experiments_leave_the_random_state_alone():
    net = small(nn.Dropout(0.5))
    state = torch.get_rng_state()
    dp_ready.mixes_samples(net, (1, 8, 8))
    dp_ready.changed_buffers(net, (1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
