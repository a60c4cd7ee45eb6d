"""What may be told in clear of an instance that is set aside: words of closed lists, numbers, and an HMAC."""

import re
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import UID

from fedscan_client.intake import headers
from fedscan_client.intake.deid import pseudonym
from fedscan_client.intake.profile_values import MAKERS
from fedscan_client.intake.records import Refused

# PS3.3 C.7.3.1.1.1: the kinds of equipment whose images are met; anything else, or free text, is "other".
_MODALITIES = (
    "BI CR CT DG DX ECG ES FID GM HC IO IVOCT IVUS KO LS MG MR NM OCT OP OPT OT PT PR PX REG RF RG RTDOSE RTIMAGE "
    "RTPLAN RTSTRUCT SC SEG SM SR TG US VA VL XA XC"
)


@dataclass(frozen=True)
class Traits:
    """Of one instance; see `traits`."""

    sop_class: str = "unknown"
    modality: str = "other"
    manufacturer: str = "other"
    device: str = ""
    rows: int = 0
    columns: int = 0
    frames: int = 0


UNKNOWN = Traits()


def traits(ds: Dataset, names: bytes) -> Traits:
    """What may be kept in clear of a header; a part that cannot be read is left out.

    Args:
        ds: the header.
        names: the project's key for pseudonyms: `device` is an HMAC of maker and model, equal for equal devices.
    """
    kind = UID(str(_read(ds, "SOPClassUID")))
    modality, maker = _read(ds, "Modality"), str(_read(ds, "Manufacturer"))
    known = (MAKERS[word] for word in re.findall(r"[a-z]+", maker.lower()) if word in MAKERS)
    rows, columns, frames = (_number(_read(ds, name)) for name in ("Rows", "Columns", "NumberOfFrames"))
    return Traits(
        sop_class=kind.name if kind.type == "SOP Class" else "unknown",
        modality=modality if isinstance(modality, str) and modality in _MODALITIES.split() else "other",
        manufacturer=next(known, "other"),
        device=pseudonym(names, "device", f"{maker}\0{_read(ds, 'ManufacturerModelName')}")[:8],
        rows=rows,
        columns=columns,
        frames=frames or 1,
    )


def _read(ds: Dataset, keyword: str) -> Any:
    try:
        return headers.value(ds, keyword)
    except Refused:
        return None


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int) and 0 <= value < 2**31 else 0
