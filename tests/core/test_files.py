import os
import stat

import pytest

from fedscan_core.files import write_atomic


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomic(path, b"one")
    assert path.read_bytes() == b"one" and stat.S_IMODE(path.stat().st_mode) == 0o600
    write_atomic(path, b"two, longer")
    assert path.read_bytes() == b"two, longer"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_crash_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, where, error):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def crash(*args):
        raise error

    monkeypatch.setattr(os, where, crash)
    with pytest.raises(error):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    path, replace = tmp_path / "file", os.replace
    steps: list[str] = []

    def fsync(descriptor):
        info = os.fstat(descriptor)
        steps.append("folder" if stat.S_ISDIR(info.st_mode) else f"{info.st_size} bytes")

    def rename(source, target):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write_atomic(path, b"abc")
    assert steps == ["3 bytes", "rename", "folder"]
