"""`fedscan agent pull` and `fedscan agent listen`: images from the PACS into the site's encrypted spool."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedscan import stopping

if TYPE_CHECKING:
    from rich.console import Console

    from fedscan_client.intake.records import PatientId
    from fedscan_client.intake.sources.pull import Permitted
    from fedscan_client.intake.sources.settings import Source
    from fedscan_client.intake.sources.spool import Spool
    from fedscan_client.site import Site

_SOON = "stopping after what is in transit"

_PULL = """\
Asks the PACS of site.toml what it has, and retrieves what is new into the encrypted spool, where `fedscan agent ingest`
finds it. Only studies of patients whom the consent register permits are asked for. Nothing is fetched twice: stopped by
Ctrl-C, by the network or by the PACS, it goes on where it was.

  fedscan agent pull /srv/fedscan/site --dry-run     how many instances there are of each modality, and how many are new
  fedscan agent pull /srv/fedscan/site
  fedscan agent pull /srv/fedscan/site --json > today.json

It serves sources of the kinds dicomweb, dimse-move and dimse-get, one after the other. The report holds counts only.
Exit code 1 if something could not be had: run it again. 2 if the PACS refused or could not be reached."""

_LISTEN = """\
Receives images that the PACS routes here (C-STORE) into the encrypted spool, where `fedscan agent ingest` finds them.
Runs until Ctrl-C or SIGTERM, and prints what came.

  fedscan agent listen /srv/fedscan/site

It serves the sources of the kind dimse-store. The PACS is told "success" only when an image is on disk. AE titles are
names that anybody can claim, not authentication: allow each only from its own address, and use [tls] where you can."""

NETWORK = ("dicomweb", "dimse-move", "dimse-get")


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds both commands to those of `fedscan agent`."""
    plain = argparse.RawDescriptionHelpFormatter
    pull = agent.add_parser("pull", help="retrieve new images from the PACS", description=_PULL, formatter_class=plain)
    pull.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
    pull.add_argument("--dry-run", action="store_true", help="only count, and change nothing")
    pull.add_argument("--json", action="store_true", help="print JSON on standard output")
    pull.set_defaults(command=_pull)
    listen = agent.add_parser("listen", help="receive from the PACS", description=_LISTEN, formatter_class=plain)
    listen.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
    listen.add_argument("--json", action="store_true", help="print the final counts as JSON on standard output")
    listen.set_defaults(command=_listen)


