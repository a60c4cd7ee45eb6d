import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedscan_core.errors import ConfigError, FolderError
from fedscan_server.coordinator import vault


@pytest.fixture
def key(monkeypatch):
    monkeypatch.delenv(vault.KEY_FILE, raising=False)
    monkeypatch.setenv(vault.KEY, "5a" * 32)


@pytest.fixture
def no_key(monkeypatch):
    for name in (vault.KEY, vault.KEY_FILE):
        monkeypatch.delenv(name, raising=False)


def test_without_a_key_files_are_plain(no_key, tmp_path):
    vault.write(tmp_path / "x", b"hello")
    assert (tmp_path / "x").read_bytes() == vault.read(tmp_path / "x") == b"hello"
    assert not vault.is_key_set()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_what_is_written_comes_back_and_does_not_show(key, memory_path, data):
    path = memory_path / "runs" / "r" / "x"
    vault.write(path, data)
    assert vault.read(path) == data and vault.is_sealed(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(data) < 8 or data not in path.read_bytes()[len(vault.MAGIC) :]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_any_changed_byte_is_found(key, memory_path, where, flip):
    path = memory_path / "runs" / "r" / "x"
    vault.write(path, b"twelve bytes")
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= flip
    path.write_bytes(data)
    with pytest.raises((FolderError, ConfigError)):
        vault.read(path)


def test_a_cut_file_is_found(key, tmp_path):
    vault.write(tmp_path / "x", b"twelve bytes")
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises((FolderError, ConfigError)):
            vault.read(tmp_path / "x")


def test_files_cannot_be_exchanged(key, tmp_path):
    """Neither within a run nor between runs, at whatever depth; the whole folder may move."""
    runs = tmp_path / "runs"
    names = ["r1/model", "r1/checkpoints/5", "r1/checkpoints/6", "r2/checkpoints/5", "r1/a/b/c/d", "r2/a/b/c/d"]
    for name in names:
        vault.write(runs / name, name.encode())
    for one in names:
        for other in names:
            if one != other:
                with pytest.raises(FolderError, match="does not open"):
                    vault.unseal(runs / other, (runs / one).read_bytes())
    os.rename(runs, tmp_path / "x")
    (tmp_path / "moved").mkdir()
    os.rename(tmp_path / "x", tmp_path / "moved" / "runs")
    assert vault.read(tmp_path / "moved" / "runs" / names[1]) == names[1].encode()


def test_another_key_does_not_open_it(key, tmp_path, monkeypatch):
    vault.write(tmp_path / "x", b"hello")
    monkeypatch.setenv(vault.KEY, "5b" * 32)
    with pytest.raises(FolderError, match="another key"):
        vault.read(tmp_path / "x")
    monkeypatch.delenv(vault.KEY)
    with pytest.raises(ConfigError, match="no key is set"):
        vault.read(tmp_path / "x")


def test_a_plain_file_is_not_taken_for_a_sealed_one(key, tmp_path):
    (tmp_path / "x").write_bytes(b"planted")
    with pytest.raises(ConfigError, match="not encrypted"):
        vault.read(tmp_path / "x")


def test_the_key_may_lie_in_a_file(no_key, tmp_path, monkeypatch):
    path = tmp_path / "vault.key"
    vault.new_key(path)
    with pytest.raises(FolderError, match="left alone"):
        vault.new_key(path)
    monkeypatch.setenv(vault.KEY_FILE, str(path))
    vault.write(tmp_path / "x", b"hello")
    assert vault.is_sealed(tmp_path / "x") and vault.read(tmp_path / "x") == b"hello"
    os.chmod(path, 0o644)
    with pytest.raises(ConfigError, match="Others can read"):
        vault.read(tmp_path / "x")
    monkeypatch.setenv(vault.KEY_FILE, str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="cannot be read"):
        vault.write(tmp_path / "x", b"")


@pytest.mark.parametrize("text", ["5a" * 31, "5a" * 33, "zz" * 32, "hello"])
def test_a_key_that_is_none_is_refused_not_ignored(no_key, tmp_path, monkeypatch, text):
    monkeypatch.setenv(vault.KEY, text)
    with pytest.raises(ConfigError, match="64 hex digits"):
        vault.write(tmp_path / "x", b"secret")
    assert not (tmp_path / "x").exists()


def test_equal_contents_look_different_each_time(key, tmp_path):
    first, second = (vault.seal(tmp_path / "x", b"hello") for _ in range(2))
    assert len(first) == len(second) and first[len(vault.MAGIC) :][:44] != second[len(vault.MAGIC) :][:44]
