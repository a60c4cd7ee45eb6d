"""What the probes bring back from the real `train_round` has the law that the audit's bounds assume."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import stats

from fedscan import audit_probes
from fedscan_client.dp import engine
from fedscan_core import accounting
from fedscan_core.config import Privacy
from fedscan_models import tasks

ENGINES = get_args(Privacy.model_fields["engine"].annotation)


def score_cdf(steps, rate, sigma):
    """Distribution of a canary's score that is in: Binomial(steps, rate) plus N(0, steps sigma^2)."""
    count = np.arange(steps + 1)
    weight = stats.binom.pmf(count, steps, rate)
    return lambda x: (weight * stats.norm.cdf((np.asarray(x)[:, None] - count) / (sigma * math.sqrt(steps)))).sum(1)


CASES: dict[str, dict[str, Any]] = {
    "all": {"train": {"rounds": 2, "local_steps": 2}},
    "sampled": {"train": {"rounds": 4, "patients_per_step": 20}},
    "auto clip": {"train": {"rounds": 2}, "privacy": {"clip": "auto"}},
    "views": {"train": {"rounds": 2, "augmentation": "shift", "multiplicity": 2}, "model": {"name": "cnn"}},
    "few images": {"train": {"rounds": 2}, "privacy": {"max_images_per_patient": 1, "clip": 30.0}},
}


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_scores_have_the_law_that_the_bounds_assume(run_for, case, engine_name):
    sections = {**CASES[case]}
    sections["privacy"] = {**sections.get("privacy", {}), "noise_multiplier": 0.4, "engine": engine_name}
    run = run_for(**sections)
    plan = accounting.plan_for(run, 80)
    score, inside = audit_probes.canary_scores(run, plan, 800)
    assert 300 < inside.sum() < 500
    deviation = 0.4 * math.sqrt(plan.steps)
    assert stats.kstest(score[~inside] / deviation, "norm").pvalue > 1e-5
    assert stats.kstest(score[inside], score_cdf(plan.steps, plan.sampling_rate, 0.4)).pvalue > 1e-5
    # The test can tell: a patient of one and a half times the influence has another law.
    assert stats.kstest(1.5 * score[inside], score_cdf(plan.steps, plan.sampling_rate, 0.4)).pvalue < 1e-5


def test_every_canary_has_its_own_weight_and_is_clipped(run_for):
    run = run_for()
    clip = run.privacy.clip
    network = audit_probes.Dirac(50, 1e6 * clip)
    patients = audit_probes._canary_patients(np.array([3, 8]), run)
    sums = engine.clipped_sum(
        network, tasks.loss_rows, patients.inputs, patients.targets, [4, 4], clip=clip, engine=run.privacy.engine
    )[0]
    assert sums.shape == (1, 50)
    assert set(sums[0].nonzero().flatten().tolist()) == {3, 8}
    assert sums[0, [3, 8]].abs().numpy() == pytest.approx(clip * (1 - engine.MARGIN))
    assert sums[0, 3] < 0 < sums[0, 8]  # label is the number's parity


def test_the_layer_patient_has_a_large_gradient_in_every_tensor(run_for):
    """Whatever tensor a clip forgets, this patient would show it."""
    network, patients = audit_probes.Layers(1e6), audit_probes._layer_patient(run_for())
    tasks.loss_rows(network(patients.inputs), patients.targets).mean().backward()
    norms = {name: float(p.grad.norm()) for name, p in network.named_parameters() if p.grad is not None}
    assert len(norms) == 10 and min(norms.values()) > 3e3, norms
    twice = zip(network.parameters(), audit_probes.Layers(1.0).parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in twice)


def test_the_unit_of_an_image_makes_patients_of_one_image(run_for):
    patients = audit_probes._canary_patients(np.array([0, 5]), run_for(privacy={"unit": "image"}))
    assert patients.offsets.tolist() == [0, 1, 2]
