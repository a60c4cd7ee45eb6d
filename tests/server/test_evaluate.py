import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_core.config import RunConfig
from fedscan_models import tasks
from fedscan_server.evaluate import fits, private_metrics

BINS = 200


def scored(patients, seed=0, shift=0.25):
    rng = np.random.default_rng(seed)
    targets = np.r_[0, 1, rng.integers(0, 2, patients - 2)]
    return np.clip(rng.normal(0.4 + shift * targets, 0.2), 0, 1 - 1e-9), targets


def histogram(scores, targets, bins=BINS):
    counts = np.zeros((1, 2, bins))
    for score, target in zip(scores, targets, strict=True):
        counts[0, target, int(score * bins)] += 1
    return counts


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), sites=st.integers(1, 5), shift=st.floats(-0.3, 0.3))
def test_without_noise_it_is_the_exact_auroc_of_all_patients_up_to_binning(seed, sites, shift):
    """Of the pooled patients: not the mean of the sites' areas."""
    scores, targets = scored(300, seed, shift)
    parts = [histogram(scores[k::sites], targets[k::sites]) for k in range(sites)]
    found = private_metrics(parts, [0.0] * sites)["auroc_private"]
    binned = tasks.auroc(np.floor(scores * BINS), targets)
    assert found["value"] == pytest.approx(binned, abs=1e-12)
    assert found["value"] == pytest.approx(tasks.auroc(scores, targets), abs=0.02)
    assert found["sites"] == sites and found["status"] == "private" and found["noise_sd"] < 1e-12


def test_several_labels_give_the_mean_over_blocks():
    blocks = [histogram(*scored(200, seed))[0] for seed in range(3)]
    each = [private_metrics([block[None]], [0.0])["auroc_private"]["value"] for block in blocks]
    found = private_metrics([np.stack(blocks)], [0.0])["auroc_private"]
    assert found["value"] == pytest.approx(np.mean(each)) and len(set(each)) == 3


def test_the_spread_it_states_is_the_spread_there_is():
    scores, targets = scored(3000)
    exact, sites, noise = histogram(scores, targets, 20), 3, 4.0
    rng = np.random.default_rng(1)
    found = []
    for _ in range(200):
        noisy = [exact / sites + rng.normal(0, noise, exact.shape) for _ in range(sites)]
        found.append(private_metrics(noisy, [noise] * sites)["auroc_private"])
    assert all(one["status"] == "private" for one in found)
    spread = np.std([one["value"] for one in found])
    assert np.mean([one["noise_sd"] for one in found]) == pytest.approx(spread, rel=0.2)
    assert abs(np.mean([one["value"] for one in found]) - tasks.auroc(scores, targets)) < 3 * spread / 200**0.5 + 2e-3


def test_withheld_where_noise_dominates():
    scores, targets = scored(60)
    exact = histogram(scores, targets, 20)
    clear = private_metrics([exact], [0.5])["auroc_private"]
    assert clear["status"] == "private"
    rng = np.random.default_rng(0)
    for _ in range(50):
        drowned = private_metrics([exact + rng.normal(0, 10.0, exact.shape)], [10.0])["auroc_private"]
        assert drowned == {"value": None, "status": "withheld", "sites": 1}
    # the noise of all sites counts: what is clear from one alone is not with nine others' noise on top
    empty = [np.zeros_like(exact)] * 99
    assert private_metrics([exact, *empty], [0.5] * 100)["auroc_private"]["status"] == "withheld"


def test_withheld_where_one_label_has_nobody_or_no_site_answered():
    lonely = histogram(np.linspace(0, 0.9, 500), np.zeros(500, int), 20)
    for hists, noise in (([lonely], [0.0]), ([lonely], [1.0]), ([], [])):
        assert private_metrics(hists, noise)["auroc_private"]["status"] == "withheld"


def test_fits():
    run = RunConfig.model_validate({"evaluation": {"bins": 20}})
    good = np.zeros((1, 2, 20))
    assert fits(run, good)
    assert fits(RunConfig.model_validate({"task": {"labels": ["a", "b", "c"]}}), np.zeros((3, 2, 20)))
    for bad in (None, good[0], np.zeros((1, 2, 19)), np.zeros((3, 2, 20)), good.astype(np.float32)):
        assert not fits(run, bad)
    for value in (np.nan, np.inf, -np.inf, 1e300):
        spoiled = good.copy()
        spoiled[0, 1, 3] = value
        assert not fits(run, spoiled)
    for kind in ("U3", object, complex):  # types that numpy's own checks trip over
        assert not fits(run, good.astype(kind))
