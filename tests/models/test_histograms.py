"""What noisy histograms still tell: point estimates against plain definitions, intervals by how often they hold."""

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_core.config import Evaluation, RunConfig
from fedscan_core.errors import DataError
from fedscan_models import histograms, tasks
from fedscan_models.histograms import Cell

BINS = 10
GROUPS = st.sampled_from([(), ("sex",), ("age",), ("sex", "age"), ("age", "sex")])


def draw(rng, patients, share, separation, sharpness):
    """Scores of a logistic model on binormal evidence: the sharper, the more they crowd at 0 and 1."""
    targets = (rng.random(patients) < share).astype(int)
    evidence = rng.normal(0, 1, patients) + separation * (targets - 0.5)
    return 1 / (1 + np.exp(-sharpness * evidence)), targets


def count(scores, targets, bins=BINS):
    counts = np.zeros((2, bins))
    np.add.at(counts, (targets, np.minimum((scores * bins).astype(int), bins - 1)), 1)
    return counts


def sure(found):
    """What the function returned, which is not None."""
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------------------- layout


def test_cells_are_declared_in_order():
    found = histograms.cells(Evaluation(groups=("age", "sex"), age_edges=(18, 40)))
    assert found[0] == Cell("all", "all")
    assert [cell.group for cell in found[1:5]] == ["0-17", "18-39", "40+", "unknown"]
    assert [cell.group for cell in found[5:]] == ["F", "M", "O", "unknown"]
    run = RunConfig.model_validate({"task": {"labels": ["a", "b", "c"]}, "evaluation": {"groups": ["sex"], "bins": 20}})
    assert histograms.shape(run) == (5, 3, 2, 20)
    assert histograms.shape(RunConfig()) == (1, 1, 2, 10)


@given(
    groups=GROUPS,
    edges=st.lists(st.integers(1, 90), min_size=1, max_size=8, unique=True).map(sorted),
    sex=st.sampled_from(["F", "M", "O", "", "X", "f"]) | st.text(max_size=3),
    age=st.none() | st.floats() | st.integers(0, 120),
)
def test_an_image_is_in_one_cell_of_each_table(groups, edges, sex, age):
    evaluation = Evaluation(groups=groups, age_edges=tuple(edges))
    found = [histograms.cells(evaluation)[number] for number in histograms.cells_of(evaluation, sex, age)]
    assert [cell.attribute for cell in found] == ["all", *groups]
    for cell in found[1:]:
        if cell.attribute == "sex":
            assert cell.group == (sex if sex in ("F", "M", "O") else "unknown")
        elif age is None or not 0 <= age < 200:
            assert cell.group == "unknown"
        elif "+" in cell.group:
            assert age >= int(cell.group[:-1]) == edges[-1]
        else:
            low, high = map(int, cell.group.split("-"))
            assert low <= int(age) <= high


@given(groups=GROUPS, labels=st.integers(2, 5))
def test_the_shares_of_a_patient_add_up_to_one_in_l2(groups, labels):
    run = RunConfig.model_validate({"task": {"labels": list("abcde"[:labels])}, "evaluation": {"groups": groups}})
    blocks = (1 + len(groups)) * tasks.outputs(run.task.labels)
    assert blocks * histograms.share(run) ** 2 == pytest.approx(1)


@pytest.mark.parametrize("groups", [(), ("sex",), ("sex", "age")])
def test_everybody_is_pooled_without_bias_and_with_the_variance_it_states(groups):
    evaluation = Evaluation(groups=groups)
    rng = np.random.default_rng(0)
    exact = np.zeros((len(histograms.cells(evaluation)), 1, 2, BINS))
    for scores, target in zip(*draw(rng, 500, 0.4, 1.0, 1.0), strict=True):
        person = (rng.choice(["F", "M", "O", ""]), (20, 50, 80, None)[rng.integers(4)])
        for cell in histograms.cells_of(evaluation, *person):
            exact[cell, 0, target, int(scores * BINS)] += 1
    assert np.allclose(histograms.pooled(evaluation, exact), exact[0])
    errors = np.array(
        [histograms.pooled(evaluation, exact + rng.normal(0, 2, exact.shape)) - exact[0] for _ in range(1500)]
    )
    assert errors.var() == pytest.approx(histograms.pooled_variance(evaluation, 4.0), rel=0.05)
    assert abs(errors.mean()) < 0.05


