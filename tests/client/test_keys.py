"""The site's key: kept where it is said, shown to nobody, and never replaced by accident."""

import base64
import contextlib
import hmac
import os
import socket
import sys
import traceback
from hashlib import sha256
from pathlib import Path

import keyring
import keyring.backend
import keyring.errors
import pytest

from fedscan_client import keys
from fedscan_client.audit import log
from fedscan_client.cohort import split_of
from fedscan_client.keys import Settings, SiteKey
from fedscan_core.errors import ConfigError, MissingExtra, SiteKeyError

FILE = Settings()
ENVIRONMENT = Settings(source="environment")
RING = Settings(source="keyring")
KEY = SiteKey(bytes(range(32)), bytes(range(1, 33)), bytes(range(2, 34)))


class Ring(keyring.backend.KeyringBackend):
    priority = 1

    def __init__(self):
        self.kept = {}

    def get_password(self, service, username):
        return self.kept.get((service, username))

    def set_password(self, service, username, password):
        self.kept[service, username] = password


@pytest.fixture
def ring():
    before = keyring.get_keyring()
    ours = Ring()
    keyring.set_keyring(ours)
    yield ours
    keyring.set_keyring(before)


def secret_forms(key):
    parts = [part for part in (key.names, key.wrapping, key.staged) if part]
    whole = keys.text_of(key)
    return [form for p in parts for form in (repr(p), p.hex(), base64.b64encode(p).decode()[:40])] + [whole]


def test_a_file_comes_back_and_only_its_owner_reads_it(tmp_path):
    key = keys.create(tmp_path / "site", FILE)
    path = tmp_path / "site" / "key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.load(tmp_path / "site", FILE) == key
    assert key.names != key.wrapping and key != keys.create(tmp_path / "other", FILE)
    _, logged = log.read(tmp_path / "site")
    assert (logged["event"], logged["did"], logged["key"]) == ("key", "key created", key.key_id)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622, 0o666, 0o610])
def test_a_file_that_others_can_read_or_change_is_refused_with_what_to_type(tmp_path, mode):
    keys.create(tmp_path, FILE)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(SiteKeyError, match=f"chmod 600 {tmp_path}/key"):
        keys.load(tmp_path, FILE)
    (tmp_path / "key").chmod(0o600)
    keys.load(tmp_path, FILE)


def test_nothing_but_a_regular_file_of_this_user_is_read(tmp_path, monkeypatch):
    key = keys.create(tmp_path, FILE)
    (tmp_path / "link").symlink_to("key")
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(0o700)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "socket"))
    for name, word in (("link", "symbolic"), ("pipe", "regular"), ("folder", "regular"), ("socket", "read")):
        with pytest.raises(SiteKeyError, match=word):
            keys.load(tmp_path, Settings(path=Path(name)))
    assert keys.load(tmp_path, Settings(path=tmp_path / "key")) == key
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(SiteKeyError, match="another user"):
        keys.load(tmp_path, FILE)


def test_a_missing_or_damaged_key_says_so_and_is_never_made_anew(tmp_path):
    with pytest.raises(SiteKeyError, match="fedscan agent key create"):
        keys.load(tmp_path, FILE)
    assert not (tmp_path / "key").exists()
    keys.create(tmp_path, FILE)
    whole = (tmp_path / "key").read_text()
    token = whole.splitlines()[1]
    swapped = token[:30] + ("A" if token[30] != "A" else "B") + token[31:]
    for text in (
        "",
        "\n",
        whole[:-10],
        swapped,
        token[:-4],
        token + "AAAA",
        f"{token}\n{token}",
        "x" * 9000,
        "\xff\x00",
    ):
        (tmp_path / "key").write_text(text)
        for action in (lambda: keys.load(tmp_path, FILE), lambda: keys.create(tmp_path, FILE)):
            with pytest.raises(SiteKeyError) as caught:
                action()
            assert "restore" in caught.value.remedy
            assert token[20:40] not in "".join(traceback.format_exception(caught.value))
        assert (tmp_path / "key").read_text() == text
    (tmp_path / "key").write_bytes(bytes(range(32)))  # as before this version
    with pytest.raises(SiteKeyError, match="this version"):
        keys.load(tmp_path, FILE)


def test_no_key_is_replaced(tmp_path, monkeypatch, ring):
    for number, settings in enumerate((FILE, RING, ENVIRONMENT)):
        site = tmp_path / str(number)
        key = keys.create(site, settings)
        if settings is ENVIRONMENT:
            with pytest.raises(SiteKeyError, match="already"):
                keys.create(site, settings)
            monkeypatch.setenv("FEDSCAN_SITE_KEY", keys.text_of(key))
        with pytest.raises(SiteKeyError, match="already"):
            keys.create(site, settings)
        with pytest.raises(SiteKeyError, match="already"):
            keys.put(site, settings, SiteKey(bytes(32), bytes(32)), "key restored")
        assert keys.load(site, settings) == key
        keys.put(site, settings, key, "key restored")  # the same one is welcome


