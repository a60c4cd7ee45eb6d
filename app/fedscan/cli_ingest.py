"""`fedscan agent ingest` and its table."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedscan import cli_pull

if TYPE_CHECKING:
    from rich.console import Console

    from fedscan_client.intake.report import Report
    from fedscan_client.site import Site

_INGEST = """\
Takes the hospital's images into the encrypted cohort: source, consent, de-identification, pixels, cache. Only patients
whom the consent register permits are read; only what is new or changed since the last run is read again; whoever
withdrew, or is gone from register or source, is destroyed (unless so many are gone at once that it looks like a
mistake). Stop it whenever you like: the next run goes on.

  fedscan agent ingest /srv/fedscan/site --dry-run      what would happen, and a sample of headers before and after
  fedscan agent ingest /srv/fedscan/site
  fedscan agent ingest /srv/fedscan/site --json > today.json

SITE is the site's folder or its site.toml, which has the sections [source], [consent] and [intake]. A PACS that is
asked (dicomweb, dimse-get, dimse-move) is asked first; --no-pull takes only what the spool holds already.

The counts are for the hospital's own eyes. Exit code 0: done, whatever was set aside; 2: nothing was read."""


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command below `fedscan agent`."""
    parser = agent.add_parser(
        "ingest",
        help="images into the encrypted cohort",
        description=_INGEST,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("site", metavar="SITE", type=Path, nargs="?", default=Path("."), help="default: this folder")
    parser.add_argument("--dry-run", action="store_true", help="read headers only; write and destroy nothing")
    parser.add_argument("--sample", metavar="N", type=int, default=1, help="headers shown by --dry-run (%(default)s)")
    parser.add_argument(
        "--allow-loss", action="store_true", help="destroy whoever register or source lost, however many they are"
    )
    parser.add_argument("--no-pull", action="store_true", help="do not ask the PACS first")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on standard output")
    parser.set_defaults(command=_ingest)


def _ingest(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from fedscan_client import site as sites
    from fedscan_client.intake import ingest

    here = sites.load(arguments.site)
    notes = Console(stderr=True, highlight=False)
    asked = [name for name, source in here.source.items() if source.kind in cli_pull.NETWORK]
    if asked and not (arguments.dry_run or arguments.no_pull):
        told, stopped = cli_pull.pull(here, notes)
        for name, counts in told.items():
            if counts["problem"] or counts["failed"]:
                notes.print(
                    f"{name}: {counts['failed']} failed. {counts['reason']} {counts['problem']}", soft_wrap=True
                )
        if stopped:
            return 130
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, of: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=done, total=of)

        try:
            report = ingest.ingest(here, dry_run=arguments.dry_run, allow_loss=arguments.allow_loss, tell=tell)
        except KeyboardInterrupt:
            notes.print("Stopped; nothing is half done, and the same command goes on.")
            raise
    out = Console(highlight=False)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        show(here, report, out)
        if arguments.dry_run and arguments.sample:
            _samples(here, arguments.sample, out)
    return 0


def show(here: "Site", report: "Report", console: "Console") -> None:
    """Prints the summary table."""
    from rich.table import Column, Table

    from fedscan_client.consent import WHY
    from fedscan_client.intake.records import REASONS
    from fedscan_client.intake.sources.folder import SKIPPED

    table = Table(
        "outcome",
        Column("reason", overflow="fold"),
        *(Column(name, justify="right") for name in ("studies", "series", "instances")),
        title=f"{here.name}: {report.objects} objects of {report.patients} patients",
        title_justify="left",
    )
    for line in report.lines:
        reason = {**REASONS, **WHY}.get(line.reason, "")
        if line.outcome == "unlabelled":
            reason = "the label table does not name it"
        counts = [str(count) if count else "" for count in (line.studies, line.series, line.instances)]
        table.add_row(line.outcome, reason, *counts)
    console.print(table)
    for reason, count in sorted(report.skipped.items()):
        console.print(f"{count} not looked at: {SKIPPED[reason]}.", soft_wrap=True)
    if report.skipped or "unreadable" in report.reasons("unreadable"):
        console.print("While that is so, nobody is destroyed for being gone from the source.", soft_wrap=True)
    for kept, what in (
        (report.unlisted_kept, "the consent register does not name them any more. They take no part in training"),
        (report.gone_kept, "their images are gone from the source"),
    ):
        if kept:
            text = f"{kept} patients are kept in the cache although {what}: so many at once look like a mistake."
            console.print(f"{text} If it is none: --allow-loss destroys them.", soft_wrap=True)
    if report.dry:
        would = f" {report.destroyed} patients would be destroyed in the cache." if report.destroyed else ""
        console.print(f"A dry run: nothing was written, and only a sample's pixels are decoded.{would}", soft_wrap=True)
        return
    console.print(
        f"{report.cached_patients} patients are in the cache; {report.destroyed} were destroyed; "
        f"the pixels of {report.read} objects were read.",
        soft_wrap=True,
    )
    if any(line.outcome in ("quarantined", "refused", "unreadable") for line in report.lines):
        text = (
            f"What waits for a person, and which files could not be used: fedscan agent quarantine list {here.folder}"
        )
        console.print(text, soft_wrap=True)


def _samples(here: "Site", count: int, console: "Console") -> None:
    """Headers before and after, on the terminal of the hospital only."""
    from rich.markup import escape
    from rich.table import Column, Table

    from fedscan_client.intake import samples

    console.print("What follows is a real header: for this terminal only.", soft_wrap=True)
    for number, rows in enumerate(samples.headers(here, count), 1):
        table = Table("element", *(Column(name, overflow="fold") for name in ("before", "after")))
        table.title, table.title_justify = f"Sample {number}: what the header becomes", "left"
        for row in rows:
            after = "[dim]gone[/dim]" if row.after is None else escape(row.after)
            table.add_row(row.keyword or row.tag, escape(row.before or ""), after)
        console.print(table)
