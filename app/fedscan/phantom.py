"""Phantom hospitals: synthetic chest radiographs as real DICOM files, with invented identities.

They stand in for patients wherever no patient may be: quickstart, simulation, tests, the canary
check of the de-identification. Nothing in them comes from a person. A patient has one to four
images of one anatomy; the disease is one to three soft opacities in the lung fields, whose strength
varies from patient to patient, down to invisible, so that no model can be perfect. Healthy patients
have faint harmless shadows. Two scanner makers differ in contrast, sharpness, noise, window and,
for some images, polarity.

The same seed draws the same hospital, byte for byte, apart from the day in the first line of
consent.csv, which has to be fresh for the intake to accept it.

Shape letters: H rows, W columns.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedscan.phantom_headers import WHITE, Person, demographics, instance, mrn, study_uid

Grid = NDArray[np.float64]


@dataclass(frozen=True)
class Phantom:
    """One synthetic patient; lengths in units of half the image's height."""

    number: int
    sex: str
    age: int
    sick: bool
    maker: int
    lung: tuple[float, float, float, float]  # half width, half height, distance from the middle, height of the centre
    heart: float
    ribs: tuple[float, float]  # how many, phase
    spots: tuple[tuple[float, float, float, float], ...]  # x, y, radius, strength
    visits: tuple[int, ...]  # images of each study


def draw_hospital(
    folder: Path,
    *,
    name: str,
    patients: int,
    seed: int,
    image_size: int = 64,
    sickness: float = 0.5,
    makers: Sequence[str] = ("Acme", "Borealis"),
    as_of: date | None = None,
) -> None:
    """Draws one hospital: `folder`/dicom/..., labels.csv (study_uid, label) and consent.csv.

    A few patients are denied, withdrawn or absent in consent.csv (each about one in forty; none
    when there are fewer than six patients).

    Args:
        folder: created if need be.
        name: institution in the headers; another name with the same seed is another hospital.
        patients: how many.
        seed: decides everything else.
        image_size: rows and columns, about 32 to 256.
        sickness: share of patients with the disease, label 1.
        makers: scanner makers; a patient is always imaged by the same one.
        as_of: the day on which the consent register was drawn up, default today.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    labels: list[tuple[str, str]] = []
    for phantom in draw_patients(rng, patients, sickness, len(makers)):
        maker = makers[phantom.maker]
        person = Person(name, seed, phantom.number, phantom.sex, phantom.age, maker, phantom.maker % 2)
        base = demographics(person)
        for study, images in enumerate(phantom.visits):
            labels.append((study_uid(person, study), str(int(phantom.sick))))
            place = folder / "dicom" / f"{phantom.number:05d}" / f"study{study}"
            place.mkdir(parents=True, exist_ok=True)
            for image in range(images):
                stored_HW = (draw_image(phantom, rng, image_size) * WHITE).round().astype(np.uint16)
                inverted = bool(phantom.maker % 2 and rng.random() < 0.3)
                ds = instance(base, person, study, image, stored_HW, inverted)
                ds.save_as(place / f"IM{image:04d}", enforce_file_format=True)
    write_csv(folder / "labels.csv", ("study_uid", "label"), labels)
    numbers = [mrn(name, seed, number) for number in range(patients)]
    write_consent(folder / "consent.csv", _consent_rows(numbers), as_of or date.today())


def phantom_table(folder: Path, *, patients: int, sites: int, seed: int, image_size: int = 64) -> None:
    """Draws a research table: `folder`/metadata.csv and PNG images, as `read_table` reads them.

    Args:
        folder: created if need be.
        patients: how many over all sites; split 70 / 10 / 20 into train, val and test by patient.
        sites: how many sites they are dealt to.
        seed: decides everything.
        image_size: rows and columns.
    """
    rng = np.random.default_rng([seed, sites])
    rows: list[tuple[str, ...]] = []
    for phantom in draw_patients(rng, patients, 0.5, 2):
        site = f"phantom_{phantom.number % sites + 1}"
        # Dealt in turn within a site, so that each site has all three splits.
        split = (
            "train",
            "test",
            "train",
            "train",
            "val",
            "train",
            "train",
            "test",
            "train",
            "train",
        )[phantom.number // sites % 10]
        (folder / site).mkdir(parents=True, exist_ok=True)
        for image in range(sum(phantom.visits)):
            file = f"{site}/{phantom.number:05d}_{image}.png"
            x_HW = draw_image(phantom, rng, image_size)
            Image.fromarray((x_HW * 255).round().astype(np.uint8)).save(folder / file)
            who = (f"P{phantom.number:05d}", site, phantom.sex, str(phantom.age))
            rows.append((file, *who, str(int(phantom.sick)), split, "AB"[phantom.maker]))
    columns = ("file", "patient_id", "site", "sex", "age", "label", "split", "maker")
    write_csv(folder / "metadata.csv", columns, rows)


def draw_patients(rng: np.random.Generator, patients: int, sickness: float, makers: int) -> Iterator[Phantom]:
    """Synthetic patients, one by one; disease, sex, age and maker are independent."""
    sick = rng.permutation(patients) < round(sickness * patients)  # exactly that many
    for number in range(patients):
        spots: list[tuple[float, float, float, float]] = []
        visible = rng.beta(2.2, 1.5)  # of this patient, 0 to 1
        for _ in range(rng.integers(1, 4)):
            side, height = rng.choice((-1.0, 1.0)), rng.uniform(-0.45, 0.4)
            strength = 0.42 * visible if sick[number] else rng.uniform(0, 0.06)
            spots.append((side * rng.uniform(0.25, 0.55), height, rng.uniform(0.10, 0.22), strength))
        yield Phantom(
            number=number,
            sex=str(rng.choice(("F", "M"))),
            age=int(np.clip(rng.normal(58, 17), 18, 97)),
            sick=bool(sick[number]),
            maker=int(rng.integers(makers)),
            lung=(
                rng.uniform(0.27, 0.34),
                rng.uniform(0.56, 0.70),
                rng.uniform(0.37, 0.44),
                rng.uniform(-0.12, 0.02),
            ),
            heart=rng.uniform(0.22, 0.34),
            ribs=(rng.uniform(7, 10), rng.uniform(0, 2 * np.pi)),
            spots=tuple(spots),
            visits=((1,), (2,), (1, 1), (1,), (2, 1), (1,), (2, 2))[rng.integers(7)],
        )


def draw_image(phantom: Phantom, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """One radiograph, [size, size] in [0, 1], bone white: new position, exposure and noise."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    zoom, dx, dy = rng.uniform(0.94, 1.06), *rng.uniform(-0.06, 0.06, 2)
    y_HW, x_HW = np.meshgrid((axis - dy) * zoom, (axis - dx) * zoom, indexing="ij")

    width, height, distance, middle = phantom.lung
    side = np.abs(x_HW)
    lungs = _soft((side - distance) / width, (y_HW - middle) / height, 4.0)
    body = _soft(x_HW / 0.95, (y_HW - 0.25) / 1.35, 8.0)
    spine = np.exp(-((x_HW / 0.10) ** 2))
    heart = _soft((x_HW - 0.12) / phantom.heart, (y_HW - 0.30) / (phantom.heart * 1.15), 4.0)
    frequency, phase = phantom.ribs
    ribs = np.clip(np.sin(frequency * np.pi * (y_HW + 0.35 * side**2) + phase), 0, None) ** 3
    clavicles = np.exp(-(((y_HW + 0.72 - 0.25 * side) / 0.05) ** 2)) * (side > 0.12)

    x = 0.08 + 0.62 * body - 0.46 * lungs + 0.16 * spine + 0.30 * heart * body
    x += (0.09 * ribs + 0.12 * clavicles) * body
    if phantom.sex == "F":  # soft tissue over the lower lung fields
        x += 0.09 * _soft((side - 0.45) / 0.33, (y_HW - 0.35) / 0.30, 3.0)
    x -= 0.0008 * (phantom.age - 58) * ribs  # bone thins with age
    for left, top, radius, strength in phantom.spots:
        spot = np.exp(-((x_HW - left) ** 2 + (y_HW - top) ** 2) / (2 * radius**2))
        x += strength * spot * lungs
    x += 0.035 * _texture(rng, size, 2.0)  # vessels: as soft as a small opacity
    if phantom.maker % 2 == 0:
        x = 1.02 * x + 0.025 * rng.standard_normal((size, size))
    else:  # older detector: flatter, softer, noisier
        x = 0.12 + 0.80 * np.clip(x, 0, None) ** 0.85
        x = (x + np.roll(x, 1, 0) + np.roll(x, 1, 1) + np.roll(x, (1, 1), (0, 1))) / 4
        x += 0.035 * rng.standard_normal((size, size))
    result: Grid = np.clip(x * rng.uniform(0.92, 1.08), 0, 1)
    return result


