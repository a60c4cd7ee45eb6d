"""Headers of the phantom hospitals: all the identity that a careless hospital would leave in.

PS3.3 A.2 (CR) and A.26 (DX). Names, numbers, addresses and UIDs depend on the hospital's name, the
seed and the patient's number only. The canary test of the de-identification looks for all of them.
"""

import hashlib
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

WHITE = 4095  # 12 bits stored
_FIRST_STUDY = date(2021, 1, 4)
_SURNAMES = ["Alder", "Birch", "Cedar", "Hazel", "Larch", "Maple", "Rowan", "Willow", "Yarrow"]
_FIRST_NAMES = {
    "F": ["Ada", "Blanca", "Chiara", "Dalia", "Edda", "Freya"],
    "M": ["Anton", "Bela", "Cyril", "Dario", "Emil", "Felix"],
}
_STREETS = ["Canal", "Harbour", "Meadow", "Orchard", "Quarry", "Vineyard"]
# SOP class and modality of each kind of scanner.
_KINDS = (("1.2.840.10008.5.1.4.1.1.1.1", "DX"), ("1.2.840.10008.5.1.4.1.1.1", "CR"))


@dataclass(frozen=True)
class Person:
    """Whom the headers are about, and which scanner was used (kind 0 is DX, 1 is CR)."""

    hospital: str
    seed: int
    number: int
    sex: str
    age: int
    maker: str
    kind: int

    @property
    def mrn(self) -> str:
        """The hospital number; the running number keeps it distinct."""
        return mrn(self.hospital, self.seed, self.number)


def mrn(hospital: str, seed: int, number: int) -> str:
    """The hospital number of the patient with this running number."""
    return f"MRN-{_digest('mrn', hospital, seed) % 9000 + 1000}{number:05d}"


def study_uid(person: Person, study: int) -> str:
    """The UID of a person's study."""
    return _uid(person.hospital, person.seed, person.mrn, study)


def _digest(*parts: object) -> int:
    """128 bits that depend on the parts only (Python's own hash changes with every process)."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:16], "big")


def _uid(*parts: object) -> str:
    return f"2.25.{_digest('uid', *parts)}"


def demographics(person: Person) -> Dataset:
    """The patient module (PS3.3 C.7.1.1)."""
    draw = _digest("person", person.hospital, person.seed, person.number)
    birth = date(_FIRST_STUDY.year - person.age - 1, draw % 12 + 1, draw // 12 % 28 + 1)
    surname = _SURNAMES[draw // 400 % len(_SURNAMES)]
    first = _FIRST_NAMES[person.sex]
    ds = Dataset()
    ds.PatientName = f"{surname}{person.number}^{first[draw // 5000 % len(first)]}"
    ds.PatientID = person.mrn
    ds.PatientBirthDate = birth.strftime("%Y%m%d")
    ds.PatientSex = person.sex
    ds.PatientAge = f"{person.age:03d}Y"
    ds.OtherPatientIDs = f"INS{draw % 10**9:09d}"
    ds.PatientAddress = f"{draw % 90 + 1} {_STREETS[draw % len(_STREETS)]} Street, Phantomville"
    ds.PatientTelephoneNumbers = f"+00 {draw % 10**8:08d}"
    ds.PatientComments = f"Son of {surname}, called on arrival"
    return ds


def instance(
    base: Dataset,
    person: Person,
    study: int,
    image: int,
    stored_HW: NDArray[np.uint16],
    inverted: bool,
    bits: int = 12,
) -> Dataset:
    """One complete CR or DX instance.

    Args:
        base: the person's `demographics`.
        person: see `Person`.
        study: running number of the study.
        image: running number of the image in it.
        stored_HW: pixels from 0 (black) to 2**bits - 1.
        inverted: store them as MONOCHROME1.
        bits: stored of the 16 allocated.
    """
    name, number, mrn = person.hospital, person.number, person.mrn
    sop_class, modality = UID(_KINDS[person.kind][0]), _KINDS[person.kind][1]
    day = _FIRST_STUDY + timedelta(days=number % 700 + 90 * study)
    ds = Dataset()
    ds.update(base)
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.SOPClassUID = sop_class
    ds.SOPInstanceUID = _uid(name, person.seed, mrn, study, image)
    ds.StudyInstanceUID = study_uid(person, study)
    ds.SeriesInstanceUID = _uid(name, person.seed, mrn, study, "series")
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = day.strftime("%Y%m%d")
    ds.StudyTime = ds.ContentTime = f"{8 + number % 9:02d}{number % 60:02d}{image % 60:02d}"
    ds.AccessionNumber = f"ACC{_digest(name, person.seed, mrn, study) % 10**10:010d}"
    ds.Modality = modality
    ds.Manufacturer = f"{person.maker} Imaging"
    ds.ManufacturerModelName = f"{person.maker} Ray {person.kind + 1}"
    ds.InstitutionName = name
    ds.InstitutionAddress = f"1 {name} Square, Phantomville"
    ds.StationName = f"ROOM{number % 7 + 1}"
    ds.DeviceSerialNumber = f"SN{_digest(name, person.maker) % 10**8:08d}"
    ds.ReferringPhysicianName = f"Dr^{_SURNAMES[number % len(_SURNAMES)]}son"
    ds.OperatorsName = f"Operator^{_SURNAMES[number // 3 % len(_SURNAMES)]}"
    ds.StudyDescription = f"Chest of {base.PatientName}"
    ds.StudyID = f"ST{number}{study}"
    ds.SeriesNumber, ds.InstanceNumber = 1, image + 1
    ds.BodyPartExamined = "CHEST"
    ds.ViewPosition = "PA"
    ds.PatientOrientation = ["L", "F"]
    ds.ImageLaterality = "U"
    ds.BurnedInAnnotation = "NO"
    ds.LossyImageCompression = "00"
    ds.ImagerPixelSpacing = ["4", "4"]
    ds.PositionReferenceIndicator = ""
    if modality == "DX":
        ds.PresentationIntentType = "FOR PRESENTATION"
        ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1
        ds.DetectorType = "DIRECT"
        ds.AcquisitionContextSequence = []
    request = Dataset()
    request.RequestedProcedureID = f"RP{ds.AccessionNumber}"
    request.RequestedProcedureDescription = f"Chest, patient {mrn}"
    ds.RequestAttributesSequence = [request]
    private = ds.private_block(0x0011, "PHANTOM RIS", create=True)
    private.add_new(0x01, "LO", f"{base.PatientName} {mrn}")

    stored_HW, white = stored_HW.astype("<u2"), 2**bits - 1
    center, width = (2200, 3400) if person.kind else (2 ** (bits - 1), 2**bits)
    ds.PhotometricInterpretation = "MONOCHROME2"
    if inverted:
        stored_HW, center = white - stored_HW, white + 1 - center
        ds.PhotometricInterpretation = "MONOCHROME1"
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.Rows, ds.Columns = stored_HW.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    ds.WindowCenter, ds.WindowWidth = str(center), str(width)
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    if modality == "DX":
        ds.PresentationLUTShape = "IDENTITY"
    ds.add_new("PixelData", "OW", stored_HW.tobytes())
    ds.preamble = b"\0" * 128
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.SourceApplicationEntityTitle = "PHANTOMPACS"
    return ds
