"""Patients as tensors: who is in, in which order, and that one bad image spoils itself only."""

import csv
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedscan_client import cohort
from fedscan_client.cohort import TABLE, load_patients, split_of
from fedscan_client.intake import pictures
from fedscan_client.site import Source
from fedscan_core.errors import DataError
from fedscan_models import registry, scatter

ROWS = [  # on purpose not patient by patient
    ("b", "ill", "train", 0),
    ("a", "well", "train", 1),
    ("b", "1", "train", 2),
    ("c", "1.0", "train", 3),
    ("a", "0", "train", 4),
    ("d", "ill", "test", 5),
]


def edit(site, change):
    """Rewrites cohort.csv, row by row."""
    with (site.folder / TABLE).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        change(number, row)
    with (site.folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, cohort.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    cohort.forget()


def picture(site, seed):
    return pictures.load_image(site.source.folder / f"canary-file-{seed}.png", size=(16, 16), channels=1)


@pytest.mark.parametrize(("text", "index"), [("well", 0), ("ill", 1), ("0", 0), ("1", 1), ("1.0", 1)])
def test_labels_by_name_or_number(text, index):
    assert cohort.label_index(text, ("well", "ill")) == index


def test_a_name_goes_before_a_number():
    assert cohort.label_index("0", ("1", "0")) == 1


@pytest.mark.parametrize("text", ["", "sick", "2", "-1", "0.5", "nan", "inf", "-inf", "1e400", "ILL"])
def test_labels_outside_the_declared_set(text):
    with pytest.raises(DataError, match="declared"):
        cohort.label_index(text, ("well", "ill"))


def test_each_patients_images_lie_side_by_side(make_site, make_run, tmp_path):
    site = make_site(tmp_path / "s", rows=ROWS)
    patients = load_patients(site, make_run(), "train")
    assert patients.ids == ("a", "b", "c") and len(patients) == 3
    assert patients.offsets.tolist() == [0, 2, 4, 5] and patients.offsets.dtype == np.int64
    assert patients.targets.tolist() == [0, 0, 1, 1, 1] and patients.targets.dtype == torch.int64
    assert torch.equal(patients.inputs, torch.from_numpy(np.stack([picture(site, s) for s in (1, 4, 0, 2, 3)])))
    assert patients.left_out == ()
    assert load_patients(site, make_run(), "test").ids == ("d",)


def test_sex_and_age_are_each_images_own_whatever_is_written_there(make_site, make_run, tmp_path):
    site = make_site(tmp_path / "s", rows=ROWS)
    written = [("M", "41"), (" f", "39.5"), ("", ""), ("woman", "old"), ("F", "nan"), ("M", "1e999"), ("O", "7")]
    edit(site, lambda number, row: row.update(zip(("sex", "age"), written[number], strict=False)))
    found = load_patients(site, make_run(), "train")
    assert found.left_out == () and len(found.groups) == len(found.targets) == 5
    by_image = {row[3]: text for row, text in zip(ROWS, written, strict=False)}
    read = dict(zip((1, 4, 0, 2, 3), found.groups, strict=True))  # sorted by patient, as above
    assert {seed: sex for seed, (sex, _) in read.items()} == {s: by_image[s][0].strip().upper() for s in read}
    for seed, (_, age) in read.items():
        text = by_image[seed][1]
        assert (age is None) == (text in ("", "old")) and (age is None or str(float(text)) == str(age))


def test_images_as_units_are_one_each(make_site, make_run, tmp_path):
    site = make_site(tmp_path / "s", rows=ROWS)
    run = make_run(privacy={"unit": "image"})
    patients = load_patients(site, run, "train")
    assert patients.offsets.tolist() == [0, 1, 2, 3, 4, 5] and len(set(patients.ids)) == 5
    assert torch.equal(patients.inputs, load_patients(site, make_run(), "train").inputs)
    assert len(load_patients(site, make_run(), "train")) == 3  # kept apart in memory


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (2, {"label": "sick"}),
        (2, {"label": "inf"}),
        (2, {"label": "1e999"}),
        (2, {"file": "absent.png"}),
        (2, {"index": "first"}),
        (2, {"index": "7"}),
    ],
)
def test_an_image_that_cannot_be_used_spoils_itself_only(make_site, make_run, tmp_path, number, change):
    """If it stopped the round, the round's failure would tell something about that patient."""
    site = make_site(tmp_path / "s", rows=ROWS)
    edit(site, lambda n, row: row.update(change if n == number else {}))
    patients = load_patients(site, make_run(), "train")
    assert patients.ids == ("a", "b", "c") and patients.offsets.tolist() == [0, 2, 3, 4]
    assert len(patients.left_out) == 1
    assert torch.equal(patients.inputs[2], torch.from_numpy(picture(site, 0)))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", None], ids=["empty", "header only", "half"])
