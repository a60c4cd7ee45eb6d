"""A site's consenting patients for one task, as tensors: each patient's images lie side by side.

A stack of slices or a multi-frame object counts as that many images of its patient. Nothing here looks across patients:
pixels are shown through a window of the run's or of the image's own, features are fixed, and labels are checked against
the declared set. An image that cannot be used is left out and noted for the site's own eyes; it must not stop a round,
because whether a round fails would then tell something about that patient. Shapes: N images, P patients.
"""

import csv
import functools
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedscan_client import keys
from fedscan_client.intake import cache, pictures, render
from fedscan_client.intake.cache import Entry, Opened
from fedscan_client.site import Site
from fedscan_core.config import RunConfig
from fedscan_core.errors import DataError, SiteKeyError
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
        until: last day of each patient's consent, [P], None where no end was known at the intake; empty: none known.
    """

    inputs: Tensor
    targets: Tensor
    offsets: np.ndarray
    ids: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    groups: tuple[tuple[str, float | None], ...] = ()
    until: tuple[date | None, ...] = ()

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.ids)

    def only(self, keep: Callable[[str, date | None], bool]) -> "Patients":
        """The patients for whom `keep(id, last day of consent)` holds, in the same order."""
        until = self.until or (None,) * len(self)
        chosen = [p for p in range(len(self)) if keep(self.ids[p], until[p])]
        if len(chosen) == len(self):
            return self
        sizes = np.diff(self.offsets)[chosen]
        rows = np.concatenate([np.arange(self.offsets[p], self.offsets[p + 1]) for p in chosen] or [np.zeros(0, int)])
        return replace(
            self,
            inputs=self.inputs[torch.from_numpy(rows)],
            targets=self.targets[torch.from_numpy(rows)],
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            ids=tuple(self.ids[p] for p in chosen),
            groups=tuple(self.groups[row] for row in rows) if self.groups else (),
            until=tuple(until[p] for p in chosen),
        )


@dataclass(frozen=True)
class Image:
    """One image, or one stack, before it is an input: who, what, and how to get the pixels [Z, C, H, W]."""

    patient: str
    label: str
    split: str
    sex: str
    age: float | None
    load: functools.partial[np.ndarray]
    until: date | None = None


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
    """The site's patients of one split, decoded and turned into inputs once, and again when its images changed.

    Of a site the newest _KEPT of these stay in memory.

    Raises:
        DataError: the cohort as a whole cannot be read. Its text may name a file: it stays inside the site.
        SiteKeyError: the site's key cannot be had, or is not the cache's.
    """
    what = (site.folder, split, json.dumps([run.task.model_dump(mode="json"), run.model.name, run.privacy.unit]))
    state = cache.state_digest(site.cache) if site.table is None else _table_state(site, site.table)
    known = _MEMORY.pop(what, None)
    if known is None or known[0] != state:
        # What was withdrawn leaves the memory too, whatever run it was loaded for.
        for other in [it for it, (then, _) in _MEMORY.items() if it[0] == site.folder and then != state]:
            del _MEMORY[other]
        known = (state, _load(site, run, split))
    for oldest in [it for it in _MEMORY if it[0] == site.folder][: 1 - _KEPT]:
        del _MEMORY[oldest]
    _MEMORY[what] = known  # the newest
    return known[1]


_KEPT = 4  # training and evaluation of two runs at a time
_MEMORY: dict[tuple[Path, str, str], tuple[str, Patients]] = {}


def forget() -> None:
    """Drops everything that `load_patients` keeps in memory."""
    _MEMORY.clear()


def split_of(key: bytes, patient: str) -> str:
    """train, val or test (70/10/20) by a keyed hash of the patient: fixed for ever, whoever else is in the cohort."""
    digest = hmac.new(key, b"fedscan split 1\0" + patient.encode(), hashlib.sha256).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.7 else "val" if share < 0.8 else "test"


def images_of(site: Site, run: RunConfig) -> tuple[list[Image], list[str]]:
    """Every image of the site, undecoded, and why patients were left out whole."""
    if site.table is not None:
        return list(_of_table(site, site.table, run)), []
    key = keys.load(site.folder, site.key)
    images: list[Image] = []
    left_out: list[str] = []
    for name in cache.patients(site.cache):
        try:
            opened = cache.open_patient(site.cache, key, name)
        except SiteKeyError:  # nobody's can be read
            raise
        except Exception as error:  # one spoilt file must not stop the others: see the module's docstring
            left_out.append(f"{type(error).__name__}: {error}")
            continue
        where = split_of(key.names, name)
        for entry in opened.patient.entries:
            if run.task.modality in ("", entry.modality):
                load = functools.partial(_rendered, opened, entry, run)
                split, until = entry.split or where, opened.patient.consent_until
                images.append(Image(name, entry.label, split, entry.sex, entry.age, load, until))
    return images, left_out


def _table_state(site: Site, folder: Path) -> str:
    """Another one whenever the table, or a file that it names, was written anew: by size and time."""
    text = (site.folder / TABLE).read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode())
    for name in sorted({row["file"] for row in csv.DictReader(text.splitlines(keepends=True))}):
        try:
            stat = (folder / name).stat()
            digest.update(f"{name}\0{stat.st_size} {stat.st_mtime_ns}\n".encode())
        except (OSError, ValueError):  # it is not there; the loader leaves that image out
            digest.update(f"{name}\0\n".encode())
    return digest.hexdigest()


def _of_table(site: Site, folder: Path, run: RunConfig) -> Iterator[Image]:
    size = (run.task.image_size[0], run.task.image_size[1])
    with (site.folder / TABLE).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            path = folder / row["file"]
            load = functools.partial(_row_image, path, row["index"], size=size, channels=run.task.channels)
            sex, age = (row.get("sex") or "").strip().upper(), _age(row.get("age") or "")
            yield Image(row["patient_id"], row["label"], row["split"], sex, age, load)


def _age(text: str) -> float | None:
    """Years, or None for what is no number: a spoilt age puts its own image into the group "unknown", no more."""
    try:
        return float(text)
    except ValueError:
        return None


def _rendered(opened: Opened, entry: Entry, run: RunConfig) -> np.ndarray:
    size = (run.task.image_size[0], run.task.image_size[1])
    return render.render(opened.volume(entry), window=run.task.window, size=size, channels=run.task.channels)


def _row_image(path: Path, index: str, *, size: tuple[int, int], channels: Literal[1, 3]) -> np.ndarray:
    """The image of one row of the table; an index that is no number spoils this image only."""
    try:
        number = int(index) if index else None
    except ValueError:
        raise DataError(f"{path.name}: the index '{index}' is no number.", remedy="Correct the table.") from None
    return pictures.load_image(path, number, size=size, channels=channels)[None]


def _load(site: Site, run: RunConfig, split: str) -> Patients:
    found, left_out = images_of(site, run)
    return decoded([image for image in found if image.split == split], run, left_out)


def decoded(images: list[Image], run: RunConfig, left_out: Sequence[str] = ()) -> Patients:
    """These images as inputs of the run's network; what cannot be decoded is left out, and why is added."""
    images = sorted(images, key=lambda image: image.patient)  # stable: images keep their order inside a patient
    why = list(left_out)
    features = registry.for_run(run).features
    rows: list[Tensor] = []
    names: list[str] = []
    targets: list[int] = []
    groups: list[tuple[str, float | None]] = []
    until: list[date | None] = []
    for number, image in enumerate(images):
        try:
            target, x_BCHW = label_index(image.label, run.task.labels), torch.from_numpy(image.load())
            # One image at a time: in a batch its features could depend, in the last bits, on whose images are beside
            # it, and weights made for it could blow that up.
            with torch.no_grad():
                made = [features(x_BCHW[i : i + 1]) if features else x_BCHW[i : i + 1] for i in range(len(x_BCHW))]
        except Exception as error:  # decoders raise many kinds on damaged files
            why.append(f"{type(error).__name__}: {error}")
            continue
        for row in made:
            rows.append(row)
            # Every slice a unit of its own where images are protected instead of patients.
            names.append(f"{image.patient}/{number}.{len(rows)}" if run.privacy.unit == "image" else image.patient)
            targets.append(target)
            groups.append((image.sex, image.age))
            until.append(image.until)
    inputs = torch.cat(rows) if rows else torch.zeros(0)
    starts = [0] if names else []
    starts += [i for i in range(1, len(names)) if names[i] != names[i - 1]]
    offsets = np.array([*starts, len(names)], dtype=np.int64)
    return Patients(
        inputs,
        torch.tensor(targets, dtype=torch.int64),
        offsets,
        ids=tuple(names[start] for start in starts),
        left_out=tuple(why),
        groups=tuple(groups),
        until=tuple(until[start] for start in starts),
    )
