"""Which rows make which site, and every way in which a table can be wrong."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedscan import federation
from fedscan_client import cohort
from fedscan_client import site as sites
from fedscan_core.errors import ConfigError, DataError, FedscanError, PrivacyError


def planned(run, table):
    data = run.data.model_copy(update={"dir": str(table)})
    return federation.plan(run.model_copy(update={"data": data}))


def homes(found):
    """patient -> set of (site, split)."""
    result = defaultdict(set)
    for site in found:
        for row in site.rows:
            result[row.patient_id].add((site.name, row.split))
    return result


def test_sites_are_those_of_the_column_and_declare_their_training_patients(run_for, table):
    found = planned(run_for(), table)
    assert [site.name for site in found] == ["phantom_1", "phantom_2", "phantom_3"]
    for site in found:
        assert site.declared == len({row.patient_id for row in site.rows if row.split == "train"}) > 0
        assert site.trains


def test_a_table_needs_only_three_columns(run_for, table, edit):
    edit(lambda row: row, columns=["file", "patient_id", "label"])
    found = planned(run_for(simulation={"sites": 2}), table)
    assert [site.name for site in found] == ["site-1", "site-2"]
    assert Counter(row.split for site in found for row in site.rows).keys() == {"train", "val", "test"}
    assert all(len(places) == 1 for places in homes(found).values())


def test_another_label_column(run_for, table, edit):
    edit(lambda row: {**row, "ill": row["label"], "label": "nonsense"})
    found = planned(run_for(data={"label_column": "ill"}), table)
    assert {row.label for site in found for row in site.rows} == {"0", "1"}


def test_rules_merge_split_and_hold_out(run_for, table):
    rules = [
        {"name": "north", "members": ["phantom_1", "phantom_2"], "parts": 2},
        {"name": "south", "members": ["phantom_3"], "role": "evaluate"},
    ]
    found = planned(run_for(data={"sites": rules}), table)
    assert [(site.name, site.trains) for site in found] == [("north-1", True), ("north-2", True), ("south", False)]
    assert abs(found[0].declared - found[1].declared) <= 1
    assert all(len(places) == 1 for places in homes(found).values())


def test_rules_leave_out_what_they_do_not_name(run_for, table):
    found = planned(run_for(data={"sites": [{"name": "phantom_2"}]}), table)
    assert [site.name for site in found] == ["phantom_2"]


def test_a_patient_at_two_sites_is_refused_unless_the_sites_are_merged(run_for, table, edit):
    def move(row):
        return {**row, "patient_id": "P00000" if row["patient_id"] == "P00001" else row["patient_id"], "split": "train"}

    edit(move)
    with pytest.raises(DataError, match="P00000 is in two sites"):
        planned(run_for(), table)
    merged = [{"name": "all", "members": ["phantom_1", "phantom_2", "phantom_3"]}]
    assert len(planned(run_for(data={"sites": merged}), table)) == 1


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    how=st.sampled_from(["iid", "dirichlet", "quantity"]),
    count=st.integers(1, 5),
    alpha=st.floats(0.3, 50),
    seed=st.integers(0, 9),
)
def test_dealing_never_tears_a_patient_and_loses_nobody(run_for, drawn_table, how, count, alpha, seed):
    run = run_for(simulation={"partition": how, "sites": count, "alpha": alpha}, train={"seed": seed})
    found = planned(run, drawn_table)
    places = homes(found)
    assert len(places) == 60
    assert all(len(where) == 1 for where in places.values())
    if how == "iid":
        sizes = [site.declared for site in found]
        assert max(sizes) - min(sizes) <= 1


def test_label_skew_is_skewed(run_for, drawn_table):
    def spread(alpha):
        run = run_for(simulation={"partition": "dirichlet", "sites": 3, "alpha": alpha})
        shares = []
        for site in planned(run, drawn_table):
            labels = [int(row.label) for row in site.rows if row.split == "train"]
            shares.append(np.mean(labels))
        return np.std(shares)

    assert spread(0.3) > 2 * spread(1000.0)


BAD: dict[str, tuple[Any, dict[str, Any], type[FedscanError], str]] = {
    "no folder": (lambda folder: folder / "nowhere", {}, DataError, "There is no folder"),
    "no table": (lambda folder: folder, {"data": {"table": "other.csv"}}, DataError, "other.csv"),
    "label column": (lambda folder: folder, {"data": {"label_column": "ill"}}, DataError, "no column 'ill'"),
    "rule": (lambda folder: folder, {"data": {"sites": [{"name": "mars"}]}}, ConfigError, "'mars'"),
    "target": (
        lambda folder: folder,
        {"privacy": {"target_epsilon": 0.02}, "train": {"rounds": 5000}},
        PrivacyError,
        "Site 'phantom_1'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_names_the_thing_and_the_way_out(run_for, table, case):
    where, sections, kind, text = BAD[case]
    with pytest.raises(kind) as caught:
        planned(run_for(**sections), where(table))
    assert text in str(caught.value)
    assert caught.value.remedy
    assert caught.value.exit_code == 2


def test_no_data_at_all(run_for):
    with pytest.raises(ConfigError, match="--data"):
        federation.plan(run_for())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda row: {**row, "label": "7"} if row["patient_id"] == "P00004" else row, "Label '7'"),
        (lambda row: {**row, "file": "gone.png"} if row["patient_id"] == "P00004" else row, "gone.png"),
        (lambda row: {**row, "split": "val" if row["split"] == "train" else row["split"]}, "no patient to train on"),
        (lambda row: {**row, "site": ""} if row["patient_id"] == "P00004" else row, "gives no site"),
        (lambda row: {**row, "patient_id": ""} if row["patient_id"] == "P00004" else row, "no patient_id"),
    ],
)
def test_what_is_wrong_with_rows_is_named(run_for, table, edit, change, text):
    edit(change)
    with pytest.raises(DataError) as caught:
        planned(run_for(), table)
    assert text in str(caught.value)
    assert caught.value.remedy


def test_a_site_with_one_label_only_is_refused_when_its_images_are_read(run_for, table, edit, tmp_path):
    edit(lambda row: row if row["site"] != "phantom_2" or row["label"] == "1" else None)
    run = run_for(data={"dir": str(table)})
    with pytest.raises(DataError, match="'phantom_2' has only images of label 1"):
        federation.build(run, federation.plan(run), tmp_path / "sites", lambda done: None)


def test_an_image_that_is_none_is_refused_by_name(run_for, table, tmp_path):
    victim = sorted(table.glob("phantom_2/*.png"))[0]
    victim.write_bytes(b"not a picture")
    run = run_for(data={"dir": str(table)})
    with pytest.raises(DataError, match=victim.name):
        federation.build(run, federation.plan(run), tmp_path / "sites", lambda done: None)


def test_phantom_hospitals_come_through_the_agents_door(run_for, tmp_path):
    run = run_for(data={"source": "phantom"}, simulation={"sites": 2, "patients": 24})
    told: list[int] = []
    built = federation.build(run, federation.plan(run), tmp_path / "sites", told.append)
    assert told == [0, 1, 2]
    for site in built:
        assert (site.folder / "key").stat().st_mode & 0o777 == 0o600
        archive = tmp_path / "hospitals" / site.name / "dicom"
        names = {path.name for path in archive.iterdir()}
        parts = [cohort.load_patients(site, run, split) for split in ("train", "val", "test")]
        ids = [patient for part in parts for patient in part.ids]
        assert len(set(ids)) == len(ids)  # nobody in two splits
        assert 24 - 6 <= len(ids) <= 24 - 3  # without consent: one denied, one withdrew, one not in the register
        assert not names & set(ids)
        for path in (site.folder / "cache").rglob("*"):
            assert b"MRN-" not in (path.read_bytes() if path.is_file() else b"")
        assert sites.load(site.folder) == site


def test_who_never_trains_is_measured_on_everybody_but_those_for_tuning(run_for):
    assert federation.splits(run_for(), trains=True) == ("test",)
    assert federation.splits(run_for(), trains=False) == ("train", "test")
    assert federation.splits(run_for(evaluation={"split": "val"}), trains=False) == ("val",)
