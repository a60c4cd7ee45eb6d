"""The site's own rules for burned-in text: one device and picture format each, and where its text is.

A rule is a `[[quarantine.rule]]` of site.toml that a person has approved after looking at images of that device. It
lets in, without a person, what would otherwise wait, after blacking out. What limits it:

- it names rows and columns and either the device (manufacturer and model) or the kind of object (SOP class): no rule
  means everything. "Nothing is burned in" (`clean`) and the ultrasound regions need the device;
- it never overrules a header that says that the patient can be recognised, and `clean` never one that says that text
  is burned in; and no rule overrules a reason that is not in `records.REVIEW`;
- it is only as good as the person's look: a device whose software changes its layout keeps matching.

Where several rules match, everything that any of them blacks out is blacked out.
"""

from collections.abc import Iterable
from datetime import date
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator
from pydicom._uid_dict import UID_dictionary  # names to UIDs: pydicom's public interface has only the other way
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

from fedscan_client.intake import blackout, headers
from fedscan_client.intake.records import Rectangle, Refused
from fedscan_core.errors import DataError

MAX_REGIONS = 32  # a device draws a handful; a header may claim thousands
# Region Data Type (PS3.3 C.8.5.5.1.3): tissue, colour flow, pulsed and continuous Doppler; not bars, traces, scales.
_ECHO = (1, 2, 3, 4)
_NAMES = {entry[0].casefold(): uid for uid, entry in UID_dictionary.items() if entry[1] == "SOP Class"}


class Rule(BaseModel):
    """One approved rule; see the module's docstring.

    Attributes:
        name: for people, unique in the file.
        sop_class: UID, or the standard's name ("Ultrasound Image Storage").
        modality, manufacturer, model: as in the header, upper or lower case; must be equal.
        rows, columns: of the frames.
        image_type: the first values of ImageType, as many as are given.
        blackout: [top, left, bottom, right] in pixels from 0; bottom and right excluded.
        keep: "ultrasound-regions" blacks out all but the regions of echoes that the header declares.
        clean: true says that this device burns in nothing: then there is nothing to black out.
        approved_by, approved_on, why: who looked at images of the device, when, and what was seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(min_length=1)
    sop_class: str = ""
    modality: str = ""
    manufacturer: str = ""
    model: str = ""
    rows: PositiveInt
    columns: PositiveInt
    image_type: tuple[str, ...] = ()
    blackout: tuple[tuple[int, int, int, int], ...] = ()
    keep: Literal["ultrasound-regions"] | None = None
    clean: bool = False
    approved_by: str = Field(min_length=1)
    approved_on: date
    why: str = Field(min_length=1)

    @field_validator("sop_class")
    @classmethod
    def _uid(cls, text: str) -> str:
        uid = _NAMES.get(text.strip().casefold(), text.strip())
        if uid and UID_dictionary.get(uid, ("", ""))[1] != "SOP Class":
            raise ValueError(f"'{text}' is neither a SOP class UID nor the standard's name of one")
        return uid

    @model_validator(mode="after")
    def _narrow(self) -> Self:
        device = self.manufacturer.strip() and self.model.strip()
        if not (device or self.sop_class):
            raise ValueError(f"rule '{self.name}' is too wide: name manufacturer and model, or sop_class")
        if (self.clean or self.keep) and not device:
            raise ValueError(f"rule '{self.name}' is too wide: clean and keep need manufacturer and model")
        if self.clean and (self.blackout or self.keep):
            raise ValueError(f"rule '{self.name}': clean means that there is nothing to black out")
        if not (self.clean or self.blackout or self.keep):
            raise ValueError(f"rule '{self.name}' blacks out nothing: say clean = true if that is meant")
        try:
            blackout.check(self.rectangles, self.rows, self.columns)
        except DataError as error:
            raise ValueError(f"rule '{self.name}': {error.message}") from None
        return self

    @property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """`blackout` as rectangles."""
        return tuple(Rectangle(*sides) for sides in self.blackout)


class QuarantineSettings(BaseModel):
    """Section [quarantine] of site.toml.

    Attributes:
        rule: the approved rules.
        ocr: whether tesseract looks at accepted images as a second alarm: "off", "sample" (the middle frame of the
            middle instance of a series) or "all" (every frame). It misses most text on textured images: see `ocr`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: tuple[Rule, ...] = ()
    ocr: Literal["off", "sample", "all"] = "off"

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [rule.name for rule in self.rule]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rules have the name '{twice[0]}'")
        return self


def blackout_for(ds: Dataset, rules: Iterable[Rule]) -> tuple[Rectangle, ...] | None:
    """What to black out before this image is let in without a person; None: no rule matches, so it waits.

    An empty tuple: a rule says that the device burns in nothing. Never raises: a header that cannot be read matches
    no rule. Only headers are read.
    """
    try:
        found = [rectangles for rule in rules if (rectangles := _blackout(ds, rule)) is not None]
    except Refused:
        return None
    return tuple(dict.fromkeys(it for rectangles in found for it in rectangles)) if found else None


def ultrasound_regions(ds: Dataset) -> tuple[Rectangle, ...] | None:
    """The regions of echoes that the device declares (PS3.3 C.8.5.5.1, Sequence of Ultrasound Regions), or None.

    None where there are none, where any declared region (bars and traces as well) is not wholly inside the frame, so
    that the coordinates are those of another picture, or where they leave nothing outside. Both ends are included in
    the header, excluded in the result.

    Raises:
        Refused: the header cannot be read.
    """
    rows, columns = headers.count(ds, "Rows"), headers.count(ds, "Columns")
    declared = headers.value(ds, "SequenceOfUltrasoundRegions")
    if not isinstance(declared, Sequence) or not 0 < len(declared) <= MAX_REGIONS:
        return None
    kept = []
    for region in declared:
        left, top, right, bottom = (
            headers.value(region, f"RegionLocation{side}") for side in ("MinX0", "MinY0", "MaxX1", "MaxY1")
        )
        if not all(isinstance(side, int) for side in (left, top, right, bottom)):
            return None
        if not (0 <= left < right < columns and 0 <= top < bottom < rows):
            return None
        if headers.value(region, "RegionDataType") in _ECHO:
            kept.append(Rectangle(top, left, bottom + 1, right + 1))
    return tuple(kept) if kept and blackout.outside(kept, rows, columns) else None


def _blackout(ds: Dataset, rule: Rule) -> tuple[Rectangle, ...] | None:
    if (headers.count(ds, "Rows"), headers.count(ds, "Columns")) != (rule.rows, rule.columns):
        return None
    if rule.sop_class and headers.value(ds, "SOPClassUID") != rule.sop_class:
        return None
    texts = ((rule.modality, "Modality"), (rule.manufacturer, "Manufacturer"), (rule.model, "ManufacturerModelName"))
    for wanted, keyword in texts:
        if wanted and str(headers.value(ds, keyword) or "").strip().casefold() != wanted.strip().casefold():
            return None
    values = headers.value(ds, "ImageType")
    first = tuple(values) if isinstance(values, MultiValue) else (values,)
    if first[: len(rule.image_type)] != rule.image_type:
        return None
    if headers.value(ds, "RecognizableVisualFeatures") not in (None, "", "NO"):
        return None
    if rule.clean and headers.value(ds, "BurnedInAnnotation") not in (None, "", "NO"):
        return None
    if rule.keep is None:
        return rule.rectangles
    kept = ultrasound_regions(ds)
    return None if kept is None else (*rule.rectangles, *blackout.outside(kept, rule.rows, rule.columns))
