import shutil
import stat
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedscan_client.intake import cache, cache_keys, seal
from fedscan_client.intake.cache import Entry, Patient
from fedscan_client.intake.cache_keys import Damaged
from fedscan_client.intake.records import Volume, Window
from fedscan_client.keys import SiteKey
from fedscan_core.errors import DataError, FolderError, SiteKeyError

KEY = SiteKey(bytes(range(32)), bytes(range(1, 33)))
A, B = "a" * 32, "b" * 32
NEEDLE = b"needle in the haystack"


def entry(name, label="ill", **more):
    return Entry(f"2.25.{name}", "2.25.99", label, "", "F", 41, {"manufacturer": "GE"}, f"digest {name}", **more)


def pixels(seed, shape=(3, 8, 40), dtype="<i2"):
    return np.random.default_rng(seed).integers(-900, 900, shape).astype(dtype)


def patient(*names, label="ill"):
    return Patient(tuple(entry(name, label) for name in names), date(2030, 1, 2), NEEDLE.decode())


def write_patient(folder, key, pid, kept, values):
    more = {"consent_until": kept.consent_until, "basis": kept.basis}
    return cache.write_patient(folder, key, pid, ((it, values(it)) for it in kept.entries), **more)


def fill(folder, pid=A, names=(1, 2), seed=0, label="ill"):
    return write_patient(folder, KEY, pid, patient(*names, label=label), lambda e: pixels(seed + int(e.id[5:])))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def images(folder, pid=A):
    return sorted((folder / "patients" / pid).glob("*.img"))


def contents(folder, pid=A, key=KEY):
    opened = cache.open_patient(folder, key, pid)
    return [(e.id, e.label, opened.values(e).tobytes()) for e in opened.patient.entries]


def test_round_trip_of_everything_that_is_kept(tmp_path):
    volume = Volume(
        pixels(1),
        "CT",
        (2.5, 0.7, None),
        tuple(range(16)),
        (Window(40.0, 400.0), Window(1.5, 0.1, "SIGMOID")),
        (-3, (0.0, 0.1, 1.0)),
        True,
        "HU",
    )
    given = Patient((entry(1), entry(2)), date(2030, 1, 2), "consent")
    kept = write_patient(tmp_path, KEY, A, given, lambda e: volume if e.id == "2.25.1" else pixels(2, (4, 5), ">f4"))
    first, second = kept.entries
    assert cache.read_index(tmp_path, KEY, A) == kept and cache.patients(tmp_path) == [A]
    assert (second.dtype, second.shape, second.modality) == ("<f4", (4, 5), "")
    back = cache.open_patient(tmp_path, KEY, A).volume(first)
    assert np.array_equal(back.values, volume.values) and back.values.dtype == volume.values.dtype
    assert {k: v for k, v in vars(back).items() if k != "values"} == {
        k: v for k, v in vars(volume).items() if k != "values"
    }
    assert np.array_equal(cache.read_values(tmp_path, KEY, A, second), pixels(2, (4, 5)))


def test_nothing_in_clear_nothing_for_others_to_read(tmp_path, leaks):
    fill(tmp_path / "cache")
    rows = [pixels(seed)[0, 0].tobytes() for seed in (1, 2)]
    needles = [NEEDLE, b"manufacturer", b"2.25.99", b"digest 1", b"NUMPY\x01", KEY.names, KEY.wrapping, *rows]
    assert leaks(tmp_path, needles) == []
    for path in (tmp_path / "cache").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    np.save(tmp_path / "clear.npy", pixels(1))  # the search does find such rows
    assert len(leaks(tmp_path, needles)) == 2


def test_the_same_again_changes_no_byte_and_what_is_kept_keeps_its_file(tmp_path):
    fill(tmp_path)
    before, digest = files(tmp_path), cache.state_digest(tmp_path)
    write_patient(tmp_path, KEY, A, patient(1, 2), lambda e: None)
    assert files(tmp_path) == before and cache.state_digest(tmp_path) == digest
    kept = write_patient(tmp_path, KEY, A, patient(2, 3, label="well"), lambda e: pixels(3) if "3" in e.id else None)
    assert kept.entries[0].shape == (3, 8, 40)  # noted of the pixels that are kept, though the entry did not say
    after = files(tmp_path)
    assert len(after.keys() & before.keys()) == len(before) - 1  # one image gone
    assert [name for name in after.keys() & before.keys() if after[name] != before[name]] == [
        images(tmp_path)[0].parent.relative_to(tmp_path) / "index"
    ]
    assert contents(tmp_path) == [(f"2.25.{n}", "well", pixels(n).tobytes()) for n in (2, 3)]
    assert cache.state_digest(tmp_path) != digest


