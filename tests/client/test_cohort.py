"""Patients as tensors: who is in, in which order, and that one bad image spoils itself only."""

import csv
from datetime import date

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedscan_client import cohort, keys
from fedscan_client.cohort import TABLE, load_patients, split_of
from fedscan_client.intake import cache, pictures, render
from fedscan_client.intake.cache import Entry
from fedscan_client.intake.records import Volume, Window
from fedscan_client.intake.sources.settings import Folder
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
    return pictures.load_image(site.table / f"canary-file-{seed}.png", size=(16, 16), channels=1)


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
    path = site.table / "canary-file-3.png"
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
    np.savez(site.table / "all.npz", images=images)
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
        image = pictures.load_image(site.table / f"canary-file-{number}.png", size=(32, 32), channels=1)
        assert torch.equal(inputs[number], scatter.features(torch.from_numpy(image[None]))[0])


def test_a_cohort_is_read_once_until_forgotten(make_site, make_run, tmp_path):
    site = make_site(tmp_path / "s", rows=ROWS)
    first = load_patients(site, make_run(), "train")
    assert load_patients(site, make_run(train={"rounds": 9}), "train") is first
    cohort.forget()
    assert load_patients(site, make_run(), "train") is not first


def test_a_table_that_changes_is_read_again(make_site, make_run, tmp_path):
    """Rows that are gone, and pictures that are others or gone: one process serves many rounds."""
    site = make_site(tmp_path)
    first = load_patients(site, make_run(), "train")
    pictures_ = sorted((tmp_path / "pictures").iterdir())
    pictures_[-1].write_bytes(pictures_[0].read_bytes() + b"\0")  # of a test patient, but it counts
    again = load_patients(site, make_run(), "train")
    assert again is not first and again.ids == first.ids
    pictures_[0].unlink()
    assert len(load_patients(site, make_run(), "train").left_out) == 1
    lines = (tmp_path / TABLE).read_text().splitlines(keepends=True)
    (tmp_path / TABLE).write_text("".join([lines[0], *lines[4:]]))
    fewer = load_patients(site, make_run(), "train")
    assert set(fewer.ids) < set(first.ids) and load_patients(site, make_run(), "train") is fewer


def test_of_a_site_the_newest_few_stay_in_memory(make_site, make_run, tmp_path):
    here, there = make_site(tmp_path / "a"), make_site(tmp_path / "b", name="south")
    runs = [make_run(task={"labels": ["well", "ill"], "image_size": [size, size]}) for size in (16, 24, 32, 40)]
    kept = [load_patients(here, run, "train") for run in runs]
    other = load_patients(there, runs[0], "train")
    assert load_patients(here, runs[0], "train") is kept[0]  # used now: the newest
    load_patients(here, runs[0], "test")
    assert load_patients(here, runs[0], "train") is kept[0] and load_patients(here, runs[3], "train") is kept[3]
    assert load_patients(here, runs[1], "train") is not kept[1] and load_patients(there, runs[0], "train") is other


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


SECRET = keys.SiteKey(bytes(range(32)), bytes(range(32, 64)))


def cached_site(make_site, folder, patients):
    """A site whose cohort is the cache: pseudonym -> (entry changes, values) of its images."""
    site = make_site(folder, rows=[])
    keys.put(site.folder, site.key, SECRET, "test")
    site = site.model_copy(update={"source": {"source": Folder(kind="folder", folder=folder / "pacs")}})
    for name, images in patients.items():
        made = [
            (
                Entry(
                    str(n),
                    "s",
                    **({"label": "ill", "split": "", "sex": "", "age": None} | changes),
                    group={},
                    digest="",
                ),
                it,
            )
            for n, (changes, it) in enumerate(images)
        ]
        cache.write_patient(site.cache, SECRET, name, made, consent_until=date(2030, 1, int(name, 16) % 28 + 1))
    return site


def radiograph(seed):
    return Volume(
        np.random.default_rng(seed).integers(0, 256, (1, 16, 16), np.uint8), "DX", windows=(Window(128, 256),)
    )


