"""Poisson sampling at the public rate, and at most K images of each chosen patient.

The stream is secret, so no seed can be fixed: every single check is set for a false alarm below one in 10^8, 200 in a
run, or it is given its uniforms and is exact.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from fedscan_client.dp import sampling
from fedscan_client.dp.noise import SecretStream

P = 1e-9
uniforms = st.integers(1, 2**53).map(lambda k: k * 2.0**-53)  # all that a stream gives


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_every_patient_is_chosen_at_the_rate(rate):
    """A patient's count over T draws is binomial; so are the whole and each pair's."""
    patients, draws = 20, 4000
    stream = SecretStream()
    chosen = np.zeros((draws, patients), bool)
    for row in chosen:
        row[sampling.poisson(patients, rate, stream.uniform)] = True
    for count in chosen.sum(0):
        assert stats.binomtest(int(count), draws, rate).pvalue > P
    assert stats.binomtest(int(chosen.sum()), draws * patients, rate).pvalue > P
    for other in range(1, patients):  # independent: neither a fixed batch size nor neighbours together
        both = int((chosen[:, 0] & chosen[:, other]).sum())
        assert stats.binomtest(both, draws, rate**2).pvalue > P


def test_the_batch_size_varies_as_that_of_a_poisson_sample_does():
    sizes = np.array([len(sampling.poisson(50, 0.5, SecretStream().uniform)) for _ in range(2000)])
    spread = sizes.var(ddof=1) / (50 * 0.25)
    assert abs(spread - 1) < 6.2 * np.sqrt(2 / 2000)


def test_nobody_is_dropped_however_many_there_are():
    """No cap: at a rate next to one nearly all of a large cohort are there."""
    chosen = sampling.poisson(200_000, 0.999, SecretStream().uniform)
    assert stats.binomtest(len(chosen), 200_000, 0.999).pvalue > P
    assert (np.diff(chosen) > 0).all()


@given(st.lists(uniforms, min_size=1, max_size=30), st.floats(0, 1, exclude_min=True), st.data())
def test_a_patient_is_chosen_by_their_own_uniform_and_by_nothing_else(own, rate, data):
    """With one patient removed, everybody else, whose uniforms are what they were, is chosen as before."""
    gone = data.draw(st.integers(0, len(own) - 1))
    rest = own[:gone] + own[gone + 1 :]
    whole = sampling.poisson(len(own), rate, lambda count: np.array(own)[:count])
    without = sampling.poisson(len(rest), rate, lambda count: np.array(rest)[:count])
    assert [i - (i > gone) for i in whole if i != gone] == without.tolist()


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
@example(0.1)
@example(2.0**-53)
@example(2.0**-60)
@example(1 - 2.0**-53)
def test_the_rate_is_exact_to_2_to_the_minus_53_and_never_exceeded(rate):
    """Of the 2^53 equally likely uniforms exactly floor(rate 2^53) choose a patient: the edge lies there."""
    count = math.floor(rate * 2**53)  # exact: a product with a power of two
    edge = np.array([count * 2.0**-53, (count + 1) * 2.0**-53])
    assert sampling.poisson(2, rate, lambda _: edge).tolist() == [0]
    assert 0 <= rate - count * 2.0**-53 < 2.0**-53


def test_rate_one_takes_everybody_and_asks_for_no_randomness():
    assert sampling.poisson(7, 1.0, lambda count: 1 / 0).tolist() == list(range(7))  # type: ignore[arg-type,return-value]


def test_the_rate_is_a_bound_that_counts():
    assert sampling.poisson(3, 0.5, lambda count: np.array([0.5, np.nextafter(0.5, 1), 2.0**-53])).tolist() == [0, 2]


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_nobody(rate):
    assert sampling.poisson(0, rate, SecretStream().uniform).tolist() == []
    rows, sizes = sampling.images_of(np.empty(0, np.int64), np.zeros(1, np.int64), 3, SecretStream().uniform)
    assert rows.tolist() == [] and rows.dtype == np.int64 and sizes == []


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 6), st.data())
def test_at_most_k_images_without_repetition_each_patients_side_by_side(sizes, most, data):
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1)))), np.int64)
    rows, taken = sampling.images_of(chosen, offsets, most, SecretStream().uniform)
    assert len(rows) == sum(taken) == len(set(rows.tolist())) and len(taken) == len(chosen)
    start = 0
    for patient, size in zip(chosen, taken, strict=True):
        own = rows[start : start + size]
        assert size == min(most, sizes[patient])
        assert ((own >= offsets[patient]) & (own < offsets[patient + 1])).all()
        assert (np.diff(own) > 0).all()
        start += size


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 99))
def test_it_takes_each_patients_smallest_keys(sizes, most, seed):
    """The plain loop: a patient's images with the K smallest uniforms."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    keys = np.random.default_rng(seed).random(sum(sizes))
    rows, _ = sampling.images_of(np.arange(len(sizes)), offsets, most, lambda count: keys)
    expected = []
    for first, last in itertools.pairwise(offsets):
        expected += sorted((first + np.argsort(keys[first:last])[:most]).tolist())
    assert rows.tolist() == expected


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_every_set_of_a_patients_images_is_as_likely(most):
    """Exact over the subsets of five images, for 20000 such patients among others with none, fewer and more."""
    sizes = np.tile([5, 0, 1, 7], 20_000)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rows, taken = sampling.images_of(np.arange(len(sizes)), offsets, most, SecretStream().uniform)
    patient = np.repeat(np.arange(len(sizes)), taken)
    five = patient % 4 == 0
    sets = (rows[five] - offsets[patient[five]]).reshape(-1, most)
    codes = (2**sets).sum(1)
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == math.comb(5, most) and counts.sum() == 20_000
    assert stats.chisquare(counts).pvalue > P
    # Neighbours' choices are independent too.
    pairs = np.unique(codes[:-1:2] * 32 + codes[1::2], return_counts=True)[1]
    assert len(pairs) == math.comb(5, most) ** 2 and stats.chisquare(pairs).pvalue > P
