"""A round of training against plain gradient descent, and the noise that is left when nobody is there."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedscan_client import cohort, train
from fedscan_client.dp import engine as dp_engine
from fedscan_client.dp.noise import SecretStream
from fedscan_core.accounting import SitePlan
from fedscan_models import registry, tasks

ROUND: dict[str, Any] = {"round_": 1, "site": "north"}
SIZES = [3, 1, 2, 1, 4]
ENGINES = ("bookkeeping", "opacus", "loop")
FAINT = 1e-12  # noise multiplier whose noise is lost in float32


def plan(sigma=FAINT, *, rate=1.0, declared=20):
    return SitePlan(declared, 1e-5, 1.0, rate, sigma, 3, 0.0)


def reference(module, patients, run, divisor, *, mu=0.0):
    """Plain descent in float64 on the sum over patients of their mean loss over a constant; returns the change."""
    exact = copy.deepcopy(module).double()
    parameters = [p for p in exact.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    velocity = [torch.zeros_like(p) for p in parameters]
    for _ in range(run.train.local_steps):
        exact.zero_grad()
        for first, last in zip(patients.offsets[:-1], patients.offsets[1:], strict=True):
            rows = tasks.loss_rows(exact(patients.inputs[first:last].double()), patients.targets[first:last])
            (rows.mean() / divisor).backward()
        with torch.no_grad():
            for p, origin, v in zip(parameters, start, velocity, strict=True):
                v.mul_(run.train.momentum).add_(p.grad + mu * (p - origin) + run.train.weight_decay * p)
                p.sub_(run.train.learning_rate * v)
    return torch.cat([(p - s).reshape(-1) for p, s in zip(parameters, start, strict=True)])


def flat(delta):
    return torch.cat([torch.from_numpy(a).reshape(-1) for a in delta.values()])


def close(delta, expected, relative=1e-4):
    return (flat(delta).double() - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("settings", "sections", "mu"),
    [
        ({}, {}, 0.0),
        ({"local_steps": 3, "momentum": 0.9, "weight_decay": 0.1}, {}, 0.0),
        ({"local_steps": 3}, {"aggregation": {"strategy": "fedprox", "proximal_mu": 0.7}}, 0.7),
        ({"local_steps": 3}, {"model": {"name": "cnn", "trainable": "head"}}, 0.0),
    ],
    ids=["one step", "momentum and decay", "fedprox", "head"],
)
def test_without_noise_and_clipping_it_is_plain_descent(make_run, make_patients, settings, sections, mu, engine):
    run = make_run(privacy={"clip": 1e4, "engine": engine}, train={"learning_rate": 0.5, **settings}, **sections)
    network, patients = registry.for_run(run), make_patients(SIZES)
    expected = reference(network.module, patients, run, 20.0, mu=mu)
    delta = train.train_round(network.module, patients, run, plan(), **ROUND)
    assert list(delta) == [n for n, p in network.module.named_parameters() if p.requires_grad]
    assert all(a.dtype == np.float32 for a in delta.values())
    assert close(delta, expected)


def test_the_proximal_pull_makes_a_difference(make_run, make_patients):
    """What the fedprox case above compares is not the same with and without the pull."""
    run = make_run(train={"learning_rate": 0.5, "local_steps": 3})
    network, patients = registry.for_run(run), make_patients(SIZES)
    free, pulled = (reference(network.module, patients, run, 20.0, mu=mu) for mu in (0.0, 0.7))
    assert (free - pulled).norm() > 0.05 * free.norm()


def test_adam_takes_its_first_step(make_run, make_patients):
    run = make_run(
        privacy={"clip": 1e4}, train={"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.1}, model={}
    )
    network, patients = registry.for_run(run), make_patients(SIZES)
    before = torch.cat([p.detach().reshape(-1) for p in network.module.parameters()])
    plain = make_run(train={"learning_rate": 1.0})
    gradient = -reference(network.module, patients, plain, 20.0)
    delta = flat(train.train_round(network.module, patients, run, plan(), **ROUND))
    expected = -0.01 * (gradient / (gradient.abs() + 1e-8) + 0.1 * before)
    sure = gradient.abs() > 1e-5  # where rounding cannot turn the sign
    assert sure.sum() > 1000 and torch.allclose(delta[sure].double(), expected[sure], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("rate", "declared"), [(1.0, 20), (1.0, 400), (0.999999, 20)])
def test_the_divisor_is_public(make_run, make_patients, rate, declared):
    """Rate times declared size: neither how many patients there are nor how many were drawn."""
    run = make_run(privacy={"clip": 1e4}, train={"learning_rate": 0.5})
    for sizes in ([2, 1], SIZES):
        network, patients = registry.for_run(run), make_patients(sizes)
        expected = reference(network.module, patients, run, rate * declared)
        assert close(
            train.train_round(network.module, patients, run, plan(rate=rate, declared=declared), **ROUND), expected
        )


@pytest.mark.parametrize("clip", [0.25, "auto"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("extra", [{}, {"augmentation": "flip", "multiplicity": 3}], ids=["plain", "views"])
def test_one_patient_moves_the_update_by_at_most_c_over_the_divisor(make_run, make_patients, clip, engine, extra):
    """The whole path, from sample to update; a patient that counted twice or was clipped by image would show."""
    run = make_run(privacy={"clip": clip, "engine": engine}, train={"learning_rate": 1.0, **extra})
    bound = (1.0 if clip == "auto" else clip) / 20
    sizes = [3, 8, 1]
    everybody = make_patients(sizes, seed=3)
    before = registry.for_run(run)
    with torch.no_grad():
        before.module.get_parameter("head.weight").mul_(30)  # every patient's gradient is longer than C
    largest = 0.0
    for gone in range(3):
        first, last = everybody.offsets[gone : gone + 2]
        rest = cohort.Patients(
            torch.cat([everybody.inputs[:first], everybody.inputs[last:]]),
            torch.cat([everybody.targets[:first], everybody.targets[last:]]),
            np.concatenate([[0], np.cumsum(sizes[:gone] + sizes[gone + 1 :])]),
            everybody.ids[:2],
        )
        pair = []
        for part in (everybody, rest):
            torch.manual_seed(0)
            module = copy.deepcopy(before.module)
            with pytest.MonkeyPatch.context() as patch:  # the same views for those in both
                patch.setattr(SecretStream, "uniform", lambda self, count: np.ones(count))
                patch.setattr(SecretStream, "gaussian", lambda self, count: np.zeros(count))
                pair.append(flat(train.train_round(module, part, run, plan(), **ROUND)).double())
        largest = max(largest, float((pair[0] - pair[1]).norm()))
    assert 0.9 * bound < largest <= bound * (1 + 1e-5)  # the subtraction from the weights rounds


@pytest.mark.parametrize(("clip", "c"), [(0.5, 0.5), ("auto", 1.0)])
@pytest.mark.parametrize("who", ["nobody", "nobody drawn"])
@pytest.mark.parametrize("steps", [1, 4])
def test_an_empty_sample_still_takes_its_noisy_step(make_run, make_patients, clip, c, who, steps):
    """Pure noise: sigma * C / divisor a step. False alarm near 1e-9 each."""
    run = make_run(privacy={"clip": clip}, train={"learning_rate": 1.0, "local_steps": steps})
    rate = 1.0 if who == "nobody" else 1e-12
    patients = make_patients([] if who == "nobody" else SIZES)
    module = registry.for_run(run).module
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()  # so that the weights round nothing away
    delta = flat(train.train_round(module, patients, run, plan(1.5, rate=rate), **ROUND)).double().numpy()
    z = delta / (1.5 * c / (rate * 20) * math.sqrt(steps))
    assert stats.kstest(z, "norm").pvalue > 1e-9
    assert abs(z.std() - 1) < 6.2 * math.sqrt(0.5 / z.size) and abs(z.mean()) < 6.2 / math.sqrt(z.size)


def test_noise_is_fresh_at_every_step_and_call(make_run, make_patients, monkeypatch):
    made = []

    class Counted(SecretStream):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(train, "SecretStream", Counted)
    run = make_run(train={"local_steps": 3})
    updates = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        updates.append(
            flat(train.train_round(registry.for_run(run).module, make_patients([]), run, plan(1.0), **ROUND))
        )
    assert len(made) == 6 and len({s._encryptor for s in made}) == 6
    assert (updates[0] == updates[1]).float().mean() < 0.01  # float32: some meet by chance


def test_without_privacy_it_is_the_mean_over_the_patients_there(make_run, make_patients):
    run = make_run(privacy={"enabled": False}, train={"learning_rate": 0.5, "local_steps": 2})
    network, patients = registry.for_run(run), make_patients(SIZES)
    expected = reference(network.module, patients, run, len(SIZES))
    assert close(train.train_round(network.module, patients, run, plan(0.0), **ROUND), expected)
    nobody = train.train_round(network.module, make_patients([]), run, plan(0.0), **ROUND)
    assert not flat(nobody).any()


def test_without_privacy_the_seed_decides_and_nothing_else(make_run, make_patients):
    def once(seed=0, **changes):
        run = make_run(privacy={"enabled": False}, train={"seed": seed, "augmentation": "shift", "multiplicity": 2})
        module = registry.for_run(make_run()).module
        return flat(
            train.train_round(module, make_patients([1] * 40), run, plan(0.0, rate=0.5), **{**ROUND, **changes})
        )

    first = once()
    torch.manual_seed(5)
    assert torch.equal(once(), first)
    assert not any(torch.equal(once(**c), first) for c in ({"seed": 1}, {"round_": 2}, {"site": "south"}))
    draws = [train._seeded(0, "north", 1, step)(5).tolist() for step in (0, 1)]
    assert draws[0] != draws[1] and all(0 < u <= 1 for u in draws[0] + draws[1])


def drawn(patients, run, uniform=None, rate=1.0):
    """The blocks of one step."""
    uniform = uniform or SecretStream().uniform
    return list(train._blocks(patients, run, *train._sample(patients, run, rate, uniform), uniform))


def test_a_block_holds_each_patients_views_side_by_side(make_run, make_patients):
    run = make_run(privacy={"max_images_per_patient": 2}, train={"augmentation": "flip", "multiplicity": 3})
    patients = make_patients(SIZES)
    ((x_B, y_B, sizes),) = drawn(patients, run)
    assert sizes == [6, 3, 6, 3, 6] and len(x_B) == len(y_B) == 24
    row = 0
    for patient, size in enumerate(sizes):
        first, last = patients.offsets[patient : patient + 2]
        own = patients.inputs[first:last]
        for view, target in zip(x_B[row : row + size], y_B[row : row + size], strict=True):
            hits = [i for i, x in enumerate(own) if torch.equal(view, x) or torch.equal(view, x.flip(-1))]
            assert len(hits) == 1 and target == patients.targets[first + hits[0]]
        row += size


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4))
def test_blocks_hold_everybody_whole_and_no_more_than_fits(make_run, make_patients, sizes, rows, views, most):
    """In order, once, never split; larger than the limit only where one patient alone is."""
    extra = {"augmentation": "flip", "multiplicity": views} if views > 1 else {}
    run = make_run(train=extra, privacy={"max_images_per_patient": most})
    patients = make_patients(sizes, (1, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_BLOCK_BYTES", rows * views * 16)
        blocks = drawn(patients, run, lambda count: np.ones(count))  # no view is mirrored
    taken = [min(size, most) * views for size in sizes if size]
    assert [size for *_, inside in blocks for size in inside] == taken
    assert blocks and all(len(x_B) == len(y_B) == sum(inside) for x_B, y_B, inside in blocks)
    assert all(x_B.nbytes <= rows * views * 16 or len(inside) == 1 for x_B, _, inside in blocks)
    for (*_, one), (*_, two) in itertools.pairwise(blocks):
        assert sum(one) + two[0] > rows * views  # no block ends early
    if most >= max(sizes, default=0):
        whole = torch.cat([x_B for x_B, *_ in blocks])
        assert torch.equal(whole, patients.inputs.repeat_interleave(views, 0).view_as(whole))


ANOTHER_ORDER = 1e-5  # float32 sums in another order: up to 5e-6 of the norm, by the machine's vector width


def no_noise(patch):
    patch.setattr(SecretStream, "gaussian", lambda self, count: np.zeros(count))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_blocks_give_what_one_big_batch_gives(make_run, make_patients, monkeypatch, engine, private, rows):
    """The same draws, in many blocks and in one."""
    no_noise(monkeypatch)
    run = make_run(
        privacy={"enabled": private, "clip": 0.3, "engine": engine, "max_images_per_patient": 3},
        train={"learning_rate": 1.0, "local_steps": 2, "augmentation": "flip", "multiplicity": 2},
    )
    patients, updates, counts = make_patients([3, 1, 2, 1, 4, 2, 2, 5]), [], []
    real = train._blocks

    def counted(*args):
        blocks = list(real(*args))
        counts.append(len(blocks))
        return iter(blocks)

    monkeypatch.setattr(train, "_blocks", counted)
    for limit in (train._BLOCK_BYTES, rows * 2 * 1024):
        monkeypatch.setattr(train, "_BLOCK_BYTES", limit)
        generator = np.random.default_rng(0)
        monkeypatch.setattr(SecretStream, "uniform", lambda self, count, g=generator: 1 - g.random(count))
        delta = train.train_round(registry.for_run(run).module, patients, run, plan(rate=0.9), **ROUND)
        updates.append(flat(delta).double())
    assert counts[0] == counts[1] == 1 < counts[2]
    assert (updates[0] - updates[1]).norm() <= ANOTHER_ORDER * updates[0].norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_sample_reaches_the_engine_too(make_run, make_patients, monkeypatch, engine):
    """What the engine refuses must not depend on who was drawn."""
    seen = []
    real = dp_engine.clipped_sum

    def watched(*args, **kwargs):
        seen.append(args[4])
        return real(*args, **kwargs)

    monkeypatch.setattr(dp_engine, "clipped_sum", watched)
    run = make_run(privacy={"engine": engine})
    for sizes, rate in (([], 1.0), (SIZES, 1e-12)):
        train.train_round(registry.for_run(run).module, make_patients(sizes), run, plan(rate=rate), **ROUND)
    assert seen == [[], []]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clip", [0.3, "auto"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [2, 1000], ids=["blocks", "one block"])
def test_a_patient_of_nan_images_changes_nothing_but_the_noise(
    make_run, make_patients, monkeypatch, engine, clip, value, rows
):
    """With the noise taken away: the update is that of the site without this patient."""
    no_noise(monkeypatch)
    monkeypatch.setattr(train, "_BLOCK_BYTES", rows * 1024)
    run = make_run(privacy={"clip": clip, "engine": engine}, train={"learning_rate": 1.0, "local_steps": 2})
    everybody = make_patients([2, 3, 1])
    everybody.inputs[2:5] = value
    keep = [0, 1, 5]
    rest = cohort.Patients(everybody.inputs[keep], everybody.targets[keep], np.array([0, 2, 3]), ("p0", "p2"))
    with_it, without = (
        flat(train.train_round(registry.for_run(run).module, part, run, plan(), **ROUND)).double()
        for part in (everybody, rest)
    )
    assert with_it.isfinite().all() and (with_it - without).norm() <= ANOTHER_ORDER * without.norm() > 0


def test_images_that_cannot_be_decoded_change_nothing_but_the_noise(make_run, make_site, monkeypatch, tmp_path):
    """One patient's every file is spoilt: the update is that of a site without this patient."""
    no_noise(monkeypatch)
    run = make_run(train={"learning_rate": 1.0, "local_steps": 2})
    rows = [(f"p{i // 2}", ("well", "ill")[i // 2 % 2], "train", i) for i in range(8)]
    whole, fewer = make_site(tmp_path / "a", rows=rows), make_site(tmp_path / "b", rows=rows[:2] + rows[4:])
    for seed in (2, 3):
        (whole.table / f"canary-file-{seed}.png").write_bytes(b"no picture")
    updates = []
    for site in (whole, fewer):
        patients = cohort.load_patients(site, run, "train")
        assert len(patients.left_out) == (2 if site is whole else 0)
        updates.append(train.train_round(registry.for_run(run).module, patients, run, plan(), **ROUND))
    assert flat(updates[0]).any() and torch.equal(*map(flat, updates))


@pytest.mark.parametrize(("kind", "reach"), [("flip", 0), ("shift", 2)])
def test_views_are_mirrored_and_moved_evenly(kind, reach):
    """Each view is one of 2 * (2 reach + 1)^2 pictures, all as likely; what moves in from outside repeats the edge."""
    x_HW = np.random.default_rng(0).random((32, 32), np.float32)
    possible = {}
    for mirrored in (False, True):
        padded = np.pad(x_HW[:, ::-1] if mirrored else x_HW, reach, mode="edge")
        for i in range(2 * reach + 1):
            for j in range(2 * reach + 1):
                possible[padded[i : i + 32, j : j + 32].tobytes()] = (mirrored, i, j)
    draws = 4000
    x_BCHW = torch.from_numpy(x_HW).expand(draws, 1, 32, 32)
    views = train.augment(x_BCHW, kind, SecretStream().uniform)
    counts = dict.fromkeys(possible.values(), 0)
    for view in views:
        counts[possible[view.numpy().tobytes()]] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-9


def test_flat_pictures_are_moved_within_each_side():
    views = train.augment(torch.rand(9, 3, 8, 48), "shift", SecretStream().uniform)
    assert views.shape == (9, 3, 8, 48)
    assert train.augment(torch.rand(9, 1, 32, 32), "shift", lambda n: np.ones(n)).shape == (9, 1, 32, 32)
