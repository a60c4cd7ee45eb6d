"""`fedscan agent audit`: what left this site, who did what, and whether anybody changed the record of it."""

import argparse
import contextlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedscan_core.errors import ConfigError, FolderError, RecordDamaged

if TYPE_CHECKING:
    from rich.console import Console

    from fedscan_client.audit.show import Left
    from fedscan_client.audit.verify import Report

_WHAT = """\
The site's audit log says what left this building, who decided, looked at or changed what, and when; it names no
patient. Each line is bound to the one before under a key of this site. After every answer the coordinator keeps a
digest of the whole, which tells it nothing, but lets this site find out later whether its own log lost anything.

  fedscan agent audit show SITE_DIR --released      what left my site?
  fedscan agent audit verify SITE_DIR               is the log what was written?
  fedscan agent audit export SITE_DIR log.zip       for an auditor"""

_VERIFY = """\
Reads the whole log: every line under the log's key, every line against the one before. It finds what was edited,
dropped, inserted or moved. A cut at the end, or an older copy put back, is found by comparing with the anchors that the
coordinator kept, up to the last of them: they are fetched where this site is enrolled. Changes nothing.

  fedscan agent audit verify /srv/fedscan/site
  fedscan agent audit verify /srv/fedscan/site --anchors anchors.txt     instead of asking the coordinator
  fedscan agent audit verify /srv/fedscan/site --offline

FILE holds anchors of 64 hex digits each, in any text. Exit code 0: whole; 1: it is not; 2: it could not be checked."""

_SHOW = """\
Shows the log's newest records, or with --released what left this site, run by run, on one screen. The whole chain is
checked first. Changes nothing.

  fedscan agent audit show /srv/fedscan/site
  fedscan agent audit show /srv/fedscan/site --released
  fedscan agent audit show /srv/fedscan/site --event approval --last 100
  fedscan agent audit show /srv/fedscan/site --run study-7 --json"""

_EXPORT = """\
Writes the log as it is, and what a check of it says, into one zip file that must not exist. The export is noted in the
log. --with-key adds the log's key: unpacked, `fedscan agent audit verify` then checks the copy by itself. Who has the
key can also make up records newer than the last anchor; leave it out unless it is needed.

  fedscan agent audit export /srv/fedscan/site /media/usb/north-2026.zip"""

_SYSLOG = """\
Sends to the hospital's log collector, named in [audit] of site.toml, every record that it has not got: RFC 5424 over
TLS. A running agent does that by itself; this is for trying the connection out, or for a machine where none runs.

  [audit]
  syslog = "logs.hospital.example:6514"
  syslog_ca = "hospital-ca.pem"          # default: the authorities that this machine trusts"""

_SCREEN = 15  # runs that --released shows one by one


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command and its parts to `fedscan agent`."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = agent.add_parser("audit", help="what left; the log of it", description=_WHAT, formatter_class=plain)
    parts = parser.add_subparsers(metavar="COMMAND", required=True)
    verify = parts.add_parser("verify", help="was it changed?", description=_VERIFY, formatter_class=plain)
    show = parts.add_parser("show", help="what left, who did what", description=_SHOW, formatter_class=plain)
    export = parts.add_parser("export", help="into one file", description=_EXPORT, formatter_class=plain)
    syslog = parts.add_parser("syslog", help="to the log collector, now", description=_SYSLOG, formatter_class=plain)
    for part, command in ((verify, _verify), (show, _show), (export, _export), (syslog, _syslog)):
        part.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
        part.set_defaults(command=command)
    export.add_argument("file", metavar="FILE.zip", type=Path, help="must not exist")
    export.add_argument("--with-key", action="store_true", help="also the key that checks the log")
    for part in (verify, show):
        part.add_argument("--json", action="store_true", help="print JSON on standard output")
    for part in (verify, export):
        part.add_argument("--anchors", metavar="FILE", type=Path, help="anchors that were kept somewhere else")
        part.add_argument("--offline", action="store_true", help="do not ask the coordinator for its anchors")
    show.add_argument("--released", action="store_true", help="what left this site, run by run")
    show.add_argument("--event", default="", help="only this kind of record: release, answer, approval, access, ...")
    show.add_argument("--run", default="", metavar="RUN", help="only this run, by the first letters of its id")
    show.add_argument("--last", type=_count, default=20, metavar="N", help="the newest N; 0 for all (%(default)s)")


def _count(text: str) -> int:
    number = int(text)  # argparse names the text where it is none
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


# ------------------------------------------------------------------------------------------------------------ handlers


def _verify(arguments: argparse.Namespace) -> int:
    from fedscan_client.audit.verify import verify

    folder = _folder(arguments.site)
    anchors = _anchors(folder, arguments)
    report = verify(folder, anchors or [])
    if arguments.json:
        print(json.dumps({**asdict(report), "whole": report.whole}, indent=2))
    else:
        _print_report(report, anchors is not None, _console())
    return 0 if report.whole else 1


