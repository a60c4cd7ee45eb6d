"""`fedscan agent enrol`, `check`, `retire`: a hospital joins a federation, looks whether all is well, and leaves."""

import argparse
import contextlib
import dataclasses
import json
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fedscan_client.check.finding import Finding

_ENROL = """\
Makes this machine a site of a federation, from the one file that the coordinator sent.

  fedscan agent enrol INVITE.toml                      makes the folder NAME here
  fedscan agent enrol INVITE.toml /srv/fedscan/site    an existing site.toml in it is kept

It makes the site's keys (nobody else can read them, they never leave), writes a site.toml with safe defaults where
there is none, tells the coordinator the public key and the policy, and prints what the coordinator knows. Stopped half
way, or without a network: type it again. The invitation works once; keep it secret until then, and compare the
fingerprint that is printed with the coordinator's by telephone."""

_CHECK = """\
Looks whether everything is in place, and says what to do where it is not. Changes nothing, sends nothing of patients,
charges nothing; the last line is a private training step on a few of the site's own patients, which is thrown away.

  fedscan agent check /srv/fedscan/site
  fedscan agent check /srv/fedscan/site --json         for scripts: topic, state, says, remedy
  fedscan agent check /srv/fedscan/site --for-it       the page for the firewall and PACS teams

Run it as the user, and with the HTTPS_PROXY, of the agent. Lines marked * hold counts of patients: leave them out of
a message to anybody outside the hospital. Exit code 0: no cross; 1: at least one; 2: no such folder."""

_RETIRE = """\
Ends this site for ever: destroys its keys, the cache, the spool and the certificate, tells the coordinator to forget
the public key, and keeps ledger and audit log, also as one archive for your records.

  fedscan agent retire /srv/fedscan/site               only says what would be done
  fedscan agent retire /srv/fedscan/site --yes         does it; nothing of it can be undone
  fedscan agent retire /srv/fedscan/site --yes --out /mnt/records/north.tar.gz

Stop the agent first. What trained models have learnt stays in them, under the epsilon that the ledger holds. Without
the site's key nobody can say any more which runs a patient was in: print letters first (fedscan agent patient show)."""

