"""Who takes part in a step: Poisson sampling over patients, then at most K images of each.

Guarantee: every patient of the cohort is chosen independently with the public rate q, so the step is a Poisson-sampled
mechanism (unit: patient, adjacency: add or remove one). Nobody is dropped to save memory: a step may choose everybody,
and `train` walks over them in blocks. Which of a chosen patient's images enter is free: their mean gradient is clipped
as one. Masks and batch sizes are secret: drawn from the keystream, never logged, never sent.

Legend: U chosen patients, R their images.
"""

from collections.abc import Callable

import numpy as np

Uniform = Callable[[int], np.ndarray]  # count -> float64 in (0, 1]


def poisson(patients: int, rate: float, uniform: Uniform) -> np.ndarray:
    """Indices of the chosen patients, ascending; empty is a valid answer and its step is still taken."""
    # uniform() is a multiple of 2^-53 in (0, 1]: P(u <= rate) is the rate rounded down to one, never above what is
    # accounted; rate 1 takes everybody.
    return np.flatnonzero(uniform(patients) <= rate) if rate < 1 else np.arange(patients)


def images_of(chosen: np.ndarray, offsets: np.ndarray, most: int, uniform: Uniform) -> tuple[np.ndarray, list[int]]:
    """Rows of the chosen patients' images, at most `most` each, drawn uniformly without replacement.

    Args:
        chosen: patient indices.
        offsets: int64 of length patients + 1; patient i owns rows offsets[i] to offsets[i + 1].
        most: K.
        uniform: source of randomness.

    Returns:
        (rows, sizes): row indices, each patient's contiguous, and how many each patient has; a patient without images
        has size 0 and contributes nothing.
    """
    count_U = offsets[chosen + 1] - offsets[chosen]
    begin_U = np.cumsum(count_U) - count_U
    place_R = np.arange(count_U.sum())
    rows_R = place_R + np.repeat(offsets[chosen] - begin_U, count_U)
    if (count_U > most).any():
        # Ordered by a random key within each patient, who keep their places: the first `most` of each stay.
        order_R = np.lexsort((uniform(len(rows_R)), np.repeat(np.arange(len(chosen)), count_U)))
        rows_R = rows_R[np.sort(order_R[place_R - np.repeat(begin_U, count_U) < most])]
    return rows_R, np.minimum(count_U, most).tolist()
