"""What `fedscan agent quarantine` shows of one item: pictures on the terminal or in a browser, and a rule to paste."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import tomli_w
from pydantic import ValidationError
from pydicom.dataset import Dataset
from rich.console import Console

from fedscan_client.intake import preview, preview_server, rules
from fedscan_client.intake.preview import Picture, View
from fedscan_client.intake.quarantine import Item
from fedscan_client.intake.records import Rectangle
from fedscan_core.errors import ConfigError, DataError


@dataclass(frozen=True)
class Look:
    """What a person wants to look at.

    Attributes:
        item: which one.
        instances: how many it has.
        open: reads the instance of a number from the source.
        rectangles: blacked out in the second picture.
        instance, frame: numbers from 1; None: the middle one.
        view: of the picture on the terminal.
    """

    item: Item
    instances: int
    open: Callable[[int], Dataset]
    rectangles: tuple[Rectangle, ...]
    instance: int | None
    frame: int | None
    view: View

    def picture(self, number: int) -> Picture:
        """The instance of a number from 0, decoded."""
        return preview.picture(self.open(number))


def terminal(look: Look, console: Console) -> None:
    """Prints one frame, before and after."""
    if not console.is_terminal:
        console.print("No picture: this is not a terminal. --browser shows it in a browser.")
        return
    number = _chosen(look.instance, look.instances, "instance")
    it = look.picture(number)
    frame = _chosen(look.frame, len(it.frames), "frame")
    images = [preview.shown(it, frame, view=look.view)]
    if look.rectangles:
        images.append(preview.shown(it, frame, look.rectangles, look.view))
    drawn, reduced = preview.terminal(images, console.width, max(8, console.height - 8))
    console.print(drawn, soft_wrap=False)
    sides = "before and after" if look.rectangles else "as it is"
    console.print(f"Instance {number + 1} of {look.instances}, frame {frame + 1} of {len(it.frames)}, {sides}.")
    if reduced > 1:
        console.print(f"One dot is {reduced:.1f} x {reduced:.1f} pixels: small text is lost. Use --browser.")


def browser(look: Look, console: Console) -> None:
    """Serves all frames to a browser on this machine until Ctrl-C."""
    number = _chosen(look.instance, look.instances, "instance")
    frame = _chosen(look.frame, len(look.picture(number).frames), "frame")
    title = f"{look.item.id}: {many(look.item)}"
    shown = preview_server.Shown(title, look.instances, look.picture, look.rectangles, number, frame)
    preview_server.serve(shown, lambda url: console.print(f"Open {url}\nCtrl-C ends it."))


def rule_of(item: Item, ds: Dataset, rectangles: tuple[Rectangle, ...], *, by: str, why: str) -> dict[str, Any]:
    """The rule that says for a device what the decision would say for one item; no rectangles: the device is clean.

    Raises:
        DataError: the header does not name the device well enough.
    """
    tree: dict[str, Any] = {
        "name": f"rule {item.id}",
        "sop_class": str(ds.get("SOPClassUID") or ""),
        "manufacturer": str(ds.get("Manufacturer") or "").strip(),
        "model": str(ds.get("ManufacturerModelName") or "").strip(),
        "rows": item.rows,
        "columns": item.columns,
        "blackout": [[it.top, it.left, it.bottom, it.right] for it in rectangles],
        "clean": not rectangles,
        "approved_by": by or "NAME",
        "approved_on": date.today(),
        "why": why or "WHAT WAS SEEN ON IMAGES OF THIS DEVICE",
    }
    tree = {name: value for name, value in tree.items() if value not in ("", [], False)}
    try:
        rules.Rule.model_validate(tree)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"No rule can be made of it: {said}.", remedy="Decide item by item.") from None
    return tree


def toml(rule: dict[str, Any]) -> str:
    """A rule as it is pasted into site.toml."""
    return tomli_w.dumps({"quarantine": {"rule": [rule]}}).strip()


def many(item: Item) -> str:
    """How many instances of what."""
    count = f"{item.instances} instance{'s' if item.instances > 1 else ''}"
    return f"{count} of {item.sop_class}, {item.manufacturer} {item.modality}, {size(item)}"


def size(item: Item) -> str:
    """Rows, columns and, where there are several, frames."""
    if not item.rows:
        return "unknown"
    return f"{item.rows} x {item.columns}" + (f" x {item.frames}" if item.frames > 1 else "")


def _chosen(wanted: int | None, count: int, what: str) -> int:
    """Index from a number that begins at 1; the middle one by default."""
    if wanted is None:
        return count // 2
    if not 1 <= wanted <= count:
        raise ConfigError(f"There is no {what} {wanted}.", remedy=f"Give a number from 1 to {count}.")
    return wanted - 1
