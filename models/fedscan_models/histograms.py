"""Score histograms: how a site's release is laid out, and which metrics noisy ones still give, with intervals.

Layout of a release, all of it declared in [evaluation]: [CELLS, K, 2, BINS]. A cell is everybody, or one group of one
attribute ("sex F", "age 40-64", "sex unknown"); K one score for two labels, else one a label; 2 without and with the
label; BINS equal bins of [0, 1]. Everybody is one table; each attribute is another, whose cells share the patients out.

Intervals here are of noisy counts: every count is taken as its expectation plus Poisson sampling of patients plus
Gaussian noise of known size, and an interval is the set of values that a two-sided normal test does not reject
(test inversion: Wilson 1927 for a proportion, Fieller 1954 for a ratio of noisy sums, Hanley and McNeil 1982 with the
variance at the tested value, as Newcombe 2006, for the AUROC). No bootstrap: resampling counts that noise has made
negative is biased, this is not. A patient whose images fall into several bins counts as if all lay in one, which makes
intervals too wide, never too narrow. Nothing here adds noise or looks at a patient.

G groups of an attribute, B bins, T tested values.
"""

import itertools
import statistics
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedscan_core.config import Evaluation, RunConfig
from fedscan_core.errors import DataError
from fedscan_models import tasks

EVERYBODY = "all"
UNKNOWN = "unknown"
SEXES = ("F", "M", "O")  # DICOM PS3.3 C.7.1.1, and what de-identification keeps

_Z = 1.959964  # two-sided 95 %
_TESTED = np.linspace(0.0, 1.0, 2001)  # intervals are read off this grid, outwards
_DOUBT = 0.25  # of what a binormal curve says of the order inside the end bins
_FOLDED_MEAN = np.sqrt(2 / np.pi)  # of |N(0, 1)|


@dataclass(frozen=True)
class Cell:
    """One group of one attribute; everybody is the only group of the attribute "all"."""

    attribute: str
    group: str


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval, both within [0, 1]."""

    value: float
    low: float
    high: float


# ------------------------------------------------------------------------------------------------------------- layout


def cells(evaluation: Evaluation) -> tuple[Cell, ...]:
    """The declared cells in the order of the release's first axis: everybody, then each attribute's groups."""
    found = [Cell(EVERYBODY, EVERYBODY)]
    for attribute in evaluation.groups:
        found += [Cell(attribute, group) for group in (*_groups(evaluation, attribute), UNKNOWN)]
    return tuple(found)


def cells_of(evaluation: Evaluation, sex: str, age: float | None) -> tuple[int, ...]:
    """Where an image counts: one cell of each table. What is missing or not declared goes to "unknown"."""
    found, first = [0], 1
    for attribute in evaluation.groups:
        unknown = len(_groups(evaluation, attribute))
        if attribute == "sex":
            group = SEXES.index(sex) if sex in SEXES else unknown
        else:
            group = unknown if age is None or not 0 <= age < 200 else sum(age >= edge for edge in evaluation.age_edges)
        found.append(first + group)
        first += unknown + 1
    return tuple(found)


def shape(run: RunConfig) -> tuple[int, int, int, int]:
    """Shape of a release."""
    return (len(cells(run.evaluation)), tasks.outputs(run.task.labels), 2, run.evaluation.bins)


def share(run: RunConfig) -> float:
    """What one patient weighs in each table and score: w with tables * scores * w^2 = 1, the L2 norm of it all.

    All tables get the same share: each is then as precise as the others, and everybody's is the sharpest there can be
    without making every group's worse. `pooled` wins back a part from the groups.
    """
    return float(1 / np.sqrt((1 + len(run.evaluation.groups)) * tasks.outputs(run.task.labels)))


def _groups(evaluation: Evaluation, attribute: str) -> tuple[str, ...]:
    if attribute == "sex":
        return SEXES
    edges = evaluation.age_edges
    between = [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]
    return (f"0-{edges[0] - 1}", *between, f"{edges[-1]}+")


def pooled(evaluation: Evaluation, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Everybody's counts [K, 2, B] from all tables: each table's sum over its groups, weighted by its precision.

    The variance of an entry is that of one cell's entry, divided by the sum over tables of 1/G.
    """
    sums, weights = [counts[0]], [1.0]
    for group in (_members(evaluation, attribute) for attribute in evaluation.groups):
        sums.append(counts[group].sum(axis=0))
        weights.append(1 / len(group))
    return np.asarray(np.average(sums, axis=0, weights=weights))


