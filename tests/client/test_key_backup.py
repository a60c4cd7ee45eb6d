"""Backups of the site's key: readable on paper, opened by the passphrase alone, restored to the right site only."""

import random
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client import key_backup, key_rotation, keys
from fedscan_client.intake import cache
from fedscan_client.keys import Settings, SiteKey
from fedscan_core.errors import FolderError, SiteKeyError

FILE = Settings()
WORDS = "correct horse battery staple"
A = "a" * 32


@pytest.fixture
def quick(monkeypatch):
    """A cheap scrypt: what is tested has nothing to do with its price."""
    monkeypatch.setattr(key_backup, "LOG_N", 4)


def fill(site, key):
    entry = cache.Entry("2.25.1", "", "ill", "", "", None, {}, "")
    cache.write_patient(site / "cache", key, A, [(entry, np.arange(9))])


def test_site_folder_lost_key_restored_cache_readable(tmp_path):
    """With the real scrypt."""
    site, safe = tmp_path / "site", tmp_path / "safe.txt"
    key = keys.create(site, FILE)
    fill(site, key)
    key_backup.backup(key, safe, WORDS)
    assert safe.stat().st_mode & 0o777 == 0o600
    shutil.move(site / "cache", tmp_path / "cache on another disk")
    shutil.rmtree(site)
    back = key_backup.restore(safe, WORDS, site, FILE, tmp_path / "cache on another disk")
    assert back == key == keys.load(site, FILE)
    opened = cache.open_patient(tmp_path / "cache on another disk", keys.load(site, FILE), A)
    assert opened.values(opened.patient.entries[0]).tolist() == list(range(9))
    assert "scrypt 17" in safe.read_text()


def test_it_can_be_printed_and_typed_again(tmp_path, quick, leaks):
    key = SiteKey(bytes(range(32)), bytes(range(1, 33)))
    key_backup.backup(key, tmp_path / "b.txt", WORDS)
    text = (tmp_path / "b.txt").read_text()
    assert text.isascii() and max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) < 12
    assert leaks(tmp_path, [key.names, key.wrapping, WORDS.encode()]) == []
    typed = "\r\n\n".join(f"  {line} " for line in text.splitlines())
    lines = text.splitlines()
    lines = [re.sub(r" +", "   ", line) if number == 1 else line.lower() for number, line in enumerate(lines)]
    for other in (typed, "\n".join(lines), "\n".join(text.splitlines()[:-2])):
        (tmp_path / "typed.txt").write_text(other)
        assert key_backup.read(tmp_path / "typed.txt", WORDS) == key


def test_a_wrong_passphrase_is_said_and_one_letter_counts(tmp_path, quick):
    key_backup.backup(keys.create(tmp_path, FILE), tmp_path / "b.txt", "gro\u00dfe Stra\u00dfe \u00e9t\u00e9")
    assert key_backup.read(tmp_path / "b.txt", "gro\u00dfe Stra\u00dfe e\u0301te\u0301")  # typed on another keyboard
    for wrong in ("", "grosse Strasse \u00e9t\u00e9", "gro\u00dfe Stra\u00dfe \u00e9t\u00e8"):
        with pytest.raises(SiteKeyError, match=r"passphrase does not open b\.txt") as caught:
            key_backup.read(tmp_path / "b.txt", wrong)
        assert wrong == "" or wrong not in str(caught.value)


def _checked(head: str) -> str:
    text = head.rpartition(" ")[0]
    return f"{text} {key_backup._check(0, text)}"