# ---------------------------------------------------------------------------------------------------- point estimates


def pairs(hist):
    """The area's definition, pair of bins by pair of bins, where the end bins hold one label each."""
    (negatives, positives), won = hist, 0.0
    for b, positive in enumerate(positives):
        for c, negative in enumerate(negatives):
            between = ((0 < b < BINS - 1) + (0 < c < BINS - 1)) / 24  # each inner bin's half of the pair's 1/12
            order = {0: 0.5, 1: 1 + between, -1: -between}.get(b - c, float(b > c))
            won += positive * negative * order
    return min(1.0, max(0.0, won / (sum(negatives) * sum(positives))))


@given(st.lists(st.lists(st.floats(0.1, 100), min_size=BINS, max_size=BINS), min_size=2, max_size=2), st.booleans())
def test_the_area_is_over_all_pairs(hist, turned):
    hist[turned][0], hist[not turned][-1] = 0.0, 0.0
    assert sure(histograms.area(hist)) == pytest.approx(pairs(hist), abs=1e-9)


@pytest.mark.parametrize("separation", [-1.0, 0.0, 0.7, 1.5, 2.5])
@pytest.mark.parametrize("edge", [-1.0, 0.0, 1.5])
def test_the_end_bin_of_binormal_scores_is_won_as_often_as_its_curve_says(edge, separation):
    normal, grid = statistics.NormalDist(), (np.arange(400) + 0.5) / 400
    f, t = 1 - normal.cdf(edge), 1 - normal.cdf(edge - separation)
    if min(f, t) > 0.005 and max(f, t) < 0.995:
        negative = np.array([normal.inv_cdf(1 - f * u) for u in grid])
        positive = np.array([normal.inv_cdf(1 - t * u) for u in grid]) + separation
        won = (positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2
        assert histograms._won_at_the_end(f, t) == pytest.approx(won, abs=0.01)


@pytest.mark.parametrize("separation", [0.7, 1.3, 3.0])
@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.0, 4.0, 8.0])
def test_what_binning_takes_off_the_area(separation, sharpness):
    """As the docstring states; ties counted as ties only would take off 0.02 in the first case, 0.05 in the last."""
    scores, targets = draw(np.random.default_rng(1), 50_000, 0.5, separation, sharpness)
    hist = count(scores, targets)
    exact = tasks.auroc(scores, targets)
    assert sure(histograms.area(hist)) == pytest.approx(exact, abs=0.007 if separation == 3.0 else 0.005)
    flat = hist[1] @ (np.tril(np.ones((BINS, BINS)), -1) + np.eye(BINS) / 2) @ hist[0] / hist.sum(1).prod()
    if abs(flat - exact) > 0.015:
        assert abs(sure(histograms.area(hist)) - exact) < abs(flat - exact) / 2


def test_scores_that_are_not_binormal_keep_within_what_the_docstring_says():
    rng = np.random.default_rng(1)
    targets = rng.random(100_000) < 0.4
    both_ends = np.where(targets, rng.beta(0.3, 0.1, len(targets)), rng.beta(0.1, 0.3, len(targets)))
    tails = 1 / (1 + np.exp(-3 * (rng.standard_t(3, len(targets)) + 1.3 * (targets - 0.5))))
    for scores, off in ((both_ends, 0.009), (tails, 0.019)):
        area = sure(histograms.area(count(scores, targets.astype(int))))
        assert area == pytest.approx(tasks.auroc(scores, targets.astype(int)), abs=off)


