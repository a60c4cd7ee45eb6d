"""Metrics from what the sites release: their noisy score histograms, summed. Never an average of the sites' AUROCs.

All of it is post-processing: it costs no privacy beyond what `fedscan_client.evaluate` charged.
"""

from typing import Any

import numpy as np

from fedscan_core.config import RunConfig
from fedscan_models import tasks

_DRAWS = 200
_LIMIT = 2.0**40  # more patients than there are


def fits(run: RunConfig, histogram: np.ndarray | None) -> bool:
    """Whether a reply's histogram has the declared shape and type, is finite and within bounds."""
    shape = tasks.histogram_shape(run.task.labels, run.evaluation.bins)
    if histogram is None or histogram.shape != shape or histogram.dtype != np.float64:
        return False
    return bool((np.abs(histogram) < _LIMIT).all())  # false for NaN


def private_metrics(histograms: list[np.ndarray], noise: list[float]) -> dict[str, Any]:
    """`auroc_private` from the sum over sites, with how far its noise alone moves it.

    Args:
        histograms: [K, 2, bins] noisy counts, one per site that answered.
        noise: standard deviation of each of them's noise, in the same order.

    Returns:
        {"auroc_private": {"value", "noise_sd", "status", "sites"}}; value is None and status "withheld" where a
        class's noisy total is not clearly above its noise. `noise_sd` is from redrawing noise of the same size.
    """
    if not histograms:
        return {"auroc_private": {"value": None, "status": "withheld", "sites": 0}}
    total = np.sum(histograms, axis=0)
    scale = float(np.sqrt(np.sum(np.square(noise))))
    bins = total.shape[2]
    clear = bool((total.sum(axis=2) > 3 * scale * np.sqrt(bins)).all())
    value = _mean_auroc(total)
    if value is None or not clear:
        return {"auroc_private": {"value": None, "status": "withheld", "sites": len(histograms)}}
    rng = np.random.default_rng(0)
    redrawn = [_mean_auroc(total + rng.normal(0, scale, total.shape)) for _ in range(_DRAWS)]
    spread = float(np.std([v for v in redrawn if v is not None] or [0.0]))
    return {"auroc_private": {"value": value, "noise_sd": spread, "status": "private", "sites": len(histograms)}}


def _mean_auroc(total: np.ndarray) -> float | None:
    values = [tasks.auroc_from_histogram(block) for block in total]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
