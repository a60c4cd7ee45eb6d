"""Nothing that was planted survives: every element of the dictionary, at every place that is kept."""

import io

import pydicom
import pytest
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from fedscan_client.intake.deid import deidentify, pseudonymous_uid
from fedscan_client.intake.kinds import KINDS, TABLES
from fedscan_client.intake.records import Refused

KEY = bytes(range(32))
STORAGE = "1.2.840.10008.5.1.4.1.1."
# Between them these have every table: see test_the_kinds_have_every_table.
FUZZED = ["1.2", "2", "2.1", "3.1", "4", "4.1", "7", "12.1", "20", "128", "130"]
NUMBERED = [number for number in FUZZED if number not in ("2", "2.1", "130")]  # the functional groups once
# Planted junk in these is not removed but refused, because without them the pixels would mean something else.
REFUSED = {"ModalityLUTSequence"}
NUMERIC = {"DS", "IS", "FD", "FL", "SL", "SS", "UL", "US", "US or SS"}


def written(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def tree(base: Dataset, table) -> Dataset:
    """`base`, and a copy of it in every sequence that is kept, all the way down."""
    ds = Dataset(dict(base._dict))
    for row in table:
        inner = row.arguments[:1] if row.action == "items" else row.arguments[1:] if row.action == "codes" else None
        if inner is not None and row.keyword not in REFUSED:
            item = tree(base, TABLES[inner[0]] if inner else ())
            ds[row.tag] = DataElement(row.tag, "SQ", Sequence([item]))
    return ds


def filled(canaries, base: Dataset, sop_class: str) -> Dataset:
    """An image of a kind with `base` everywhere, that would be accepted but for what is planted."""
    frame = canaries.image(sop_class)
    ds = tree(base, KINDS[STORAGE + sop_class].table)
    pixels = {row.keyword for row in TABLES["PIXELS"] if row.action == "pixels"} - {
        "NumberOfFrames",
        "PlanarConfiguration",
    }
    for keyword in pixels | {"SOPClassUID", "RescaleSlope", "RescaleIntercept"}:
        ds[keyword] = frame[keyword]
    for keyword in ["PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"]:
        if keyword not in ds:
            ds[keyword] = frame[keyword]
    ds.file_meta, ds.Modality = frame.file_meta, "CT"
    if "NumberOfFrames" in ds:
        del ds.NumberOfFrames
    return ds


@pytest.fixture(scope="module")
def planted(canaries):
    plants = canaries.Plants("QF")
    return canaries.fill(Dataset(), plants, ""), plants


def test_the_kinds_have_every_table():
    def names(table) -> set[str]:
        inner = {name for row in table if row.action == "items" for name in row.arguments[:1]}
        inner |= {name for row in table if row.action == "codes" for name in row.arguments[1:]}
        return inner.union(*(names(TABLES[name]) for name in inner))

    everything = set().union(*(names(kind.table) for kind in KINDS.values()))
    assert everything == set().union(*(names(KINDS[STORAGE + number].table) for number in FUZZED))


def test_none_of_the_dictionary_file_survives(canaries, tmp_path):
    """3,340 canaries in one file, the one of the bench."""
    plants = canaries.dictionary_file(tmp_path / "a.dcm")
    raw = (tmp_path / "a.dcm").read_bytes()
    assert len(plants.where) == 3340
    assert len(plants.surviving(raw)) >= 3335  # the detector works (a few are overwritten to make the file acceptable)
    assert plants.surviving(written(deidentify(pydicom.dcmread(tmp_path / "a.dcm"), KEY))) == []


@pytest.mark.parametrize("sop_class", FUZZED)
def test_no_text_uid_or_byte_survives_anywhere(canaries, planted, sop_class):
    """Every element of the dictionary, at the top and in the items of every kept sequence.

    There is no list of exceptions: a canary is in no value set, so not even a code string passes. That legal values do
    pass is for test_actions.py.
    """
    base, plants = planted
    ds = filled(canaries, base, sop_class)
    assert len(plants.where) == 1670
    out = written(deidentify(ds, KEY, released=True))
    assert plants.surviving(out) == []
    assert b"QF" not in out and b".99999." not in out


def test_the_corpus_survives_nowhere(canaries, tmp_path):
    refused = set()
    for name, plants in canaries.corpus(tmp_path).items():
        raw = (tmp_path / f"{name}.dcm").read_bytes()
        assert len(plants.surviving(raw)) >= len(plants.where) - 1 > 90  # those in spare bits are spread over words
        try:
            out = deidentify(pydicom.dcmread(tmp_path / f"{name}.dcm"), KEY, released=True)
        except Refused as refusal:
            assert refusal.reason == "sop_class"
            refused.add(name)
            continue
        assert plants.surviving(written(out)) == []
    assert refused == {"sr", "ecg", "pdf", "rtplan"}


def test_text_in_the_spare_bits_is_gone(canaries, tmp_path):
    canaries.corpus(tmp_path)
    ds = pydicom.dcmread(tmp_path / "mr_overlay.dcm")
    assert any(word & 0xF000 for word in memoryview(ds.PixelData[:128]).cast("H"))
    assert not any(word & 0xF000 for word in memoryview(deidentify(ds, KEY).PixelData).cast("H"))


def numbers(value: float) -> Dataset:
    """One number in every numeric element of the dictionary."""
    base = Dataset()
    for tag, (vr, vm, *_) in sorted(DicomDictionary.items()):
        if vr in NUMERIC and tag >> 16 not in (0, 2, 4):
            count = int(vm.partition("-")[0].partition(" ")[0])
            whole = value if vr in ("DS", "FD", "FL") else int(value)
            try:
                base.add(DataElement(tag, vr.split(" ")[0], [whole] * count if count > 1 else whole))
            except (ValueError, OverflowError):  # the number does not fit the VR
                continue
    return base


def surviving(out: Dataset, value: float) -> set[str]:
    found = set()
    for element in out.iterall():
        values = element.value if element.VM > 1 else [element.value]
        if any(isinstance(v, int | float) and v == value for v in values):
            found.add(element.keyword)
    return found


@pytest.mark.parametrize("sop_class", NUMBERED)
@pytest.mark.filterwarnings("ignore")
def test_which_numbers_survive(canaries, sop_class):
    """A telephone number of ten digits survives nowhere; a small number in elements that a table names, and no other.

    They survive because the pixels need them (geometry, rescale, windows, frames) or the object is invalid without
    them; each is physical, has a range, and is written anew from its value.
    """
    many = numbers(4917012345)
    del many.RescaleSlope, many.RescaleIntercept  # the image is refused, see test_actions.py
    ds = filled(canaries, many, sop_class)
    assert surviving(ds, 4917012345) > {"PatientWeight", "SliceThickness"}
    assert surviving(deidentify(ds, KEY, released=True), 4917012345) == set()
    named = {
        row.keyword
        for table in (*TABLES.values(), *(kind.table for kind in KINDS.values()))
        for row in table
        if row.action in ("number", "lut")
    }
    small = surviving(deidentify(filled(canaries, numbers(1), sop_class), KEY, released=True), 1)
    assert len(small) > 5 and small <= named | {"InstanceNumber", "SamplesPerPixel", "NumberOfFrames"}
    assert not small & {"PatientWeight", "PatientSize", "ImagingFrequency", "CurrentPatientLocation", "StudyID"}


@pytest.mark.filterwarnings("ignore")
def test_no_date_or_time_survives(canaries):
    """Dates are shifted or gone, times are gone."""
    base = Dataset()
    with canaries.anything_goes():
        for tag, (vr, *_) in sorted(DicomDictionary.items()):
            if vr in ("DA", "TM", "DT") and tag >> 16 > 4:
                base.add(DataElement(tag, vr, {"DA": "20110203", "TM": "214365.87", "DT": "20110203214365.87"}[vr]))
    for sop_class in NUMBERED:
        ds = filled(canaries, base, sop_class)
        out = deidentify(ds, KEY, released=True)
        assert "20110203" in str(ds) and "20110203" not in str(out) and "214365" not in str(out)
        assert len({e.value for e in out.iterall() if e.VR in ("DA", "DT") and e.value}) == 1  # one shift for all


def test_private_unknown_and_repeating_groups_are_gone(cr_instance):
    ds = cr_instance()
    for tag in (
        0x00091001,
        0x00099F01,
        0x00089F01,
        0x50002500,
        0x501E3000,
        0x60001500,
        0x601E3000,
        0x7FE10010,
        0xFFFCFFFC,
    ):
        ds.add(DataElement(Tag(tag), "UN", b"CANARYX_"))
    ds.SourceImageSequence = [Dataset()]
    ds.SourceImageSequence[0].ReferencedSOPClassUID = STORAGE + "1"
    ds.SourceImageSequence[0].ReferencedSOPInstanceUID = "1.2.3.4"
    ds.SourceImageSequence[0].add(DataElement(Tag(0x00091001), "LO", "CANARYX"))
    out = deidentify(ds, KEY)
    assert b"CANARYX" not in written(out)
    assert out.SourceImageSequence[0].ReferencedSOPInstanceUID == pseudonymous_uid(KEY, "1.2.3.4") == out.SOPInstanceUID