def test_bins_that_hold_only_noise_are_left_out():
    """Scores crowded in the middle: the empty bins' noise has the longest lever on the area."""
    rng, errors = np.random.default_rng(5), []
    exact = tasks.auroc(*draw(rng, 100_000, 0.5, 1.5, 0.4))
    for _ in range(200):
        noisy = count(*draw(rng, 2000, 0.5, 1.5, 0.4)) + rng.normal(0, 7.5, (2, BINS))
        errors.append([sure(histograms.area(noisy, variance)) - exact for variance in (56.25, 0.0)])
    told, whole = np.sqrt(np.mean(np.square(errors), axis=0))
    assert told <= 0.018 < whole


def test_a_noisy_histogram_is_used_as_it_is_and_gives_nothing_without_patients():
    assert histograms.area([[0, 0, 0], [1, 2, 3]]) is None
    assert histograms.area([[5, -6], [1, 2]]) is None
    assert histograms.area([[1, 2], [5, -5]]) is None
    assert sure(histograms.area([[-3, 4], [9, -1]])) == 0.0  # noise took it out of [0, 1]
    rng = np.random.default_rng(0)
    clean = np.array([[40, 30, 20, 10], [10, 20, 30, 40.0]])
    areas = [histograms.area(clean + rng.normal(0, 5, clean.shape)) for _ in range(2000)]
    # 100 patients a label: noise never brings a total below zero.
    assert np.mean([sure(area) for area in areas]) == pytest.approx(sure(histograms.area(clean)), abs=0.005)
    for shape in ((3,), (3, 10), (2, 0)):
        with pytest.raises(DataError, match="2 rows"):
            histograms.area(np.ones(shape))
    assert histograms.rate([-3, 1], [1], 1.0) is None
    assert histograms.ece([[1, -2], [0, 0]], 1.0) is None
    assert histograms.auroc([[1, -2], [1, 1]], 1.0) is None


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(0.1, 0.9), st.floats(0.2, 4), st.sampled_from([10, 20]))
def test_the_calibration_error_is_half_a_bin_from_the_one_with_mean_scores(seed, share, sharpness, bins):
    scores, targets = draw(np.random.default_rng(seed), 300, share, 1.5, sharpness)
    exact = 0.0
    for bin_ in range(bins):
        here = np.minimum((scores * bins).astype(int), bins - 1) == bin_
        exact += here.sum() * abs(targets[here].mean() - scores[here].mean()) / 300 if here.any() else 0
    found = sure(histograms.ece(count(scores, targets, bins), 0.0))
    assert found.value == pytest.approx(exact, abs=0.5 / bins + 1e-9)


def test_noise_does_not_pass_for_miscalibration():
    """The root of the plain squares would say 0.10 where the truth is 0.01."""
    rng = np.random.default_rng(0)
    scores, targets = draw(rng, 2000, 0.5, 1.3, 1.3)
    hist = count(scores, targets)
    found = np.mean([sure(histograms.ece(hist + rng.normal(0, 15, hist.shape), 225.0)).value for _ in range(200)])
    naive = np.mean([sure(histograms.ece(hist + rng.normal(0, 15, hist.shape), 0.0)).value for _ in range(200)])
    assert found - sure(histograms.ece(hist, 0.0)).value < 0.6 * (naive - sure(histograms.ece(hist, 0.0)).value)


# ---------------------------------------------------------------------------------------------------------- intervals


