"""The intake as one function: source -> consent -> deid -> pixels -> cache.

Two passes. The first reads headers only and writes down who is in which file. The second goes
patient by
patient: is the patient cleared? does the image have a label? only then are its pixels touched. So
memory holds one patient, and pixels of somebody who did not consent are never decoded.

After it the cache holds exactly the patients accepted by this run: whoever withdrew, or is gone
from the source, is destroyed. The same input again changes nothing.

Labels are a CSV with one or more of the columns sop_uid, accession, study_uid (the most specific
one that matches counts), the column label, and optionally split.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedscan_client.intake import cache, headers
from fedscan_client.intake.consent import read_register
from fedscan_client.intake.deid import deidentify, pseudonym
from fedscan_client.intake.pictures import Channels
from fedscan_client.intake.records import SPLITS, Record, Refused
from fedscan_client.intake.render import render
from fedscan_client.intake.sources import dicom_files, parse_rows, read_instance, read_text
from fedscan_client.intake.stack import assemble
from fedscan_core.errors import DataError

_IDENTITY = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_LABEL_KEYS = ("sop_uid", "accession", "study_uid")  # most specific first


@dataclass(frozen=True)
class IngestReport:
    """What one run of the intake did; for the hospital's own eyes: exact counts never leave.

    Every file found is in exactly one of accepted, no_consent, unlabelled, unreadable and refused.

    Attributes:
        files: regular files found below the source folder.
        patients, studies, series: distinct ones among the files whose header gave their identity.
        accepted: images now in the cache.
        cached: patients now in the cache.
        no_consent: images of patients whom the register does not permit.
        unlabelled: images of cleared patients without a label.
        unreadable: files that are not DICOM.
        refused: reason (see `records.REASONS`) -> images set aside for it.
        destroyed: patients removed from the cache by this run.
    """

    files: int
    patients: int
    studies: int
    series: int
    accepted: int
    cached: int
    no_consent: int
    unlabelled: int
    unreadable: int
    refused: Mapping[str, int]
    destroyed: int


@dataclass(frozen=True)
class _Entry:
    """One file of the header pass."""

    path: Path
    patient: str
    study: str
    series: str
    instance: str
    accession: str


def ingest(
    source_dir: Path,
    *,
    consent_csv: Path,
    labels_csv: Path,
    image_size: tuple[int, int],
    site_key: bytes,
    out: Path,
    channels: Channels = 1,
    as_of: date | None = None,
    max_age_days: int = 30,
) -> IngestReport:
    """Takes the DICOM files of a folder into the encrypted cache.

    Args:
        source_dir: folder with DICOM files, any depth and names.
        consent_csv: the consent register, see `consent.read_register`.
        labels_csv: see the module's docstring.
        image_size: (rows, columns) of the cached images.
        site_key: the site's secret, at least 32 bytes; makes pseudonyms and protects the cache.
        out: the cache folder, see `cache`.
        channels: 1 or 3.
        as_of: the day for which consent is asked, default today.
        max_age_days: how old the consent register may be.

    Raises:
        ConsentError: no usable register; nothing was read.
        DataError: no usable labels, no file in the source, a cache of another key, or a key that is
            too short.
    """
    register = read_register(consent_csv, as_of=as_of or date.today(), max_age_days=max_age_days)
    cleared = {pseudonym(site_key, "pid", patient) for patient in register.permitted}
    # Withdrawals first: whatever happens later in this run, they have been honoured.
    destroyed = sum(cache.destroy_patient(out, name) for name in cache.patients(out) if name not in cleared)
    labels = _read_labels(labels_csv)

    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    by_patient, clashing = _index(source_dir, refused)
    files = sum(map(len, by_patient.values())) + refused.total()
    if not files:
        raise DataError(f"The image folder {source_dir} is empty.", remedy="Check that the share is mounted.")

    accepted: set[str] = set()
    for patient, entries in sorted(by_patient.items()):
        if not register.permits(patient):
            counts["no_consent"] += len(entries)
            continue
        images: dict[str, tuple[dict[str, Any], NDArray[np.float32]]] = {}
        seen: set[str] = set()
        for entry in entries:
            label = next((found for name in _names(entry) if (found := labels.get(name))), None)
            if label is None:
                counts["unlabelled"] += 1
                continue
            try:
                if clashing & _uids(entry):
                    raise Refused("uid_on_two_patients")
                if entry.instance in seen:
                    raise Refused("duplicate")
                clean = _read_clean(entry, site_key)
                volume = assemble([clean])[0][0]
                image = render(volume, window="header", size=image_size, channels=channels)[0]
            except Refused as reason:
                refused[reason.reason] += 1
                continue
            seen.add(entry.instance)
            images[clean.SOPInstanceUID] = (_meta(clean, *label), image)
        if images:
            name = pseudonym(site_key, "pid", patient)
            cache.write_patient(out, site_key, name, _payload(images, patient))
            counts["accepted"] += len(images)
            accepted.add(name)
    destroyed += sum(cache.destroy_patient(out, name) for name in cache.patients(out) if name not in accepted)

    entries_all = [entry for entries in by_patient.values() for entry in entries]
    return IngestReport(
        files=files,
        patients=len(by_patient),
        studies=len({entry.study for entry in entries_all}),
        series=len({entry.series for entry in entries_all}),
        accepted=counts["accepted"],
        cached=len(accepted),
        no_consent=counts["no_consent"],
        unlabelled=counts["unlabelled"],
        unreadable=refused.pop("not_dicom", 0),
        refused=dict(sorted(refused.items())),
        destroyed=destroyed,
    )


def load_cohort_records(out: Path, key: bytes) -> list[Record]:
    """All images in the cache, patients in the order of their pseudonyms.

    Args:
        out: the cache folder.
        key: the site key with which it was written.

    Raises:
        DataError: there is no cache, the key is another, a file was altered, or image sizes are
            mixed.
    """
    records = [record for name in cache.patients(out) for record in patient_records(out, key, name)]
    if not records:
        raise DataError(f"There is no cached patient in {out}.", remedy="Ingest the hospital's images first.")
    if len({record.image.shape for record in records}) > 1:
        raise DataError(f"The cache {out} holds images of several sizes.", remedy="Ingest again.")
    return records


def patient_records(out: Path, key: bytes, name: str) -> list[Record]:
    """One cached patient's images.

    Raises:
        DataError: not in the cache, another key, or a file that was altered.
    """
    payload = cache.read_patient(out, key, name)
    return [
        Record(name, meta["label"], meta["split"], meta["sex"], meta["age"], meta["group"], image)
        for meta, image in zip(payload.meta, payload.arrays["images"], strict=True)
    ]


def _index(source_dir: Path, refused: Counter[str]) -> tuple[dict[str, list[_Entry]], frozenset[str]]:
    """Header pass: files by hospital patient id, and the UIDs that more than one patient claims."""
    by_patient: dict[str, list[_Entry]] = defaultdict(list)
    owners: dict[str, set[str]] = defaultdict(set)
    for path in dicom_files(source_dir):
        try:
            entry = _entry(
                path,
                read_instance(path, tags=(*_IDENTITY, "AccessionNumber", "SpecificCharacterSet")),
            )
        except Refused as reason:
            refused[reason.reason] += 1
            continue
        by_patient[entry.patient].append(entry)
        for uid in _uids(entry):
            owners[uid].add(entry.patient)
    return by_patient, frozenset(uid for uid, patients in owners.items() if len(patients) > 1)


def _entry(path: Path, ds: Dataset) -> _Entry:
    patient, study, series, instance = (headers.identifier(ds, keyword) for keyword in _IDENTITY)
    accession = headers.value(ds, "AccessionNumber")
    text = accession.strip() if isinstance(accession, str) else ""
    return _Entry(path, patient, study, series, instance, text)


def _uids(entry: _Entry) -> set[str]:
    return {entry.study, entry.series, entry.instance}


def _names(entry: _Entry) -> list[tuple[str, str]]:
    """The names under which an image may stand in the label table, most specific first."""
    return list(zip(_LABEL_KEYS, (entry.instance, entry.accession, entry.study), strict=True))


def _read_clean(entry: _Entry, key: bytes) -> Dataset:
    """Reads a file whole and de-identifies it, if it is still about the patient asked for."""
    ds = read_instance(entry.path)
    if _entry(entry.path, ds) != entry:
        raise Refused("changed")
    return deidentify(ds, key)


def _meta(clean: Dataset, label: str, split: str) -> dict[str, Any]:
    """What is kept beside the pixels; from the de-identified dataset only."""
    age = clean.get("PatientAge")
    return {
        "label": label,
        "split": split,
        "sex": clean.get("PatientSex", ""),
        "age": int(age[:3]) if age else None,
        "group": {
            "manufacturer": clean.get("Manufacturer", ""),
            "modality": clean.get("Modality", ""),
        },
    }


def _payload(images: dict[str, tuple[dict[str, Any], NDArray[np.float32]]], patient: str) -> cache.Payload:
    """One patient's images in the order of their pseudonymous UIDs, which hides that in time."""
    ordered = [images[uid] for uid in sorted(images)]
    if len({meta["split"] for meta, _ in ordered}) > 1:
        raise DataError(
            f"The label table puts patient {patient!r} into two splits.",
            remedy="Split by patient, not by image.",
        )
    return cache.Payload({"images": np.stack([image for _, image in ordered])}, [meta for meta, _ in ordered])


def _read_labels(path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(column, value) -> (label, split)."""
    labels: dict[tuple[str, str], tuple[str, str]] = {}
    for line, row in parse_rows(read_text(path), path.name, ("label",)):
        names = [(column, row[column]) for column in _LABEL_KEYS if row.get(column)]
        if not names:
            raise DataError(
                f"Line {line} of {path.name} does not say which image or study it labels.",
                remedy=f"Fill in one of the columns {', '.join(_LABEL_KEYS)}.",
            )
        label, split = row["label"], row.get("split", "")
        if not label or split not in ("", *SPLITS):
            raise DataError(
                f"Line {line} of {path.name} has no label, or a split not train, val or test.",
                remedy="Correct the line, or remove it.",
            )
        # The most specific name of the row is the one it labels.
        if labels.setdefault(names[0], (label, split)) != (label, split):
            raise DataError(
                f"Line {line} of {path.name} contradicts an earlier line on the same study.",
                remedy="Keep one line for each.",
            )
    if not labels:
        raise DataError(f"{path.name} has no rows.", remedy="Add one row for each labelled study.")
    return labels