def test_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDSCAN_SITE_KEY", raising=False)
    key = keys.create(tmp_path, ENVIRONMENT)
    handed = tmp_path / "key.environment"
    assert handed.stat().st_mode & 0o777 == 0o600 and not (tmp_path / "key").exists()
    with pytest.raises(SiteKeyError, match=r"Set the variable from .*key\.environment"):
        keys.load(tmp_path, ENVIRONMENT)
    name, _, value = handed.read_text().splitlines()[1].partition("=")  # as systemd's EnvironmentFile is read
    assert name == "FEDSCAN_SITE_KEY"
    monkeypatch.setenv(name, value)
    assert keys.load(tmp_path, ENVIRONMENT) == key
    monkeypatch.setenv(name, value[:-4])
    with pytest.raises(SiteKeyError, match="variable FEDSCAN_SITE_KEY does not hold"):
        keys.load(tmp_path, ENVIRONMENT)


def test_the_keyring(tmp_path, ring, monkeypatch):
    with pytest.raises(SiteKeyError, match="keyring"):
        keys.load(tmp_path, RING)
    key = keys.create(tmp_path, RING)
    assert keys.load(tmp_path, RING) == key and list(ring.kept) == [("fedscan", "site key")]
    other = RING.model_copy(update={"user": "south"})
    assert keys.create(tmp_path, other) != key

    def locked(service, username):
        raise keyring.errors.KeyringLocked("canary")

    monkeypatch.setattr(ring, "get_password", locked)
    with pytest.raises(SiteKeyError, match="KeyringLocked") as caught:
        keys.load(tmp_path, RING)
    assert "canary" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(MissingExtra, match=r"fedscan\[keyring\]"):
        keys.load(tmp_path, RING)


def test_secrets_are_in_no_repr_and_the_fingerprint_is_none(tmp_path):
    shown = [repr(KEY), str(KEY), f"{KEY}", repr([KEY]), repr(KEY.after()), KEY.key_id]
    assert not [form for form in secret_forms(KEY) for text in shown if form in text]
    with pytest.raises(SiteKeyError) as caught:
        SiteKey(b"s" * 31, b"s" * 32)
    assert "sss" not in "".join(traceback.format_exception(caught.value))
    assert KEY.key_id == f"{KEY.names_id}-{KEY.wrapping_id}" and len(KEY.key_id) == 33
    assert KEY.after().key_id.split("-")[0] == KEY.names_id != SiteKey(KEY.wrapping, KEY.names).names_id
    assert KEY.names_id != SiteKey(bytes(32), KEY.wrapping).names_id


def test_projects_cannot_be_linked_and_derived_keys_are_unrelated():
    # RFC 5869 by hand: one block of output, no salt.
    extracted = hmac.new(bytes(32), KEY.names, sha256).digest()
    expected = hmac.new(extracted, b"fedscan project 1\0lung\x01", sha256).digest()
    assert KEY.project("lung") == expected != KEY.project("Lung")
    derived = {KEY.project("lung"), KEY.project(""), KEY.names, KEY.wrapping}
    derived |= {keys.derive_wrapping(KEY.wrapping, purpose) for purpose in ("patient key", "spool")}
    assert len(derived) == 6
    assert KEY.project("lung") == SiteKey(KEY.names, bytes(32)).project("lung")  # a rotation changes no name


def test_splits_stay_with_the_names(tmp_path):
    other = SiteKey(KEY.names, bytes(32))
    assert [split_of(KEY.names, str(n)) for n in range(50)] == [split_of(other.names, str(n)) for n in range(50)]


def test_settings_are_read_from_site_toml_alone(tmp_path):
    assert keys.read_settings(tmp_path) == FILE
    (tmp_path / "site.toml").write_text('name = "north"\n[key]\nsource = "keyring"\nuser = "north"\n')
    assert keys.read_settings(tmp_path) == Settings(source="keyring", user="north")
    for text, word in (
        ('[key]\nsource = "paper"', "key.source"),
        ('[key]\ncolour = "red"', "key.colour"),
        ('[key]\nvariable = "A=B"', "key.variable"),
        ("key = 3", "'key'"),
        ("[", "cannot be read"),
    ):
        (tmp_path / "site.toml").write_text(text)
        with pytest.raises(ConfigError, match=word):
            keys.read_settings(tmp_path)


def test_a_folder_that_cannot_be_written_is_said_in_words(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keys, "write_atomic", full)
    with pytest.raises(SiteKeyError, match="No space left"):
        keys.create(tmp_path, FILE)
