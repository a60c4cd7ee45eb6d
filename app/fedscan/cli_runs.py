"""`fedscan agent runs`, `show`, `approve`, `refuse`, `revoke`: which runs asked this site, and what people decide."""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedscan_core.errors import ConfigError

if TYPE_CHECKING:
    from fedscan_client.approvals import Asked

_RUNS = """\
Lists the runs that asked this site, and how each stands. Where site.toml says approval = "manual" a run waits as
pending until somebody approves or refuses it; the coordinator asks again by itself.

  fedscan agent runs /srv/fedscan/site
  fedscan agent show /srv/fedscan/site chest
  fedscan agent approve /srv/fedscan/site chest --by "A. Meier"
  fedscan agent refuse /srv/fedscan/site chest --by "A. Meier" --reason "our ethics approval does not cover it"
  fedscan agent revoke /srv/fedscan/site chest --by "A. Meier"

A run is named by its id or by its first letters."""

_SHOW = """\
Says in plain words who asks what of this site, for which purpose, on which cohort, what it will cost of the lifetime
budget and what is left, and what leaves the building. Changes nothing."""

_APPROVE = """\
Shows the run and lets it take part: the whole of its epsilon is charged, for ever, when the coordinator next asks. A
run that the site's own rules refuse stays refused. Asks first; --yes does not."""

_REFUSE = "Says no to a run. The reason goes to the researcher: write nothing in it that they may not know."

_REVOKE = """\
Ends a run's part here, also in the middle of it: from the moment this returns no answer of this run is released any
more, and the run goes on without this site. What was charged stays charged. An answer that the audit log shows as
released before may still be under way. Asks first; --yes does not."""


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds the five commands to those of `fedscan agent`."""
    plain = argparse.RawDescriptionHelpFormatter
    for name, does, text in (
        ("runs", "which runs asked, and how they stand", _RUNS),
        ("show", "what a run asks, in plain words", _SHOW),
        ("approve", "let a run take part", _APPROVE),
        ("refuse", "say no to a run", _REFUSE),
        ("revoke", "end a run's part here, at any time", _REVOKE),
    ):
        it = agent.add_parser(name, help=does, description=text, formatter_class=plain)
        it.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
        if name != "runs":
            it.add_argument("run", metavar="RUN", help="the run's id, or its first letters")
        if name in ("approve", "refuse", "revoke"):
            it.add_argument("--by", required=True, metavar="NAME", help="who decides; goes into the audit log")
            it.add_argument("--yes", action="store_true", help="do not ask")
        if name in ("refuse", "revoke"):
            needed = name == "refuse"
            it.add_argument("--reason", required=needed, default="", metavar="TEXT", help="the researcher reads it")
        it.add_argument("--json", action="store_true", help="print JSON on standard output")
        it.set_defaults(command={"runs": _runs, "show": _show}.get(name, _decide), decision=name)


def _runs(arguments: argparse.Namespace) -> int:
    from fedscan_client import approvals
    from fedscan_client import site as sites
    from fedscan_client.asked import purpose

    found = approvals.every(sites.load(arguments.site))
    if arguments.json:
        print(json.dumps({"runs": [_told(asked) for asked in found]}, indent=2))
        return 0
    if not found:
        print("No run has asked yet.")
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    names = (Column("run", overflow="fold", min_width=20), "state", "launcher", "purpose", "asked (UTC)", "decided")
    table = Table(*names, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for asked in found:
        came = asked.came[:16].replace("T", " ")
        table.add_row(asked.run_id, asked.state, asked.order.launcher, purpose(asked), came, _decided(asked))
    Console(highlight=False, markup=False).print(table)
    waiting = [asked.run_id for asked in found if asked.state == "pending"]
    if waiting:
        print(f"Waiting for a decision: {len(waiting)}. Next: fedscan agent show {arguments.site} {waiting[0]}")
    return 0


def _decided(asked: "Asked") -> str:
    if asked.by:
        return f"{asked.by}, {asked.decided[:10]}"
    return "by the policy" if asked.state == "approved" else ""


def _told(asked: "Asked") -> dict[str, Any]:
    keys = ("run_id", "state", "came", "by", "decided", "reason")
    return {**{key: getattr(asked, key) for key in keys}, "launcher": asked.order.launcher}


def _show(arguments: argparse.Namespace) -> int:
    from fedscan_client import approvals, asked
    from fedscan_client import site as sites
    from fedscan_client.audit import log

    here = sites.load(arguments.site)
    with _busy():
        told = asked.facts(here, approvals.get(here, arguments.run))
    log.access(here.folder, "a run's order", run_id=told["run_id"])
    if arguments.json:
        print(json.dumps(told, indent=2))
        return 0
    print("\n".join(_paragraphs(told)))
    if told["state"] == "pending":
        print(f'\nNext: fedscan agent approve {arguments.site} {told["run_id"]} --by "YOUR NAME", or refuse')
    return 0


def _paragraphs(told: dict[str, Any]) -> list[str]:
    import shutil
    import textwrap

    from fedscan_client import asked

    width = min(shutil.get_terminal_size().columns, 110)
    return [textwrap.fill(text, width, subsequent_indent="  ") for text in asked.words(told)]


def _decide(arguments: argparse.Namespace) -> int:
    from fedscan_client import approvals, asked, two_people
    from fedscan_client import site as sites

    here = sites.load(arguments.site)
    known, by = approvals.get(here, arguments.run), two_people.person(arguments.by)
    told = None
    if arguments.decision == "approve":  # a "no" needs no description
        with _busy():
            told = asked.facts(here, known)
    if not arguments.yes:
        _ask(f"{arguments.decision} run {known.run_id}", _paragraphs(told) if told else [])
    if arguments.decision == "approve":
        after = approvals.approve(here, known.run_id, by)
    elif arguments.decision == "refuse":
        after = approvals.refuse(here, known.run_id, by, arguments.reason)
    else:
        after = approvals.revoke(here, known.run_id, by, arguments.reason)
    if arguments.json:
        print(json.dumps(_told(after), indent=2))
        return 0
    print(f"Run {after.run_id} is {after.state}.")
    if told and told["refused"]:
        print(f"It still cannot take part: {told['refused']}")
    elif after.state == "revoked":
        print("Nothing more of it leaves. What was charged stays charged.")
    return 0


def _busy() -> "contextlib.AbstractContextManager[Any]":
    """Pricing a run loads PyTorch, which takes seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status("reading the run and its price") if console.is_terminal else contextlib.nullcontext()


def _ask(what: str, paragraphs: list[str]) -> None:
    """Shows what is decided and asks; nothing was changed where this raises."""
    print("\n".join(paragraphs), file=sys.stderr)
    if not sys.stdin.isatty():
        raise ConfigError(f"Nothing was changed: nobody was there to ask whether to {what}.", remedy="Add --yes.")
    print(f"\n{what[0].upper()}{what[1:]}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("Nothing was changed.", remedy="Answer y to go on.")
