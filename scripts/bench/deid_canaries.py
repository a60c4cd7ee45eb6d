"""DICOM files with a canary in every place an identity can hide, for scripts/bench/deid.py and the tests.

Everything is synthetic and written here. A canary is a text, UID, date or byte string that occurs nowhere else; one
that is found in the bytes of a tool's output has survived. (A tool that re-encodes a canary, say compressed, would be
missed; the tools compared do not.)
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import config
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

STORAGE = "1.2.840.10008.5.1.4.1.1."
TEXT = frozenset(["AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"])
BINARY = frozenset({"OB", "UN", "OB or OW"})
# An object could not be read without these; the first is the one kind all tools accept.
ESSENTIAL = {"SOPClassUID", "SpecificCharacterSet", "Modality", "PhotometricInterpretation", "LengthToEnd", "PixelData"}


@dataclass
class Plants:
    """Canaries of one file: what was planted, and where."""

    prefix: str
    where: dict[bytes, str] = field(default_factory=dict)

    def text(self, place: str) -> str:
        """A new text, at most 9 letters."""
        return self._new(place, f"{self.prefix}{len(self.where):06d}"[:16])

    def uid(self, place: str) -> str:
        """A new UID."""
        return self._new(place, f"1.2.840.99999.{sum(self.prefix.encode())}.{len(self.where)}.7")

    def date(self, place: str) -> str:
        """A new date of a year in which nothing else here is."""
        number = len(self.where)
        return self._new(place, f"{1901 + number // 336 % 40}{number // 28 % 12 + 1:02d}{number % 28 + 1:02d}")

    def _new(self, place: str, value: str) -> str:
        assert value.encode() not in self.where
        self.where[value.encode()] = place
        return value

    def surviving(self, data: bytes) -> list[str]:
        """Where the canaries that occur in `data` had been planted."""
        return [place for canary, place in self.where.items() if canary in data]


def item(**elements: Any) -> Dataset:
    """A dataset with these elements."""
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def image(sop_class: str = "2", size: int = 8, seed: int = 0, **elements: Any) -> Dataset:
    """A harmless image, 16 bits grey unless `elements` says otherwise; CT by default."""
    ds = item(
        SOPClassUID=STORAGE + sop_class,
        SOPInstanceUID=f"1.2.3.4.{seed}",
        StudyInstanceUID="1.2",
        SeriesInstanceUID="1.2.3",
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        Modality="CT",
        PatientID="HARMLESS",
        Rows=size,
        Columns=size,
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16,
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=0,
        InstanceNumber=1,
        ImagePositionPatient=[-100, -100, seed],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[0.7, 0.7],
        SliceThickness=1,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=40,
        WindowWidth=400,
        KVP=120,
    )
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    shape = (int(ds.get("NumberOfFrames", 1)), ds.Rows, ds.Columns, ds.SamplesPerPixel)
    values = np.random.default_rng(seed).integers(0, 2**ds.BitsStored, shape)
    ds.add_new("PixelData", "OW", values.astype(f"<u{ds.BitsAllocated // 8}").tobytes())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def save(ds: Dataset, path: Path) -> None:
    """Writes a file, whatever its header holds."""
    ds.file_meta.MediaStorageSOPClassUID = UID(ds.SOPClassUID)
    ds.file_meta.MediaStorageSOPInstanceUID = UID(ds.SOPInstanceUID)
    with anything_goes():
        ds.save_as(path, enforce_file_format=True)


@contextlib.contextmanager
def anything_goes():
    """Pydicom checks no value that is written."""
    before = config.settings.writing_validation_mode
    config.settings.writing_validation_mode = config.IGNORE
    try:
        yield
    finally:
        config.settings.writing_validation_mode = before


def fill(ds: Dataset, plants: Plants, place: str) -> Dataset:
    """A canary in every text, UID and binary element of pydicom's dictionary."""
    with anything_goes():
        for tag, (vr, _, _, _, keyword) in sorted(DicomDictionary.items()):
            if keyword in ESSENTIAL or tag >> 16 in (0, 2, 4, 0xFFFE):
                continue
            if vr in TEXT:
                ds.add(DataElement(tag, vr, plants.text(f"{place}{keyword}:{vr}")))
            elif vr == "UI":
                ds.add(DataElement(tag, vr, plants.uid(f"{place}{keyword}:UI")))
            elif vr in BINARY:
                ds.add(DataElement(tag, "UN" if vr == "UN" else "OB", plants.text(f"{place}{keyword}:{vr}").encode()))
    return ds


