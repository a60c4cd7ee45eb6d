"""A secret's file when it goes; what is refused on reading is in test_keys.py."""

import os

from fedscan_client import secret_file


def test_what_is_forgotten_is_overwritten(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"secret")
    with path.open("rb") as still:
        secret_file.forget(path)
        assert still.read() == bytes(6) and not path.exists()
    secret_file.forget(path)


def test_what_has_another_name_is_left_alone(tmp_path):
    kept = tmp_path / "kept"
    kept.write_bytes(b"secret")
    (tmp_path / "link").symlink_to(kept)
    os.link(kept, tmp_path / "second")
    for name in ("link", "second"):
        secret_file.forget(tmp_path / name)
        assert not (tmp_path / name).is_symlink() and not (tmp_path / name).exists()
    assert kept.read_bytes() == b"secret"
