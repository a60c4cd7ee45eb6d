"""Private evaluation: one noisy histogram of the model's scores, by true class.

Guarantee of `noisy_histogram`: the Gaussian mechanism with L2 sensitivity 1 and standard deviation
plan.evaluation_noise (unit: patient, adjacency: add or remove one). Every patient adds a total weight of 1, spread
evenly over their images, so their contribution has L1 norm 1, and with it L2 norm at most 1 (K class scores: K blocks
of weight 1/sqrt(K)). Bins are declared, never fitted. What the server does with it (AUROC, suppression) is
post-processing.
"""

import numpy as np
import torch
from torch import Tensor, nn

from fedscan_client.cohort import Patients
from fedscan_client.dp.engine import MARGIN
from fedscan_client.dp.noise import SecretStream, add_noise
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_models import tasks

_BATCH = 256


def shape(run: RunConfig) -> tuple[int, int, int]:
    """Shape of what `noisy_histogram` returns."""
    return tasks.histogram_shape(run.task.labels, run.evaluation.bins)


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


def histogram(scores_NK: np.ndarray, targets_N: np.ndarray, weights_N: np.ndarray, bins: int) -> np.ndarray:
    """Exact weighted histogram [K, 2, bins] over equal bins of [0, 1]; scores that are not finite fall out."""
    classes = scores_NK.shape[1]
    counts = np.zeros((classes, 2, bins))
    for k in range(classes):
        score = scores_NK[:, k]
        finite = np.isfinite(score)
        positive = (targets_N == (1 if classes == 1 else k)).astype(int)[finite]
        bin_ = np.clip((score[finite] * bins).astype(int), 0, bins - 1)
        np.add.at(counts[k], (positive, bin_), weights_N[finite])
    return counts


def noisy_histogram(module: nn.Module, patients: Patients, run: RunConfig, plan: SitePlan) -> np.ndarray:
    """float64 [K, 2, bins] with noise on every entry. Of K > 1 class scores each block gets 1/sqrt(K)."""
    scores_NK = predict(module, patients).double().numpy()
    classes = tasks.outputs(run.task.labels)
    sizes = np.diff(patients.offsets)
    weights_N = np.repeat(1.0 / np.maximum(sizes, 1), sizes) / np.sqrt(classes)
    if len(patients):
        counts = histogram(scores_NK, patients.targets.numpy(), weights_N, run.evaluation.bins)
    else:
        counts = np.zeros(shape(run))
    noisy = add_noise([torch.from_numpy(counts * (1 - MARGIN))], plan.evaluation_noise, SecretStream(), sensitivity=1.0)
    return noisy[0].numpy()
