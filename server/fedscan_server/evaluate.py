"""Metrics from what the sites release: their noisy score histograms, summed. Never an average of the sites' AUROCs.

All of it is post-processing: it costs no privacy beyond what `fedscan_client.evaluate` charged. Suppression looks at
noisy counts only. An image weighs 1 over its patient's images, so every figure is about patients; an interval is for
what the model would do in the sites' population: it includes the noise and the drawing of patients, and for the AUROC
a doubt about the order inside the end bins; otherwise not the binning.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedscan_core.config import RunConfig
from fedscan_models import histograms
from fedscan_models.histograms import Estimate

PRIVATE, WITHHELD = "private", "withheld"
# Why a figure is withheld: constants, decided on noisy counts.
NO_ANSWER = "no site answered the evaluation"
FEW_POSITIVES = "too few patients with the label to stand out from the noise"
FEW_NEGATIVES = "too few patients without the label to stand out from the noise"

_LIMIT = 2.0**40  # more patients than there are
_CLEAR = 3.0  # a noisy total must be this many of its noise's standard deviations

Grid = NDArray[np.float64]


def fits(run: RunConfig, histogram: np.ndarray | None) -> bool:
    """Whether a reply's histogram has the declared shape and type, is finite and within bounds."""
    if histogram is None or histogram.shape != histograms.shape(run) or histogram.dtype != np.float64:
        return False
    return bool((np.abs(histogram) < _LIMIT).all())  # false for NaN


def private_metrics(run: RunConfig, released: Sequence[np.ndarray], noise: Sequence[float]) -> dict[str, Any]:
    """The private metrics of everybody and of each declared group, from the sum over sites.

    With more than two labels every figure is the mean over labels, each against the rest; the interval is the mean of
    the labels' intervals, which holds however they hang together.

    Args:
        run: the experiment.
        released: [CELLS, K, 2, BINS] noisy counts, one per site that answered; see `fedscan_models.histograms`.
        noise: standard deviation of each of them's noise, in the same order.

    Returns:
        "auroc_private": everybody's AUROC, its interval `low` to `high`, and `noise_sd`, how far the noise alone moves
        it; "private_evaluation": the declarations and one entry a cell. A withheld figure has the value None, the
        status "withheld" and a `reason`.
    """
    declared = run.evaluation
    share = histograms.share(run)
    counts = np.sum(released, axis=0) / share if len(released) else np.zeros(histograms.shape(run))
    variance = float(np.sum(np.square(noise))) / share**2
    entries = []
    for cell, count, spread in zip(
        histograms.cells(declared),
        [histograms.pooled(declared, counts), *counts[1:]],
        [histograms.pooled_variance(declared, variance), *[variance] * (len(counts) - 1)],
        strict=True,
    ):
        figures = _figures(run, count, spread) if len(released) else dict.fromkeys(_NAMES, _withheld(NO_ANSWER))
        entries.append({**dataclasses.asdict(cell), **_patients(count, spread, len(released)), **figures})
    return {
        "auroc_private": {**entries[0]["auroc"], "sites": len(released)},
        "private_evaluation": {
            "split": declared.split,
            "sites": len(released),
            "bins": declared.bins,
            "threshold": declared.threshold,
            "confidence": 0.95,
            "ece_binning_at_most": 0.5 / declared.bins,
            "cells": entries,
        },
    }


_NAMES = ("auroc", "sensitivity", "specificity", "ece")


def _figures(run: RunConfig, count_K2B: Grid, variance: float) -> dict[str, dict[str, Any]]:
    edge = round(run.evaluation.threshold * run.evaluation.bins)
    clear = _CLEAR * np.sqrt(variance * count_K2B.shape[2])
    totals = count_K2B.sum(axis=2).min(axis=0)  # of the label that has fewest
    negatives = None if totals[0] > clear else FEW_NEGATIVES
    positives = None if totals[1] > clear else FEW_POSITIVES
    both = positives or negatives

    def mean(measure: Callable[[Grid], Estimate | None], reason: str | None) -> dict[str, Any]:
        found = [measure(block) for block in count_K2B] if reason is None else []
        known = [one for one in found if one is not None]
        if reason is not None or len(known) < len(found):
            return _withheld(reason or FEW_POSITIVES)
        value, low, high = np.mean([dataclasses.astuple(one) for one in known], axis=0).tolist()
        return {"value": value, "low": low, "high": high, "status": PRIVATE}

    area = mean(lambda block: histograms.auroc(block, variance), both)
    if area["value"] is not None:
        at = np.array([area["value"]])
        noise = [float(histograms.area_noise(block, variance, at)[0]) for block in count_K2B]
        area["noise_sd"] = float(np.sqrt(np.sum(noise))) / len(noise)  # the labels' noise is independent
    return {
        "auroc": area,
        "sensitivity": mean(lambda block: histograms.rate(block[1, edge:], block[1, :edge], variance), positives),
        "specificity": mean(lambda block: histograms.rate(block[0, :edge], block[0, edge:], variance), negatives),
        "ece": mean(lambda block: histograms.ece(block, variance), both),
    }


def _withheld(reason: str) -> dict[str, Any]:
    return {"value": None, "status": WITHHELD, "reason": reason}


def _patients(count_K2B: Grid, variance: float, sites: int) -> dict[str, Any]:
    """The noisy number of patients, and its noise's standard deviation."""
    if not sites:
        return {"patients": None, "patients_noise_sd": None}
    entries = count_K2B[0].size
    return {
        "patients": round(float(count_K2B.sum()) / len(count_K2B), 1),
        "patients_noise_sd": round(float(np.sqrt(variance * entries / len(count_K2B))), 1),
    }
