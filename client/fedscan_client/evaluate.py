"""Private evaluation: noisy histograms of the model's scores by label, for everybody and for each declared group.

Guarantee of `noisy_histogram`: the Gaussian mechanism with L2 sensitivity 1 and standard deviation
plan.evaluation_noise (unit: patient, adjacency: add or remove one).

Proof. The release is T tables (everybody, and one per attribute of evaluation.groups) of K class scores each. In every
table and class score each image of a patient adds w / images to exactly one entry: the one of its own group, label and
bin. So a patient's part of one table and score has L1 norm at most w, hence L2 norm at most w, and the whole has a
squared L2 norm of at most T K w^2, which is 1 for the w of `histograms.share`. Where an image counts depends on nobody
else: groups overlap across tables, never within one, and what is missing or not declared counts as "unknown". An image
whose age differs from the patient's last one goes to its own age's cell, with its own part of w.

Bins, groups and threshold are declared, never fitted. What the server does with the histograms is post-processing.
The charge adds to the training's: nothing here rests on the two splits holding different patients.
"""

import numpy as np
import torch
from torch import Tensor, nn

from fedscan_client.cohort import Patients
from fedscan_client.dp.engine import MARGIN
from fedscan_client.dp.noise import SecretStream, add_noise
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_models import histograms, tasks

_BATCH = 256


def predict(module: nn.Module, patients: Patients) -> Tensor:
    """Scores [N, K] in evaluation mode, K = `tasks.outputs` columns (binary: the positive class's).

    Each patient's rows go through the network by themselves. In a common batch the rounding of one patient's score
    depends on who else is in it, and a model made for it would move everybody across a bin's edge.
    """
    module.eval()
    own = patients.inputs.split(np.diff(patients.offsets).tolist()) if len(patients) else ()
    with torch.no_grad():
        parts = [tasks.scores(module(x.clone())) for rows in own for x in rows.split(_BATCH)]
    if not parts:
        return torch.zeros(0, 1)
    scores = torch.cat(parts)
    return scores.view(len(scores), -1)


def histogram(
    scores_NK: np.ndarray,
    targets_N: np.ndarray,
    weights_N: np.ndarray,
    cells_NT: np.ndarray,
    shape: tuple[int, int, int, int],
) -> np.ndarray:
    """Exact weighted histograms [CELLS, K, 2, BINS] over equal bins of [0, 1]; scores that are not finite fall out.

    Args:
        scores_NK: class scores of each image.
        targets_N: label index of each image.
        weights_N: what each image adds to one entry of every table and score.
        cells_NT: the image's cell in each table.
        shape: of the result.
    """
    counts = np.zeros(shape)
    classes, bins = shape[1], shape[3]
    for k in range(classes):
        score = scores_NK[:, k]
        finite = np.isfinite(score)
        positive = (targets_N == (1 if classes == 1 else k)).astype(int)[finite]
        bin_ = np.clip((score[finite] * bins).astype(int), 0, bins - 1)
        for cell_N in cells_NT[finite].T:
            np.add.at(counts, (cell_N, k, positive, bin_), weights_N[finite])
    return counts


def noisy_histogram(module: nn.Module, patients: Patients, run: RunConfig, plan: SitePlan) -> np.ndarray:
    """float64 [CELLS, K, 2, BINS] (`histograms.shape`) with noise on every entry; see the module's docstring."""
    counts = np.zeros(histograms.shape(run))
    if len(patients):
        sizes = np.diff(patients.offsets)
        groups = patients.groups or (("", None),) * len(patients.targets)
        counts = histogram(
            predict(module, patients).double().numpy(),
            patients.targets.numpy(),
            np.repeat(1.0 / np.maximum(sizes, 1), sizes) * histograms.share(run),
            np.array([histograms.cells_of(run.evaluation, sex, age) for sex, age in groups]),
            counts.shape,
        )
    noisy = add_noise([torch.from_numpy(counts * (1 - MARGIN))], plan.evaluation_noise, SecretStream(), sensitivity=1.0)
    return noisy[0].numpy()