def test_the_encrypted_cache_gives_each_patient_a_split_by_the_sites_key(make_site, make_run, tmp_path):
    names = [f"{n:032x}" for n in range(12)]
    patients = {
        name: [({"split": "test" if n == 0 else ""}, radiograph(2 * n)), ({}, radiograph(2 * n + 1))]
        for n, name in enumerate(names)
    }
    patients[names[0]] = [({"split": "test"}, radiograph(0)), ({"split": "test"}, radiograph(1))]
    site = cached_site(make_site, tmp_path / "s", patients)
    found = {split: load_patients(site, make_run(), split).ids for split in ("train", "val", "test")}
    for number, name in enumerate(names):
        assert name in found["test" if number == 0 else split_of(SECRET.names, name)]
    assert sum(map(len, found.values())) == 12
    loaded = load_patients(site, make_run(), "train")
    first = names.index(loaded.ids[0])
    for row in range(2):
        shown = radiograph(2 * first + row).values[0].astype(np.float64) / 255
        assert np.allclose(loaded.inputs[row, 0].numpy(), shown, atol=1e-6)
    assert loaded.until[0] == date(2030, 1, first % 28 + 1)


def test_a_stack_is_as_many_images_as_it_has_slices_and_the_run_chooses_the_window(make_site, make_run, tmp_path):
    values = np.arange(5 * 16 * 16, dtype=np.int16).reshape(5, 16, 16) - 600
    ct = Volume(values, "CT", windows=(Window(0, 100),))
    name = f"{7:032x}"
    site = cached_site(make_site, tmp_path / "s", {name: [({"split": "train"}, ct)]})
    for window in ("header", "full", (-100.0, 300.0)):
        run = make_run(task={"window": window, "modality": "CT"})
        loaded = load_patients(site, run, "train")
        assert loaded.ids == (name,) and loaded.inputs.shape == (5, 1, 16, 16) and len(loaded.targets) == 5
        assert np.array_equal(loaded.inputs, render.render(ct, window=run.task.window, size=(16, 16), channels=1))
    assert len(load_patients(site, make_run(task={"modality": "MR"}), "train")) == 0


def test_what_is_destroyed_leaves_the_memory_too(make_site, make_run, tmp_path):
    names = [f"{n:032x}" for n in range(3)]
    site = cached_site(make_site, tmp_path / "s", {n: [({"split": "train"}, radiograph(1))] for n in names})
    assert load_patients(site, make_run(), "train").ids == tuple(names)
    assert load_patients(site, make_run(), "train") is load_patients(site, make_run(), "train")
    cache.destroy_patient(site.cache, names[1])
    assert load_patients(site, make_run(), "train").ids == (names[0], names[2])
    assert len(cohort._MEMORY) == 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.data())
def test_only_keeps_the_rows_of_those_it_keeps(sizes, data):
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    rows, ids = int(offsets[-1]), tuple(f"p{n}" for n in range(len(sizes)))
    everybody = cohort.Patients(
        torch.arange(rows)[:, None].float(),
        torch.arange(rows),
        offsets,
        ids,
        groups=tuple(("F", n) for n in range(rows)),
    )
    kept = data.draw(st.sets(st.sampled_from(ids)))
    some = everybody.only(lambda name, until: name in kept and until is None)
    expected = [row for p, name in enumerate(ids) if name in kept for row in range(offsets[p], offsets[p + 1])]
    assert some.targets.tolist() == expected == some.inputs[:, 0].long().tolist()
    assert some.ids == tuple(name for name in ids if name in kept)
    assert np.diff(some.offsets).tolist() == [size for size, name in zip(sizes, ids, strict=True) if name in kept]
    assert [age for _, age in some.groups] == expected


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


def test_a_cache_that_is_damaged_leaves_images_out_and_raises_nothing(make_site, make_run, tmp_path):
    names = [f"{n:032x}" for n in range(3)]
    site = cached_site(make_site, tmp_path / "s", {})
    assert len(cohort.load_patients(site, make_run(), "train")) == 0  # no cache at all
    for n in names:
        entry = Entry("0", "s", "ill", "train", "", None, {}, "")
        cache.write_patient(site.cache, SECRET, n, [(entry, radiograph(1))])
    (image,) = (site.cache / "patients" / names[1]).glob("*.img")
    image.write_bytes(image.read_bytes()[:-1])
    index = site.cache / "patients" / names[2] / cache.INDEX
    index.write_bytes(index.read_bytes()[:-1])
    found = cohort.load_patients(site, make_run(), "train")
    assert found.ids == (names[0],) and len(found.left_out) == 2
