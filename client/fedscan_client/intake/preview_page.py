"""The page of a preview: what a path says, what a click does to it, and the HTML; no scripts.

Everything chosen is in the path: INSTANCE/FRAME/ZOOM/VIEW/RECTANGLES, then .ROW-COLUMN after a first click.
"""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from fedscan_client.intake.preview import View
from fedscan_client.intake.records import Rectangle

ZOOMS = (12, 25, 50, 75, 100, 200, 400)  # percent
_SIDE_BY_SIDE = 800  # CSS pixels of one picture, so that two fit on a common screen
_VIEWS: tuple[tuple[View, str], ...] = (("linear", "as it is"), ("equal", "faint text made visible"))
_PATH = re.compile(
    r"(?P<instance>\d{1,7})/(?P<frame>\d{1,7})/(?P<zoom>\d{1,3})/(?P<view>linear|equal)"
    r"/(?P<rects>none|\d{1,5}(?:[-_]\d{1,5})*)(?:\.(?P<y>\d{1,5})-(?P<x>\d{1,5}))?(?P<what>|/before|/after|/click)"
)
_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:1rem;background:#1c1c1c;color:#ddd}a{color:#8cf}"
    "b{color:#fff}nav{margin:.3rem 0}.two{display:flex;gap:1rem}figure{margin:0;flex:1;min-width:0}"
    "figure div{overflow:auto;max-height:76vh;border:1px solid #555}"
    "img{display:block}.large img{image-rendering:pixelated}"
    "code{background:#333;padding:.1rem .4rem;user-select:all}.corner{color:#fc6}"
)


@dataclass(frozen=True)
class State:
    """What a path says; `corner` is the first click (row, column) of a rectangle in the making."""

    instance: int
    frame: int
    zoom: int
    view: View
    rectangles: tuple[Rectangle, ...]
    corner: tuple[int, int] | None = None

    def path(self, what: str = "") -> str:
        """The path that says it."""
        sides = ("-".join(map(str, (it.top, it.left, it.bottom, it.right))) for it in self.rectangles)
        corner = f".{self.corner[0]}-{self.corner[1]}" if self.corner else ""
        chosen = f"{self.instance}/{self.frame}/{self.zoom}/{self.view}"
        return f"{chosen}/{'_'.join(sides) or 'none'}{corner}{what}"


def parse(path: str) -> tuple[State, str] | None:
    """What a path says, and what it asks for: "" (the page), "/before", "/after" or "/click"; None: no such path."""
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    rectangles = []
    for sides in [] if found["rects"] == "none" else found["rects"].split("_"):
        numbers = [int(side) for side in sides.split("-")]
        if len(numbers) != 4:
            return None
        rectangles.append(Rectangle(*numbers))
    corner = (int(found["y"]), int(found["x"])) if found["y"] else None
    view: View = "equal" if found["view"] == "equal" else "linear"
    where = (int(found["instance"]), int(found["frame"]), int(found["zoom"]))
    state = State(*where, view, tuple(rectangles), corner)
    return (state, found["what"]) if state.zoom in ZOOMS else None


def zoom_for(columns: int) -> int:
    """The largest zoom up to 100 at which two pictures of so many columns fit side by side."""
    return max((zoom for zoom in ZOOMS if zoom <= 100 and zoom * columns <= 100 * _SIDE_BY_SIDE), default=ZOOMS[0])


def clicked(state: State, query: str, rows: int, columns: int) -> State:
    """The first click is a corner, the second the opposite one, both inside the rectangle.

    Args:
        state: before the click.
        query: "x,y" in CSS pixels of the picture, as a browser sends it for a server-side image map.
        rows: of the frame.
        columns: of the frame.
    """
    place = re.fullmatch(r"(\d{1,6}),(\d{1,6})", query)
    if place is None:
        return state
    x = min(int(place[1]) * 100 // state.zoom, columns - 1)
    y = min(int(place[2]) * 100 // state.zoom, rows - 1)
    if state.corner is None:
        return replace(state, corner=(y, x))
    (top, bottom), (left, right) = sorted((y, state.corner[0])), sorted((x, state.corner[1]))
    return replace(state, corner=None, rectangles=(*state.rectangles, Rectangle(top, left, bottom + 1, right + 1)))


def render(state: State, *, title: str, instances: int, frames: int, rows: int, columns: int, base: str) -> bytes:
    """The page.

    Args:
        state: what is shown.
        title: heading; words of ours only.
        instances: how many can be picked.
        frames: how many this instance has.
        rows: of the frame.
        columns: of the frame.
        base: what comes before a path, with its slash.
    """

    def link(text: str, other: State) -> str:
        return f"<b>{text}</b>" if other == state else f'<a href="{base}{other.path()}">{text}</a>'

    def picker(name: str, here: int, many: int, go: Callable[[int], State]) -> str:
        near = sorted({0, *range(max(0, here - 4), min(many, here + 5)), many // 2, many - 1})
        links = (f"<b>{n + 1}</b>" if n == here else link(str(n + 1), go(n)) for n in near)
        return f"<nav>{name} {here + 1} of {many}: {' '.join(links)}</nav>"

    zooms = " ".join(link(f"{zoom} %", replace(state, zoom=zoom)) for zoom in ZOOMS)
    views = " ".join(link(text, replace(state, view=view)) for view, text in _VIEWS)
    shape = f'width="{columns * state.zoom // 100}" height="{rows * state.zoom // 100}"'
    before = f'<img ismap {shape} src="{base}{state.path("/before")}" alt="before">'
    after = f'<img {shape} src="{base}{state.path("/after")}" alt="after">'
    reduced = '<span class="corner">reduced: small text may be lost</span>' if state.zoom < 100 else ""
    parts = (
        f"<h2>{html.escape(title)}</h2>",
        picker("Instance", state.instance, instances, lambda n: replace(state, instance=n, frame=0)),
        picker("Frame", state.frame, frames, lambda n: replace(state, frame=n)),
        f"<nav>Size: {zooms} {reduced} &nbsp; Contrast: {views}</nav>",
        _words(state, link),
        f'<div class="two{" large" if state.zoom > 100 else ""}">',
        "<figure><figcaption>Before: click two corners of what is to be blacked out</figcaption>",
        f'<div><a href="{base}{state.path("/click")}">{before}</a></div></figure>',
        f"<figure><figcaption>After</figcaption><div>{after}</div></figure></div>",
    )
    return whole("".join(parts))


def _words(state: State, link: Callable[[str, State], str]) -> str:
    """The options to type for the rectangles on the page."""
    said = []
    if state.rectangles:
        sides = (f"--rect {it.top},{it.left},{it.bottom},{it.right}" for it in state.rectangles)
        last = replace(state, rectangles=state.rectangles[:-1], corner=None)
        said.append(f"<code>{' '.join(sides)}</code> {link('remove the last one', last)}")
    if state.corner:
        said.append(f'<span class="corner">corner at row {state.corner[0]}, column {state.corner[1]}</span>')
        said.append(link("undo", replace(state, corner=None)))
    return f"<nav>{' '.join(said) or 'No rectangle.'}</nav>"


def whole(body: str) -> bytes:
    """A page around a body that is already HTML."""
    head = f'<html lang="en"><meta charset="utf-8"><title>fedscan quarantine</title><style>{_STYLE}</style>'
    return f"<!doctype html>{head}{body}".encode()