def dictionary_file(path: Path) -> Plants:
    """A CT image with `fill` at the top and once more in the shared functional groups."""
    plants = Plants("QF")
    ds = fill(image(), plants, "")
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]  # without which our tool would look no further
    ds.BurnedInAnnotation = ds.RecognizableVisualFeatures = "NO"
    ds.SharedFunctionalGroupsSequence = [fill(Dataset(), plants, "nested ")]
    save(ds, path)
    return plants


def corpus(folder: Path) -> dict[str, Plants]:
    """Eleven files of the kinds that tools are known to treat differently, by file name."""
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    byte = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    files: dict[str, tuple[Dataset, Callable[[Dataset, Plants], None]]] = {
        "ct": (image(), _groups),
        "ct_single_uid": (image(), _single),
        "ct_utf8": (image(SpecificCharacterSet="ISO_IR 192"), _letters),
        "mr_implicit": (image("4", Modality="MR"), _nothing),
        "mr_overlay": (image("4", Modality="MR"), _overlay),
        "us_rgb": (image("6.1", Modality="US", **colour, **byte), _nothing),
        "us_frames": (image("3.1", Modality="US", NumberOfFrames=3, FrameTime=40, **colour, **byte), _nothing),
        "sr": (image("88.33", Modality="SR"), _report),
        "ecg": (image("9.1.1", Modality="ECG"), _waveform),
        "pdf": (image("104.1", Modality="DOC"), _document),
        "rtplan": (image("481.5", Modality="RTPLAN"), _plan),
    }
    planted = {}
    for number, (name, (ds, extra)) in enumerate(files.items()):
        plants = planted[name] = Plants(f"Q{'ABCDEGHJKLM'[number]}Z")
        _plant(ds, plants)
        extra(ds, plants)
        if name == "mr_implicit":
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        save(ds, folder / f"{name}.dcm")
    return planted


def scanner_image(size: int, seed: int) -> Dataset:
    """A CT image with as many elements, private ones and sequences among them, as a scanner writes."""
    ds = image(size=size, seed=seed)
    _plant(ds, Plants("QS"))
    block = ds.private_block(0x0019, "ACME CT", create=True)
    for element in range(156):
        block.add_new(element, "DS" if element % 2 else "LO", str(element / 8))
    return ds


_TOP = """
    OtherPatientNames PatientMotherBirthName PatientAddress PatientTelephoneNumbers EthnicGroup Occupation
    MilitaryRank AdditionalPatientHistory PatientComments ImageComments StudyDescription SeriesDescription
    ProtocolName ReasonForStudy AccessionNumber StudyID InstitutionName InstitutionAddress
    InstitutionalDepartmentName StationName DeviceSerialNumber ReferringPhysicianName OperatorsName
    PerformingPhysicianName ContentCreatorName SoftwareVersions RetrieveURL DerivationDescription ContrastBolusAgent
    ClinicalTrialSubjectID IssuerOfPatientID StorageMediaFileSetID PatientName PatientID StudyComments
    InterpretationText Manufacturer ManufacturerModelName BodyPartExamined ConvolutionKernel SOPInstanceUID
    StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID DeviceUID InstanceCreatorUID PatientBirthDate StudyDate
    SeriesDate AcquisitionDate ContentDate DateOfLastCalibration
"""


