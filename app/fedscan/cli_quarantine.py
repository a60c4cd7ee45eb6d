"""`fedscan agent quarantine`: what the intake set aside, and a person's decisions about it."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from fedscan_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from fedscan import quarantine_view
    from fedscan_client.intake.quarantine import Item, Verdict
    from fedscan_client.intake.records import Rectangle

_WHAT = """\
Images that may show who the patient is, and everything else that could not be used, wait here: nothing of it is used
until a person or a rule of site.toml lets it in. Damaged files and lying headers are listed with what to do; nobody can
let them in.

  fedscan agent quarantine list SITE_DIR
  fedscan agent quarantine show SITE_DIR k3f7m --browser
  fedscan agent quarantine blackout SITE_DIR k3f7m --rect 0,0,60,800 --preview
  fedscan agent quarantine blackout SITE_DIR k3f7m --rect 0,0,60,800 --by "A. Meier" --why "text in the top bar" --yes
  fedscan agent quarantine release SITE_DIR q8d2v --by "A. Meier" --why "no text in all 12 frames" --yes

An id is what `list` shows, or its first letters. A decision is about the instances that are there now; what comes later
waits again. It takes effect at the next ingest. Where site.toml says two_people = ["quarantine"], release and blackout
happen once a second person has given the same command with another name. Look at every frame: character recognition is
no proof that an image is clean, and faces on head scans are not removed."""

_LIST = """\
Shows what waits, one line for a series' instances with one reason. --all also shows what was decided."""

_SHOW = """\
Shows one item and a picture of it: before, and after what is (or with --rect: would be) blacked out. On the terminal it
is small, so only large text can be read: --browser serves all frames at full size to a browser on this machine, from
memory, until Ctrl-C or 15 quiet minutes; two clicks there draw a rectangle. No picture is ever written to disk; the
terminal keeps what it showed until it is cleared.

Over ssh, forward the port that it prints:  ssh -L PORT:127.0.0.1:PORT HOST"""

_RELEASE = """\
Lets an item in as it is. Without --yes it only says what would be let in. --as-rule prints a rule for site.toml that
does the same for all future images of this device and size, for devices that never burn in text."""

_BLACKOUT = """\
Lets an item in after blacking out rectangles in every frame: --rect TOP,LEFT,BOTTOM,RIGHT in pixels from 0, where row
BOTTOM and column RIGHT are not blacked out any more. Without --yes nothing is decided; --preview shows before and
after. --as-rule prints a rule for site.toml that does the same for all future images of this device and size."""

