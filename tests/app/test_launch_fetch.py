"""A run folder from the coordinator: hostile archives, full disks and cut lines leave nothing behind."""

import contextlib
import io
import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedscan import fetch, people
from fedscan.people import CoordinatorError, Unreachable
from fedscan_core.errors import FolderError

ID = "cxr-0123456789ab"
FILES = {f"{ID}/run.toml": b'name = "cxr"\n', f"{ID}/rounds.jsonl": b"{}\n" * 1000, f"{ID}/more/x.json": b"{}"}


@pytest.fixture
def http(edge, fake_edge):
    edge.add(ID)
    edge.archive = fake_edge.tar(FILES)
    with people.connect(edge.address, edge.ca, fake_edge.BEARER) as client:
        yield client


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_comes_whole_and_is_the_owners_only(http, tmp_path):
    out = tmp_path / "here" / "runs" / ID
    assert fetch.fetch(http, ID, out) == out
    for name, data in FILES.items():
        path = out / name.removeprefix(f"{ID}/")
        assert path.read_bytes() == data
        assert path.stat().st_mode & 0o077 == 0
    assert everything(tmp_path / "here") == sorted(
        ["runs", f"runs/{ID}", *(f"runs/{name}" for name in FILES), f"runs/{ID}/more"]
    )


def test_an_empty_folder_may_be_there_already(http, tmp_path):
    (tmp_path / "out").mkdir()
    assert (fetch.fetch(http, ID, tmp_path / "out") / "run.toml").is_file()


@pytest.mark.parametrize("what", ["file", "full", "link"])
def test_what_is_there_is_never_replaced(http, edge, tmp_path, what):
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "full":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(tmp_path / "elsewhere")
    before = everything(tmp_path)
    with pytest.raises(FolderError, match="there already"):
        fetch.fetch(http, ID, out)
    assert everything(tmp_path) == before
    assert not [asked for asked in edge.seen if "archive" in asked]


def test_half_a_download_leaves_nothing(http, edge, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    edge.sha = "0" * 64
    with pytest.raises(CoordinatorError, match="damaged"):
        fetch.fetch(http, ID, tmp_path / "here" / "out")
    edge.fail[f"/runs/{ID}/archive"] = (None, b"")
    with pytest.raises(Unreachable):
        fetch.fetch(http, ID, tmp_path / "here" / "out")

    def interrupted(archive, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    edge.sha = None
    monkeypatch.setattr(fetch, "unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(http, ID, tmp_path / "here" / "out")
    assert everything(tmp_path / "here") == []


def test_a_folder_that_cannot_be_written_is_said_to_be_so(http, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="cannot be filled"):
        fetch.fetch(http, ID, tmp_path / "file" / "out")


def packed(*members):
    """A tar of (name, type, data or link)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.linkname = data
                tar.addfile(info)
    return out.getvalue()


GOOD = (f"{ID}/run.toml", tarfile.REGTYPE, b"x")
FILE, LINK, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize(
    "members",
    [
        [("../evil", FILE, b"x"), GOOD],
        [("/tmp/evil", FILE, b"x"), GOOD],
        [(f"{ID}/../../evil", FILE, b"x"), GOOD],
        [GOOD, (f"{ID}/run.toml", FILE, b"another")],
        [(f"{ID}/out", LINK, "/tmp"), (f"{ID}/out/evil", FILE, b"x"), GOOD],
        [GOOD, (f"{ID}/hard", HARD, "/etc/passwd")],
        [GOOD, (f"{ID}/pipe", tarfile.FIFOTYPE, "")],
        [GOOD, (f"{ID}/device", tarfile.CHRTYPE, "")],
        [GOOD, (f"{ID}/.bashrc", FILE, b"x")],
        [GOOD, (f"{ID}/a\nb", FILE, b"x")],
        [GOOD, (f"{ID}/run.toml/x", FILE, b"x")],
        [GOOD, ("", FILE, b"x")],
        [("other/run.toml", FILE, b"x")],
        [],
    ],
)
def test_hostile_archives_are_refused_and_nothing_is_kept(http, edge, tmp_path, members):
    (tmp_path / "a" / "here").mkdir(parents=True)
    edge.archive = packed(*members)
    with pytest.raises(CoordinatorError, match="nothing was kept"):
        fetch.fetch(http, ID, tmp_path / "a" / "here" / "out")
    assert everything(tmp_path / "a") == ["here"]


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_a_compressed_archive_is_refused_before_it_grows(http, edge, tmp_path, mode):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        info = tarfile.TarInfo(f"{ID}/run.toml")
        info.size = 2_000_000
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    edge.archive = out.getvalue()
    with pytest.raises(CoordinatorError, match="damaged"):
        fetch.fetch(http, ID, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_holes_is_refused(tmp_path):
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": f"{ID}/run.toml"}
    info = tarfile.TarInfo(f"{ID}/run.toml")
    info.pax_headers = headers | {"GNU.sparse.realsize": str(2**40)}
    data = b"1\n0\n0\n".ljust(512, b"\0")
    info.size = len(data)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(CoordinatorError):
        fetch.unpack(tmp_path / "a.tar", tmp_path / "out")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_archive_never_writes_outside_and_never_surprises(memory_path, fake_edge, data):
    raw = bytearray(fake_edge.tar(FILES))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    (memory_path / "a.tar").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    number = len(os.listdir(memory_path))
    with contextlib.suppress(CoordinatorError):
        fetch.unpack(memory_path / "a.tar", memory_path / f"out-{number}")
    assert all(name == "a.tar" or name.startswith("out-") for name in os.listdir(memory_path))
