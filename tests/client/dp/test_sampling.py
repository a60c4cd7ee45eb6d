"""Poisson sampling at the public rate, and at most K images of each chosen patient."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedscan_client.dp import sampling
from fedscan_client.dp.noise import SecretStream


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_every_patient_is_chosen_at_the_rate(rate):
    """A patient's count over T draws is binomial; so are the whole and each pair's. False alarm below 1e-6."""
    patients, draws = 20, 4000
    stream = SecretStream()
    chosen = np.zeros((draws, patients), bool)
    for row in chosen:
        row[sampling.poisson(patients, rate, stream.uniform)] = True
    for count in chosen.sum(0):
        assert stats.binomtest(int(count), draws, rate).pvalue > 1e-8
    assert stats.binomtest(int(chosen.sum()), draws * patients, rate).pvalue > 1e-7
    for other in range(1, patients):  # independent: neither a fixed batch size nor neighbours together
        both = int((chosen[:, 0] & chosen[:, other]).sum())
        assert stats.binomtest(both, draws, rate**2).pvalue > 1e-8


def test_the_batch_size_varies_as_that_of_a_poisson_sample_does():
    sizes = np.array([len(sampling.poisson(50, 0.5, SecretStream().uniform)) for _ in range(2000)])
    spread = sizes.var(ddof=1) / (50 * 0.25)
    assert abs(spread - 1) < 5.5 * np.sqrt(2 / 2000)


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
        start += size


def test_every_image_of_a_patient_has_the_same_chance():
    offsets, stream, draws = np.array([0, 2, 7]), SecretStream(), 4000
    counts = np.zeros(7)
    for _ in range(draws):
        rows, sizes = sampling.images_of(np.array([1]), offsets, 2, stream.uniform)
        assert sizes == [2]
        counts[rows] += 1
    assert counts[:2].sum() == 0
    for count in counts[2:]:
        assert stats.binomtest(int(count), draws, 2 / 5).pvalue > 1e-7
