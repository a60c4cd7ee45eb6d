import io
import os
import threading
import time
import zipfile
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedscan_client.intake.records import Refused
from fedscan_client.intake.sources import folder
from fedscan_core.errors import DataError

OLD = time.time() - 2 * folder.CLOCK_SKEW
DICOMDIR = b"\0" * 128 + b"DICM" + b"\x02\x00\x02\x00UI\x14\x001.2.840.10008.1.3.10\0" + b"..."


def write(path, data=b"x", when=OLD):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (when, when))
    return path


def scan(root, settle=0.0):
    skipped = Counter[str]()
    found = list(folder.found(root, settle_seconds=settle, skipped=skipped))
    return {each.locator: each for each in found}, dict(skipped)


def content(root, locator):
    with folder.open_locator(root, locator) as file:
        return file.read()


def zipped(members, **how):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **{"compression": zipfile.ZIP_DEFLATED, **how}) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def test_any_depth_any_name_sorted_without_links_and_pipes(tmp_path):
    for name in ("b/IM2", "b/IM1", "a/deep/er/x.DCM", "c with space", "b-", ".hidden"):
        write(tmp_path / name, name.encode())
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "b/IM1")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    found, skipped = scan(tmp_path)
    assert list(found) == [".hidden", "b-", "c with space", "a/deep/er/x.DCM", "b/IM1", "b/IM2"]
    assert skipped == {"link": 2}
    for locator, each in found.items():
        assert content(tmp_path, locator) == each.open().read() == locator.encode()
        assert each.size == len(locator)
    assert "IM1" not in repr(found["b/IM1"])  # a locator may hold a name


def test_the_stamp_changes_with_the_file(tmp_path):
    path = write(tmp_path / "a", b"one")
    stamps = [scan(tmp_path)[0]["a"].stamp]
    write(path, b"two", OLD + 1)
    stamps.append(scan(tmp_path)[0]["a"].stamp)
    write(path, b"four", OLD + 1)
    stamps.append(scan(tmp_path)[0]["a"].stamp)
    assert len(set(stamps)) == 3


def test_a_file_that_grows_is_left_for_the_next_run(tmp_path):
    now = time.time()
    write(tmp_path / "old")
    write(tmp_path / "fresh", when=now)
    write(tmp_path / "behind", when=now - 1800)  # a file server whose clock is half an hour late
    write(tmp_path / "ahead", when=now + 1800)
    write(tmp_path / "export.PART")
    writing = threading.Timer(0.2, lambda: write(tmp_path / "behind", b"more", now - 1799))
    going = threading.Timer(0.2, (tmp_path / "ahead").unlink)
    writing.start()
    going.start()
    started = time.monotonic()
    found, skipped = scan(tmp_path, settle=0.6)
    assert 0.5 < time.monotonic() - started < 3  # once for all of them
    assert list(found) == ["old", "fresh"]
    assert skipped == {"still_writing": 3}
    assert list(scan(tmp_path)[0]) == ["old", "behind", "fresh"]


def test_old_files_cost_no_waiting(tmp_path):
    write(tmp_path / "old")
    started = time.monotonic()
    assert scan(tmp_path, settle=30)[0]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p / "a/b").mkdir(parents=True)])
def test_a_share_that_is_not_mounted_is_an_error(tmp_path, make):
    make(tmp_path / "share")
    with pytest.raises(DataError) as caught:
        scan(tmp_path / "share")
    assert "mounted" in caught.value.remedy and "nothing was changed" in caught.value.remedy


def test_what_cannot_be_read_is_counted(tmp_path, monkeypatch):
    for name in ("a/1", "b/2", "c", "d"):
        write(tmp_path / name)
    real_scan, real_open = os.scandir, os.open

    def scandir(path):
        if str(path).endswith("/a"):
            raise PermissionError
        return real_scan(path)

    def refuse(path, *rest, **more):
        if str(path).endswith("/c"):
            raise PermissionError
        return real_open(path, *rest, **more)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "open", refuse)
    found, skipped = scan(tmp_path)
    assert list(found) == ["d", "b/2"] and skipped == {"unreadable": 2}
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(OSError("stale handle")))
    with pytest.raises(DataError, match="listed"):
        scan(tmp_path)


def test_a_dicomdir_stands_for_its_folder(tmp_path):
    write(tmp_path / "DICOMDIR", DICOMDIR)
    write(tmp_path / "IMAGES/IM1", b"image")
    found, _ = scan(tmp_path / "DICOMDIR")
    assert list(found) == ["DICOMDIR", "IMAGES/IM1"]
    assert content(tmp_path / "DICOMDIR", "IMAGES/IM1") == b"image"
    with pytest.raises(DataError):
        scan(tmp_path / "IMAGES/IM1")


def test_members_of_archives_known_by_content(tmp_path):
    write(tmp_path / "export", zipped([("b/IM2", b"two"), ("IM1", b"one" * 999), ("folder/", b""), ("no.tmp", b"?")]))
    write(tmp_path / "plain.zip", b"no archive")
    preamble = b"PK\x03\x04".ljust(128, b"\0") + b"DICM"  # a preamble may hold anything
    write(tmp_path / "dicom", preamble)
    found, skipped = scan(tmp_path)
    assert set(found) == {"dicom", "export!IM1", "export!b/IM2", "plain.zip"}
    assert skipped == {"still_writing": 1}
    assert found["export!IM1"].open().read() == content(tmp_path, "export!IM1") == b"one" * 999
    assert found["export!IM1"].size == 2997 and found["export!IM1"].stamp != found["export!b/IM2"].stamp


def _encrypted():
    data = bytearray(zipped([("secret", b"x"), ("open", b"y")]))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.index(mark)
        data[place + offset] |= 1
    return bytes(data)