_REJECT = "Keeps an item out for ever and takes it off the list of what waits. Any reason can be rejected."


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command and its parts to `fedscan agent`."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = agent.add_parser(
        "quarantine",
        help="what was set aside: look, release, black out, reject",
        description=_WHAT,
        formatter_class=plain,
    )
    parts = parser.add_subparsers(metavar="COMMAND", required=True)

    def part(name: str, does: str, text: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        it: argparse.ArgumentParser = parts.add_parser(name, help=does, description=text, formatter_class=plain)
        it.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
        if name != "list":
            it.add_argument("id", metavar="ID", help="the item's id, or its first letters")
        it.add_argument("--json", action="store_true", help="print JSON on standard output")
        it.set_defaults(command=command)
        return it

    listed = part("list", "what waits, and why", _LIST, _list)
    listed.add_argument("--reason", default="", help="only this reason, by its key as --json shows it")
    listed.add_argument("--all", action="store_true", help="also what was decided")
    show = part("show", "one item with a picture of it", _SHOW, _show)
    show.add_argument("--browser", action="store_true", help="full size, in a browser on this machine")
    _add_picture(show)
    for name, does, text in (
        ("release", "let it in as it is", _RELEASE),
        ("blackout", "let it in with rectangles blacked out", _BLACKOUT),
        ("reject", "keep it out for ever", _REJECT),
    ):
        decision = part(name, does, text, _decide)
        decision.set_defaults(verdict={"release": "released", "reject": "rejected"}.get(name, name))
        decision.add_argument("--by", default="", metavar="NAME", help="who decides; goes into the audit log")
        decision.add_argument("--why", default="", metavar="TEXT", help="what was seen; kept encrypted")
        decision.add_argument("--yes", action="store_true", help="do it; otherwise only say what would be done")
        if name != "reject":
            decision.add_argument("--as-rule", action="store_true", help="print a rule for site.toml; decide nothing")
        if name == "blackout":
            decision.add_argument("--preview", action="store_true", help="show before and after on the terminal")
            _add_picture(decision)


def _add_picture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instance", type=int, metavar="N", help="which instance, from 1; default the middle one")
    parser.add_argument("--frame", type=int, metavar="N", help="which frame, from 1; default the middle one")
    parser.add_argument(
        "--rect", action="append", default=[], metavar="TOP,LEFT,BOTTOM,RIGHT", help="black this out; may be repeated"
    )
    parser.add_argument("--contrast", choices=("linear", "equal"), default="linear", help="equal: shows faint text")


# ------------------------------------------------------------------------------------------------- what is injected


def _key(folder: Path) -> bytes:
    """The wrapping key of a site."""
    from fedscan_client import keys, site

    here = site.load(folder)
    return keys.load(here.folder, here.key).wrapping


def _open_instance(folder: Path, locator: str) -> "Dataset":
    """The instance of a locator, from the site's source."""
    from fedscan_client import keys, site
    from fedscan_client.intake import objects, read

    here = site.load(folder)
    with objects.opened(here, keys.load(folder, here.key), locator) as (stream, size):
        return read.whole(stream, size)


# --------------------------------------------------------------------------------------------------------- commands


def _list(arguments: argparse.Namespace) -> int:
    from fedscan import quarantine_view
    from fedscan_client import site
    from fedscan_client.intake import quarantine
    from fedscan_client.intake.records import REASONS, what_to_do

    if arguments.reason and arguments.reason not in REASONS:
        raise ConfigError(f"'{arguments.reason}' is no reason.", remedy=f"The reasons are {', '.join(REASONS)}.")
    folder = site.load(arguments.site).folder
    found = quarantine.items(folder, reason=arguments.reason, state=None if arguments.all else "waiting")
    if arguments.json:
        print(json.dumps({"items": [_told(item) for item in found]}, indent=2))
        return 0
    console = Console(highlight=False, markup=False)
    if not found:
        console.print("Nothing waits." if not arguments.all else "The quarantine is empty.")
        return 0
    for reason in sorted({item.reason for item in found}, key=list(REASONS).index):
        console.print(f"\n{reason}: {REASONS[reason]}. {what_to_do(reason)}", soft_wrap=True)
        table = Table("id", "what", "size", Column("instances", justify="right"), "since", "state")
        for item in (item for item in found if item.reason == reason):
            what = f"{item.manufacturer} {item.modality}, {_short(item.sop_class)}"
            many = str(item.instances) if item.waiting in (0, item.instances) else f"{item.waiting} of {item.instances}"
            state = item.state if item.state == "waiting" else f"{item.state} by {item.by}"
            table.add_row(item.id, what, quarantine_view.size(item), many, item.first_seen, state)
        console.print(table)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from fedscan import quarantine_view
    from fedscan_client import site
    from fedscan_client.intake import quarantine
    from fedscan_client.intake.records import REASONS, what_to_do

    folder = site.load(arguments.site).folder
    item, key = quarantine.get(folder, arguments.id), _key(folder)
    why = quarantine.why(folder, key, item.id)
    if arguments.json:
        print(json.dumps({**_told(item), "why": why}, indent=2))
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{item.id}: {quarantine_view.many(item)}, since {item.first_seen}")
    console.print(f"Reason: {REASONS[item.reason]}.")
    if item.by:
        console.print(f"{_last(item)} {why}")
    console.print(what_to_do(item.reason))
    rectangles = _rectangles(arguments.rect) or item.rectangles
    if item.releasable:
        looked = _look(folder, key, item, rectangles, arguments)
        (quarantine_view.browser if arguments.browser else quarantine_view.terminal)(looked, console)
    return 0


def _decide(arguments: argparse.Namespace) -> int:
    from fedscan import quarantine_view
    from fedscan_client import site
    from fedscan_client.intake import blackout, quarantine, second_look
    from fedscan_client.intake.records import REASONS, what_to_do

    here = site.load(arguments.site)
    folder = here.folder
    item, key = quarantine.get(folder, arguments.id), _key(folder)
    verdict: Verdict = arguments.verdict
    rectangles = _rectangles(getattr(arguments, "rect", []))
    if verdict != "rejected" and not item.releasable:
        said = f"Item {item.id} cannot be let in by anybody: {REASONS[item.reason]}."
        raise DataError(said, remedy=what_to_do(item.reason))
    if verdict == "blackout" and not rectangles:
        raise ConfigError("A blackout needs at least one rectangle.", remedy="Give --rect TOP,LEFT,BOTTOM,RIGHT.")
    blackout.check(rectangles, item.rows, item.columns)
    if getattr(arguments, "as_rule", False):
        ds = _open_instance(folder, quarantine.held(folder, key, item.id)[0].locator)
        rule = quarantine_view.rule_of(item, ds, rectangles, by=arguments.by, why=arguments.why)
        print(json.dumps(rule, indent=2, default=str) if arguments.json else quarantine_view.toml(rule))
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True, stderr=arguments.json)
    if getattr(arguments, "preview", False):
        quarantine_view.terminal(_look(folder, key, item, rectangles, arguments), console)
    waits = False
    if arguments.yes:
        words = {"by": arguments.by, "why": arguments.why}
        decided = second_look.decide(here, key, item, verdict, rectangles=rectangles, **words)
        item, waits = decided or item, decided is None
    if arguments.json:
        done = arguments.yes and not waits
        told = {"done": done, "waits_for_second_person": waits, "decision": verdict, **_told(item)}
        print(json.dumps(told, indent=2))
        return 0
    if waits:
        console.print(f"{item.id}: noted, nothing changed yet. A second person must decide the same within 14 days.")
        return 0
    does = {"released": "let in as they are", "rejected": "kept out for ever"}
    what = does.get(verdict, f"let in with {len(rectangles)} rectangle(s) of every frame blacked out")
    console.print(f"{item.id}: {quarantine_view.many(item)}: {'' if arguments.yes else 'would be '}{what}.")
    if item.by and not arguments.yes:
        console.print(_last(item))
    if arguments.yes:
        console.print("It takes effect at the next ingest.")
    else:
        console.print("Nothing was changed. Add --yes, with --by and --why, to decide it.")
    return 0


