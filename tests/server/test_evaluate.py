"""The server's private metrics: pooled over sites, withheld where noise dominates, with the reason why."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_core.config import RunConfig
from fedscan_models import histograms, tasks
from fedscan_server import evaluate
from fedscan_server.evaluate import FEW_NEGATIVES, FEW_POSITIVES, NO_ANSWER, fits, private_metrics

BINS = 10
RUN = RunConfig()
FIGURES = ("auroc", "sensitivity", "specificity", "ece")


def run_for(labels=("a", "b"), **evaluation):
    return RunConfig.model_validate({"task": {"labels": list(labels)}, "evaluation": evaluation})


def scored(patients, seed=0, shift=0.25):
    rng = np.random.default_rng(seed)
    targets = np.r_[0, 1, rng.integers(0, 2, patients - 2)]
    return np.clip(rng.normal(0.4 + shift * targets, 0.2), 0, 1 - 1e-9), targets


def histogram(scores, targets, bins=BINS):
    counts = np.zeros((1, 1, 2, bins))
    np.add.at(counts[0, 0], (targets, (scores * bins).astype(int)), 1)
    return counts


def everybody(found):
    return found["private_evaluation"]["cells"][0]


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), sites=st.integers(1, 5), shift=st.floats(-0.3, 0.3))
def test_without_noise_it_is_about_all_patients_together(seed, sites, shift):
    """Of the pooled patients: not the mean of the sites' figures."""
    scores, targets = scored(300, seed, shift)
    order = np.argsort(scores)  # sites as unlike each other as can be
    parts = [histogram(scores[part], targets[part]) for part in np.array_split(order, sites)]
    found = private_metrics(RUN, parts, [1e-9] * sites)
    area = found["auroc_private"]
    assert area["value"] == pytest.approx(tasks.auroc(scores, targets), abs=0.03)
    assert area["sites"] == sites and area["status"] == "private" and area["noise_sd"] < 1e-9
    cell = everybody(found)
    assert {name: cell["auroc"][name] for name in ("value", "low", "high")} == {
        name: area[name] for name in ("value", "low", "high")
    }
    assert cell["sensitivity"]["value"] == pytest.approx((scores[targets == 1] >= 0.5).mean())
    assert cell["specificity"]["value"] == pytest.approx((scores[targets == 0] < 0.5).mean())
    assert (cell["patients"], cell["patients_noise_sd"]) == (300, 0)
    for name in FIGURES:
        assert 0 <= cell[name]["low"] <= cell[name]["value"] <= cell[name]["high"] <= 1


def test_the_threshold_is_the_declared_one():
    scores, targets = scored(500)
    for threshold in (0.3, 0.7):
        found = everybody(private_metrics(run_for(threshold=threshold), [histogram(scores, targets)], [1e-6]))
        assert found["sensitivity"]["value"] == pytest.approx((scores[targets == 1] >= threshold).mean())
        assert found["specificity"]["value"] == pytest.approx((scores[targets == 0] < threshold).mean())


def test_several_labels_give_the_mean_over_labels():
    run = run_for("abc")
    blocks = [histogram(*scored(200, seed))[0, 0] for seed in range(3)]
    each = [everybody(private_metrics(RUN, [block[None, None]], [1e-9])) for block in blocks]
    found = everybody(private_metrics(run, [np.stack(blocks)[None] * histograms.share(run)], [1e-9]))
    for name in FIGURES:
        for end in ("value", "low", "high"):
            assert found[name][end] == pytest.approx(np.mean([one[name][end] for one in each]), abs=1e-3)
    assert found["patients"] == 200


def test_groups_are_told_apart_and_everybody_is_sharper_than_one_table():
    run = run_for(groups=["sex"])
    cells = [cell.group for cell in histograms.cells(run.evaluation)]
    good, bad = histogram(*scored(800, 1, 0.4))[0], histogram(*scored(800, 2, 0.0))[0]
    exact = np.zeros(histograms.shape(run))
    exact[0] = good + bad
    exact[cells.index("F")], exact[cells.index("M")] = good, bad
    found = private_metrics(run, [exact * histograms.share(run)], [0.5])
    by_group = {cell["group"]: cell for cell in found["private_evaluation"]["cells"]}
    assert by_group["F"]["auroc"]["low"] > 0.85 and by_group["M"]["auroc"]["high"] < 0.6
    assert by_group["F"]["auroc"]["value"] > by_group["all"]["auroc"]["value"] > by_group["M"]["auroc"]["value"]
    for name in FIGURES:
        assert by_group["O"][name]["value"] is by_group["unknown"][name]["value"] is None
    assert by_group["all"]["patients"] == pytest.approx(1600)
    assert by_group["all"]["patients_noise_sd"] < by_group["F"]["patients_noise_sd"]