def pooled_variance(evaluation: Evaluation, variance: float) -> float:
    """The noise variance of an entry of `pooled`, from that of an entry of the release."""
    return variance / (1.0 + sum(1 / len(_members(evaluation, attribute)) for attribute in evaluation.groups))


def _members(evaluation: Evaluation, attribute: str) -> list[int]:
    return [number for number, cell in enumerate(cells(evaluation)) if cell.attribute == attribute]


# ------------------------------------------------------------------------------------------------------------ metrics


def area(hist_2xB: ArrayLike, variance: float = 0.0) -> float | None:
    """AUROC from counts per score bin, which may be noisy.

    Pairs in one bin count as ties, corrected for what the neighbouring bins say of the order inside it (`_order`), and
    in the two end bins, where a sharp model's scores crowd, for what a binormal ROC curve through the edge says
    (`_won_at_the_end`). Bins at either end that do not stand out from the noise are left out (`_told`). Measured with
    10 bins, without noise: at most 0.005 off for binormal scores, spread over four bins or more or crowding at 0 and 1;
    0.007 for beta densities that rise to both ends, 0.02 for evidence with tails of Student's t of 3 degrees.

    Noisy counts are used as they are, negative ones too: clipping them first would pull the area downwards, and their
    noise averages out. The result is clipped to [0, 1].

    Args:
        hist_2xB: row 0 counts the negatives, row 1 the positives; bins in rising order of score.
        variance: of the noise of each entry.

    Returns:
        The area, or None if a row's total is zero or less.

    Raises:
        DataError: for another shape.
    """
    if min(row.sum() for row in _rows(hist_2xB)) <= 0:
        return None
    negative, positive = _told(hist_2xB, variance)
    won = positive @ _order(len(negative)) @ negative / (negative.sum() * positive.sum())
    return float(np.clip(won + _at_the_ends(negative, positive), 0.0, 1.0))


def _at_the_ends(negative: NDArray[np.float64], positive: NDArray[np.float64]) -> float:
    """What the end bins' curve adds to the area, instead of the tie and of their half of what `_order` corrects."""
    if len(negative) < 2:
        return 0.0
    n_B, p_B = negative / negative.sum(), positive / positive.sum()
    top = p_B[-1] * n_B[-1] * (_won_at_the_end(n_B[-1], p_B[-1]) - 0.5)
    bottom = p_B[0] * n_B[0] * (_won_at_the_end(p_B[0], n_B[0]) - 0.5)
    slopes = p_B[-1] * n_B[-2] - p_B[-2] * n_B[-1] + p_B[1] * n_B[0] - p_B[0] * n_B[1]
    return float(top + bottom - slopes / 24)