def test_a_damaged_picture_is_left_out(make_site, make_run, tmp_path, data):
    site = make_site(tmp_path / "s", rows=ROWS)
    path = site.source.folder / "canary-file-3.png"
    path.write_bytes(path.read_bytes()[:60] if data is None else data)
    patients = load_patients(site, make_run(), "train")
    assert patients.ids == ("a", "b") and len(patients.inputs) == 4 and len(patients.left_out) == 1


def test_nobody_left(make_site, make_run, tmp_path):
    site = make_site(tmp_path / "s", rows=[("a", "sick", "train", 0)])
    for split in ("train", "val"):
        patients = load_patients(site, make_run(), split)
        assert len(patients) == 0 and patients.offsets.tolist() == [0] and len(patients.targets) == 0


def test_npz_rows(make_site, make_run, tmp_path):
    site = make_site(tmp_path / "s", rows=ROWS)
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16), np.uint8)
    np.savez(site.source.folder / "all.npz", images=images)
    edit(site, lambda n, row: row.update(file="all.npz", index=str(5 - n)))
    patients = load_patients(site, make_run(), "train")
    assert np.allclose(patients.inputs[:, 0].numpy(), images[[4, 1, 5, 3, 2]] / np.float32(255))


def test_fixed_features_are_those_of_each_image_alone(make_site, make_run, tmp_path):
    rows = [(f"p{n:03d}", "ill", "train", n) for n in range(70)]  # more than go through at once
    site = make_site(tmp_path / "s", rows=rows)
    run = make_run(model={"name": "scatter"}, task={"labels": ["well", "ill"], "image_size": [32, 32]})
    inputs = load_patients(site, run, "train").inputs
    assert len(inputs) == 70
    for number in (0, 63, 64, 69):
        image = pictures.load_image(site.source.folder / f"canary-file-{number}.png", size=(32, 32), channels=1)
        assert torch.equal(inputs[number], scatter.features(torch.from_numpy(image[None]))[0])


def test_a_cohort_is_read_once_until_forgotten(make_site, make_run, tmp_path):
    site = make_site(tmp_path / "s", rows=ROWS)
    first = load_patients(site, make_run(), "train")
    assert load_patients(site, make_run(train={"rounds": 9}), "train") is first
    cohort.forget()
    assert load_patients(site, make_run(), "train") is not first


def test_split_is_a_keyed_hash_fixed_for_ever():
    key = bytes(range(32))
    assert [split_of(key, f"patient-{n}") for n in range(12)] == PINNED
    other = [split_of(b"other", f"patient-{n}") for n in range(400)]
    assert other != [split_of(key, f"patient-{n}") for n in range(400)]


PINNED = ["test", "train", "train", "test", "val", "train", "train", "test", "test", "train", "train", "train"]


def test_split_shares():
    names = [split_of(b"key", f"patient-{n}") for n in range(20_000)]
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert stats.binomtest(names.count(split), len(names), share).pvalue > 1e-7
    assert set(names) == {"train", "val", "test"}