def _soft(u: Grid, v: Grid, edge: float) -> Grid:
    """A disc of radius 1 in (u, v) with a soft border: 1 inside, 0 outside."""
    result: Grid = 1 / (1 + np.exp(np.clip(2 * edge * (u**2 + v**2 - 1), -60, 60)))
    return result


def _texture(rng: np.random.Generator, size: int, slope: float) -> Grid:
    """Noise with a power law over frequencies, mean 0 and deviation 1, as in tissue."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    filtered = np.fft.rfft2(rng.standard_normal((size, size))) / (frequency + 2) ** slope
    filtered[0, 0] = 0
    texture = np.fft.irfft2(filtered, (size, size))
    result: Grid = texture / texture.std()
    return result


def _consent_rows(mrns: list[str]) -> list[tuple[str, str, str]]:
    """The register: of each forty patients, one is denied, one withdrew and one is not in it."""
    rows: list[tuple[str, str, str]] = []
    given, withdrawn = "2020-11-02", "2020-12-07"
    few = max(1, len(mrns) // 40) if len(mrns) >= 6 else 0
    step = len(mrns) // few if few else 0
    for number, patient in enumerate(mrns):
        turn = number % step if few and number < few * step else -1
        if turn == 1:
            continue
        rows.append((patient, "deny" if turn == 3 else "permit", given))
        if turn == 5:
            rows.append((patient, "withdrawn", withdrawn))
    return rows


def write_consent(path: Path, rows: Sequence[tuple[str, str, str]], as_of: date) -> None:
    """A consent register: patient, status and date of each row."""
    write_csv(path, ("patient_id", "status", "date"), rows, head=f"# as-of: {as_of}\n")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], head: str = "") -> None:
    """A CSV with a first line, its columns and its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(head)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