def _told(hist_2xB: ArrayLike, variance: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two rows without the bins at either end that hold no more than noise.

    From each end inwards until the sum of both rows is two standard deviations of its noise above zero: the lever of
    the outermost bins on the area is the longest. Looks at noisy counts only. All bins where nothing stands out.
    """
    negative, positive = _rows(hist_2xB)
    seen = np.array([negative + positive, (negative + positive)[::-1]]).cumsum(axis=1)
    clear = seen > 2 * np.sqrt(2 * variance * np.arange(1, len(negative) + 1))
    first, last = clear.argmax(axis=1)
    inside = slice(first, len(negative) - last)
    if not clear.any(axis=1).all() or negative[inside].sum() <= 0 or positive[inside].sum() <= 0:
        return negative, positive
    return negative[inside], positive[inside]


def _won_at_the_end(f: float, t: float) -> float:
    """Share of pairs in the top bin whose positive is above, from the shares f of negatives and t of positives in it.

    Under the binormal ROC curve of equal variances through (f, t), Phi(Phi^-1(u) + d): its area up to f over f t
    (Metz 1978). The scale of the scores does not enter. The bottom bin is the same with the two labels swapped.
    """
    if not (0.005 < f < 0.995 and 0.005 < t < 0.995):
        return 0.5
    normal = statistics.NormalDist()
    d = min(max(normal.inv_cdf(t) - normal.inv_cdf(f), -3.0), 3.0)
    height = statistics.fmean(normal.cdf(normal.inv_cdf(f * (i + 0.5) / 32) + d) for i in range(32))
    return min(height / t, 1.0)


def _order(bins: int) -> NDArray[np.float64]:
    """[B, B] how far a positive in the row's bin is above a negative in the column's: 1, 1/2 in the same one, or 0.

    Plus 1/12 one bin above and minus 1/12 one below. Where both densities are linear across a bin, with slopes a and b
    relative to their means, a positive of that bin is above a negative of it with probability 1/2 + (a - b) / 12;
    with slopes from the neighbours' counts this sums to just that. It stays linear in either row: noise averages out.
    """
    step = np.eye(bins, k=-1) - np.eye(bins, k=1)
    return np.tril(np.ones((bins, bins)), -1) + np.eye(bins) / 2 + step / 12


def auroc(hist_2xB: ArrayLike, variance: float) -> Estimate | None:
    """`area` with an interval for the area in the population, with a doubt about the end bins' curve.

    The noise counts for all bins, also for those that `area` leaves out: who is in them is not known. The curve's part
    of the area counts as known to a standard deviation of a quarter of it.

    Args:
        hist_2xB: as in `area`, in patients.
        variance: of the noise of each entry, in patients squared.
    """
    value = area(hist_2xB, variance)
    if value is None:
        return None
    negative, positive = _rows(hist_2xB)
    pairs = positive.sum() * negative.sum()
    of_curve = (_DOUBT * _at_the_ends(*_told(hist_2xB, variance))) ** 2
    sampling = _sampling_variance(_TESTED, positive.sum(), negative.sum())
    spread_T = np.sqrt(sampling + area_noise(hist_2xB, variance) + of_curve)
    low, high = _accepted((value - _TESTED) * pairs, spread_T * pairs)
    return Estimate(value, low, high)


def area_noise(hist_2xB: ArrayLike, variance: float, tested_T: NDArray[np.float64] = _TESTED) -> NDArray[np.float64]:
    """Variance [T] that the noise alone gives the area, were the area each tested value.

    The statistic is sum_bc positive_b negative_c (k_bc - t) with k from `_order`: linear in either row, so its variance
    follows from the row sums and, for noise on both rows at once, the sum of squares. Squared sums of noisy counts come
    out too large on average. All bins count,
    and the end bins' pairs as ties: it is at least what the noise does to `area`, but for the curve's small part.
    """
    negative, positive = _rows(hist_2xB)
    bins = len(negative)
    k_BB = _order(bins)
    by_positive = k_BB @ negative - tested_T[:, None] * negative.sum()
    by_negative = positive @ k_BB - tested_T[:, None] * positive.sum()
    both = ((k_BB - tested_T[:, None, None]) ** 2).sum(axis=(1, 2))
    total = variance * ((by_positive**2).sum(axis=1) + (by_negative**2).sum(axis=1)) + variance**2 * both
    return np.asarray(total / (negative.sum() * positive.sum()) ** 2)


def _sampling_variance(t_T: NDArray[np.float64], positives: float, negatives: float) -> NDArray[np.float64]:
    """Of an area of t from so many positives and negatives (Hanley and McNeil 1982)."""
    above, below = t_T / (2 - t_T), 2 * t_T**2 / (1 + t_T)
    spread = t_T * (1 - t_T)
    more = max(positives - 1, 0.0) * (above - t_T**2) + max(negatives - 1, 0.0) * (below - t_T**2)
    return np.asarray((spread + more) / (positives * negatives))


def rate(hits: ArrayLike, misses: ArrayLike, variance: float) -> Estimate | None:
    """Share of hits among hits and misses, from noisy counts: Wilson's interval, with the noise.

    Args:
        hits: bins that count as hits, [any]; sensitivity: positives at or above the threshold.
        misses: the other bins of the same row.
        variance: of the noise of each entry.

    Returns:
        None if the total is zero or less.
    """
    hit, miss = np.atleast_1d(np.asarray(hits, float)), np.atleast_1d(np.asarray(misses, float))
    total = hit.sum() + miss.sum()
    if total <= 0:
        return None
    value = float(np.clip(hit.sum() / total, 0.0, 1.0))
    # hits - t * total has mean 0 at the true t, however noisy the total is.
    sampling = total * _TESTED * (1 - _TESTED)
    noise = variance * ((1 - _TESTED) ** 2 * len(hit) + _TESTED**2 * len(miss))
    low, high = _accepted((value - _TESTED) * total, np.sqrt(sampling + noise))
    return Estimate(value, low, high)


def ece(hist_2xB: ArrayLike, variance: float) -> Estimate | None:
    """Expected calibration error: mean over patients of |share of positives in the bin - centre of the bin|.

    A bin's mean score is not released, so its centre stands for it: the result is at most half a bin's width
    (1 / (2 B)) from the one with mean scores, by the triangle inequality.

    With c the centre, d = (1 - c) positives - c negatives of a bin, it is sum |d| / N. Noise makes |d| too large, so
    the value takes the root of d^2 - variance(d) where that is positive. The interval holds whatever the signs of the
    true d are: upwards because sum |noisy d| is at least the sum under the true signs, which is unbiased; downwards
    because it is at most sum |true d| + sum |error|, whose mean and variance are a folded normal's. It is wider than
    it would have to be where the truth is near 0.

    Args:
        hist_2xB: as in `area`.
        variance: of the noise of each entry.

    Returns:
        None if the total is zero or less.
    """
    negative, positive = _rows(hist_2xB)
    total, bins = negative.sum() + positive.sum(), len(negative)
    if total <= 0:
        return None
    c_B = (np.arange(bins) + 0.5) / bins
    d_B = (1 - c_B) * positive - c_B * negative
    unbiased = np.sqrt(np.maximum(0.0, d_B**2 - variance * ((1 - c_B) ** 2 + c_B**2)))
    positive_v, negative_v = np.maximum(positive, 0.0) + variance, np.maximum(negative, 0.0) + variance
    t_T1 = _TESTED[:, None]
    either_sign = [
        (sign * (1 - c_B) - t_T1) ** 2 * positive_v + (sign * c_B + t_T1) ** 2 * negative_v for sign in (1, -1)
    ]
    upwards = np.sqrt(np.maximum(*either_sign).sum(axis=1))
    error_B = (1 - c_B) ** 2 * positive_v + c_B**2 * negative_v
    folded = (1 - _FOLDED_MEAN**2) * error_B.sum() + _TESTED**2 * (positive_v + negative_v).sum()
    too_large = np.abs(d_B).sum() - _TESTED * total
    high = _TESTED[too_large >= -_Z * upwards].max()
    not_low = _TESTED[too_large <= _FOLDED_MEAN * np.sqrt(error_B).sum() + _Z * np.sqrt(folded)]
    value = float(min(unbiased.sum() / total, 1.0))
    return Estimate(value, min(value, float(not_low.min(initial=1.0))), max(value, float(high)))


def _accepted(off_T: NDArray[np.float64], spread_T: NDArray[np.float64]) -> tuple[float, float]:
    """Ends of the set of tested values whose distance from what was seen is within _Z spreads; one step outwards."""
    inside = np.flatnonzero(np.abs(off_T) <= _Z * spread_T + np.abs(off_T).min())
    return float(_TESTED[max(inside[0] - 1, 0)]), float(_TESTED[min(inside[-1] + 1, len(_TESTED) - 1)])


def _rows(hist_2xB: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    hist = np.asarray(hist_2xB, dtype=np.float64)
    if hist.ndim != 2 or hist.shape[0] != 2 or hist.shape[1] < 1:
        raise DataError(
            f"A score histogram has 2 rows, not the shape {hist.shape}.",
            remedy="Give one row of negatives and one of positives.",
        )
    return hist[0], hist[1]
