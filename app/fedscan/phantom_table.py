"""A research table written as DICOM: real pixels, invented identities. For trying the hospital's door with real images.

Every patient of the table becomes a phantom person with a name, a number, dates and comments for the de-identification
to find; sex and age are the table's. Every image becomes a study with one DX instance, whose window shows the pixels
as the table's loader scales them. Do not use it on images whose identity is a secret: it hides nothing.
"""

from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedscan.phantom import write_consent, write_csv
from fedscan.phantom_headers import Person, demographics, instance, mrn, study_uid
from fedscan_client.intake.sources.table import TableRow, read_table, row_path
from fedscan_core.errors import DataError

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def table_to_hospitals(
    table: Path,
    out: Path,
    *,
    label_column: str = "label",
    seed: int = 0,
    as_of: date | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, int]:
    """Writes OUT/SITE/{dicom/..., labels.csv, consent.csv} for each site of the table ("hospital" where it names none).

    Args:
        table: the CSV, see `read_table`; PNG or JPEG images, or npz rows, 8 or 16 bits, colour becomes grey.
        out: created if need be.
        label_column: which column becomes the label.
        seed: decides the invented identities.
        as_of: the day of the consent register, default today. Everybody is permitted.
        tell: told how many of how many images are written.

    Returns:
        Site -> number of patients.

    Raises:
        DataError: the table, or an image of it, cannot be used.
    """
    rows = read_table(table, label_column=label_column)
    sites: dict[str, dict[str, list[TableRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        sites[row.site or "hospital"][row.patient_id].append(row)
    done = 0
    for name, patients in sorted(sites.items()):
        labels = []
        for number, (_, images) in enumerate(sorted(patients.items())):
            sex, age = images[0].sex.strip().upper(), _age(images[0].age)
            person = Person(name, seed, number, sex if sex in ("F", "M") else "F", age or 50, "Acme", 0)
            base = demographics(person)
            base.PatientSex = sex if sex in ("F", "M", "O") else ""
            if age is None:
                base.PatientAge = base.PatientBirthDate = ""
            place = out / name / "dicom" / f"{number:05d}"
            place.mkdir(parents=True, exist_ok=True)
            for study, row in enumerate(images):
                stored_HW, bits = _stored(row_path(table, row), row.index)
                ds = instance(base, person, study, 0, stored_HW, inverted=False, bits=bits)
                ds.save_as(place / f"IM{study:04d}", enforce_file_format=True)
                labels.append((study_uid(person, study), row.label, row.split))
                done += 1
                tell(done, len(rows))
        write_csv(out / name / "labels.csv", ("study_uid", "label", "split"), labels)
        numbers = [(mrn(name, seed, number), "permit", "2020-11-02") for number in range(len(patients))]
        write_consent(out / name / "consent.csv", numbers, as_of or date.today())
    return {name: len(patients) for name, patients in sorted(sites.items())}


def _age(text: str) -> int | None:
    """Whole years, None where the table says nothing usable."""
    try:
        return min(130, max(0, int(float(text))))
    except (ValueError, OverflowError):
        return None


def _stored(path: Path, index: int | None) -> tuple[NDArray[np.uint16], int]:
    """Grey pixels as they are, and how many bits they have."""
    if index is not None:
        with np.load(path, allow_pickle=False) as archive:
            pixels = archive["images"][index]
    else:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            pixels = np.asarray(
                image if image.mode in ("L", "RGB") or image.mode.startswith("I;16") else image.convert("RGB")
            )
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path.name} holds {pixels.dtype} values.", remedy="Use 8-bit or 16-bit images.")
    bits = 8 * pixels.dtype.itemsize
    if pixels.ndim == 3:
        pixels = np.rint(pixels[..., :3] @ _LUMA) if pixels.shape[2] >= 3 else pixels[..., 0]
    return pixels.astype(np.uint16), bits
