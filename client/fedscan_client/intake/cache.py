"""The encrypted cache: what training reads, one image at a time, and what a withdrawal destroys.

    CACHE/key.check                   public fingerprints of the site key it belongs to: see `cache_keys`
          keys/PSEUDONYM.key          the patient's own key, drawn at random, under the site key's `wrapping`
          patients/PSEUDONYM/index    the patient's entries and consent, sealed with the patient's key
          patients/PSEUDONYM/*.img    one image each, `.npy` inside, sealed with it; random names

Guarantee: without the site key nothing is read but the number of patients, of each patient's images, and the files'
sizes and times. No file of a patient can be changed, cut, exchanged (with another of the same patient, an earlier
version, or another patient's) or given another label unnoticed: an image is sealed together with patient and entry, and
the index lists nonce and tag of the very file. Removing one key file destroys the patient wherever copies of
`patients/` went; leave `keys/` out of backups, or a restore undoes it.

Not seen: that a patient's whole folder was put back as it was once, index and images together. `state_digest` changes
with it, for a record kept elsewhere to compare. Nor is a disk made to forget the block where a removed key lay: it
opens nothing without the site key, and nothing at all after the next rotation.

Features or previews computed from images are images too and belong in here. One process writes at a time (a lock);
readers need none.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from numpy.typing import NDArray

from fedscan_client.intake import cache_keys, seal
from fedscan_client.intake.cache_keys import REMEDY, Damaged
from fedscan_client.intake.records import Refused, Volume, Window
from fedscan_client.keys import SiteKey
from fedscan_core.errors import DataError
from fedscan_core.files import sync_folder, write_atomic

INDEX = "index"
_LARGEST = 2**31 - 2**16  # bytes of an image that the cipher takes at once


@dataclass(frozen=True)
class Entry:
    """What is kept beside one image: how it is used for training, and all of `Volume` but its values.

    Attributes:
        id: pseudonymous, unique within the patient.
        study: pseudonymous study.
        label: as written in the hospital's table.
        split: train, val, test, or "" where the table leaves it to the site.
        sex: M, F, O, or "" where unknown.
        age: whole years, 90 for everybody older, None where unknown.
        group: further values to report fairness by.
        digest: of the source, to tell whether it changed.
        dtype: of the values, as numpy writes it, such as "<i2"; this and what follows is filled in by `write_patient`.
        shape: of the values.
        modality: this and the following as in `Volume`.
        spacing_mm: see `Volume`.
        affine: see `Volume`.
        windows: see `Volume`.
        voi_lut: see `Volume`.
        inverted: see `Volume`.
        unit: see `Volume`.
    """

    id: str
    study: str
    label: str
    split: str
    sex: str
    age: int | None
    group: Mapping[str, str]
    digest: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    modality: str = ""
    spacing_mm: tuple[float | None, float | None, float | None] = (None, None, None)
    affine: tuple[float, ...] | None = None
    windows: tuple[Window, ...] = ()
    voi_lut: tuple[int, tuple[float, ...]] | None = None
    inverted: bool = False
    unit: str = ""


_OF_VOLUME = tuple(item.name for item in fields(Volume) if item.name != "values")


@dataclass(frozen=True)
class Patient:
    """The index of one patient.

    Attributes:
        entries: one for each image.
        consent_until: last day of the consent; None: no end known.
        basis: the consent or legal basis under which the patient is here.
    """

    entries: tuple[Entry, ...]
    consent_until: date | None
    basis: str


@dataclass(frozen=True)
class _Image:
    """An entry with the name of its file, and the nonce and tag of that very file in hex."""

    entry: Entry
    file: str
    mark: str


@dataclass(frozen=True, eq=False)
class Opened:
    """One patient with the key at hand, to read many images of."""

    patient: Patient
    _name: str
    _folder: Path
    _key: bytes = field(repr=False)
    _images: Mapping[str, _Image]  # by the id of the entry

    def values(self, entry: Entry) -> NDArray[Any]:
        """The image's values [Z, H, W] or [Z, H, W, 3].

        Args:
            entry: exactly one of `patient.entries`.

        Raises:
            Damaged: the file was altered or is gone, or there is no such entry.
        """
        image = self._images.get(entry.id)
        if image is None or (image.entry is not entry and image.entry != entry):
            raise Damaged(f"Patient {self._name} has no such image.", remedy="Read the index again.")
        try:
            told = seal.about("image", self._name, entry.id)
            return seal.read_array(self._folder / image.file, self._key, image.mark, entry.dtype, entry.shape, told)
        except (InvalidTag, OSError):
            raise Damaged(f"An image of patient {self._name} was altered or is gone.", remedy=REMEDY) from None

    def volume(self, entry: Entry) -> Volume:
        """The image with what its header said. Errors as `values`."""
        return Volume(self.values(entry), **{name: getattr(entry, name) for name in _OF_VOLUME})


# ------------------------------------------------------------------------------------------------------------- reading


def patients(folder: Path) -> list[str]:
    """Pseudonyms of all patients that have a key and an index, sorted; none where there is no cache yet."""
    return [name for name in cache_keys.with_key(folder) if (_place(folder, name) / INDEX).exists()]


def open_patient(folder: Path, key: SiteKey, pid: str) -> Opened:
    """Unwraps the patient's key and reads the index, once for many images.

    Raises:
        SiteKeyError: the cache belongs to another site key.
        Damaged: not in the cache, or altered.
    """
    place, data_key = _place(folder, pid), cache_keys.unwrap(folder, key, pid)
    try:
        tree = json.loads(seal.unseal(data_key, (place / INDEX).read_bytes(), seal.about("index", pid)))
    except (InvalidTag, OSError):
        raise Damaged(f"The index of patient {pid} was altered or is gone.", remedy=REMEDY) from None
    images = {item["id"]: _Image(_entry(item), name, mark) for name, mark, item in tree["images"]}
    until = tree["consent_until"] and date.fromisoformat(tree["consent_until"])
    patient = Patient(tuple(image.entry for image in images.values()), until, tree["basis"])
    return Opened(patient, pid, place, data_key, images)


def read_index(folder: Path, key: SiteKey, pid: str) -> Patient:
    """One patient's entries and consent. Errors as `open_patient`."""
    return open_patient(folder, key, pid).patient


