"""The private histogram: what one patient can change of it, and that it is the right one."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fedscan_client import evaluate
from fedscan_client.cohort import Patients
from fedscan_client.dp.engine import MARGIN
from fedscan_core.accounting import SitePlan
from fedscan_models import histograms, registry, tasks

FAINT = 1e-9  # noise that the eye of a test does not see


def plan(noise=FAINT):
    return SitePlan(20, 1e-5, 1.0, 1.0, 1.0, 3, noise)


def without(patients, gone):
    """The same patients but one."""
    first, last = patients.offsets[gone : gone + 2]
    sizes = np.delete(np.diff(patients.offsets), gone)
    return Patients(
        torch.cat([patients.inputs[:first], patients.inputs[last:]]),
        torch.cat([patients.targets[:first], patients.targets[last:]]),
        np.concatenate([[0], np.cumsum(sizes)]),
        patients.ids[:gone] + patients.ids[gone + 1 :],
        groups=patients.groups[:first] + patients.groups[last:],
    )


def count_plainly(scores_NK, targets, weights, groups, run):
    """The definition, image by image and cell by cell."""
    cells = histograms.cells(run.evaluation)
    bins = run.evaluation.bins
    counts = np.zeros((len(cells), scores_NK.shape[1], 2, bins))
    for scores, target, weight, (sex, age) in zip(scores_NK, targets, weights, groups, strict=True):
        mine = {"all": "all", "sex": sex or "unknown", "age": "unknown" if age is None else age_group(age)}
        for number, cell in enumerate(cells):
            for k, score in enumerate(scores):
                if math.isfinite(score) and mine[cell.attribute] == cell.group:
                    true = target == 1 if len(scores) == 1 else target == k
                    counts[number, k, int(true), min(int(score * bins), bins - 1)] += weight
    return counts


def age_group(age):
    return "0-39" if age < 40 else "40-64" if age < 65 else "65+"


PEOPLE = [("F", 20), ("M", 40.0), ("", None), ("O", 64), ("M", 65), ("F", 90), ("F", 39)]
GROUPS = [(), ("sex",), ("age", "sex")]


@given(
    classes=st.integers(1, 4),
    rows=st.integers(0, 20),
    bins=st.sampled_from([10, 16, 20]),
    groups=st.sampled_from(GROUPS),
    seed=st.integers(0, 10**6),
)
def test_histogram_counts_every_score_once_a_table(make_run, classes, rows, bins, groups, seed):
    rng = np.random.default_rng(seed)
    run = make_run(evaluation={"bins": bins, "groups": groups})
    scores = rng.choice([0.0, 1.0, 0.5, np.nan, np.inf, rng.random()], (rows, classes))
    targets, weights = rng.integers(0, max(2, classes), rows), rng.random(rows)
    people = [PEOPLE[i] for i in rng.integers(0, len(PEOPLE), rows)]
    cells = np.array([histograms.cells_of(run.evaluation, *person) for person in people], int)
    shape = (len(histograms.cells(run.evaluation)), classes, 2, bins)
    found = evaluate.histogram(scores, targets, weights, cells.reshape(rows, 1 + len(groups)), shape)
    assert np.allclose(found, count_plainly(scores, targets, weights, people, run))
    assert found.sum() == pytest.approx((1 + len(groups)) * (weights[:, None] * np.isfinite(scores)).sum())


LABELS = {1: ["well", "ill"], 3: ["well", "ill", "other"]}


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("groups", GROUPS)
def test_without_noise_it_is_the_weighted_histogram(make_run, make_patients, classes, groups):
    run = make_run(task={"labels": LABELS[classes]}, evaluation={"groups": groups})
    module, patients = registry.for_run(run).module, make_patients([3, 1, 2], labels=len(LABELS[classes]))
    patients = dataclasses.replace(patients, groups=tuple(PEOPLE[:6]))
    scores = evaluate.predict(module, patients).double().numpy()
    blocks = classes * (1 + len(groups))
    weights = np.array([1 / 3] * 3 + [1.0] + [1 / 2] * 2) / math.sqrt(blocks)
    found = evaluate.noisy_histogram(module, patients, run, plan())
    assert found.shape == histograms.shape(run) == (len(histograms.cells(run.evaluation)), classes, 2, 10)
    assert found.dtype == np.float64
    plain = count_plainly(scores, patients.targets.tolist(), weights, patients.groups, run)
    assert np.allclose(found, plain, rtol=1.1e-3, atol=1e-7)
    assert found.sum() == pytest.approx(3 * math.sqrt(blocks), rel=1.1e-3)  # each patient: 1 / sqrt(blocks) a block
    with torch.no_grad():
        plain = tasks.scores(module.eval()(patients.inputs)).view(6, -1)
    assert np.allclose(scores, plain.numpy(), atol=1e-6)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    classes=st.sampled_from([1, 3]),
    groups=st.sampled_from(GROUPS),
    loud=st.sampled_from([0.0, 1.0, 1e4, 1e38]),
    data=st.data(),
)
@settings(max_examples=60)
def test_one_patient_changes_it_by_at_most_one(make_run, make_patients, sizes, classes, groups, loud, data):
    """L2 over all tables, through the network; 1e38 makes some scores no number. Images of a patient may disagree."""
    run = make_run(task={"labels": LABELS[classes]}, evaluation={"groups": groups})
    patients = make_patients(sizes, labels=len(LABELS[classes]), seed=len(sizes))
    people = data.draw(st.lists(st.sampled_from(PEOPLE), min_size=sum(sizes), max_size=sum(sizes)))
    patients = dataclasses.replace(patients, groups=tuple(people))
    module = registry.for_run(run).module
    with torch.no_grad():
        module.get_parameter("head.weight").mul_(loud)
    rest = without(patients, data.draw(st.integers(0, len(sizes) - 1)))
    pair = [evaluate.noisy_histogram(module, part, run, plan(1e-12)) for part in (patients, rest)]
    assert np.sqrt(((pair[0] - pair[1]) ** 2).sum()) <= 1


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("classes", [1, 3])
def test_the_budget_is_used_whole(make_run, make_patients, groups, classes):
    """A patient with one image moves the release by 1, but for the margin: less would be noise for nothing."""
    run = make_run(task={"labels": LABELS[classes]}, evaluation={"groups": groups})
    patients, module = make_patients([1]), registry.for_run(run).module
    alone = evaluate.noisy_histogram(module, patients, run, plan(1e-12))
    assert np.sqrt((alone**2).sum()) == pytest.approx(1 - MARGIN, abs=1e-9)


def test_who_is_not_known_counts_as_unknown(make_run, make_patients):
    run = make_run(evaluation={"groups": ["sex"]})
    found = evaluate.noisy_histogram(registry.for_run(run).module, make_patients([1, 1]), run, plan())
    groups = [cell.group for cell in histograms.cells(run.evaluation)]
    by_cell = dict(zip(groups, found.sum(axis=(1, 2, 3)), strict=True))
    assert by_cell == pytest.approx({"all": 2**0.5, "F": 0, "M": 0, "O": 0, "unknown": 2**0.5}, abs=3e-3)


def test_a_model_made_to_amplify_rounding_does_not_move_the_others(make_run, make_patients):
    """Its logits are what rounding leaves of numbers that cancel: in a common batch, a matter of who else is in it."""
    run, patients = make_run(evaluation={"bins": 20}), make_patients([1, 2, 1, 1, 1, 1, 1])
    module = registry.for_run(run).module
    with torch.no_grad():
        f = nn.Sequential(*list(module.children())[:-1])(patients.inputs).double()
        v = torch.randn(1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        module.get_parameter("head.weight").copy_((v - v @ torch.linalg.pinv(f) @ f) * 1e9)
        module.get_parameter("head.bias").zero_()
    whole = evaluate.noisy_histogram(module, patients, run, plan(1e-12))
    for gone in range(7):
        rest = evaluate.noisy_histogram(module, without(patients, gone), run, plan(1e-12))
        assert np.sqrt(((whole - rest) ** 2).sum()) <= 1


@pytest.mark.parametrize("who", [[], [2, 1, 1]])
def test_every_entry_gets_the_plans_noise_whoever_is_there(make_run, make_patients, who):
    names = [str(number) for number in range(30)]
    run = make_run(task={"labels": names}, evaluation={"bins": 20, "groups": ["sex"]})
    module, patients = registry.for_run(run).module, make_patients(who, labels=30)
    exact = evaluate.noisy_histogram(module, patients, run, plan())
    z = (evaluate.noisy_histogram(module, patients, run, plan(2.5)) - exact).ravel() / 2.5
    assert z.size == 5 * 30 * 2 * 20 and stats.kstest(z, "norm").pvalue > 1e-7
    assert abs(z.std() - 1) < 5.5 * math.sqrt(0.5 / z.size)


def test_noise_is_fresh(make_run, make_patients):
    run = make_run()
    module, patients = registry.for_run(run).module, make_patients([1, 2])
    first, second = (evaluate.noisy_histogram(module, patients, run, plan(1.0)) for _ in range(2))
    assert not (first == second).any()


def test_predict_is_in_evaluation_mode_and_keeps_the_order(make_run, make_patients):
    network, patients = registry.for_run(make_run()), make_patients([2, 300])
    module = nn.Sequential(nn.Dropout(0.9), network.module).train()
    scores = evaluate.predict(module, patients)
    assert scores.shape == (302, 1) and not module.training
    assert torch.allclose(scores, evaluate.predict(network.module, patients))
    swapped = dataclasses.replace(patients, inputs=patients.inputs.flip(0), offsets=np.array([0, 300, 302]))
    assert torch.allclose(evaluate.predict(module, swapped), scores.flip(0), atol=1e-6)
    assert evaluate.predict(module, make_patients([])).shape == (0, 1)