def _show(arguments: argparse.Namespace) -> int:
    from fedscan_client.audit import show

    folder = _folder(arguments.site)
    if arguments.released:
        left = show.released(folder)
        if arguments.json:
            print(json.dumps({**asdict(left), "bytes": left.bytes}, indent=2))
        else:
            _print_left(left, _console())
        return 0
    found = show.find(folder, event=arguments.event, run_id=arguments.run, last=arguments.last)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    console = _console()
    for record in found:
        console.print(f"{record['utc'][:19]}  {record['event']:<11} {show.words(record)}", soft_wrap=True)
    if not found:
        console.print("No such record.")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from fedscan_client.audit import export, log

    folder = _folder(arguments.site)
    anchors = _anchors(folder, arguments)
    if log.files(folder / log.FOLDER) and not arguments.file.exists():
        with contextlib.suppress(RecordDamaged, OSError):  # a log that was changed is exported as it is
            log.access(folder, "export of the audit log", with_key=arguments.with_key)
    report = export.export(folder, arguments.file, with_key=arguments.with_key, anchors=anchors or [])
    console = _console()
    console.print(f"{arguments.file}: {report.records} records.", soft_wrap=True)
    _print_report(report, anchors is not None, console)
    return 0 if report.whole else 1


def _syslog(arguments: argparse.Namespace) -> int:
    from fedscan_client import site
    from fedscan_client.audit import syslog

    here = site.load(arguments.site)
    if not here.audit.syslog:
        raise ConfigError("site.toml names no log collector.", remedy="Add [audit] with syslog = 'host:port'.")
    count = syslog.ship(here.folder, here.audit)
    print(f"{count} records sent to {here.audit.syslog}." if count else "It has got everything already.")
    return 0


def _folder(path: Path) -> Path:
    """The site's folder; a site.toml that cannot be read is no reason not to look at the log."""
    folder = path.parent if path.name == "site.toml" else path
    if not (folder / "site.toml").exists() and not (folder / "audit").is_dir():
        raise FolderError(
            f"{folder} is no site's folder.", remedy="It holds site.toml, and audit/ once there is a log."
        )
    return folder


def _anchors(folder: Path, arguments: argparse.Namespace) -> list[str] | None:
    """What was given, or what the coordinator kept; None where nobody was asked."""
    if arguments.anchors is not None:
        try:
            return re.findall(r"\b[0-9a-f]{64}\b", arguments.anchors.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{arguments.anchors} cannot be read: {error}.", remedy="Check --anchors.") from None
    if arguments.offline or not (folder / "connection.toml").exists():
        return None
    from fedscan_client import door

    return [kept["anchor"] for kept in door.anchors(folder)]


# ---------------------------------------------------------------------------------------------------------------- text


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _print_report(report: "Report", asked: bool, console: "Console") -> None:
    for problem in report.problems:
        console.print(f"✗ {problem}", soft_wrap=True)
    for anchor in report.unknown:
        console.print(f"✗ The log never had the anchor {anchor[:12]}..., which the coordinator kept.", soft_wrap=True)
    if report.unknown:
        console.print(
            "  The log was cut, replaced by an older copy or begun anew, or these anchors are not this site's.",
            soft_wrap=True,
        )
    if not report.problems:
        span = f", {report.first[:19]} to {report.last[:19]} UTC" if report.records else ""
        console.print(f"✓ {report.records} records in {report.files} file(s){span}: each as it was written, in order.")
    if report.torn:
        console.print(f"  {report.torn} bytes at the end are a write that never returned; the next one drops them.")
    if report.anchors and not report.unknown:
        after = report.records - report.anchored
        text = f"✓ {report.anchors} anchors agree: nothing up to record {report.anchored} was lost"
        console.print(f"{text}; {after} newer record(s) are not anchored yet.", soft_wrap=True)
    elif not report.anchors:
        why = "the coordinator kept none yet" if asked else "no anchors were compared"
        console.print(f"  A cut at the end could not be found: {why}.", soft_wrap=True)


def _print_left(left: "Left", console: "Console") -> None:
    from rich.table import Column, Table

    if not left.released:
        console.print("No update and no histogram has left this site.")
    else:
        names = ("rounds", "sent", "bytes", "epsilon")
        table = Table(Column("run", overflow="fold"), "what", *(Column(name, justify="right") for name in names), "UTC")
        table.title, table.title_justify = "What left this site: noisy updates and histograms", "left"
        older, shown = left.released[:-_SCREEN], left.released[-_SCREEN:]
        if older:
            numbers = (sum(it.rounds for it in older), sum(it.times for it in older), sum(it.bytes for it in older))
            table.add_row(f"{len(older)} earlier", "", *(f"{number:,}" for number in numbers), "", "")
        for it in shown:
            epsilon = "no privacy" if it.epsilon == "inf" else "" if it.epsilon is None else f"{it.epsilon:.3f}"
            when = f"{it.first[:16]} to {it.last[:16]}".replace("T", " ") if it.first else "before this log began"
            table.add_row(it.run_id, it.what, f"{it.rounds:,}", f"{it.times:,}", f"{it.bytes:,}", epsilon, when)
        console.print(table)
        console.print(f"{left.bytes:,} bytes in all. Epsilon: what the run holds of the budget, whole.", soft_wrap=True)
    others = [f"{count:,} {status}" for status, count in left.answers.items() if status != "ok"]
    plain = left.answers.get("ok", 0) - sum(it.times for it in left.released if it.first)
    others += [f"{plain:,} public plan(s)"] if plain > 0 else []
    if others:
        text = f"Besides, constants and public plans or reasons, which hold nothing of any image: {', '.join(others)}."
        console.print(text, soft_wrap=True)