@given(st.integers(1, 200), st.data())
def test_without_noise_the_rate_has_wilsons_interval(total, data):
    hits = data.draw(st.integers(0, total))
    found, z = sure(histograms.rate([hits], [total - hits], 0.0)), 1.959964
    middle = (hits + z**2 / 2) / (total + z**2)
    half = z / (total + z**2) * (hits * (total - hits) / total + z**2 / 4) ** 0.5
    assert found.value == hits / total
    assert found.low == pytest.approx(max(0, middle - half), abs=1.1e-3)
    assert found.high == pytest.approx(min(1, middle + half), abs=1.1e-3)
    assert found.low <= max(0, middle - half) + 1e-9 and found.high >= min(1, middle + half) - 1e-9


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([10, 20]), st.integers(0, 20), st.integers(0, 300))
def test_every_value_lies_in_its_interval_and_every_interval_in_0_to_1(seed, bins, sigma, level):
    rng = np.random.default_rng(seed)
    hist = rng.normal(level, sigma, (2, bins)) * rng.integers(0, 2, (2, bins))
    for found in (
        histograms.auroc(hist, sigma**2),
        histograms.rate(hist[1, 5:], hist[1, :5], sigma**2),
        histograms.ece(hist, sigma**2),
    ):
        if found is not None:
            assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(
    ("patients", "share", "separation", "sharpness", "sigma"),
    [
        (2000, 0.5, 1.5, 1.0, 7.5),
        (2000, 0.2, 1.5, 0.5, 7.5),
        (2000, 0.5, 1.5, 4.0, 7.5),
        (2000, 0.5, 1.5, 8.0, 7.5),
        (300, 0.4, 3.0, 2.0, 2.0),
        (200, 0.5, 1.3, 1.0, 5.0),
    ],
)
def test_95_of_100_intervals_hold_the_truth(patients, share, separation, sharpness, sigma):
    """Fresh patients and fresh noise each time, the truth from 200,000 of them; binning's own error counts too."""
    rng = np.random.default_rng(3)
    scores, targets = draw(rng, 200_000, share, separation, sharpness)
    big, edge = count(scores, targets), BINS // 2
    centre = (np.arange(BINS) + 0.5) / BINS
    truth = {
        "auroc": tasks.auroc(scores, targets),
        "sensitivity": (scores[targets == 1] >= 0.5).mean(),
        "specificity": (scores[targets == 0] < 0.5).mean(),
        "ece": np.abs((1 - centre) * big[1] - centre * big[0]).sum() / big.sum(),
    }
    held: dict[str, list[bool]] = {name: [] for name in truth}
    for _ in range(400):
        noisy = count(*draw(rng, patients, share, separation, sharpness)) + rng.normal(0, sigma, (2, BINS))
        found = {
            "auroc": histograms.auroc(noisy, sigma**2),
            "sensitivity": histograms.rate(noisy[1, edge:], noisy[1, :edge], sigma**2),
            "specificity": histograms.rate(noisy[0, :edge], noisy[0, edge:], sigma**2),
            "ece": histograms.ece(noisy, sigma**2),
        }
        for name, one in found.items():
            assert one is not None
            held[name].append(one.low <= truth[name] <= one.high)
    for name, times in held.items():
        assert np.mean(times) >= (0.93 if name == "auroc" else 0.92), name
        if name != "ece" and sharpness < 8:  # that one is wider than it would have to be, and says so
            assert np.mean(times) <= 0.997, name


def test_a_patient_whose_images_scatter_makes_intervals_wider_never_narrower():
    """Four images a patient, weight 1/4 each: the interval holds at least as often."""
    rng = np.random.default_rng(4)
    scores, targets = draw(rng, 200_000, 0.5, 1.3, 1.0)
    truth, held = tasks.auroc(scores, targets), []
    for _ in range(300):
        targets = (rng.random(300) < 0.5).astype(int)
        own = rng.normal(0, 0.8, 300)[:, None] + rng.normal(0, 0.6, (300, 4)) + 1.3 * (targets[:, None] - 0.5)
        hist = count((1 / (1 + np.exp(-own))).ravel(), np.repeat(targets, 4)) / 4
        found = sure(histograms.auroc(hist + rng.normal(0, 2, hist.shape), 4.0))
        held.append(found.low <= truth <= found.high)
    assert np.mean(held) >= 0.94


def test_noise_makes_intervals_wider():
    hist = count(*draw(np.random.default_rng(0), 1000, 0.5, 1.3, 1.0))
    widths = [one.high - one.low for one in (sure(histograms.auroc(hist, sigma**2)) for sigma in (0.0, 5.0, 20.0))]
    assert widths[0] < widths[1] < widths[2]
    spread = [sure(histograms.area(hist + np.random.default_rng(n).normal(0, 5, hist.shape))) for n in range(1000)]
    stated = histograms.area_noise(hist, 25.0, np.array([sure(histograms.area(hist))]))[0] ** 0.5
    assert np.std(spread) == pytest.approx(stated, rel=0.1)
