"""What a task is in numbers: outputs, per-sample loss, scores and the metrics of a report.

A classification task has a list of labels. Two labels make one logit and a binary cross-entropy;
more make one logit a label and a softmax cross-entropy. The second label is the positive one.

Metrics work on arrays of scores that are already outside the guarantee (public data, a site's own
screen); those from noisy histograms are in ``histograms``. Nothing here adds noise.

B batch, N images, K outputs, D bootstrap draws, U distinct scores.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from fedscan_core.errors import ConfigError, DataError

_DRAWS_AT_ONCE = 64


def outputs(labels: Sequence[str]) -> int:
    """Logits per image: 1 for two labels, one per label for more.

    Raises:
        ConfigError: for fewer than two labels, or a label that is there twice.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ConfigError(
            f"A classification needs two or more different labels; got {', '.join(labels) or 'none'}.",
            remedy="List each label once; with two labels the second is the positive one.",
        )
    return 1 if len(labels) == 2 else len(labels)


def loss_rows(logits_BK: Tensor, target_B: Tensor) -> Tensor:
    """Cross-entropy of each sample by itself: [B]. A sample's value depends on no other sample.

    Args:
        logits_BK: [B, 1] or [B, K]; a segmenter's [B, K, ...] gives the mean over each sample's
            voxels.
        target_B: label indices, [B] or [B, ...].
    """
    if logits_BK.shape[1] == 1:
        rows = F.binary_cross_entropy_with_logits(logits_BK[:, 0], target_B.to(logits_BK.dtype), reduction="none")
    else:
        rows = F.cross_entropy(logits_BK, target_B.long(), reduction="none")
    return rows.unsqueeze(-1).flatten(start_dim=1).mean(dim=1)


def scores(logits_BK: Tensor) -> Tensor:
    """Probabilities: of the positive label, [B], for one logit; of each label, [B, K], for more."""
    return torch.sigmoid(logits_BK[:, 0]) if logits_BK.shape[1] == 1 else logits_BK.softmax(dim=1)


def auroc(scores: ArrayLike, targets: ArrayLike) -> float:
    """Area under the ROC curve, exact.

    It is the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: [N], or [N, K] for more than two labels: then the mean of each label against the
            rest.
        targets: label indices [N].

    Raises:
        DataError: for lengths that differ, scores that are not finite, or a label no image has.
    """
    from scipy.stats import rankdata  # here: importing scipy.stats takes a second

    score, target = _checked(scores, targets)
    areas = []
    for column, positive in _one_vs_rest(score, target):
        n_pos = int(positive.sum())
        n_neg = len(positive) - n_pos
        rank_sum = float(rankdata(column)[positive].sum())
        areas.append((rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))
    return float(np.mean(areas))


def brier(scores: ArrayLike, targets: ArrayLike) -> float:
    """Mean squared error of the probabilities (Brier 1950): 0 is perfect.

    With [N] scores it is of the positive label (0.25 for always one half); with [N, K] it is
    summed over labels.

    Raises:
        DataError: for lengths that differ or scores that are not finite.
    """
    score, target = _checked(scores, targets, every_label=False)
    if score.ndim == 1:
        return float(np.mean((score - target) ** 2))
    return float(np.mean(((score - np.eye(score.shape[1])[target]) ** 2).sum(axis=1)))


