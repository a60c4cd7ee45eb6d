import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_core.errors import ConfigError, FolderError
from fedscan_server.coordinator import state


def test_settings_come_back(bare):
    assert (bare.name, bare.address, bare.host) == ("Test centre", "https://localhost:8443", "localhost")
    assert (bare.bind, bare.superlink, bare.encrypt) == (("127.0.0.1", 8443), "127.0.0.1:8444", False)
    assert bare.ca_pem == ""
    assert (bare.folder / "coordinator.toml").stat().st_mode & 0o777 == 0o600


def test_a_key_file_is_found_beside_the_settings(bare):
    state.write_settings(bare.folder, "Zürich", "[::1]:8443", "[::]:8443", 9000, True, "vault.key")
    c = state.load(bare.folder)
    assert (c.name, c.host, c.encrypt, c.key_file) == ("Zürich", "::1", True, bare.folder / "vault.key")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("8444", '"8444"'),
        ("8444", "0"),
        ("localhost:8443", "localhost"),
        ("localhost:8443", "https://localhost:8443"),
        ("localhost:8443", "localhost:99999"),
        ("name =", "nome ="),
        ("false", '"yes"'),
        ("name =", "name"),
    ],
)
def test_a_wrong_value_is_named(bare, old, new):
    path = bare.folder / "coordinator.toml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=r"coordinator\.toml"):
        state.load(bare.folder)


def test_a_folder_that_others_can_enter_is_refused(bare):
    os.chmod(bare.folder, 0o750)
    with pytest.raises(FolderError, match="Others"):
        state.load(bare.folder)


def test_another_folder_is_no_coordinator(tmp_path):
    with pytest.raises(ConfigError, match="no coordinator"):
        state.load(tmp_path)


@settings(max_examples=50)
@given(name=st.text(min_size=1, max_size=20))
def test_any_name_comes_back_or_is_refused(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "names"
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        state.write_settings(folder, name, "localhost:1", "localhost:1", 1)
    except ConfigError:
        assert any(character in '"\\' or ord(character) < 0x20 or not character.isprintable() for character in name)
    else:
        assert state.load(folder).name == name