# ------------------------------------------------------------------------------------------------------------- words


def _look(
    folder: Path, key: bytes, item: "Item", rectangles: "tuple[Rectangle, ...]", arguments: argparse.Namespace
) -> "quarantine_view.Look":
    from fedscan import quarantine_view
    from fedscan_client.audit import log
    from fedscan_client.intake import quarantine

    locators = [held.locator for held in quarantine.held(folder, key, item.id)]
    log.access(folder, "images in quarantine", item=item.id)
    wanted = (arguments.instance, arguments.frame)
    return quarantine_view.Look(
        item, len(locators), lambda n: _open_instance(folder, locators[n]), rectangles, *wanted, arguments.contrast
    )


def _told(item: "Item") -> dict[str, Any]:
    from fedscan_client.intake.records import REASONS, what_to_do

    return {
        **asdict(item),
        "state": item.state,
        "means": REASONS[item.reason],
        "releasable": item.releasable,
        "what_to_do": what_to_do(item.reason),
    }


def _last(item: "Item") -> str:
    some = f" (without the newest {item.waiting})" if item.waiting else ""
    return f"Last decision{some}: {item.decision}, by {item.by} on {item.when[:10]}."


def _short(sop_class: str) -> str:
    return sop_class.removesuffix(" Storage").removesuffix(" Image")


def _rectangles(texts: list[str]) -> "tuple[Rectangle, ...]":
    from fedscan_client.intake.records import Rectangle

    found = []
    for text in texts:
        try:
            top, left, bottom, right = (int(side) for side in text.split(","))
        except ValueError:
            raise ConfigError(
                f"--rect {text}: four whole numbers are needed.",
                remedy="For example --rect 0,0,60,800 for the top bar.",
            ) from None
        found.append(Rectangle(top, left, bottom, right))
    return tuple(found)