def _pull(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fedscan_client import site as sites

    told, stopped = pull(sites.load(arguments.site), Console(stderr=True), dry_run=arguments.dry_run)
    if arguments.json:
        print(json.dumps(told, indent=2))
    else:
        for name, counts in told.items():
            show(name, counts, arguments.dry_run)
    return int(any(counts["problem"] or counts["failed"] for counts in told.values()) or stopped)


def pull(here: "Site", console: "Console", *, dry_run: bool = False) -> tuple[dict[str, Any], bool]:
    """Asks every PACS of a site, one after the other: what each gave, and whether somebody said stop.

    Raises:
        ConfigError: there is no PACS to ask.
        ConsentError: no usable consent register; nothing was asked for.
        SiteKeyError: no usable site key, or it is being replaced.
        ArchiveError: a PACS refused or could not be reached before anything was found.
    """
    from fedscan_client import key_use
    from fedscan_client.intake.sources import dicomweb, dimse
    from fedscan_client.intake.sources.settings import DicomWeb, DimseGet, DimseMove

    sources = _of_kinds(here.source, NETWORK, "pull")
    told: dict[str, Any] = {}
    with key_use.held(here.folder), stopping.on_signal(_SOON) as stop:
        permitted, spool = _permitted(here), _spool(here, write=not dry_run)
        for name, source in sources.items():
            if stop.is_set():
                break
            with _progress(console, name) as progress:
                how: dict[str, Any] = {"known": lambda uid: False, "progress": progress, "stop": stop}
                how |= {"permitted": permitted, "dry_run": dry_run}
                if isinstance(source, DicomWeb):
                    report = dicomweb.retrieve(source, spool, **how)
                else:
                    assert isinstance(source, DimseMove | DimseGet)
                    report = dimse.retrieve(source, spool, **how)
            told[name] = {
                **{key: getattr(report, key) for key in _COUNTS},
                "modalities": {
                    key: {"found": n, "new": report.new[key]} for key, n in sorted(report.modalities.items())
                },
                "reason": report.reason,
                "problem": report.problem,
            }
            if not dry_run:
                _note(here.folder, "pull", name, {key: told[name][key] for key in _COUNTS})
        return told, stop.is_set()


def _permitted(here: "Site") -> "Permitted":
    """Whether the consent register permits a patient, so that nobody else's images are fetched."""
    from dataclasses import replace
    from datetime import date

    from fedscan_client import consent, keys
    from fedscan_client.intake.deid import patient_name
    from fedscan_core.errors import ConfigError

    if here.consent is None:
        raise ConfigError(
            f"{here.folder / 'site.toml'} has no [consent].", remedy="Say where the consent register is, then pull."
        )
    names = here.names(keys.load(here.folder, here.key))
    register = consent.load(here.consent, names, site_folder=here.folder, today=date.today())

    def permitted(patient: "PatientId") -> bool:
        whole = replace(patient, issuer=patient.issuer or here.issuer)
        return register.covers(whole.issuer) and register.decide(patient_name(names, whole)).permit

    return permitted


def _listen(arguments: argparse.Namespace) -> int:
    from fedscan_client import key_use
    from fedscan_client import site as sites
    from fedscan_client.intake.sources import scp
    from fedscan_client.intake.sources.settings import DimseStore

    here = sites.load(arguments.site)
    sources = _of_kinds(here.source, ("dimse-store",), "listen")
    received = {name: scp.Received() for name in sources}
    with (
        key_use.held(here.folder),
        stopping.on_signal(_SOON) as stop,
        contextlib.ExitStack() as stack,
    ):
        spool = _spool(here, write=True)
        for name, source in sources.items():
            assert isinstance(source, DimseStore)
            port = stack.enter_context(scp.listening(source, spool, received[name]))
            text = f"{name}: {source.ae_title} listens on {source.listen_address}, port {port}; Ctrl-C ends it."
            print(text, file=sys.stderr, flush=True)
        before = 0
        while not stop.wait(5.0):
            now = sum(each.counts.total() for each in received.values())
            if now != before:
                for name, each in received.items():
                    print(f"{name}: {_words(each.counts)}", file=sys.stderr, flush=True)
            before = now
    counts = {name: {what: each.counts[what] for what in scp.COUNTED} for name, each in received.items()}
    for name, numbers in counts.items():
        _note(here.folder, "listen", name, numbers)
        if not arguments.json:
            print(f"{name}: {_words(numbers)}")
    if arguments.json:
        print(json.dumps(counts, indent=2))
    return 0


_COUNTS = ("studies", "no_consent", "series", "unlisted", "found", "retrieved", "already_known", "failed", "left")


def _of_kinds(sources: "Mapping[str, Source]", kinds: tuple[str, ...], command: str) -> "Mapping[str, Source]":
    from fedscan_core.errors import ConfigError

    wanted = {name: source for name, source in sources.items() if source.kind in kinds}
    if not wanted:
        raise ConfigError(
            f"site.toml has no source that `fedscan agent {command}` could serve.",
            remedy=f"It needs a [source] with kind = {' or '.join(kinds)}.",
        )
    return wanted


def _spool(here: "Site", *, write: bool) -> "Spool":
    from fedscan_client import keys
    from fedscan_client.intake.sources import spool

    made = spool.Spool(here.spool, keys.load(here.folder, here.key).wrapping)
    if write:
        spool.clean(made.folder)
    return made


def _note(site: Path, did: str, source: str, counts: Mapping[str, int]) -> None:
    """Into the audit log: counts and the source's name, never what identifies anybody."""
    from fedscan_client.audit import log

    log.append(site, "pull", did=did, source=source, **counts)


def show(name: str, counts: Mapping[str, Any], dry_run: bool) -> None:
    """Prints what one PACS gave."""
    from rich.console import Console
    from rich.table import Table

    table = Table("modality", "instances", "new", title=f"{name}: what the PACS lists", title_justify="left")
    for modality, row in counts["modalities"].items():
        table.add_row(modality or "(none)", str(row["found"]), str(row["new"]))
    console = Console()
    console.print(table)
    totals = f"{counts['found']} instances in {counts['series']} series of {counts['studies']} studies"
    if dry_run:
        text = f"{totals}: {counts['left']} are new, {counts['already_known']} are here. Nothing was changed."
    else:
        text = (
            f"{totals}: {counts['retrieved']} retrieved, {counts['already_known']} were here, "
            f"{counts['failed']} failed, {counts['left']} left for the next run."
        )
    console.print(text, soft_wrap=True)
    if counts["no_consent"]:
        text = (
            f"{counts['no_consent']} further studies stay in the PACS: their patients are not permitted, or not named."
        )
        console.print(text, soft_wrap=True)
    if counts["unlisted"]:
        text = f"{counts['unlisted']} studies or series have no usable UID in the PACS, and cannot be asked for."
        console.print(text, soft_wrap=True)
    for text in {counts["reason"] if counts["failed"] else "", counts["problem"]} - {""}:
        print(f"fedscan: {text}", file=sys.stderr)


def _words(counts: Mapping[str, int]) -> str:
    from fedscan_client.intake.sources.scp import COUNTED

    return ", ".join(f"{counts[what]} {words}" for what, words in COUNTED.items() if counts[what]) or "nothing came"


@contextlib.contextmanager
def _progress(console: Any, name: str) -> Iterator[Any]:
    """A bar on a terminal, a line now and then elsewhere."""
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        last = [time.monotonic()]

        def line(done: int, found: int) -> None:
            if time.monotonic() - last[0] > 10:
                last[0] = time.monotonic()
                print(f"{name}: {done} of the {found} instances listed so far", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{name}: instances listed so far", total=None)
        yield lambda done, found: bar.update(task, completed=done, total=max(found, 1))
