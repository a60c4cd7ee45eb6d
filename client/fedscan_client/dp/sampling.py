"""Who takes part in a step: Poisson sampling over patients, then at most K images of each.

Guarantee: every patient of the cohort is chosen independently with the public rate q, so the step is a Poisson-sampled
mechanism (unit: patient, adjacency: add or remove one). Which of a chosen patient's images enter is free: their mean
gradient is clipped as one. Masks and batch sizes are secret: drawn from the keystream, never logged, never sent.
"""

from collections.abc import Callable

import numpy as np

Uniform = Callable[[int], np.ndarray]  # count -> float64 in (0, 1]


def poisson(patients: int, rate: float, uniform: Uniform) -> np.ndarray:
    """Indices of the chosen patients, ascending; empty is a valid answer and its step is still taken."""
    # uniform() is a multiple of 2^-53 in (0, 1], so P(u <= rate) is the rate to within 2^-53; rate 1 takes everybody.
    return np.flatnonzero(uniform(patients) <= rate) if rate < 1 else np.arange(patients)


def images_of(chosen: np.ndarray, offsets: np.ndarray, most: int, uniform: Uniform) -> tuple[np.ndarray, list[int]]:
    """Rows of the chosen patients' images, at most `most` each, drawn without replacement.

    Args:
        chosen: patient indices.
        offsets: int64 of length patients + 1; patient i owns rows offsets[i] to offsets[i + 1].
        most: K.
        uniform: source of randomness.

    Returns:
        (rows, sizes): row indices, each patient's contiguous, and how many each patient has; a patient without images
        has size 0 and contributes nothing.
    """
    rows: list[np.ndarray] = []
    sizes: list[int] = []
    for patient in chosen:
        first, last = int(offsets[patient]), int(offsets[patient + 1])
        own = np.arange(first, last)
        if len(own) > most:
            own = own[np.sort(np.argsort(uniform(len(own)))[:most])]
        rows.append(own)
        sizes.append(len(own))
    return (np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)), sizes