def test_a_network_has_its_weights_from_the_seed_and_its_trainable_part(make_run):
    def weights(**train):
        return torch.cat([p.detach().reshape(-1) for p in registry.for_run(make_run(train=train)).module.parameters()])

    assert torch.equal(weights(seed=3), weights(seed=3)) and not torch.equal(weights(seed=3), weights(seed=4))
    head = registry.for_run(make_run(model={"name": "cnn", "trainable": "head"})).module
    assert [n for n, p in head.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_the_encrypted_cache_gives_each_patient_a_split_by_the_sites_key(make_site, make_run, tmp_path):
    from fedscan_client.intake import cache

    site = make_site(tmp_path / "s", rows=[])
    key = bytes(range(32))
    (site.folder / "key").write_bytes(key)
    pseudonyms = [f"{n:032x}" for n in range(12)]
    for number, name in enumerate(pseudonyms):
        images = np.random.default_rng(number).random((2, 1, 16, 16), np.float32)
        meta: dict[str, Any] = {
            "label": "ill",
            "split": "test" if number == 0 else "",
            "sex": "",
            "age": None,
            "group": {},
        }
        cache.write_patient(site.folder / "cache", key, name, cache.Payload({"images": images}, [meta, meta]))
    site = site.model_copy(update={"source": Source(kind="cache", folder=site.folder / "cache")})
    found = {split: load_patients(site, make_run(), split).ids for split in ("train", "val", "test")}
    for number, name in enumerate(pseudonyms):
        assert name in found["test" if number == 0 else split_of(key, name)]
    assert sum(map(len, found.values())) == 12
    patients = load_patients(site, make_run(), "train")
    first = np.random.default_rng(pseudonyms.index(patients.ids[0])).random((2, 1, 16, 16), np.float32)
    assert torch.equal(patients.inputs[:2], torch.from_numpy(first))


@pytest.mark.parametrize("size", [[33, 47], [50, 50], [37, 41], [64, 64]])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_do_not_depend_on_who_else_is_in_the_cohort(make_site, make_run, tmp_path, size, channels):
    """Bit for bit: weights made for it could blow up what rounding leaves of other patients."""
    rows = [(f"p{number:02d}", ("well", "ill")[number % 2], "train", number) for number in range(12)]
    run = make_run(model={"name": "scatter"}, task={"image_size": size, "channels": channels})
    everybody = cohort.load_patients(make_site(tmp_path / "all", rows=rows), run, "train")
    for gone in (0, 5):
        others = make_site(tmp_path / f"less{gone}", rows=rows[:gone] + rows[gone + 1 :])
        fewer = cohort.load_patients(others, run, "train")
        kept = [number for number in range(12) if number != gone]
        assert torch.equal(everybody.inputs[kept], fewer.inputs)


def test_a_cache_that_does_not_fit_leaves_images_out_and_raises_nothing(make_site, make_run, tmp_path):
    from fedscan_client.intake import cache

    site, key = make_site(tmp_path / "site"), bytes(range(32))
    (site.folder / "key").write_bytes(key)
    site = site.model_copy(update={"source": Source(kind="cache", folder=site.folder / "cache")})
    assert len(cohort.load_patients(site, make_run(), "train")) == 0  # no cache at all
    cohort.forget()
    meta: dict[str, Any] = {"label": "ill", "split": "train", "sex": "", "age": None, "group": {}}
    for number, side in enumerate([16, 16, 20]):
        images = np.zeros((1, 1, side, side), np.float32)
        cache.write_patient(site.folder / "cache", key, f"{number:032x}", cache.Payload({"images": images}, [meta]))
    altered = site.folder / "cache" / "patients" / f"{1:032x}.enc"
    altered.write_bytes(altered.read_bytes()[:-1])
    found = cohort.load_patients(site, make_run(), "train")
    assert found.ids == (f"{0:032x}",)
    assert len(found.left_out) == 2