def test_one_image_at_a_time(tmp_path):
    seen = []

    def values(e):
        seen.append(len(list(tmp_path.rglob("*.img"))))
        return pixels(0)

    write_patient(tmp_path, KEY, A, patient(*range(5)), values)
    assert seen == [0, 1, 2, 3, 4]


def test_equal_images_of_two_patients_look_unrelated(tmp_path):
    fill(tmp_path, A, (1, 1 + 10), seed=0)
    fill(tmp_path, B, (1,))
    blobs = [path.read_bytes()[28:] for pid in (A, B) for path in images(tmp_path, pid)]
    blocks = [blob[i : i + 16] for blob in blobs for i in range(0, len(blob) - 16, 16)]
    assert len(set(blocks)) == len(blocks)


# --------------------------------------------------------------------------------------------------- what is noticed


def swap(one, other):
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_two_images_of_a_patient_cannot_be_swapped(tmp_path):
    fill(tmp_path)
    swap(*images(tmp_path))
    for e in cache.read_index(tmp_path, KEY, A).entries:
        with pytest.raises(Damaged, match="altered"):
            cache.read_values(tmp_path, KEY, A, e)


@pytest.mark.parametrize("which", ["patients", "keys", "index", "image"])
def test_two_patients_cannot_be_swapped(tmp_path, which):
    fill(tmp_path, A, (1,))
    fill(tmp_path, B, (1,), seed=5)
    places = [tmp_path / "patients" / pid for pid in (A, B)]
    one, other = {
        "patients": places,
        "keys": [tmp_path / "keys" / f"{pid}.key" for pid in (A, B)],
        "index": [place / "index" for place in places],
        "image": [images(tmp_path, pid)[0] for pid in (A, B)],
    }[which]
    swap(one, other)
    for pid in (A, B):
        with pytest.raises(Damaged):
            contents(tmp_path, pid)


def test_folder_and_key_of_a_patient_cannot_take_anothers_name(tmp_path):
    fill(tmp_path, A)
    (tmp_path / "patients" / A).rename(tmp_path / "patients" / B)
    (tmp_path / "keys" / f"{A}.key").rename(tmp_path / "keys" / f"{B}.key")
    with pytest.raises(Damaged):
        contents(tmp_path, B)


def test_an_earlier_version_of_an_image_or_of_the_index_is_noticed(tmp_path):
    fill(tmp_path)
    old = {path.name: path.read_bytes() for path in (tmp_path / "patients" / A).iterdir()}
    fill(tmp_path, seed=7, label="well")
    for path, blob in zip(images(tmp_path), [b for name, b in old.items() if name.endswith(".img")], strict=True):
        now = path.read_bytes()
        path.write_bytes(blob)  # sealed by the site for this very entry
        with pytest.raises(Damaged, match="altered"):
            contents(tmp_path)
        path.write_bytes(now)
    assert len(contents(tmp_path)) == 2
    (tmp_path / "patients" / A / "index").write_bytes(old["index"])
    with pytest.raises(Damaged, match="gone"):
        contents(tmp_path)


def test_a_whole_folder_put_back_is_seen_by_the_digest_alone(tmp_path):
    fill(tmp_path)
    shutil.copytree(tmp_path / "patients", tmp_path / "old")
    fill(tmp_path, label="well")
    digest = cache.state_digest(tmp_path)
    shutil.rmtree(tmp_path / "patients")
    (tmp_path / "old").rename(tmp_path / "patients")
    assert contents(tmp_path)[0][1] == "ill"  # as the docstring says
    assert cache.state_digest(tmp_path) != digest