@settings(max_examples=40)
@given(st.randoms(use_true_random=False))
def test_a_typing_error_is_found_in_its_line(rng: random.Random):
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_backup, "LOG_N", 4)
        path = Path(folder) / "b.txt"
        key_backup.backup(SiteKey(bytes(range(32)), bytes(range(1, 33))), path, WORDS)
        lines = path.read_text().splitlines()
        number = rng.randrange(2, len(lines) - 2)
        words = lines[number].split(" ")
        place = rng.choice([n for n, word in enumerate(words[1:-2], 1) if word])
        old = rng.choice(words[place])
        new = rng.choice([letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567" if letter != old])
        words[place] = words[place].replace(old, new)
        wrong = [*lines[:number], " ".join(words), *lines[number + 1 :]]
        path.write_text("\n".join(wrong))
        with pytest.raises(SiteKeyError, match=f"line {number - 1} "):
            key_backup.read(path, WORDS)
        path.write_text("\n".join(lines[:number] + lines[number + 1 :]))
        with pytest.raises(SiteKeyError, match="line"):
            key_backup.read(path, WORDS)
        head = lines[1].replace("made 2", "made 3")
        path.write_text("\n".join([lines[0], head, *lines[2:]]))
        with pytest.raises(SiteKeyError, match="begins with 'key'"):
            key_backup.read(path, WORDS)
        path.write_text("\n".join([lines[0], _checked(head), *lines[2:]]))
        with pytest.raises(SiteKeyError, match="does not open"):  # it is sealed too
            key_backup.read(path, WORDS)


def test_what_is_no_backup_is_refused_and_none_can_eat_the_memory(tmp_path):
    key_backup.backup(keys.create(tmp_path, FILE), tmp_path / "b.txt", WORDS)
    text = (tmp_path / "b.txt").read_text()
    lines = text.splitlines()
    for price in (10, 40):
        head = _checked(lines[1].replace("scrypt 17", f"scrypt {price}"))
        (tmp_path / "x.txt").write_text("\n".join([lines[0], head, *lines[2:]]))
        with pytest.raises(SiteKeyError, match="begins with 'key'"):
            key_backup.read(tmp_path / "x.txt", WORDS)
    for other in ("", "\x00\xff" * 99, "\n".join(lines[1:])):
        (tmp_path / "x.txt").write_text(other)
        with pytest.raises(SiteKeyError, match="no backup"):
            key_backup.read(tmp_path / "x.txt", WORDS)
    with pytest.raises(SiteKeyError, match="cannot be read"):
        key_backup.read(tmp_path / "none.txt", WORDS)


def test_nothing_is_overwritten_and_short_passphrases_are_refused(tmp_path, quick):
    key = keys.create(tmp_path, FILE)
    with pytest.raises(SiteKeyError, match="12 characters"):
        key_backup.backup(key, tmp_path / "b.txt", "short words")
    assert not (tmp_path / "b.txt").exists()
    (tmp_path / "b.txt").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("b.txt", "link"):
        with pytest.raises(FolderError, match="left alone"):
            key_backup.backup(key, tmp_path / name, WORDS)
    assert (tmp_path / "b.txt").read_text() == "mine"


def test_a_restore_refuses_another_key_and_another_sites_cache(tmp_path, quick):
    north, south = tmp_path / "north", tmp_path / "south"
    key = keys.create(north, FILE)
    fill(north, key)
    key_backup.backup(key, tmp_path / "b.txt", WORDS)
    other = keys.create(south, FILE)
    with pytest.raises(SiteKeyError, match="already is a site key"):
        key_backup.restore(tmp_path / "b.txt", WORDS, south, FILE, None)
    assert keys.load(south, FILE) == other
    fill(south, other)
    (south / "key").unlink()
    with pytest.raises(SiteKeyError, match="another site key"):
        key_backup.restore(tmp_path / "b.txt", WORDS, south, FILE, south / "cache")
    assert not (south / "key").exists()
    key_backup.restore(tmp_path / "b.txt", WORDS, north, FILE, north / "cache")  # the same key again
    key_rotation.rotate(north, FILE, north / "cache")
    (north / "key").unlink()
    with pytest.raises(SiteKeyError, match="rotation"):  # from before it
        key_backup.restore(tmp_path / "b.txt", WORDS, north, FILE, north / "cache")


def test_a_key_lost_during_a_rotation_comes_back_and_the_rotation_goes_on(tmp_path, quick, monkeypatch):
    key = keys.create(tmp_path, FILE)
    fill(tmp_path, key)
    key_backup.backup(key, tmp_path / "b.txt", WORDS)
    with monkeypatch.context() as patch:
        patch.setattr(keys, "replace_by_staged", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            key_rotation.rotate(tmp_path, FILE, tmp_path / "cache")
    with pytest.raises(SiteKeyError, match="unfinished"):
        key_backup.backup(keys.load(tmp_path, FILE), tmp_path / "c.txt", WORDS)
    (tmp_path / "key").unlink()
    key_backup.restore(tmp_path / "b.txt", WORDS, tmp_path, FILE, tmp_path / "cache")
    assert key_rotation.rotate(tmp_path, FILE, tmp_path / "cache")
    assert len(cache.read_index(tmp_path / "cache", keys.load(tmp_path, FILE), A).entries) == 1
