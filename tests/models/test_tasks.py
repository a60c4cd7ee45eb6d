"""Losses and metrics against definitions written as loops."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_core.errors import ConfigError, DataError
from fedscan_models import tasks

# few distinct values, so that ties are common; at least one image of each label
SCORED = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), min_size=2, max_size=40).filter(
    lambda rows: {label for _, label in rows} == {0, 1}
)


def slow_auroc(scores, targets):
    """Every pair of a positive and a negative, a tie counting half."""
    wins = [
        (p > n) + (p == n) / 2
        for p, is_pos in zip(scores, targets, strict=True)
        if is_pos == 1
        for n, is_pos_too in zip(scores, targets, strict=True)
        if is_pos_too == 0
    ]
    return sum(wins) / len(wins)


def cohort(patients=300, per_patient=3, shift=1.0, seed=0):
    rng = np.random.default_rng(seed)
    label = np.repeat(rng.integers(0, 2, patients), per_patient)
    patient = np.repeat(np.arange(patients), per_patient)
    shared = np.repeat(rng.normal(size=patients), per_patient)
    score = 1 / (1 + np.exp(-(shift * label + shared + 0.3 * rng.normal(size=len(label)))))
    return score, label, [f"p{i}" for i in patient]


def test_outputs():
    assert tasks.outputs(["normal", "pneumonia"]) == 1
    assert tasks.outputs(["a", "b", "c"]) == 3
    for wrong in ([], ["one"], ["same", "same"]):
        with pytest.raises(ConfigError):
            tasks.outputs(wrong)


def test_loss_rows_are_the_definition():
    logits, target = torch.tensor([[0.5], [-2.0]]), torch.tensor([1, 0])
    p = 1 / (1 + np.exp([-0.5, 2.0]))
    want = torch.tensor([-np.log(p[0]), -np.log(1 - p[1])], dtype=torch.float32)
    torch.testing.assert_close(tasks.loss_rows(logits, target), want)
    logits, target = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([2])
    want = torch.log(torch.exp(logits).sum(dim=1)) - logits[:, 2]
    torch.testing.assert_close(tasks.loss_rows(logits, target), want)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(), (4, 5), (2, 3, 4)])
def test_loss_rows_do_not_mix_samples(k, shape):
    logits = torch.randn(5, k, *shape)
    target = torch.randint(0, max(k, 2), (5, *shape))
    rows = tasks.loss_rows(logits, target)
    alone = [tasks.loss_rows(logits[i : i + 1], target[i : i + 1]) for i in range(5)]
    assert rows.shape == (5,)
    torch.testing.assert_close(rows, torch.cat(alone))
    assert tasks.loss_rows(logits[:0], target[:0]).shape == (0,)


def test_scores_are_probabilities():
    one = tasks.scores(torch.tensor([[0.0], [100.0]]))
    torch.testing.assert_close(one, torch.tensor([0.5, 1.0]))
    many = tasks.scores(torch.randn(4, 3))
    torch.testing.assert_close(many.sum(dim=1), torch.ones(4))


@given(SCORED)
def test_auroc_is_the_chance_that_a_positive_scores_higher(rows):
    scores, targets = zip(*rows, strict=True)
    assert tasks.auroc(scores, targets) == pytest.approx(slow_auroc(scores, targets))


def test_auroc_of_many_labels_is_the_mean_of_one_against_the_rest():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((30, 3)).round(1), rng.integers(0, 3, 30)
    want = np.mean([slow_auroc(scores[:, k], (targets == k).astype(int)) for k in range(3)])
    assert tasks.auroc(scores, targets) == pytest.approx(want)


def test_auroc_says_what_is_wrong():
    with pytest.raises(DataError, match="label 1"):
        tasks.auroc([0.1, 0.2], [0, 0])
    with pytest.raises(DataError, match="not finite"):
        tasks.auroc([0.1, float("nan")], [0, 1])
    with pytest.raises(DataError, match="do not go with"):
        tasks.auroc([0.1, 0.2, 0.3], [0, 1])
    with pytest.raises(DataError, match="3 labels"):
        tasks.auroc(np.zeros((2, 3)), [0, 3])


def test_brier():
    assert tasks.brier([1.0, 0.0, 0.5], [1, 0, 1]) == pytest.approx(0.25 / 3)
    assert tasks.brier([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], [0, 1]) == pytest.approx(0.25)
    assert tasks.brier([0.5], [1]) == 0.25  # one label alone is fine here


@settings(max_examples=20)
@given(SCORED, st.integers(0, 99))
def test_a_weighted_auroc_is_the_auroc_of_repeated_images(rows, seed):
    scores, targets = (np.array(column) for column in zip(*rows, strict=True))
    times = np.random.default_rng(seed).integers(1, 4, len(rows))
    area = tasks._weighted_auroc(scores.astype(float), targets, times[None].astype(float))
    assert area[0] == pytest.approx(slow_auroc(scores.repeat(times), targets.repeat(times)))


def test_the_interval_comes_from_whole_patients():
    scores, targets, patients = cohort()
    lower, upper = tasks.auroc_interval(scores, targets, patients, seed=1)
    assert lower < tasks.auroc(scores, targets) < upper
    assert (lower, upper) == tasks.auroc_interval(scores, targets, patients, seed=1)
    images = [str(i) for i in range(len(scores))]
    low, high = tasks.auroc_interval(scores, targets, images, seed=1)
    assert upper - lower > 1.4 * (high - low)  # three nearly equal images a patient: sqrt(3) wider


def test_the_interval_covers_the_truth():
    big = cohort(patients=20000, per_patient=1, seed=99)
    truth = tasks.auroc(big[0], big[1])
    inside = 0
    for seed in range(40):
        scores, targets, patients = cohort(patients=80, per_patient=2, seed=seed)
        low, high = tasks.auroc_interval(scores, targets, patients, seed=seed, draws=200)
        inside += low <= truth <= high
    assert inside >= 34  # 38 expected of 40


def test_the_interval_refuses_too_few_patients():
    with pytest.raises(DataError, match="too few patients"):
        tasks.auroc_interval([0.1, 0.2], [0, 1], ["a", "b"], seed=0, draws=200, level=0.9)
    with pytest.raises(DataError, match="patient ids"):
        tasks.auroc_interval([0.1, 0.2], [0, 1], ["a"], seed=0)


def test_paired_bootstrap():
    scores, targets, patients = cohort()
    worse = np.clip(scores + np.random.default_rng(1).normal(0, 0.3, len(scores)), 0, 1)
    difference, low, high = tasks.paired_bootstrap(scores, worse, targets, patients, seed=2)
    assert difference == pytest.approx(tasks.auroc(scores, targets) - tasks.auroc(worse, targets))
    assert 0 < low < difference < high
    assert tasks.paired_bootstrap(scores, scores, targets, patients, seed=2) == (0.0, 0.0, 0.0)
    back = tasks.paired_bootstrap(worse, scores, targets, patients, seed=2)
    assert back == pytest.approx((-difference, -high, -low))


def test_a_thousand_draws_on_900_images_are_quick():
    scores, targets, patients = cohort()
    start = time.process_time()
    tasks.paired_bootstrap(scores, scores, targets, patients, seed=0, draws=1000)
    assert time.process_time() - start < 2
