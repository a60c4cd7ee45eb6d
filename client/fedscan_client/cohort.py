"""A site's consenting patients for one task, as tensors: each patient's images lie side by side.

Nothing here looks across patients: pixels are scaled by their type's range, features are fixed, and labels are
checked against the declared set. An image that cannot be used is left out and noted for the site's own eyes; it must
not stop a round, because whether a round fails would then tell something about that patient. Shapes: N images, P
patients.
"""

import csv
import functools
import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedscan_client.intake import pictures
from fedscan_client.site import Site
from fedscan_core.config import RunConfig
from fedscan_core.errors import DataError
from fedscan_models import registry

TABLE = "cohort.csv"
COLUMNS = ("file", "index", "patient_id", "label", "split", "sex", "age")


@dataclass(frozen=True)
class Patients:
    """Some patients' images, ready for the network.

    Attributes:
        inputs: [N, ...] float32, pixels or the network's fixed features.
        targets: [N] int64, index into the task's labels.
        offsets: [P + 1] int64; patient p owns rows offsets[p] to offsets[p + 1].
        ids: P identifiers, as the site holds them (pseudonyms, or a research table's own).
        left_out: why images were left out, one text each. For the site's own log only.
        groups: each image's sex ("" where unknown) and age in years (None where unknown), [N]; empty: all unknown.
    """

    inputs: Tensor
    targets: Tensor
    offsets: np.ndarray
    ids: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    groups: tuple[tuple[str, float | None], ...] = ()

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.ids)


@dataclass(frozen=True)
class Image:
    """One image before it is an input: who, what, and how to get the pixels."""

    patient: str
    label: str
    split: str
    sex: str
    age: float | None
    load: functools.partial[np.ndarray]


def label_index(text: str, labels: Sequence[str]) -> int:
    """Index of a label given by name or by 0-based number.

    Raises:
        DataError: outside the declared set.
    """
    if text in labels:
        return list(labels).index(text)
    try:
        number = int(float(text))
    except (ValueError, OverflowError):  # "inf" overflows
        number = -1
    if not (0 <= number < len(labels) and float(number) == float(text)):
        raise DataError(
            f"Label '{text}' is not one of the declared {list(labels)}.",
            remedy="Correct the table, or name it in [task] labels.",
        )
    return number


def load_patients(site: Site, run: RunConfig, split: str) -> Patients:
    """The site's patients of one split, decoded and turned into inputs once per process.

    Raises:
        DataError: the cohort as a whole cannot be read. Its text may name a file: it stays inside the site.
    """
    key = json.dumps([run.task.model_dump(mode="json"), run.model.name, run.privacy.unit])
    return _load(site.folder, site.source.kind, site.source.folder, split, key)


def forget() -> None:
    """Drops everything that `load_patients` keeps in memory."""
    _load.cache_clear()


def split_of(key: bytes, patient: str) -> str:
    """train, val or test (70/10/20) by a keyed hash of the patient: fixed for ever, whoever else is in the cohort."""
    digest = hmac.new(key, b"fedscan split 1\0" + patient.encode(), hashlib.sha256).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.7 else "val" if share < 0.8 else "test"


def images_of(
    site_folder: Path, kind: str, folder: Path, size: tuple[int, int], channels: Literal[1, 3]
) -> tuple[list[Image], list[str]]:
    """Every image of the site, undecoded where the source allows it, and why patients were left out whole."""
    if kind == "table":
        with (site_folder / TABLE).open(newline="", encoding="utf-8") as file:
            return [
                Image(
                    row["patient_id"],
                    row["label"],
                    row["split"],
                    (row.get("sex") or "").strip().upper(),
                    _age(row.get("age") or ""),
                    functools.partial(_row_image, folder / row["file"], row["index"], size=size, channels=channels),
                )
                for row in csv.DictReader(file)
            ], []
    from fedscan_client.intake import cache, ingest

    key = (site_folder / "key").read_bytes()
    images: list[Image] = []
    left_out: list[str] = []
    for name in cache.patients(folder):
        try:
            records = ingest.patient_records(folder, key, name)
        except Exception as error:  # one spoilt file must not stop the others: see the module's docstring
            left_out.append(f"{type(error).__name__}: {error}")
            continue
        for record in records:
            load = functools.partial(_cached_image, record.image, (channels, *size))
            where = record.split or split_of(key, record.patient)
            images.append(Image(record.patient, record.label, where, record.sex, record.age, load))
    return images, left_out


def _age(text: str) -> float | None:
    """Years, or None for what is no number: a spoilt age puts its own image into the group "unknown", no more."""
    try:
        return float(text)
    except ValueError:
        return None


def _cached_image(image_CHW: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if image_CHW.shape != shape:
        raise DataError(f"An image was cached as {image_CHW.shape}, the run wants {shape}.", remedy="Ingest again.")
    return image_CHW


def _row_image(path: Path, index: str, *, size: tuple[int, int], channels: Literal[1, 3]) -> np.ndarray:
    """The image of one row of the table; an index that is no number spoils this image only."""
    try:
        number = int(index) if index else None
    except ValueError:
        raise DataError(f"{path.name}: the index '{index}' is no number.", remedy="Correct the table.") from None
    return pictures.load_image(path, number, size=size, channels=channels)


@functools.lru_cache(maxsize=4096)
def _load(site_folder: Path, kind: str, folder: Path, split: str, key: str) -> Patients:
    task, model_name, unit = json.loads(key)
    run = RunConfig.model_validate({"task": task, "model": {"name": model_name}})
    size = (run.task.image_size[0], run.task.image_size[1])
    found, left_out = images_of(site_folder, kind, folder, size, run.task.channels)
    images = [image for image in found if image.split == split]
    images.sort(key=lambda image: image.patient)  # stable: images keep their order inside a patient
    features = registry.for_run(run).features
    rows: list[Tensor] = []
    names: list[str] = []
    targets: list[int] = []
    groups: list[tuple[str, float | None]] = []
    for number, image in enumerate(images):
        try:
            target, x_BCHW = label_index(image.label, run.task.labels), torch.from_numpy(image.load()[None])
            # One image at a time: in a batch its features could depend, in the last bits, on whose images are beside
            # it, and weights made for it could blow that up.
            with torch.no_grad():
                rows.append(features(x_BCHW) if features else x_BCHW)
        except Exception as error:  # decoders raise many kinds on damaged files
            left_out.append(f"{type(error).__name__}: {error}")
            continue
        names.append(f"{image.patient}/{number}" if unit == "image" else image.patient)
        targets.append(target)
        groups.append((image.sex, image.age))
    inputs = torch.cat(rows) if rows else torch.zeros(0)
    starts = [0] if names else []
    starts += [i for i in range(1, len(names)) if names[i] != names[i - 1]]
    offsets = np.array([*starts, len(names)], dtype=np.int64)
    ids = tuple(names[start] for start in starts)
    return Patients(
        inputs, torch.tensor(targets, dtype=torch.int64), offsets, ids, tuple(left_out), groups=tuple(groups)
    )