def _lying():
    """Declares ten bytes, unpacks to a million."""
    data = bytearray(zipped([("bomb", b"\0" * 10**6)]))
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = data.index(mark)
        data[place + offset : place + offset + 4] = (10).to_bytes(4, "little")
    return bytes(data)


def _huge_catalogue():
    """Claims a catalogue of 2 GiB: reading it would take as much memory."""
    data = bytearray(zipped([("a", b"x")]))
    place = data.rindex(b"PK\x05\x06")
    data[place + 12 : place + 16] = (1 << 31).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "members", "reason"),
    [
        (_encrypted(), ["z!open"], "zip_encrypted"),
        (zipped([("inner", zipped([("a", b"x")])), ("ok", b"x")]), ["z!ok"], "zip_nested"),
        (zipped([("bomb", b"\0" * (1 << 25))]), [], "zip_too_large"),
        (zipped([(f"bomb{i}", b"\0" * (1 << 24)) for i in range(3)]), [], "zip_too_large"),
        (zipped([("a", b"x")])[:-30], [], "zip_damaged"),
        (_huge_catalogue(), [], "zip_damaged"),
        (b"PK\x03\x04" + b"garbage" * 99, [], "zip_damaged"),
    ],
    ids=("encrypted", "nested", "bomb", "bombs", "cut off", "huge catalogue", "garbage"),
)
def test_archives_that_are_not_read(tmp_path, data, members, reason):
    write(tmp_path / "z", data)
    found, skipped = scan(tmp_path)
    assert list(found) == members and skipped == {reason: 1}


def test_limits_of_an_archive(tmp_path, monkeypatch):
    write(tmp_path / "z", zipped([("a", b"12345"), ("b", b"123456"), ("c", b"1")]))
    monkeypatch.setattr(folder, "MAX_MEMBER_BYTES", 5)
    found, skipped = scan(tmp_path)
    assert list(found) == ["z!a", "z!c"] and skipped == {"zip_too_large": 1}
    with pytest.raises(Refused):
        content(tmp_path, "z!b")
    monkeypatch.setattr(folder, "MAX_MEMBERS", 2)
    assert scan(tmp_path) == ({}, {"zip_too_large": 1})
    monkeypatch.setattr(folder, "_MAX_CATALOGUE", 50)
    write(tmp_path / "z", zipped([("a", b"12345"), ("b", b"1")]))
    assert scan(tmp_path) == ({}, {"zip_too_large": 1})


def test_a_member_that_lies_about_its_size_or_is_damaged(tmp_path):
    sound = zipped([("a", b"abcdef" * 99)], compression=zipfile.ZIP_STORED)
    write(tmp_path / "late", sound.replace(b"abcdefabc", b"abcdefabX", 9))
    write(tmp_path / "lies", _lying())
    found, skipped = scan(tmp_path)
    assert sum(skipped.values()) + len(found) == 2
    for locator in found:  # its first bytes are sound; the rest is known on reading
        with pytest.raises(Refused):
            content(tmp_path, locator)


def test_two_members_of_one_name_are_one(tmp_path):
    with pytest.warns(UserWarning):
        data = zipped([("a", b"one"), ("a", b"two")])
    write(tmp_path / "z", data)
    found, skipped = scan(tmp_path)
    assert list(found) == ["z!a"] and skipped == {"zip_damaged": 1}


@pytest.mark.parametrize(
    "locator",
    [
        "../secret",
        "a/../../secret",
        "/etc/hosts",
        "%2e%2e/secret",
        "link/secret",
        "linked",
        "",
        ".",
        "a\0b",
        "pipe",
        "a!m",
    ],
)
def test_no_locator_leads_out(tmp_path, locator):
    write(tmp_path / "secret")
    root = tmp_path / "root"
    write(root / "a")
    (root / "link").symlink_to(tmp_path)
    (root / "linked").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "pipe")
    with pytest.raises(DataError):
        content(root, locator)


def test_a_file_that_went_or_became_a_link(tmp_path):
    write(tmp_path / "secret", b"secret")
    write(tmp_path / "root/a")
    found, _ = scan(tmp_path / "root")
    (tmp_path / "root/a").unlink()
    with pytest.raises(Refused):
        found["a"].open()
    write(tmp_path / "root/b")
    for target in ("../secret", "b"):
        (tmp_path / "root/a").unlink(missing_ok=True)
        (tmp_path / "root/a").symlink_to(target)
        with pytest.raises(DataError):
            found["a"].open()
        with pytest.raises(OSError):  # though it were exchanged after the check of where it leads
            folder._open(tmp_path / "root/a")


NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=12)
BYTES = st.binary(min_size=1, max_size=8).filter(lambda b: b"/" not in b and b"\0" not in b).map(os.fsdecode)


@given(
    st.lists(NAMES | BYTES | st.sampled_from(["a!b", "a%21b", "%", "!", "a", "b"]), min_size=1, max_size=4, unique=True)
)
def test_every_name_has_one_locator_which_is_text(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("names")
    names = [name for name in names if name not in (".", "..") and not name.lower().endswith(folder.UNFINISHED)]
    for number, name in enumerate(names):
        write(root / name, str(number).encode())
    write(root / "!zip", zipped([("a!b", b"member"), ("b", b"other")]))
    found, _ = scan(root)
    assert len(found) == len(set(names) - {"!zip"}) + 2
    for number, name in enumerate(names):
        if name != "!zip":
            locator = folder._quoted(name)
            locator.encode()  # valid text: it is encrypted and kept
            assert content(root, locator) == str(number).encode() and locator in found
    assert content(root, "%21zip!a%21b") == b"member"
