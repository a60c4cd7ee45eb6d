"""Hostile files end as `Refused`, quickly and in bounded memory; sound ones read as pydicom reads them."""

import io
import struct
import time
import zlib

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import DeflatedExplicitVRLittleEndian

from fedscan_client.intake import read
from fedscan_client.intake.records import Refused

EXPLICIT, IMPLICIT, DEFLATED = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1.99"
ITEM = b"\xfe\xff\x00\xe0\0\0\0\0"


def meta(syntax: bytes) -> bytes:
    return b"\0" * 128 + b"DICM\x02\0\x10\0UI" + struct.pack("<H", len(syntax)) + syntax


def sequence(length: int) -> bytes:
    return struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, length)


@pytest.fixture
def data(cr_instance, save, tmp_path):
    """A sound file."""
    return save(cr_instance(), tmp_path / "a.dcm").read_bytes()


@pytest.fixture
def outcomes(peak):
    """How both readers end; asserts that neither takes long, or much memory."""

    def run(data: bytes) -> list[str]:
        found = []
        for reader in (read.header, read.whole):
            peak()
            start = time.process_time()
            try:
                reader(io.BytesIO(data), len(data))
                found.append("read")
            except Refused as refused:
                found.append(refused.reason)
            assert time.process_time() - start < 4, found  # 2 s on an idle machine
            assert peak() < 700_000, found
        return found

    return run


def test_a_sound_file_reads_as_pydicom_reads_it(data):
    expected = pydicom.dcmread(io.BytesIO(data))
    whole = read.whole(io.BytesIO(data), len(data))
    assert whole == expected and whole.file_meta == expected.file_meta and whole.buffer is None
    header = read.header(io.BytesIO(data), len(data))
    del expected.PixelData
    assert header == expected
    few = read.header(io.BytesIO(data), len(data), tags=["PatientID", "Rows"])
    assert {element.keyword for element in few} == {"PatientID", "Rows"}


def test_deflated_files_are_inflated(data, cr_instance, save, tmp_path, outcomes):
    ds = cr_instance()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    packed = save(ds, tmp_path / "b.dcm").read_bytes()
    for reader in (read.header, read.whole):
        found = reader(io.BytesIO(packed), len(packed))
        assert found == reader(io.BytesIO(data), len(data))
        assert found.file_meta == pydicom.dcmread(io.BytesIO(packed)).file_meta
        assert found.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    assert outcomes(packed[:-30]) and outcomes(packed[:500])


def test_a_deflate_bomb_is_refused_half_way(monkeypatch, outcomes, peak):
    monkeypatch.setattr(read, "INFLATED_BYTES", 2**22)
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(pack.compress(b"\0" * 2**20) for _ in range(64)) + pack.flush()
    assert outcomes(meta(DEFLATED) + bomb) == ["too_large", "too_large"]
    peak()
    with pytest.raises(Refused):
        read.whole(io.BytesIO(meta(DEFLATED) + bomb), 10**6)
    assert peak() < 30_000  # kB


@pytest.mark.slow
def test_a_deflate_bomb_of_two_gigabytes(outcomes):
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(pack.compress(b"\0" * 2**20) for _ in range(2048)) + pack.flush()
    assert outcomes(meta(DEFLATED) + bomb) == ["too_large", "too_large"]


def test_a_length_of_four_gigabytes_reads_what_is_there(outcomes):
    huge = struct.pack("<HHL", 0x0010, 0x0010, 0xFFFFFFF0)
    asked = []

    class Watched(io.BytesIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    data = meta(IMPLICIT) + huge + b"ab"
    read.whole(Watched(data), len(data))
    assert max(asked) <= len(data) and min(asked) >= 0
    assert outcomes(data) == ["read", "read"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (struct.pack("<HHL", 0x11, 1, 0) * read._READS, {"too_large"}),
        (sequence(0xFFFFFFFF) + ITEM * read._READS, {"too_large"}),
        (sequence(len(ITEM) * 2**18) + ITEM * 2**18, {"too_large"}),
        (sequence(len(ITEM) * 5000) + ITEM * 5000, {"read"}),
        ((sequence(0xFFFFFFFF) + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 300, {"not_dicom", "read"}),
        ((sequence(0xFFFFFFFF) + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 100_000, {"not_dicom"}),
    ],
    ids=["elements", "items", "items of stated length", "5,000 items", "300 deep", "100,000 deep"],
)
@pytest.mark.parametrize("reads", [2**14, pytest.param(read._READS, marks=pytest.mark.slow)], ids=["few", "all"])
def test_headers_without_end(body, expected, reads, monkeypatch, outcomes):
    monkeypatch.setattr(read, "_READS", reads)
    syntax = IMPLICIT if body[:2] == b"\x11\0" else EXPLICIT
    assert set(outcomes(meta(syntax) + body)) <= expected


def test_an_item_counts_as_four_reads(monkeypatch, outcomes):
    monkeypatch.setattr(read, "_READS", 3000)
    assert outcomes(meta(IMPLICIT) + struct.pack("<HHL", 0x11, 1, 0) * 1000) == ["read", "read"]
    assert outcomes(meta(EXPLICIT) + sequence(0xFFFFFFFF) + ITEM * 1000) == ["too_large", "too_large"]


def test_limits_on_bytes(monkeypatch, data, outcomes):
    monkeypatch.setattr(read, "HEADER_BYTES", 1000)
    long = data[:-60] + struct.pack("<HH2sHL", 0x7FDF, 0x1001, b"OB", 0, 2000) + b"\0" * 2000
    assert outcomes(data) == ["read", "read"]
    assert outcomes(long) == ["too_large", "too_large"]
    taken = []

    class Counted(io.BytesIO):
        def read(self, size=-1):
            taken.append(size)
            return super().read(size)

    with pytest.raises(Refused):
        read.header(Counted(long), len(long))
    assert sum(taken) < 1400  # the sniffed file meta and the limit, not the element
    monkeypatch.setattr(read, "MAX_BYTES", len(data) - 1)
    with pytest.raises(Refused, match="more pixels or bytes"):
        read.whole(io.BytesIO(data), len(data))


def test_a_stream_that_fails_is_unreadable(data):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 200:
                raise OSError("the share CANARY went away")
            return super().read(size)

    for reader in (read.header, read.whole):
        with pytest.raises(Refused) as caught:
            reader(Failing(data), len(data))
        assert caught.value.reason == "unreadable" and "CANARY" not in str(caught.value)


@given(st.binary(max_size=300), st.booleans(), st.sampled_from([EXPLICIT, IMPLICIT, DEFLATED]))
def test_any_bytes_are_read_or_refused(tail, dicom, syntax):
    data = meta(syntax) + tail if dicom else tail
    for reader in (read.header, read.whole):
        try:
            reader(io.BytesIO(data), len(data))
        except Refused as refused:
            assert refused.reason in ("not_dicom", "unreadable", "too_large")