def read_values(folder: Path, key: SiteKey, pid: str, entry: Entry) -> NDArray[Any]:
    """One image's values; for many of a patient use `open_patient`. Errors as there and `Opened.values`."""
    return open_patient(folder, key, pid).values(entry)


def state_digest(folder: Path) -> str:
    """SHA-256 over all patients and their indexes: another one whenever anything in the cache was changed or put back.

    Made from nonces and tags only. It tells nothing of what they hold, but it does tell that something changed.
    """
    digest = hashlib.sha256(seal.VERSION)
    for name in patients(folder):
        try:
            blob = (_place(folder, name) / INDEX).read_bytes()
        except OSError:  # one patient's, or destroyed just now: must not stop a round
            blob = b""
        digest.update(name.encode() + b"\0" + blob[len(seal.VERSION) :][: seal.NONCE] + blob[-seal.TAG :])
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- writing


def write_patient(
    folder: Path,
    key: SiteKey,
    pid: str,
    images: Iterable[tuple[Entry, NDArray[Any] | Volume | None]],
    *,
    consent_until: date | None = None,
    basis: str = "",
    still: Callable[[], bool] = lambda: True,
) -> Patient:
    """Writes or replaces one patient, one image at a time; the same again changes no byte. No image: no patient.

    New images are written under new names, then the index, then what it does not list is removed: whenever it is
    stopped, the patient is there whole, as before or as now.

    Args:
        folder: the cache.
        key: the site's.
        pid: the patient's pseudonym.
        images: each entry with its image. An array: written anew. A Volume: the same, and it replaces what the entry
            says of it. None: the file that is there is kept, with what was noted of its pixels. They are taken one by
            one; an exception on the way leaves the patient as before. Making them must not write to the cache.
        consent_until: last day of the consent.
        basis: see `Patient`.
        still: asked last of all, when nobody else can write: whether the patient may be kept. No: the patient is
            destroyed, whatever was there before.

    Returns:
        The patient as kept: with dtype and shape of every image.

    Raises:
        SiteKeyError: the cache belongs to another site key; nothing was written.
        Damaged: a file of this patient was altered, or None was given for an image that is not there.
        FolderError: the disk is full, or the folder cannot be written.
    """
    place, key_file = _place(folder, pid), cache_keys.key_path(folder, pid)
    written: dict[str, _Image] = {}
    with cache_keys.locked(folder):
        cache_keys.claim(folder, key)
        if not key_file.exists():  # first, so that there never is data without a key
            _clear(place)  # of a patient who was destroyed
            cache_keys.new_key(folder, key, pid)
        place.mkdir(mode=0o700, exist_ok=True)
        there = (place / INDEX).exists()
        before = open_patient(folder, key, pid) if there else _nothing(folder, key, pid)
        try:
            for entry, values in images:
                if entry.id in written:
                    raise DataError(f"Two images of patient {pid} have one id.", remedy="Give every image its own.")
                written[entry.id] = _write_image(before, entry, values)
        except BaseException:
            _clear(place, before._images)
            raise
        if written and not still():
            written.clear()
        after = Patient(tuple(image.entry for image in written.values()), consent_until, basis)
        if written and (not there or written != before._images or after != before.patient):
            with cache_keys.writing(folder):
                sync_folder(place)
                write_atomic(place / INDEX, _sealed_index(before, after, written))
        if written:
            _clear(place, written)
    if not written:
        destroy_patient(folder, pid)
    return after