def _plant(ds: Dataset, plants: Plants) -> None:
    """What every file of the corpus has: texts, UIDs, dates, sequences, private and unknown elements, file meta."""
    for keyword in _TOP.split():
        vr = dictionary_VR(keyword)
        new = plants.uid if vr == "UI" else plants.date if vr == "DA" else plants.text
        setattr(ds, keyword, new(keyword))
    ds.PatientSex, ds.PatientAge = "F", "093Y"
    ds.AcquisitionDateTime = plants.date("AcquisitionDateTime") + "101112.5"
    ds.IrradiationEventUID = [plants.uid("IrradiationEventUID 1"), plants.uid("IrradiationEventUID 2")]
    text, uid = plants.text, plants.uid
    purpose = item(CodeValue="1", CodingSchemeDesignator="DCM", CodeMeaning=text("source image > purpose > meaning"))
    deep = item(PersonName=text("depth 4 PN"), TextValue=text("depth 4 UT"), PatientName=text("depth 4 PatientName"))
    protocol = item(CodeMeaning=text("request > protocol code > meaning"), ProtocolContextSequence=[deep])
    request = item(
        ScheduledProcedureStepDescription=text("request > step description"),
        RequestedProcedureDescription=text("request > procedure description"),
        ScheduledProtocolCodeSequence=[protocol],
    )
    before = item(
        PatientName=text("original attributes > PatientName"), PatientID=text("original attributes > PatientID")
    )
    ds.RequestAttributesSequence = [request]
    ds.OriginalAttributesSequence = [item(ModifyingSystem=text("ModifyingSystem"), ModifiedAttributesSequence=[before])]
    ds.OtherPatientIDsSequence = [item(PatientID=text("other PatientID"), IssuerOfPatientID=text("other issuer"))]
    ds.ReferencedStudySequence = [item(ReferencedSOPClassUID=STORAGE + "2", ReferencedSOPInstanceUID=uid("study"))]
    source = item(ReferencedSOPClassUID=STORAGE + "2", ReferencedSOPInstanceUID=uid("source image"))
    source.PurposeOfReferenceCodeSequence = [purpose]
    ds.SourceImageSequence = [source]
    ds.GraphicAnnotationSequence = [item(TextObjectSequence=[item(UnformattedTextValue=text("graphic annotation"))])]
    ds.AcquisitionContextSequence = [item(ValueType="TEXT", TextValue=text("acquisition context"))]
    ds.EncryptedAttributesSequence = [item(EncryptedContent=text("EncryptedContent").encode())]
    ds.DigitalSignaturesSequence = [item(DigitalSignatureUID=uid("signature"), Signature=text("signature").encode())]
    icon = item(Rows=3, Columns=3, BitsAllocated=8, PixelData=text("icon").encode())
    ds.IconImageSequence = [icon]
    for block_of, name in ((ds, "private"), (request, "nested private")):
        block = block_of.private_block(0x0009, "ACME 1", create=True)
        block.add_new(1, "LO", text(f"{name} text"))
        block.add_new(2, "SQ", [item(PatientName=text(f"{name} sequence"))])
        block.add_new(3, "UN", text(f"{name} bytes").encode())
    ds.add(DataElement(Tag(0x0009, 0x0011), "LO", text("private creator")))
    ds.add(DataElement(Tag(0x0008, 0x9F01), "LO", text("unknown element")))
    ds.add(DataElement(Tag(0x0010, 0x4001), "UN", text("unknown bytes").encode()))
    ds.add(DataElement(Tag(0x5000, 0x2500), "LO", text("curve label")))
    ds.add(DataElement(Tag(0x5000, 0x3000), "OW", text("curve data").encode() + b"_"))
    ds.add(DataElement(Tag(0x6002, 0x4000), "LT", text("overlay comment")))
    ds.add(DataElement(Tag(0x6002, 0x0022), "LO", text("overlay description")))
    ds.add(DataElement(Tag(0x6002, 0x3000), "OW", text("overlay data").encode() + b"_"))
    ds.DataSetTrailingPadding = text("trailing padding").encode() + b"_"
    ds.PixelData = ds.PixelData + text("after the last pixel").encode() + b"_"
    meta = ds.file_meta
    meta.SourceApplicationEntityTitle = text("meta SourceApplicationEntityTitle")
    meta.PrivateInformationCreatorUID, meta.PrivateInformation = (
        uid("meta creator"),
        text("meta private").encode() + b"_",
    )
    meta.ImplementationVersionName = text("meta ImplementationVersionName")
    ds.preamble = text("preamble").encode().ljust(128, b"\0")


