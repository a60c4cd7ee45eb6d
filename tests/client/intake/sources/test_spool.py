import errno
import hashlib
import os
import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.intake.sources import spool
from fedscan_client.intake.sources.spool import BLOCK
from fedscan_core.errors import DataError

KEY = bytes(range(32))
HEAD = 16 + 12 + 32 + 64 + 16  # magic, nonce, file key, UID, tag
SEALED = BLOCK + 16
UID = "1.2.840.99.424242"


def read(folder, locator, key=KEY):
    with spool.open_locator(folder, key, locator) as file:
        return file.read()


def only(folder, key=KEY):
    (one,) = spool.found(folder, key)
    return one


def noise(size, seed=0):
    return b"".join(hashlib.sha256(b"%d %d" % (seed, i)).digest() for i in range(size // 32 + 1))[:size]


def dicom(body, meta=b"\x02\x00\x10\x00UI\x06\x001.2.3\0"):
    """A DICOM file whose data set is `body`."""
    return b"\0" * 128 + b"DICM\x02\x00\x00\x00UL\x04\x00" + len(meta).to_bytes(4, "little") + meta + body


@pytest.mark.parametrize("size", [0, 1, 131, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7])
def test_what_goes_in_comes_out_at_every_edge_of_a_block(tmp_path, size):
    data = noise(size)
    assert spool.put(tmp_path, KEY, data, UID) == "stored"
    found = only(tmp_path)
    assert found.size == size and str(size) in found.stamp
    assert read(tmp_path, found.locator) == data
    with found.open() as file:
        for place in (0, size // 2, max(size - 5, 0), BLOCK - 2, 0):
            assert file.seek(place) == place
            assert file.read(9) == data[place : place + 9]
        assert file.seek(0, os.SEEK_END) == size and file.read(1) == b""
    assert spool.has(tmp_path, KEY, UID) and not spool.has(tmp_path, KEY, UID + "1")
    assert spool.drop(tmp_path, found.locator) and not spool.drop(tmp_path, found.locator)
    assert not list(spool.found(tmp_path, KEY))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 70_000), max_size=8), st.integers(0, 3 * BLOCK // 2))
def test_the_parts_it_arrives_in_make_no_difference(tmp_path_factory, sizes, large):
    folder = tmp_path_factory.mktemp("spool")
    data = noise(sum(sizes) + large)
    parts, at = [], 0
    for size in [*sizes, large]:
        parts.append(memoryview(data)[at : at + size])
        at += size
    assert spool.put(folder, KEY, iter(parts), UID) == "stored"
    assert read(folder, only(folder).locator) == data
    assert spool.put(folder, KEY, data, UID) == "same"


def test_nothing_in_clear_and_nobody_else_may_read(tmp_path):
    plain = dicom(b"Canary^Carla MRN-424242 " * 1000)
    spool.put(tmp_path / "spool", KEY, plain, UID)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0
        for secret in (UID, "Canary", "424242"):
            assert secret not in str(path)
            assert path.is_dir() or secret.encode() not in path.read_bytes()


def three_blocks(folder):
    spool.put(folder, KEY, noise(2 * BLOCK + 100), UID)
    found = only(folder)
    path = folder / found.locator
    return found.locator, path, bytearray(path.read_bytes())


def tamper(sealed, other):
    """Every way to spoil a file of three blocks: name -> what is written instead."""
    first, second, third = (sealed[HEAD + i * SEALED : HEAD + (i + 1) * SEALED] for i in range(3))
    head = sealed[:HEAD]
    flipped = {}
    for name, place in {"magic": 0, "nonce": 20, "key": 50, "first": HEAD + 5, "last": len(sealed) - 1}.items():
        flipped[f"a bit of {name}"] = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
    return {
        **flipped,
        "swapped": head + second + first + third,
        "repeated": head + first + first + third,
        "left out": head + first + third,
        "cut at a block": head + first + second,
        "cut to one block": head + first,
        "cut inside a block": sealed[:-50],
        "cut to nothing": head,
        "cut in the head": head[:40],
        "empty": b"",
        "longer": sealed + b"\0",
        "a block of another file": head + other[HEAD : HEAD + SEALED] + second + third,
        "another file's head": other[:HEAD] + first + second + third,
    }


def test_every_change_is_noticed(tmp_path):
    locator, path, sealed = three_blocks(tmp_path)
    spool.put(tmp_path / "other", KEY, noise(2 * BLOCK + 100, seed=1), UID)
    other = (tmp_path / "other" / locator).read_bytes()
    for name, spoilt in tamper(sealed, other).items():
        path.write_bytes(spoilt)
        with pytest.raises(DataError, match="altered or cut"):
            read(tmp_path, locator)
            pytest.fail(name)
        if name.startswith("cut"):  # known at once, before any of it is used
            with pytest.raises(DataError):
                spool.open_locator(tmp_path, KEY, locator)
    path.write_bytes(sealed)
    assert len(read(tmp_path, locator)) == 2 * BLOCK + 100
    with pytest.raises(DataError):
        read(tmp_path, locator, b"x" * 32)


def test_a_file_under_another_name_is_noticed(tmp_path):
    locator, _, sealed = three_blocks(tmp_path)
    spool.put(tmp_path, KEY, b"another", UID + ".1")
    (other,) = (found.locator for found in spool.found(tmp_path, KEY) if found.locator != locator)
    (tmp_path / other).write_bytes(sealed)
    with pytest.raises(DataError):
        read(tmp_path, other)


def test_the_same_instance_twice_is_one_file_and_the_first_one_stays(tmp_path):
    assert spool.put(tmp_path, KEY, dicom(b"pixels"), UID) == "stored"
    before = only(tmp_path)
    # Who sent it and how is written in the file meta information; the instance is the same.
    assert spool.put(tmp_path, KEY, dicom(b"pixels", b"\x02\x00\x16\x00AE\x04\x00PACS"), UID) == "same"
    assert spool.put(tmp_path, KEY, [dicom(b"pix"), b"els"], UID) == "same"
    assert spool.put(tmp_path, KEY, dicom(b"others"), UID) == "conflict"
    assert spool.put(tmp_path, KEY, b"pixels", UID) in ("same", "conflict")  # no DICOM file at all
    assert only(tmp_path).stamp == before.stamp and read(tmp_path, before.locator) == dicom(b"pixels")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
    (tmp_path / before.locator).write_bytes(b"damaged")
    assert spool.put(tmp_path, KEY, dicom(b"pixels"), UID) == "stored"
    assert read(tmp_path, before.locator) == dicom(b"pixels")


def test_two_senders_at_once_do_not_overwrite_each_other(tmp_path):
    outcomes = []
    start = threading.Barrier(4)

    def send(number):
        start.wait()
        outcomes.append(spool.put(tmp_path, KEY, noise(200_000, seed=number), UID))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["conflict"] * 3 + ["stored"]
    assert read(tmp_path, only(tmp_path).locator) in [noise(200_000, seed=number) for number in range(4)]


@pytest.mark.parametrize("fails", ["write", "data"])
def test_a_full_disk_or_a_broken_connection_leaves_nothing(tmp_path, monkeypatch, fails):
    def broken():
        yield noise(3 * BLOCK)
        raise ConnectionResetError

    if fails == "write":
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(OSError):
        spool.put(tmp_path, KEY, noise(5) if fails == "write" else broken(), UID)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list(spool.found(tmp_path, KEY))


def test_leftovers_go_and_what_is_being_written_stays(tmp_path):
    spool.put(tmp_path, KEY, b"x", UID)
    shard = (tmp_path / only(tmp_path).locator).parent
    (shard / ".dead.part").write_bytes(b"x")
    (shard / "notes.txt").write_bytes(b"x")
    cleaned = []

    def slowly():
        yield b"one"
        cleaned.append(spool.clean(tmp_path))
        yield b"two"

    spool.put(tmp_path, KEY, slowly(), UID + ".2")
    assert cleaned == [1] and spool.clean(tmp_path) == 0
    assert sorted(found.size for found in spool.found(tmp_path, KEY)) == [1, 6]


@pytest.mark.parametrize(
    "locator", ["", "../key", "ab/../../key", "/etc/hosts", "ab/ab.enc", "ab/" + "cd" * 20 + ".enc"]
)
def test_a_locator_names_nothing_outside(tmp_path, locator):
    with pytest.raises(DataError):
        spool.open_locator(tmp_path, KEY, locator)
    with pytest.raises(DataError):
        spool.drop(tmp_path, locator)


def test_uids_that_are_none(tmp_path):
    for uid in ("", "1" * 65):
        with pytest.raises(DataError):
            spool.put(tmp_path, KEY, b"x", uid)
    with pytest.raises(DataError, match="not there any more"):
        spool.open_locator(tmp_path, KEY, "ab/" + "ab" * 20 + ".enc")


def test_an_object_is_on_disk_before_it_has_its_name_and_the_name_before_put_returns(tmp_path, monkeypatch):
    done = []
    real_sync, real_link = os.fsync, os.link

    def sync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_sync(descriptor)

    def link(source, target):
        done.append("named")
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "link", link)
    spool.put(tmp_path, KEY, b"x", UID)
    named = done.index("named")
    shard = str((tmp_path / only(tmp_path).locator).parent)
    assert done[named - 1].endswith(".part") and done[named + 1 :] == [shard]
    assert str(tmp_path) in done[:named]  # the shard's own name


def test_memory_does_not_grow_with_the_object(tmp_path):
    part = noise(BLOCK)
    tracemalloc.start()
    try:
        spool.put(tmp_path, KEY, (part for _ in range(48)), UID)
        with only(tmp_path).open() as file:
            while file.read(BLOCK):
                pass
        assert tracemalloc.get_traced_memory()[1] < 8 * BLOCK
    finally:
        tracemalloc.stop()


def test_a_new_wrapping_key_opens_everything_and_the_old_one_nothing(tmp_path, monkeypatch):
    other = b"o" * 32
    three_blocks(tmp_path)
    spool.put(tmp_path, KEY, b"another", UID + ".1")

    def contents(key):
        return {(it.stamp, it.open().read()) for it in spool.found(tmp_path, key)}

    before = contents(KEY)
    real, calls = os.replace, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        spool.rekey(tmp_path, KEY, other)
    monkeypatch.undo()
    spool.clean(tmp_path)
    spool.rekey(tmp_path, KEY, other)
    assert contents(other) == before and len(list(spool.found(tmp_path, other))) == 2
    assert spool.has(tmp_path, other, UID) and not spool.has(tmp_path, KEY, UID)
    for it in spool.found(tmp_path, KEY):
        with pytest.raises(DataError):
            it.open().read()
    with pytest.raises(DataError):
        spool.rekey(tmp_path, KEY, b"x" * 32)
    assert not list(tmp_path.rglob("*.part"))