def destroy_patient(folder: Path, pid: str) -> bool:
    """Destroys one patient, the key first; says whether there was anything to destroy. Needs no key."""
    place, key_file = _place(folder, pid), cache_keys.key_path(folder, pid)
    if not folder.exists():
        return False
    with cache_keys.locked(folder), cache_keys.writing(folder):
        found = key_file.exists() or place.exists()
        for path in (key_file, *key_file.parent.glob(f".{key_file.name}.*.part")):  # also one whose write was killed
            if path.exists():
                with path.open("r+b") as file:  # a disk that writes in place forgets it at once
                    file.write(bytes(path.stat().st_size))
                    file.flush()
                    os.fsync(file.fileno())
                path.unlink()
        if key_file.parent.exists():
            sync_folder(key_file.parent)
        if place.exists():
            for path in place.iterdir():
                path.unlink()
            place.rmdir()
            sync_folder(place.parent)
    return found


def sweep(folder: Path) -> int:
    """Removes what interrupted runs left: data without a key, keys without data. Returns of how many patients."""
    folders = (path.name for path in (folder / "patients").glob("*"))
    left = {*cache_keys.with_key(folder), *filter(cache_keys.is_pseudonym, folders)} - set(patients(folder))
    for name in left:
        destroy_patient(folder, name)
    return len(left)


def _place(folder: Path, pid: str) -> Path:
    cache_keys.key_path(folder, pid)  # raises where `pid` is no pseudonym
    return folder / "patients" / pid


def _nothing(folder: Path, key: SiteKey, pid: str) -> Opened:
    return Opened(Patient((), None, ""), pid, _place(folder, pid), cache_keys.unwrap(folder, key, pid), {})


def _write_image(before: Opened, entry: Entry, got: NDArray[Any] | Volume | None) -> _Image:
    """Writes one image, or keeps the one that is there; its entry is filled in."""
    if got is None:
        old = before._images.get(entry.id)
        if old is None:
            raise Damaged(f"Patient {before._name} has no such image to keep.", remedy="Ingest again.")
        kept = {name: getattr(old.entry, name) for name in (*_OF_VOLUME, "dtype", "shape")}
        return replace(old, entry=replace(entry, **kept))
    if isinstance(got, Volume):
        entry, got = replace(entry, **{name: getattr(got, name) for name in _OF_VOLUME}), got.values
    if got.nbytes > _LARGEST:
        raise Refused("too_large")
    array, name = seal.plain_array(got), f"{secrets.token_hex(16)}.img"
    with cache_keys.writing(before._folder):
        told = seal.about("image", before._name, entry.id)
        mark = seal.write_array(before._folder / name, before._key, array, told)
    return _Image(replace(entry, dtype=array.dtype.str, shape=array.shape), name, mark)


def _sealed_index(opened: Opened, patient: Patient, images: Mapping[str, _Image]) -> bytes:
    tree = {
        "consent_until": patient.consent_until and patient.consent_until.isoformat(),
        "basis": patient.basis,
        "images": [[image.file, image.mark, _tree(image.entry)] for image in images.values()],
    }
    told = seal.about("index", opened._name)
    return seal.seal(opened._key, json.dumps(tree, allow_nan=False).encode(), told)


def _tree(entry: Entry) -> dict[str, Any]:
    tree = {item.name: getattr(entry, item.name) for item in fields(entry)}
    return {**tree, "group": dict(entry.group), "windows": [asdict(window) for window in entry.windows]}


def _entry(tree: dict[str, Any]) -> Entry:
    lut = tree["voi_lut"]
    changed = {
        "shape": tuple(tree["shape"]),
        "spacing_mm": tuple(tree["spacing_mm"]),
        "affine": tree["affine"] and tuple(tree["affine"]),
        "windows": tuple(Window(**window) for window in tree["windows"]),
        "voi_lut": lut and (lut[0], tuple(lut[1])),
    }
    return Entry(**{**tree, **changed})


def _clear(place: Path, images: Mapping[str, _Image] | None = None) -> None:
    """Removes every file but the index and these images' (None: all); what cannot be is left for the next time."""
    keep = set() if images is None else {INDEX, *(image.file for image in images.values())}
    for path in list(place.iterdir()) if place.exists() else ():
        if path.name not in keep:
            with contextlib.suppress(OSError):
                path.unlink()
