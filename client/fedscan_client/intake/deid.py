"""De-identification: a new dataset is built from the allow-list; the old one is never edited.

Fail closed: an image whose kind, type or header is not known to be harmless is refused by name
(`Refused`), and an element that is not in `profile.PROFILE` does not pass. Pixels are decoded
and written again as plain grey values, so neither compressed streams (comments, EXIF) nor unused
bits (overlays) nor trailing bytes carry anything along. The 128 bytes before DICM and the file meta
group are new.

What it does not do: find text that a device burned into the pixels without saying so, or remove the
face from a head scan. Both wait for the quarantine review.

Pseudonyms are HMAC-SHA-256 under the site's key, which never leaves: without the key a seven-digit
hospital number cannot be recomputed (unkeyed SHA-256 of all of them takes seconds).
Attributes of the result: PS3.15 Annex E; method codes: PS3.16 CID 7050.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, ExplicitVRLittleEndian
from pydicom.valuerep import DSfloat

from fedscan_client.intake import headers
from fedscan_client.intake.decode import frames
from fedscan_client.intake.profile import CODES, MAKERS, PROFILE, VERSION
from fedscan_client.intake.records import Refused
from fedscan_core.errors import DataError

KEY_BYTES = 32
_METHODS = (
    ("113100", "Basic Application Confidentiality Profile"),
    ("113108", "Retain Patient Characteristics Option"),
)


def pseudonym(key: bytes, domain: str, value: str) -> str:
    """A keyed name for a value: 128 bits of HMAC-SHA-256, as 32 hex digits.

    Args:
        key: the site's secret, at least 32 bytes.
        domain: what kind of value it is, "pid" or "uid"; equal values of two kinds get unrelated
            names.
        value: the hospital's own identifier.

    Raises:
        DataError: the key is too short.
    """
    if len(key) < KEY_BYTES:
        raise DataError(
            f"The site key has {len(key)} bytes, at least {KEY_BYTES} are needed.",
            remedy="Draw one at random, for example with 'openssl rand 32'.",
        )
    message = domain.encode() + b"\0" + value.encode()
    return hmac.new(key, b"fedscan pseudonym 1\0" + message, hashlib.sha256).hexdigest()[:32]


def pseudonymous_uid(key: bytes, uid: str) -> str:
    """A UID under 2.25 (PS3.5 B.2: a UUID as a decimal number) that stands for the given one."""
    bits = int(pseudonym(key, "uid", uid), 16)
    bits = bits & ~(0xF << 76) | 0x8 << 76  # version 8: made by a rule of our own (RFC 9562)
    bits = bits & ~(0x3 << 62) | 0x2 << 62  # the variant of RFC 9562
    return f"2.25.{bits}"


def deidentify(ds: Dataset, key: bytes) -> Dataset:
    """Builds the de-identified image.

    Args:
        ds: a complete instance, as read from the file.
        key: the site's secret.

    Returns:
        A new dataset with new file meta and a zero preamble: only elements of `PROFILE`, plus the
        declaration of what was done.

    Raises:
        Refused: the image is of a kind, or has a header or pixel data, that is not accepted.
    """
    check_kind(ds)
    pixels = _grey(ds)
    out = Dataset()
    for element in PROFILE:
        value = _ACTIONS[element.action](ds, element.keyword, key)
        if value is not None:
            out.add_new(element.keyword, dictionary_VR(element.keyword), value)
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    out.add_new("PixelData", "OW", data + b"\0" * (len(data) % 2))
    out.PatientIdentityRemoved = "YES"
    out.DeidentificationMethod = VERSION
    out.DeidentificationMethodCodeSequence = [_method(code, meaning) for code, meaning in _METHODS]
    out.LongitudinalTemporalInformationModified = "REMOVED"
    out.preamble = b"\0" * 128
    out.file_meta = FileMetaDataset()
    out.file_meta.MediaStorageSOPClassUID = out.SOPClassUID
    out.file_meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID
    out.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    return out


def _grey(ds: Dataset) -> NDArray[Any]:
    """The one grey frame of an image, [H, W]."""
    pixels = frames(ds)
    if pixels.ndim != 3 or pixels.dtype.itemsize > 2:
        raise Refused("colour" if pixels.ndim != 3 else "bit_layout")
    if len(pixels) != 1:
        raise Refused("multi_frame")
    return np.asarray(pixels[0])


def check_kind(ds: Dataset) -> None:
    r"""Refuses, by name, every kind of image that could carry an identity in its pixels.

    Raises:
        Refused: the SOP class is not accepted, ImageType is not ORIGINAL\PRIMARY, or the header
            says (or does not clearly deny) that text is burned in or that the patient is
            recognisable.
    """
    if _code(ds, "SOPClassUID", b"") is None:
        raise Refused("sop_class")
    image_type = headers.value(ds, "ImageType")
    if not isinstance(image_type, MultiValue) or list(image_type[:2]) != ["ORIGINAL", "PRIMARY"]:
        raise Refused("image_type")
    if headers.value(ds, "BurnedInAnnotation") not in (None, "", "NO"):
        raise Refused("burned_in")
    if headers.value(ds, "RecognizableVisualFeatures") not in (None, "", "NO"):
        raise Refused("recognizable")


def _code(ds: Dataset, keyword: str, _key: bytes) -> str | None:
    value = headers.value(ds, keyword)
    return str(value) if isinstance(value, str) and value in CODES[keyword] else None


def _age(ds: Dataset, keyword: str, _key: bytes) -> str | None:
    """Whole years; 90 stands for everybody older. An impossible age is dropped."""
    match = re.fullmatch(r"(\d{3})([DWMY])", str(headers.value(ds, keyword)), re.ASCII)
    if match is None:
        return None
    years = int(match[1]) // {"D": 365, "W": 52, "M": 12, "Y": 1}[match[2]]
    return f"{min(years, 90):03d}Y" if years <= 130 else None


def _maker(ds: Dataset, keyword: str, _key: bytes) -> str | None:
    value = headers.value(ds, keyword)
    if not value:
        return None
    words = re.findall(r"[a-z]+", str(value).lower())
    return next((MAKERS[word] for word in words if word in MAKERS), "other")


def _decimal(ds: Dataset, keyword: str, _key: bytes) -> DSfloat | None:
    number = headers.decimal(ds, keyword)
    return None if number is None else DSfloat(number, auto_format=True)


_ACTIONS: Mapping[str, Callable[[Dataset, str, bytes], Any]] = MappingProxyType(
    {
        "empty": lambda ds, keyword, key: "",
        "constant": lambda ds, keyword, key: ["ORIGINAL", "PRIMARY"],
        "uid": lambda ds, keyword, key: pseudonymous_uid(key, headers.identifier(ds, keyword)),
        "pid": lambda ds, keyword, key: pseudonym(key, "pid", headers.identifier(ds, keyword)),
        "code": _code,
        "age": _age,
        "maker": _maker,
        "count": lambda ds, keyword, key: headers.count(ds, keyword),
        "decimal": _decimal,
        "pixels": lambda ds, keyword, key: None,  # written by `deidentify` from the decoded values
    }
)


def _method(code: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue = code
    item.CodingSchemeDesignator = "DCM"
    item.CodeMeaning = meaning
    return item
