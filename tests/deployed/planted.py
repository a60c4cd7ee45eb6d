"""Phantoms with marks that can be looked for on the wire: names, ids, and stripes of random pixels."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

WINDOW = 12  # pixels in a row: 96 random bits as bytes, which do not turn up by chance


@dataclass(frozen=True)
class Planted:
    """What was planted at one hospital: texts of its headers and tables, and rows of its images."""

    texts: tuple[str, ...]
    rows: tuple[np.ndarray, ...]


def plant(hospital: Path, mark: str) -> Planted:
    """Rewrites a phantom hospital (dicom/, labels.csv, consent.csv) in place.

    Every patient gets a name and an id that hold `mark`; every image gets three rows of random pixels.
    """
    renamed: dict[str, str] = {}
    texts, rows = set[str](), list[np.ndarray]()
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(mark.encode()).digest()[:8]))
    for path in sorted((hospital / "dicom").rglob("*")):
        if not path.is_file():
            continue
        image = pydicom.dcmread(path)
        old = str(image.PatientID)
        new = renamed.setdefault(old, f"{mark}-ID-{len(renamed):05d}")
        image.PatientID, image.PatientName = new, f"{mark}NAME{len(renamed):05d}^Planted"
        pixels = image.pixel_array.copy()
        high = 2**image.BitsStored
        for row in (5, pixels.shape[0] // 2, pixels.shape[0] - 6):
            pixels[row] = rng.integers(0, high, pixels.shape[1])
            rows.append(pixels[row].copy())
        image.PixelData = pixels.tobytes()
        image.save_as(path)
        texts |= {new, str(image.PatientName).split("^")[0], str(image.StudyInstanceUID), str(image.SOPInstanceUID)}
        texts |= {text for text in (str(image.get("AccessionNumber", "")), path.name) if len(text) > 7}
    register = (hospital / "consent.csv").read_text(encoding="utf-8")
    for old, new in renamed.items():
        register = register.replace(old, new)
    (hospital / "consent.csv").write_text(register, encoding="utf-8")
    return Planted(tuple(sorted(texts | set(renamed))), tuple(rows))


def needles(planted: Planted) -> Iterator[tuple[str, bytes]]:
    """(what it is, bytes that must be nowhere): texts in several codings; windows of pixels in several number types."""
    for text in planted.texts:
        plain = text.encode()
        yield text, plain
        yield f"{text} in hex", plain.hex().encode()
        yield f"{text} in UTF-16", text.encode("utf-16-le")
        yield f"{text} hashed", hashlib.sha256(plain).hexdigest().encode()
        yield f"{text} hashed, bytes", hashlib.sha256(plain).digest()
        for shift in range(3):  # base64 has three readings of a text inside another
            inner = base64.b64encode(b"\0" * shift + plain)[4 if shift else 0 : -4]
            if len(inner) >= 8:
                yield f"{text} in base64", inner
    for number, row in enumerate(planted.rows):
        for start in range(0, len(row) - WINDOW + 1, WINDOW):
            part = row[start : start + WINDOW]
            for name, kind in (("u1", np.uint8), ("u2", "<u2"), ("f4", "<f4"), ("f8", "<f8")):
                yield f"pixels of row {number} as {name}", part.astype(kind).tobytes()
            for top in (255.0, 4095.0, 65535.0):
                yield f"pixels of row {number} scaled", (part / top).astype("<f4").tobytes()


def found(blobs: Sequence[bytes], planted: Planted) -> list[str]:
    """What of the planted things is in any of the blobs."""
    return sorted({name for name, needle in needles(planted) for blob in blobs if needle in blob})
