"""Profiles and keys: one file, nobody else's to read, and a key that is never replaced."""

import re

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan import profiles
from fedscan.profiles import Profile
from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.order import public_text

TRIAL = Profile("trial", "https://trial.example:9443", "Trial", "PEM\nof it\n", "ada", "researcher", "secret-1")


def test_what_is_saved_is_loaded_and_the_first_is_the_default(home):
    other = Profile("other", "https://other.example", "Other", "", "ada", "viewer", "secret-2")
    assert profiles.save(TRIAL)
    assert not profiles.save(other)
    assert profiles.load() == TRIAL == profiles.load("trial")
    assert profiles.load("other") == other
    assert profiles.every() == ({"trial": TRIAL, "other": other}, "trial")
    assert profiles.file().parent == home
    assert profiles.file().stat().st_mode & 0o777 == 0o600


def test_a_new_login_replaces_the_old_one_only(home):
    profiles.save(TRIAL)
    profiles.save(Profile("other", "https://other.example", "Other", "", "ada", "viewer", "secret-2"))
    again = Profile("trial", TRIAL.address, "Trial", "", "ada", "operator", "secret-3")
    assert profiles.save(again)
    assert profiles.load() == again
    assert profiles.load("other").token == "secret-2"


def test_a_token_is_not_shown_by_accident():
    assert "secret-1" not in repr(TRIAL)


def test_nobody_logged_in_is_told_how(home):
    with pytest.raises(ConfigError, match="fedscan login"):
        profiles.load()


def test_an_unknown_profile_names_the_others(home):
    profiles.save(TRIAL)
    with pytest.raises(ConfigError, match=r"'nope'.*--profile trial"):
        profiles.load("nope")


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "default = 1\n",
        "[coordinator]\ntrial = 3\n",
        '[coordinator.trial]\naddress = "https://x"\n',
        '[coordinator.trial]\nname = "x"\n',
        '[coordinator."../../x"]\naddress="a"\ncoordinator="b"\nca=""\nperson="p"\nrole="r"\ntoken="t"\n',
        '[coordinator.trial]\naddress=1\ncoordinator="b"\nca=""\nperson="p"\nrole="r"\ntoken="t"\n',
    ],
)
def test_a_damaged_file_is_said_to_be_so_and_left_alone(home, text):
    home.mkdir(parents=True)
    profiles.file().write_text(text)
    profiles.file().chmod(0o600)
    for call in (profiles.load, lambda: profiles.save(TRIAL)):
        with pytest.raises(ConfigError, match="damaged"):
            call()
    assert profiles.file().read_text() == text


def test_files_that_others_can_read_are_refused(home):
    profiles.save(TRIAL)
    profiles.make_key("trial")
    for path, call in ((profiles.file(), profiles.load), (home / "keys" / "trial", lambda: profiles.key("trial"))):
        path.chmod(0o640)
        with pytest.raises(ConfigError, match="Others can read"):
            call()


def test_a_key_is_made_once(home):
    first = public_text(profiles.make_key("trial"))
    assert (home / "keys" / "trial").stat().st_mode & 0o777 == 0o600
    assert public_text(profiles.make_key("trial")) == first == public_text(profiles.key("trial"))
    assert public_text(profiles.make_key("other")) != first
    assert sorted(path.name for path in (home / "keys").iterdir()) == ["other", "trial"]  # and nothing half made


def test_a_key_that_is_gone_or_none_is_not_made_anew_by_a_launch(home):
    with pytest.raises(ConfigError, match="cannot be read"):
        profiles.key("trial")
    assert not (home / "keys").exists()
    profiles.make_key("trial")
    path = home / "keys" / "trial"
    path.write_bytes(b"rubbish")
    for call in (profiles.key, profiles.make_key):
        with pytest.raises(ConfigError, match="holds no key"):
            call("trial")
    other = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    with pytest.raises(ConfigError, match="another kind"):
        profiles.key("trial")


@settings(max_examples=30)
@given(st.text(max_size=60))
def test_any_coordinator_has_a_name_for_a_file(text):
    name = profiles.name_for(text)
    assert re.fullmatch(NAME_PATTERN, name)
    profiles.check_name(name)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", ".hidden"])
def test_names_that_are_no_files_are_refused(name):
    with pytest.raises(ConfigError):
        profiles.check_name(name)


def test_a_profile_that_cannot_be_written_says_that_the_invitation_is_used(home, monkeypatch):
    profiles.save(TRIAL)
    before = profiles.file().read_bytes()

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiles, "write_atomic", full)
    with pytest.raises(FolderError, match=r"No space left on device.*new invitation"):
        profiles.save(TRIAL)
    assert profiles.file().read_bytes() == before
    with pytest.raises(FolderError, match="cannot be made"):
        profiles.make_key("trial")
