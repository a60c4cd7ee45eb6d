"""A phantom hospital, a single CR instance to spoil, and objects full of canaries."""

import importlib.util
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from pydicom.valuerep import DSfloat

from fedscan.phantom import draw_hospital
from fedscan_client import consent, keys
from fedscan_client.intake import cache, deid, ingest
from fedscan_client.intake.cache import Entry
from fedscan_client.intake.records import PatientId
from fedscan_client.intake.report import Report
from fedscan_client.intake.sources.settings import Folder
from fedscan_client.site import Intake, Site
from fedscan_core.policy import Policy

TODAY = date(2026, 1, 15)
CR = UID("1.2.840.10008.5.1.4.1.1.1")


def _cr_instance(**changes: Any) -> Dataset:
    """A minimal CR image of patient A-1, 4 x 6 pixels of 12 bits; None removes an element."""
    ds = Dataset()
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.SOPClassUID = CR
    ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID = "1.2.3.4", "1.2.3", "1.2"
    ds.AccessionNumber = "ACC7"
    ds.Modality = "CR"
    ds.Manufacturer = "GE MEDICAL SYSTEMS"
    ds.PatientName = "Canary^Carla"
    ds.PatientID = "A-1"
    ds.PatientSex, ds.PatientAge = "F", "093Y"
    ds.Rows, ds.Columns = 4, 6
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.add_new("PixelData", "OW", (np.arange(24, dtype="<u2") * 178).tobytes())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        elif keyword == "PixelData":
            ds.add_new("PixelData", "OW", value)
        else:
            setattr(ds, keyword, value)
    return ds


def _save(ds: Dataset, path: Path) -> Path:
    """Writes an instance as a DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.file_meta.MediaStorageSOPClassUID = CR
    ds.file_meta.MediaStorageSOPInstanceUID = UID(ds.get("SOPInstanceUID") or "1.2.3.4")
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="session")
def cr_instance() -> Callable[..., Dataset]:
    """See `_cr_instance`."""
    return _cr_instance


@pytest.fixture
def peak() -> Callable[[], int]:
    """How far this process's memory rose, in kB, since the test began or the last call.

    Not getrusage: its peak never falls, and a new process starts with its parent's.
    """
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def now(field: str) -> int:
        return int(status.read_text().split(field + ":")[1].split()[0])

    before = 0

    def rise() -> int:
        nonlocal before
        found = now("VmHWM") - before
        marks.write_text("5")  # the peak becomes what is in use
        before = now("VmRSS")
        return found

    rise()
    return rise


@pytest.fixture(scope="session")
def save() -> Callable[[Dataset, Path], Path]:
    """See `_save`."""
    return _save


class Door:
    """A site's folder whose images, labels and consent are a hospital's folder, and what is to be known of it."""

    TODAY = TODAY
    KEY = keys.SiteKey(bytes(range(32)), bytes(range(32, 64)))

    def site(self, hospital: Path, folder: Path, **changes: object) -> Site:
        """A site's folder with its key."""
        tree = {
            "name": "north",
            "patients_declared": 12,
            "source": {"source": Folder(kind="folder", folder=hospital / "dicom", settle_seconds=0)},
            "consent": consent.Settings(kind="register", path=hospital / "consent.csv"),
            "intake": Intake(labels=hospital / "labels.csv"),
            "policy": Policy(max_epsilon=1, max_delta=1e-5),
            "folder": folder,
        }
        site = Site.model_validate(tree | changes)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "key").exists():
            keys.put(folder, site.key, self.KEY, "test")
        return site

    def run(self, site: Site, **changes: Any) -> Report:
        """The intake on the day of the tests."""
        return ingest.ingest(site, **({"today": TODAY} | changes))

    def balance(self, report: Report) -> bool:
        """Whether every object is in exactly one line."""
        return report.objects == sum(line.instances for line in report.lines)

    def lists(self, folder: Path, permitted: list[str], labels: str) -> None:
        """Writes consent.csv and labels.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = "".join(f"{patient},permit,2025-01-01\n" for patient in permitted)
        (folder / "consent.csv").write_text(f"# as-of: 2026-01-10\npatient_id,status,date\n{rows}")
        (folder / "labels.csv").write_text(labels)

    def name(self, patient: str) -> str:
        """The pseudonym of a hospital's patient id."""
        return deid.patient_name(self.KEY.project("fedscan"), PatientId(patient))

    def contents(self, site: Site) -> dict[str, list[tuple[Entry, bytes]]]:
        """Everything in the cache, decrypted."""
        opened = {name: cache.open_patient(site.cache, self.KEY, name) for name in cache.patients(site.cache)}
        return {
            name: [(entry, it.values(entry).tobytes()) for entry in it.patient.entries] for name, it in opened.items()
        }

    def files(self, folder: Path) -> dict[Path, bytes]:
        """The cache's files as they are."""
        return {path: path.read_bytes() for pattern in ("*.img", "index", "*.key") for path in folder.rglob(pattern)}


@pytest.fixture(scope="session")
def door() -> Door:
    """See `Door`."""
    return Door()


@pytest.fixture(scope="session")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom hospital of 12 patients; not to be changed."""
    folder = tmp_path_factory.mktemp("hospital")
    draw_hospital(folder, name="Canary General", patients=12, seed=5, as_of=TODAY)
    return folder


@pytest.fixture(scope="session")
def canaries() -> ModuleType:
    """scripts/bench/deid_canaries.py, which the leak table of the bench is made with."""
    path = Path(__file__).parents[3] / "scripts" / "bench" / "deid_canaries.py"
    spec = importlib.util.spec_from_file_location("deid_canaries", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ct(cr_instance: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """Makes one CT slice of the given values at z mm, or `at` a place; further elements by keyword."""

    def make(
        values: Any,
        z: float = 0.0,
        *,
        at: Any = None,
        axes: Any = (1, 0, 0, 0, 1, 0),
        spacing: Any = (0.5, 0.7),
        **changes: Any,
    ) -> Dataset:
        values = np.asarray(values)
        bits = values.dtype.itemsize * 8
        geometry = {
            "ImagePositionPatient": (0, 0, z) if at is None else at,
            "ImageOrientationPatient": axes,
            "PixelSpacing": spacing,
        }
        layout = {
            "Rows": values.shape[0],
            "Columns": values.shape[1],
            "BitsAllocated": bits,
            "BitsStored": bits,
            "HighBit": bits - 1,
            "PixelRepresentation": int(values.dtype.kind == "i"),
            "PixelData": values.astype(values.dtype.newbyteorder("<")).tobytes(),
        }
        decimals = {name: [DSfloat(float(one), auto_format=True) for one in given] for name, given in geometry.items()}
        return cr_instance(**{"Modality": "CT", **layout, **decimals, **changes})

    return make