def auroc_interval(
    scores: ArrayLike,
    targets: ArrayLike,
    patients: Sequence[str] | ArrayLike,
    *,
    seed: int,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the AUROC from a bootstrap that draws patients, with all their images.

    Drawing images instead would count one patient's images as independent and give too narrow an
    interval. Draws in which a label has no image are left out.

    Args:
        scores: as in ``auroc``.
        targets: as in ``auroc``.
        patients: each image's patient, [N].
        seed: of the draws.
        draws: how many.
        level: the interval's coverage.

    Raises:
        DataError: as ``auroc``; also if fewer than half of the draws hold every label.
    """
    score, target = _checked(scores, targets)
    areas = np.concatenate([_weighted_auroc(score, target, w) for w in _draws(patients, len(target), seed, draws)])
    return _interval(areas, level)


def paired_bootstrap(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    targets: ArrayLike,
    patients: Sequence[str] | ArrayLike,
    *,
    seed: int,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """AUROC of model a minus model b on the same images: (difference, lower, upper).

    Both models meet the same draws of patients, so what the patients share cancels.

    Raises:
        DataError: as ``auroc_interval``.
    """
    a, target = _checked(scores_a, targets)
    b, _ = _checked(scores_b, targets)
    differences = np.concatenate(
        [
            _weighted_auroc(a, target, w) - _weighted_auroc(b, target, w)
            for w in _draws(patients, len(target), seed, draws)
        ]
    )
    return auroc(a, target) - auroc(b, target), *_interval(differences, level)


def _checked(
    scores: ArrayLike, targets: ArrayLike, *, every_label: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    score = np.asarray(scores, dtype=np.float64)
    target = np.asarray(targets).astype(np.int64)
    if score.ndim not in (1, 2) or target.ndim != 1 or len(score) != len(target) or len(target) == 0:
        raise DataError(
            f"Scores of shape {score.shape} do not go with targets of shape {target.shape}.",
            remedy="Give one row of scores and one label index for each image.",
        )
    if not np.isfinite(score).all():
        raise DataError(
            f"{int((~np.isfinite(score)).sum())} of the scores are not finite.",
            remedy="Look for a training that diverged.",
        )
    labels = 2 if score.ndim == 1 else score.shape[1]
    if target.min() < 0 or target.max() >= labels:
        raise DataError(
            f"The targets run from {target.min()} to {target.max()}, the scores are for {labels} labels.",
            remedy="Give label indices from 0.",
        )
    if every_label and (missing := sorted(set(range(labels)) - set(target.tolist()))):
        raise DataError(
            f"No image has label {', '.join(map(str, missing))} (counted from 0): the AUROC does not exist.",
            remedy="Measure on more images, or leave the label out of the task.",
        )
    return score, target


def _one_vs_rest(
    score: NDArray[np.float64], target: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    if score.ndim == 1:
        yield score, target == 1
    else:
        for k in range(score.shape[1]):
            yield score[:, k], target == k


def _draws(patients: Sequence[str] | ArrayLike, images: int, seed: int, draws: int) -> Iterator[NDArray[np.float64]]:
    """Yields blocks [D, N]: how often each image is in a draw of as many patients as there are."""
    ids = np.asarray(patients)
    if ids.shape != (images,):
        raise DataError(
            f"There are {images} images and patient ids of shape {ids.shape}.",
            remedy="Give each image's patient.",
        )
    distinct, of_image = np.unique(ids, return_inverse=True)
    n = len(distinct)
    rng = np.random.default_rng(seed)
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        times = rng.multinomial(n, np.full(n, 1 / n), size=size)
        yield times[:, of_image].astype(np.float64)


def _weighted_auroc(
    score: NDArray[np.float64], target: NDArray[np.int64], weight_DN: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUROC [D], each image counted as often as its weight says; NaN if a label has no weight."""
    areas = []
    for column, positive in _one_vs_rest(score, target):
        order = np.argsort(column, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(column[order]) > 0])  # one per distinct score
        weight = weight_DN[:, order]
        pos_DU = np.add.reduceat(weight * positive[order], starts, axis=1)
        neg_DU = np.add.reduceat(weight * ~positive[order], starts, axis=1)
        below = np.cumsum(neg_DU, axis=1) - neg_DU / 2
        pairs = pos_DU.sum(axis=1) * neg_DU.sum(axis=1)
        with np.errstate(invalid="ignore"):
            areas.append((pos_DU * below).sum(axis=1) / np.where(pairs > 0, pairs, np.nan))
    return np.asarray(np.mean(areas, axis=0))


def _interval(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    kept = values[np.isfinite(values)]
    if len(kept) * 2 < len(values) or len(kept) == 0:
        raise DataError(
            f"Only {len(kept)} of {len(values)} bootstrap draws hold every label: too few patients.",
            remedy="Measure on more patients, or report no interval.",
        )
    lower, upper = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)