def test_an_entry_with_another_label_reads_nothing(tmp_path):
    (first, _) = fill(tmp_path).entries
    with pytest.raises(Damaged, match="no such image"):
        cache.read_values(tmp_path, KEY, A, replace(first, label="well"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fill(folder)
    return folder, contents(folder)


@given(which=st.integers(0), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_any_altered_byte_or_cut_of_any_file_is_noticed(whole, which, where, flip, cut):
    folder, before = whole
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".img", ".key") or p.name == "index")
    assert len(paths) == 4
    path = paths[which % len(paths)]
    blob = path.read_bytes()
    place = int(where * len(blob))
    path.write_bytes(blob[:place] if cut else blob[:place] + bytes([blob[place] ^ flip]) + blob[place + 1 :])
    with pytest.raises(Damaged) as caught:
        contents(folder)
    path.write_bytes(blob)
    assert caught.value.remedy and A in str(caught.value)
    assert contents(folder) == before


# ------------------------------------------------------------------------------------------------------ the site's key


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("other", [SiteKey(KEY.names, bytes(32)), SiteKey(bytes(32), KEY.wrapping)], ids=["w", "n"])
def test_another_site_key_is_told_before_anything_is_written_or_read(tmp_path, other, checked):
    fill(tmp_path)
    if not checked:
        (tmp_path / "key.check").unlink()
    before = files(tmp_path)
    for action in (
        lambda: cache_keys.check_key(tmp_path, other),
        lambda: contents(tmp_path, key=other),
        lambda: write_patient(tmp_path, other, B, patient(1), lambda e: pixels(1)),
    ):
        with pytest.raises(SiteKeyError) as caught:
            action()
        assert caught.value.remedy
        assert {k: v for k, v in files(tmp_path).items() if k.name != "cache.lock"} == {
            k: v for k, v in before.items() if k.name != "cache.lock"
        }


def test_a_lost_check_is_made_again_with_the_right_key_and_one_spoilt_patient_does_not_stop_it(tmp_path):
    fill(tmp_path, A)
    fill(tmp_path, B)
    (tmp_path / "key.check").unlink()
    (tmp_path / "keys" / f"{A}.key").write_bytes(b"spoilt")
    fill(tmp_path, B, (3,))
    assert (tmp_path / "key.check").exists()
    with pytest.raises(Damaged):  # and not SiteKeyError
        contents(tmp_path, A)
    (tmp_path / "key.check").write_text("{")
    with pytest.raises(SiteKeyError, match="damaged"):
        fill(tmp_path, B)


def test_the_check_is_public(tmp_path):
    fill(tmp_path)
    text = (tmp_path / "key.check").read_text()
    assert KEY.names_id in text and KEY.wrapping_id in text
    assert KEY.names.hex() not in text and KEY.names_id not in KEY.names.hex()


# ------------------------------------------------------------------------------------------------- destroying, crashes


def test_destroying_the_key_destroys_every_copy_of_the_data(tmp_path):
    fill(tmp_path, A)
    fill(tmp_path, B)
    shutil.copytree(tmp_path / "patients" / A, tmp_path / "backup")
    leftover = tmp_path / "keys" / f".{A}.key.x1y2.part"  # of a write that was killed
    shutil.copy(tmp_path / "keys" / f"{A}.key", leftover)
    linked = tmp_path / "hard link"
    linked.hardlink_to(tmp_path / "keys" / f"{A}.key")
    assert cache.destroy_patient(tmp_path, A) and not cache.destroy_patient(tmp_path, A)
    assert cache.patients(tmp_path) == [B] and not leftover.exists()
    assert not any(linked.read_bytes())
    assert not (tmp_path / "patients" / A).exists()
    shutil.copytree(tmp_path / "backup", tmp_path / "patients" / A)
    assert cache.patients(tmp_path) == [B]
    with pytest.raises(Damaged, match="no key"):
        contents(tmp_path, A)
    assert cache.sweep(tmp_path) == 1 and not (tmp_path / "patients" / A).exists()
    shutil.copytree(tmp_path / "backup", tmp_path / "patients" / A)
    fill(tmp_path, A, (3,))  # a new key, not the old one
    assert len(images(tmp_path)) == 1
    shutil.copytree(tmp_path / "backup", tmp_path / "patients" / A, dirs_exist_ok=True)
    with pytest.raises(Damaged):
        contents(tmp_path, A)
    assert not cache.destroy_patient(tmp_path / "none", A) and not (tmp_path / "none").exists()


def test_killed_at_every_write_a_patient_is_whole_as_before_or_as_now(memory_path, at_every_write):
    fill(memory_path / "seed", B)  # someone else's, so that the cache is there
    fill(memory_path / "new", A, (2, 3), seed=7)
    after = contents(memory_path / "new")
    for begun in (True, False):
        start, here, seen, deaths = memory_path / f"start{begun}", memory_path / "here", set(), 0
        shutil.copytree(memory_path / "seed", start)
        if begun:
            fill(start, A, (1, 2))
        before = contents(start, A) if begun else None
        shutil.copytree(start, here)
        for _ in at_every_write(lambda here=here: fill(here, A, (2, 3), seed=7)):
            now = contents(here) if A in cache.patients(here) else None
            assert now in (before, after)
            seen.add(now == after)
            deaths += 1
            fill(here, A, (2, 3), seed=7)
            assert contents(here) == after and len(images(here)) == 2  # and nothing is left over
            shutil.rmtree(here)
            shutil.copytree(start, here)
        assert seen == ({True, False} if begun else {False}) and deaths > 8
        shutil.rmtree(here)


def test_killed_while_destroying_no_data_is_readable_once_the_first_file_is_gone(memory_path, at_every_write):
    fill(memory_path / "start", A)
    here = memory_path / "here"
    shutil.copytree(memory_path / "start", here)
    seen = set()
    for _ in at_every_write(lambda: cache.destroy_patient(here, A)):
        there = A in cache.patients(here)
        try:
            readable = len(contents(here)) == 2
        except Damaged:
            readable = False
        seen.add((there, readable))
        assert readable or not list(here.rglob("*.key")) or not any((here / "keys" / f"{A}.key").read_bytes())
        cache.destroy_patient(here, A)
        assert not images(here) and not list(here.rglob("*.key"))
        shutil.rmtree(here)
        shutil.copytree(memory_path / "start", here)
    assert {(True, True), (False, False)} <= seen


def test_an_error_of_the_source_leaves_the_patient_as_before(tmp_path):
    fill(tmp_path)
    before = files(tmp_path)

    def values(e):
        return pixels(9) if e.id == "2.25.1" else 1 / 0

    with pytest.raises(ZeroDivisionError):
        write_patient(tmp_path, KEY, A, patient(1, 2), values)
    assert files(tmp_path) == before


def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    fill(tmp_path)
    before = files(tmp_path)
    for name in ("write_array", "write_atomic"):
        with monkeypatch.context() as patch:
            at = seal if name == "write_array" else cache
            patch.setattr(at, name, lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(FolderError, match="No space left"):
                fill(tmp_path, seed=3)
    assert contents(tmp_path) == contents(tmp_path) and before.items() <= files(tmp_path).items()
    fill(tmp_path, seed=3)
    assert len(images(tmp_path)) == 2


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 32, "a" * 23, f"{A}\n"])
def test_only_pseudonyms_name_files(tmp_path, name):
    for action in (lambda: fill(tmp_path, name), lambda: cache.destroy_patient(tmp_path, name)):
        with pytest.raises(DataError, match="not a pseudonym"):
            action()
    assert not files(tmp_path)


def test_foreign_files_are_nobody(tmp_path):
    fill(tmp_path)
    (tmp_path / "keys" / "thumbs.key").write_bytes(b"")
    (tmp_path / "patients" / "lost+found").mkdir()
    assert cache.patients(tmp_path) == [A] and cache.sweep(tmp_path) == 0


def test_a_patient_without_an_image_is_none(tmp_path):
    fill(tmp_path)
    cache.write_patient(tmp_path, KEY, A, ())
    assert cache.patients(tmp_path) == [] and not list((tmp_path / "keys").iterdir())


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only numbers"):
        write_patient(tmp_path, KEY, A, patient(1), lambda e: np.array([None]))
    with pytest.raises(Damaged, match="no such image"):
        write_patient(tmp_path, KEY, A, patient(1), lambda e: None)
    with pytest.raises(DataError, match="have one id"):
        write_patient(tmp_path, KEY, A, patient(1, 1), lambda e: pixels(1))
    assert cache.patients(tmp_path) == [] and not images(tmp_path)