@pytest.mark.parametrize(
    "run",
    [RUN, pytest.param(run_for("abc"), marks=pytest.mark.slow), run_for(groups=["sex"])],
    ids=["plain", "labels", "groups"],
)
def test_the_spread_it_states_is_the_spread_there_is(run):
    scores, targets = scored(3000)
    exact, sites, noise = np.zeros(histograms.shape(run)), 3, 4.0
    exact[0] = histogram(scores, targets)[0]
    exact[-1] = exact[0]  # all of them of unknown sex
    rng = np.random.default_rng(1)
    found = []
    for _ in range(200):
        noisy = [exact * histograms.share(run) / sites + rng.normal(0, noise, exact.shape) for _ in range(sites)]
        found.append(private_metrics(run, noisy, [noise] * sites)["private_evaluation"]["cells"][0])
    areas = [cell["auroc"] for cell in found]
    assert all(one["status"] == "private" for one in areas)
    spread = np.std([one["value"] for one in areas])
    assert np.mean([one["noise_sd"] for one in areas]) == pytest.approx(spread, rel=0.15)
    assert found[0]["patients_noise_sd"] == pytest.approx(np.std([cell["patients"] for cell in found]), rel=0.15)
    assert abs(np.mean([one["value"] for one in areas]) - tasks.auroc(scores, targets)) < 3 * spread / 200**0.5 + 3e-3


def test_withheld_where_noise_dominates():
    exact = histogram(*scored(60))
    assert private_metrics(RUN, [exact], [0.5])["auroc_private"]["status"] == "private"
    rng = np.random.default_rng(0)
    withheld = 0
    for _ in range(100):
        found = private_metrics(RUN, [exact + rng.normal(0, 10.0, exact.shape)], [10.0])["auroc_private"]
        withheld += found["value"] is None
        assert found["value"] is not None or found["reason"] in (FEW_POSITIVES, FEW_NEGATIVES)
    assert withheld >= 95
    # the noise of all sites counts: what is clear from one alone is not with 99 others' noise on top
    empty = [np.zeros_like(exact)] * 99
    assert private_metrics(RUN, [exact, *empty], [0.9] * 100)["auroc_private"]["status"] == "withheld"


def test_why_a_figure_is_withheld():
    lonely = histogram(np.linspace(0, 0.9, 500), np.zeros(500, int))
    lonely[0, 0, 1, 5] = 8  # below 3 standard deviations of ten entries' noise
    found = everybody(private_metrics(RUN, [lonely], [1.0]))
    for name in ("auroc", "sensitivity", "ece"):
        assert found[name] == {"value": None, "status": "withheld", "reason": FEW_POSITIVES}
    assert found["specificity"]["status"] == "private"
    found = everybody(private_metrics(RUN, [lonely[:, :, ::-1]], [1.0]))
    assert found["specificity"]["reason"] == found["auroc"]["reason"] == FEW_NEGATIVES
    assert found["sensitivity"]["status"] == "private"
    three = np.concatenate([histogram(*scored(400))] * 2 + [lonely], axis=1)  # one of three labels has too few
    found = everybody(private_metrics(run_for("abc"), [three], [1.0]))
    assert found["sensitivity"]["reason"] == FEW_POSITIVES and found["specificity"]["status"] == "private"
    found = private_metrics(run_for(groups=["age"]), [], [])
    assert found["auroc_private"] == {"value": None, "status": "withheld", "reason": NO_ANSWER, "sites": 0}
    for cell in found["private_evaluation"]["cells"]:
        assert all(cell[name]["reason"] == NO_ANSWER for name in FIGURES) and cell["patients"] is None


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), scale=st.floats(0, 50), noise=st.floats(1e-3, 30), kind=st.integers(0, 2))
def test_any_noisy_numbers_give_a_whole_answer(seed, scale, noise, kind):
    """Nothing a site can send within bounds breaks the summary; it holds plain JSON numbers."""
    run = (RUN, run_for("abc"), run_for(groups=["sex", "age"]))[kind]
    rng = np.random.default_rng(seed)
    sent = [rng.normal(0, scale, histograms.shape(run)) * rng.choice([1.0, 2.0**30]) for _ in range(2)]
    assert all(map(fits, [run] * 2, sent))
    found = private_metrics(run, sent, [noise] * 2)["private_evaluation"]
    assert len(found["cells"]) == len(histograms.cells(run.evaluation))
    for cell in found["cells"]:
        for name in FIGURES:
            figure = cell[name]
            if figure["value"] is not None:
                assert all(type(figure[end]) is float for end in ("value", "low", "high"))
                assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1


def test_fits():
    good = np.zeros((1, 1, 2, 10))
    assert fits(RUN, good)
    assert fits(run_for("abc"), np.zeros((1, 3, 2, 10)))
    assert fits(run_for(groups=["sex"], bins=20), np.zeros((5, 1, 2, 20)))
    for bad in (None, good[0], np.zeros((1, 1, 2, 9)), np.zeros((5, 1, 2, 10)), good.astype(np.float32)):
        assert not fits(RUN, bad)
    for value in (np.nan, np.inf, -np.inf, 1e300):
        spoiled = good.copy()
        spoiled[0, 0, 1, 3] = value
        assert not fits(RUN, spoiled)
    for kind in ("U3", object, complex):  # types that numpy's own checks trip over
        assert not fits(RUN, good.astype(kind))


def test_reasons_are_constants():
    assert {NO_ANSWER, FEW_POSITIVES, FEW_NEGATIVES} == {
        value for name, value in vars(evaluate).items() if name.isupper() and isinstance(value, str)
    } - {"private", "withheld"}