def _nothing(_ds: Dataset, _plants: Plants) -> None:
    """No further canaries."""


def _groups(ds: Dataset, plants: Plants) -> None:
    code = item(CodeValue="1", CodingSchemeDesignator="99LOCAL", CodeMeaning=plants.text("groups > region > meaning"))
    frame = item(
        FrameAcquisitionDateTime=plants.date("groups > FrameAcquisitionDateTime") + "101010",
        FrameComments=plants.text("groups > FrameComments"),
        FrameLabel=plants.text("groups > FrameLabel"),
    )
    anatomy = item(PatientName=plants.text("groups > misplaced PatientName"), AnatomicRegionSequence=[code])
    ds.SharedFunctionalGroupsSequence = [item(FrameContentSequence=[frame], FrameAnatomySequence=[anatomy])]


def _single(ds: Dataset, plants: Plants) -> None:
    for uid in ds.IrradiationEventUID:
        del plants.where[uid.encode()]
    ds.IrradiationEventUID = plants.uid("IrradiationEventUID, one value")


def _letters(ds: Dataset, plants: Plants) -> None:
    ds.PatientName = "Müller^Zoë=山田^太郎"
    plants.where.update({"Müller".encode(): "PatientName alphabetic", "山田".encode(): "PatientName ideographic"})


def _overlay(ds: Dataset, plants: Plants) -> None:
    """Text in the four bits above the stored ones, as old overlays were kept."""
    canary = plants.text("bits above the stored ones").encode()
    pixels = np.frombuffer(ds.PixelData[:128], "<u2").copy()
    nibbles = [half for byte in canary for half in (byte & 15, byte >> 4)]
    pixels[: len(nibbles)] = pixels[: len(nibbles)] & 0x0FFF | np.array(nibbles, "<u2") << 12
    ds.PixelData = pixels.tobytes() + ds.PixelData[128:]
    ds.add(DataElement(Tag(0x6000, 0x1500), "LO", plants.text("overlay label")))


def _report(ds: Dataset, plants: Plants) -> None:
    ds.ContentSequence = [
        item(ValueType="TEXT", TextValue=plants.text("SR text")),
        item(ValueType="PNAME", PersonName=plants.text("SR name")),
        item(ValueType="UIDREF", UID=plants.uid("SR UID")),
        item(ValueType="DATE", Date=plants.date("SR date")),
        item(ValueType="CODE", ConceptCodeSequence=[item(CodeMeaning=plants.text("SR code meaning"))]),
    ]
    ds.VerifyingObserverSequence = [item(VerifyingObserverName=plants.text("SR observer"))]


def _waveform(ds: Dataset, plants: Plants) -> None:
    ds.WaveformAnnotationSequence = [item(UnformattedTextValue=plants.text("waveform annotation"))]


def _document(ds: Dataset, plants: Plants) -> None:
    ds.DocumentTitle = plants.text("PDF title")
    ds.EncapsulatedDocument = b"%PDF-1.4 " + plants.text("PDF body").encode() + b"_ "


def _plan(ds: Dataset, plants: Plants) -> None:
    ds.RTPlanLabel, ds.ReviewerName = plants.text("RTPlanLabel"), plants.text("ReviewerName")
    ds.BeamSequence = Sequence([item(BeamDescription=plants.text("BeamDescription"))])
