import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedscan import partition
from fedscan_core.config import SiteRule
from fedscan_core.errors import ConfigError, DataError

NAMES = st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=60)
SITES = st.integers(1, 12)
ALPHA = st.sampled_from([1e-10, 0.01, 0.1, 0.5, 1.0, 100.0])
SEED = st.integers(0, 2**31)


def rng(seed):
    return np.random.default_rng(seed)


def everybody_once(parts, patients, sites):
    return len(parts) == sites and sorted(name for part in parts for name in part) == sorted(patients)


@given(NAMES, SITES, SEED)
def test_iid_deals_everybody_out_once_and_evenly(patients, sites, seed):
    parts = partition.iid(patients, sites, rng(seed))
    assert everybody_once(parts, patients, sites)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert partition.iid(patients, sites, rng(seed)) == parts


@given(NAMES, SITES, ALPHA, SEED)
def test_quantity_deals_everybody_out_once_and_leaves_no_site_empty(patients, sites, alpha, seed):
    parts = partition.quantity(patients, sites, alpha, rng(seed))
    assert everybody_once(parts, patients, sites)
    assert len(patients) < sites or all(parts)
    assert partition.quantity(patients, sites, alpha, rng(seed)) == parts


@given(NAMES, st.integers(1, 4), SITES, ALPHA, SEED)
def test_dirichlet_deals_everybody_out_once_and_every_label_everywhere(patients, labels, sites, alpha, seed):
    label_of = {patient: f"label {i % labels}" for i, patient in enumerate(patients)}
    parts = partition.dirichlet(label_of, sites, alpha, rng(seed))
    assert everybody_once(parts, patients, sites)
    for label in set(label_of.values()):
        if list(label_of.values()).count(label) >= sites:
            assert all(any(label_of[patient] == label for patient in part) for part in parts)


def test_patients_are_shuffled_and_the_seed_counts():
    patients = [f"p{i:03}" for i in range(200)]
    for deal in (
        lambda s: partition.iid(patients, 4, rng(s)),
        lambda s: partition.quantity(patients, 4, 1.0, rng(s)),
        lambda s: partition.dirichlet(dict.fromkeys(patients, "x"), 4, 1.0, rng(s)),
    ):
        parts = deal(1)
        assert deal(1) == parts and deal(2) != parts
        assert all(part != sorted(part) for part in parts if len(part) > 9)


def test_a_small_alpha_is_more_unequal():
    patients = [f"p{i}" for i in range(400)]

    def spread(alpha):
        sizes = [[len(part) for part in partition.quantity(patients, 4, alpha, rng(s))] for s in range(30)]
        return np.mean([np.std(one) for one in sizes])

    assert spread(0.1) > 2 * spread(5.0) > 2 * spread(1000.0) > 0

    def purity(alpha):
        label_of = {patient: str(i % 2) for i, patient in enumerate(patients)}
        shares = []
        for seed in range(30):
            for part in partition.dirichlet(label_of, 4, alpha, rng(seed)):
                ones = sum(label_of[patient] == "1" for patient in part) / len(part)
                shares.append(max(ones, 1 - ones))
        return np.mean(shares)

    assert purity(0.1) > 0.8 and purity(1000.0) < 0.6


@given(
    weights=st.lists(st.floats(1e-9, 1), min_size=1, max_size=12),
    total=st.integers(0, 500),
    at_least=st.sampled_from([0, 1, 3]),
)
def test_shares_add_up_and_stay_near(weights, total, at_least):
    share = np.array(weights) / sum(weights)
    sizes = partition._shares(share, total, at_least)
    floor = at_least if total >= at_least * len(weights) else 0
    assert sum(sizes) == total and min(sizes) >= floor
    free = total - floor * len(weights)
    assert all(abs(size - floor - free * s) <= 1 + 1e-9 for size, s in zip(sizes, share, strict=True))


def test_splits_are_70_10_20_and_fixed_by_patient_and_seed():
    names = [f"patient {i}" for i in range(5000)]
    splits = [partition.split_of(name, 0) for name in names]
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert splits.count(split) / len(names) == pytest.approx(share, abs=0.025)  # four standard deviations
    assert splits == [partition.split_of(name, 0) for name in names]
    assert splits != [partition.split_of(name, 1) for name in names]


def test_by_rules():
    north = SiteRule(name="north", members=("a", "b"))
    south = SiteRule(name="c")
    assert partition.by_rules([north, south], ["a", "b", "c", "left out"]) == {"a": north, "b": north, "c": south}
    with pytest.raises(ConfigError, match=r"'north' takes site 'b'") as caught:
        partition.by_rules([north], ["z", "a"])
    assert "a, z" in caught.value.remedy
    with pytest.raises(ConfigError, match="'a' is taken by two rules"):
        partition.by_rules([north, SiteRule(name="a")], ["a", "b"])


@given(
    st.lists(
        st.tuples(st.sampled_from("ABC"), st.sampled_from(["s1", "s2"]), st.sampled_from(["train", "test"])), max_size=6
    )
)
def test_check_whole_against_the_rule_said_plainly(images):
    torn = {a[0] for a in images for b in images if a[0] == b[0] and (a[1] != b[1] or a[2] != b[2])}
    if not torn:
        partition.check_whole(images)
        return
    with pytest.raises(DataError, match=f"Patient [{''.join(sorted(torn))}] is in two") as caught:
        partition.check_whole(images)
    assert caught.value.remedy


def test_check_whole_says_where_and_how_many():
    with pytest.raises(DataError, match=r"Patient A is in two sites \(s1, s2\); 2 such"):
        partition.check_whole([("A", "s1", "train"), ("A", "s2", "train"), ("B", "s1", "x"), ("B", "s2", "x")])
    with pytest.raises(DataError, match=r"Patient A is in two splits \(test, train\); 1 such"):
        partition.check_whole([("A", "s1", "train"), ("A", "s1", "test"), ("B", "s1", "x"), ("B", "s1", "x")])
