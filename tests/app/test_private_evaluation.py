"""The private evaluation from end to end: how far off it is, and that groups arrive from the sites' own records."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

import fedscan
from fedscan_client import evaluate
from fedscan_client.cohort import Patients
from fedscan_core.accounting import GaussianQuery, epsilon, plan_for
from fedscan_core.config import RunConfig
from fedscan_models import tasks
from fedscan_server.evaluate import private_metrics

# (share of ill patients, how far they stand out, how far the site's scores are shifted)
HOSPITALS = [(0.5, 1.6, 0.0), (0.4, 1.2, 0.3), (0.3, 2.0, -0.4), (0.3, 1.4, 0.2)]


def hospital(rng, share, separation, shift, patients=500):
    """500 validation patients of one to three images each; the input is the logit that a model would give."""
    sizes = rng.integers(1, 4, patients)
    ill = (rng.random(patients) < share).astype(np.int64)
    own = rng.normal(0, 0.8, patients) + separation * (ill - 0.5) + shift
    logits = np.repeat(own, sizes) + rng.normal(0, 0.6, sizes.sum())
    return Patients(
        torch.from_numpy(logits.astype(np.float32))[:, None],
        torch.from_numpy(np.repeat(ill, sizes)),
        np.concatenate([[0], np.cumsum(sizes)]),
        tuple(map(str, range(patients))),
    )


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.0, 4.0])
def test_four_sites_of_500_patients_at_epsilon_1_are_within_002_of_the_exact_auroc(sharpness, monkeypatch):
    """Through the sites' real noise and the server's pooling; scores spread out, and towards 0 and 1."""
    run = RunConfig.model_validate({"privacy": {"target_epsilon": 5.0}, "evaluation": {"budget_share": 0.2}})
    plan = plan_for(run, 1750)
    assert 0.99 < epsilon([GaussianQuery(plan.evaluation_noise)], plan.delta) <= 1.0
    rng = np.random.default_rng(0)
    held = [hospital(rng, *kind) for kind in HOSPITALS]
    for site in held:
        site.inputs.mul_(sharpness)
    scores = {id(site): evaluate.predict(nn.Identity(), site) for site in held}
    # The model stays the same: only the noise is new each time.
    monkeypatch.setattr(evaluate, "predict", lambda module, site: scores[id(site)])
    exact = tasks.auroc(torch.cat(list(scores.values()))[:, 0], torch.cat([site.targets for site in held]))
    errors, inside = [], 0
    for _ in range(150):
        sent = [evaluate.noisy_histogram(nn.Identity(), site, run, plan) for site in held]
        found = private_metrics(run, sent, [plan.evaluation_noise] * 4)["auroc_private"]
        errors.append(found["value"] - exact)
        inside += found["low"] <= exact <= found["high"]
    assert np.sqrt(np.mean(np.square(errors))) <= 0.02
    assert inside >= 0.93 * 150


def groups_of(summary):
    cells = summary["metrics"]["private_evaluation"]["cells"]
    return {(cell["attribute"], cell["group"]): cell["patients"] for cell in cells}


ALMOST_EXACT = {"noise_multiplier": 0.02}


def test_a_tables_sex_and_age_make_the_groups(run_for, table, edit, tmp_path):
    def change(row):
        number = int("".join(filter(str.isdigit, row["patient_id"])))
        return {**row, "sex": ("f ", "M", "", "X")[number % 4], "age": ("39", "40", "66.5", "old")[number % 4]}

    edit(change)
    with (table / "metadata.csv").open(newline="") as file:
        held = {row["patient_id"]: row for row in csv.DictReader(file) if row["split"] == "test"}.values()
    run = run_for(privacy=ALMOST_EXACT, train={"rounds": 1}, evaluation={"groups": ["sex", "age"]})
    found = groups_of(fedscan.simulate(run, data=table, out=tmp_path / "run"))

    def count(column, *values):
        return pytest.approx(sum(row[column] in values for row in held), abs=1.5)

    assert found["all", "all"] == pytest.approx(len(held), abs=1.5)
    assert (found["sex", "F"], found["sex", "M"]) == (count("sex", "f "), count("sex", "M"))
    assert (found["sex", "O"], found["sex", "unknown"]) == (count("sex", "O"), count("sex", "", "X"))
    assert (found["age", "0-39"], found["age", "40-64"]) == (count("age", "39"), count("age", "40"))
    assert (found["age", "65+"], found["age", "unknown"]) == (count("age", "66.5"), count("age", "old"))


def test_sex_and_age_survive_the_de_identification(run_for, tmp_path):
    run = run_for(
        privacy=ALMOST_EXACT,
        train={"rounds": 1},
        data={"source": "phantom"},
        simulation={"sites": 2, "patients": 40},
        evaluation={"groups": ["sex", "age"]},
    )
    found = groups_of(fedscan.simulate(run, out=tmp_path / "run"))
    everybody = found["all", "all"]
    assert everybody > 8 and min(found["sex", "F"], found["sex", "M"]) > 1
    assert found["sex", "F"] + found["sex", "M"] == pytest.approx(everybody, abs=1.5)
    assert found["age", "0-39"] + found["age", "40-64"] + found["age", "65+"] == pytest.approx(everybody, abs=1.5)
    assert abs(found["sex", "unknown"]) < 1.5 and abs(found["age", "unknown"]) < 1.5


def test_it_is_on_by_default_and_off_where_nobody_is_protected(run_for, table, tmp_path):
    private = fedscan.simulate(run_for(train={"rounds": 1}), data=table, out=tmp_path / "private")
    assert all(site["evaluation_noise"] > 0 and site["epsilon"] <= 8 for site in private["sites"])
    assert private["metrics"]["auroc_private"]["status"] in ("private", "withheld")
    assert private["metrics"]["auroc"]["status"] == "simulation_only"
    for name, change in (("off", {"evaluation": {"private": False}}), ("open", {"privacy": {"enabled": False}})):
        found = fedscan.simulate(run_for(train={"rounds": 1}, **change), data=table, out=tmp_path / name)
        assert found["metrics"].keys().isdisjoint({"auroc_private", "private_evaluation"})
        assert all(site["evaluation_noise"] == 0 for site in found["sites"])