_MARKS = {"ok": "[green]✓[/green]", "warn": "[yellow]![/yellow]", "fail": "[red]✗[/red]", "skip": "[dim]-[/dim]"}


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds the three commands to those of `fedscan agent`."""
    plain = argparse.RawDescriptionHelpFormatter
    enrol = agent.add_parser("enrol", help="join a federation", description=_ENROL, formatter_class=plain)
    enrol.add_argument("invite", metavar="INVITE.toml", type=Path, help="the coordinator's file")
    enrol.add_argument("site", metavar="SITE_DIR", type=Path, nargs="?", help="the site's folder; default ./NAME")
    enrol.add_argument("--json", action="store_true", help="print JSON on standard output")
    enrol.set_defaults(command=_enrol)
    check = agent.add_parser("check", help="is everything in place?", description=_CHECK, formatter_class=plain)
    check.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
    how = check.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON on standard output")
    how.add_argument("--for-it", action="store_true", help="print firewall rule and PACS registration, check nothing")
    check.set_defaults(command=_check)
    retire = agent.add_parser("retire", help="leave for ever", description=_RETIRE, formatter_class=plain)
    retire.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
    retire.add_argument("--out", metavar="FILE", type=Path, help="the archive; default SITE_DIR/retired.tar.gz")
    retire.add_argument("--yes", action="store_true", help="do it; otherwise only say what would be done")
    retire.set_defaults(command=_retire)


# --------------------------------------------------------------------------------------------------------------- enrol


def _enrol(arguments: argparse.Namespace) -> int:
    from fedscan_client import enrol
    from fedscan_core.invite import spelled

    done = enrol.enrol(arguments.invite, arguments.site)
    if arguments.json:
        told = {"site": done.site.name, "folder": str(done.site.folder), "coordinator": done.connection.coordinator}
        told |= {"address": done.connection.address, "ca_fingerprint": done.ca_fingerprint}
        print(json.dumps({**told, "made": done.made, "known": dict(done.known), "launchers": dict(done.launchers)}))
        return 0
    folder, there = done.site.folder, done.connection
    print(f"Site '{done.site.name}' is enrolled with {there.coordinator} ({there.address}).")
    for line in done.made:
        print(f"  made  {line}")
    print(f"\nWhat {there.coordinator} knows of this site, and nothing else:")
    for name, text in _known(done.known):
        print(textwrap.fill(f"  {name:<17} {text}", 80, subsequent_indent=" " * 20, break_on_hyphens=False))
    if done.launchers:
        print("\nWho may launch there. Named in [policy.launchers] of site.toml, only their signed orders count here:")
        for name, key in done.launchers.items():
            print(f'  {name} = "{key}"')
    if done.ca_fingerprint:
        print(f"\nCompare by telephone with {there.coordinator} before the first run; SHA-256 of its authority:")
        print(spelled(done.ca_fingerprint))
    print(f"\nNext: fill in {folder / 'site.toml'}, then: fedscan agent ingest {folder}; fedscan agent check {folder}")
    return 0


def _known(known: Any) -> list[tuple[str, str]]:
    policy = known["policy"]
    names = ("max_epsilon", "max_delta", "min_noise_multiplier", "approval", "max_rounds", "max_steps")
    told = ", ".join(f"{name} {policy[name]}" for name in names if policy.get(name) is not None)
    return [
        ("name", str(known["site"])),
        ("public key", str(known["fingerprint"])),
        ("node", str(known["node_id"])),
        ("declared patients", str(policy.get("patients_declared", ""))),
        ("policy", told),
    ]


# --------------------------------------------------------------------------------------------------------------- check


def _check(arguments: argparse.Namespace) -> int:
    if arguments.for_it:
        from fedscan_client import sheet

        print(sheet.page(arguments.site), end="")
        return 0
    from rich.console import Console

    console = Console(highlight=False)
    found: list[Finding] = []
    with contextlib.ExitStack() as waiting:
        if not arguments.json:
            console.print(f"fedscan agent check {arguments.site.absolute()}   {_here()}", soft_wrap=True)
            if console.is_terminal:
                waiting.enter_context(console.status("checking"))  # loading PyTorch takes seconds
        from fedscan_client.check import checklist

        for one in checklist.findings(arguments.site):
            found.append(one)
            if not arguments.json:
                _show(one, console)
    failed = sum(one.state == "fail" for one in found)
    if arguments.json:
        told = {"site": str(arguments.site), "ok": not failed, "findings": [dataclasses.asdict(one) for one in found]}
        print(json.dumps(told, indent=2))
    else:
        _sum_up(found, failed, arguments.site, console)
    return int(failed > 0)


def _here() -> str:
    """When, where and which version: what whoever reads a ticket asks first."""
    import socket
    from datetime import UTC, datetime

    from fedscan_client.check.network import own_version

    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {socket.gethostname()}, fedscan {own_version()}"


def _show(one: "Finding", console: "Console") -> None:
    from rich.markup import escape

    star = "*" if one.local else " "
    says, remedy = _hanging(one.says, 22, console), _hanging(one.remedy, 25, console)
    console.print(f" {_MARKS[one.state]}{star} {one.topic:<17} {escape(says)}", soft_wrap=True)
    if remedy:
        console.print(f"   {'':<17}  -> {escape(remedy)}", soft_wrap=True)


def _hanging(text: str, indent: int, console: "Console") -> str:
    """Wrapped for a terminal; one line in a pipe, which whoever searches it wants whole."""
    if not console.is_terminal:
        return text
    width = max(shutil.get_terminal_size().columns - indent, 30)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * indent).join(lines)


def _sum_up(found: list["Finding"], failed: int, folder: Path, console: "Console") -> None:
    warned = sum(one.state == "warn" for one in found)
    if any(one.local for one in found):
        console.print("\n * depends on patients: not for a message to anybody outside the hospital", soft_wrap=True)
    if failed:
        console.print(f"\n{failed} to put right, {warned} to look at. Then again: fedscan agent check {folder}")
    else:
        console.print(f"\nReady{f', {warned} to look at' if warned else ''}. Next: fedscan agent start {folder}")


# -------------------------------------------------------------------------------------------------------------- retire


def _retire(arguments: argparse.Namespace) -> int:
    from fedscan_client import retire

    if not arguments.yes:
        todo = retire.plan(arguments.site, arguments.out)
        print("Nothing was done. With --yes this would")
        print(f"  write    {todo.export}: ledger, audit log and site.toml")
        for path in todo.destroyed:
            print(f"  destroy  {path}")
        for path in todo.kept:
            print(f"  keep     {path}")
    else:
        todo = retire.retire(arguments.site, arguments.out)
        print(f"The site is retired: {len(todo.destroyed)} files and folders were destroyed now.")
        print(f"Its ledger and audit log are in {todo.export} (SHA-256 {todo.sha256}).")
        if todo.not_told:
            print(f"The coordinator could not be told: {todo.not_told}")
            print("Ask it to forget this site: fedscan server revoke NAME. Nobody can use the key, it is destroyed.")
    for line in todo.by_hand:
        print(f"  by hand  {line}")
    return 0
