"""`fedscan server`: the commands for the coordinating centre."""

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedscan_core.errors import ConfigError, FolderError

if TYPE_CHECKING:
    from fedscan_core.invite import Invite
    from fedscan_server.coordinator.state import Coordinator

_WHAT = """\
Runs the coordinator: it starts researchers' runs, hands the model to the sites and adds up their noisy answers.

  fedscan server init --address fedscan.example.org:8443
  fedscan server start
  fedscan server invite hospital-a                 one file for the hospital
  fedscan server person add ann --role researcher  one file for Ann

Everything lies in one folder: --state DIR, else $FEDSCAN_COORDINATOR, else ./coordinator."""

_INIT = """\
Makes the coordinator's folder: settings, a certificate authority and the server's certificate, secrets, an empty
registry. Nothing is started, and a folder that holds something is left alone.

  fedscan server init --address fedscan.example.org:8443
  fedscan server init --address fedscan.example.org:443 --certificate chain.pem --key server.pem   your own, public CA
  fedscan server init --address 10.1.2.3:8443 --encrypt /etc/fedscan/vault.key                     encrypt runs at rest

HOST in the address is the name or address that hospitals connect to; the certificate is made for it."""

_START = """\
Runs the coordinator until Ctrl-C or SIGTERM: Flower's SuperLink and SuperExec on loopback, and the edge, the only door
to the outside. A process that ends is started again. Logs are in STATE/logs. For a service see server/deploy."""

_INVITE = """\
Writes the one file that a hospital needs: address, whom to trust, a token that works once. Send it over a channel you
trust, and read the fingerprint out over the phone. For a site that is there already, the new file replaces its key when
it is used, and until then nothing changes. No other site notices.

  fedscan server invite hospital-a
  fedscan server invite hospital-a --hours 24 --out /media/usb/hospital-a.toml"""

_REVOKE = """\
Shuts a site out: its key is refused at once and for ever, and runs go on without it. To let the site in again, invite
it; it makes a new key. What it contributed to earlier models stays in them."""

_PERSON = """\
People who may look (viewer), launch runs (researcher), or stop anybody's runs (operator). Each gets one file and runs
`fedscan login FILE`; their tokens are kept as hashes only."""

_CHECK = """\
Looks at files' modes, secrets, certificate, Flower's version, databases, disk and processes, and says what lies in
clear. Changes nothing. Exit code 1 if something is to be repaired."""

_CERT = """\
  fedscan server cert renew                           a new server certificate from the coordinator's own authority
  fedscan server cert install CHAIN KEY [--ca CA]     your own; without --ca a public authority signed it

Sites trust the authority, so a renewed certificate needs nothing of them. Stop and start afterwards. After `install`
with another authority every site needs a new invitation."""


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `server` to the parser of `fedscan`."""
    server = commands.add_parser(
        "server", help="for the coordinating centre", description=_WHAT, formatter_class=_PLAIN
    )
    of_server = server.add_subparsers(metavar="COMMAND", required=True)

    init = _add(of_server, "init", _init, "make a coordinator", _INIT)
    init.add_argument("--address", required=True, metavar="HOST:PORT", help="where sites and researchers reach it")
    init.add_argument("--name", help="shown to people; default HOST")
    init.add_argument("--bind", default="", metavar="HOST:PORT", help="what to listen on; default 0.0.0.0 and PORT")
    init.add_argument(
        "--superlink-port", type=int, default=0, metavar="PORT", help="Flower's, on loopback; default free"
    )
    init.add_argument("--certificate", type=Path, metavar="FILE", help="your own, with its chain (PEM)")
    init.add_argument("--key", type=Path, metavar="FILE", help="its private key (PEM)")
    init.add_argument("--ca", type=Path, metavar="FILE", help="the authority that signed it, if not a public one")
    init.add_argument("--encrypt", default="", metavar="KEY_FILE", help="encrypt runs at rest; a missing key is made")

    _add(of_server, "start", _start, "run it", _START)
    status = _add(of_server, "status", _status, "what it is doing", "Exit code 1 if something does not answer.")
    status.add_argument("--json", action="store_true", help="print JSON on standard output")
    _add(
        of_server,
        "stop",
        _stop,
        "end it",
        "Ends the running coordinator and waits for it. Runs go on at the next start.",
    )

    invite = _add(of_server, "invite", _invite, "let a site in", _INVITE)
    invite.add_argument("site", metavar="SITE", help="the site's name in this federation, for ever")
    _for_invitations(invite)
    revoke = _add(of_server, "revoke", _revoke, "shut a site out", _REVOKE)
    revoke.add_argument("site", metavar="SITE")
    revoke.add_argument("--yes", action="store_true", help="do not ask")
    sites = _add(of_server, "sites", _sites, "who takes part", "Sites: invited, enrolled, online, revoked.")
    sites.add_argument("--json", action="store_true", help="print JSON on standard output")

    person = of_server.add_parser("person", help="who may launch", description=_PERSON, formatter_class=_PLAIN)
    of_person = person.add_subparsers(metavar="COMMAND", required=True)
    new = _add(of_person, "add", _person_add, "invite somebody", _PERSON)
    new.add_argument("name", metavar="NAME")
    new.add_argument("--role", default="researcher", choices=["viewer", "researcher", "operator"])
    _for_invitations(new)
    _add(
        of_person, "remove", _person_remove, "take somebody's access away", "At once. Runs of theirs go on."
    ).add_argument("name", metavar="NAME")
    _add(of_person, "list", _person_list, "everybody", "Name, role and public key of everybody.")

    check = _add(of_server, "check", _check, "is it sound, and what lies in clear", _CHECK)
    check.add_argument("--json", action="store_true", help="print JSON on standard output")

    cert = of_server.add_parser("cert", help="the server's certificate", description=_CERT, formatter_class=_PLAIN)
    of_cert = cert.add_subparsers(metavar="COMMAND", required=True)
    _add(of_cert, "renew", _cert_renew, "a new one from our own authority", _CERT)
    install = _add(of_cert, "install", _cert_install, "your own", _CERT)
    install.add_argument("certificate", metavar="CHAIN", type=Path)
    install.add_argument("key", metavar="KEY", type=Path)
    install.add_argument("--ca", type=Path, metavar="CA", help="the authority that signed it, if not a public one")


_PLAIN = argparse.RawDescriptionHelpFormatter


def _add(commands: Any, name: str, command: Any, short: str, long: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=short, description=long, formatter_class=_PLAIN)
    parser.add_argument("--state", metavar="DIR", type=Path, help="the coordinator's folder")
    parser.set_defaults(command=command)
    return parser


def _for_invitations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hours", type=float, default=168.0, help="how long it is good (%(default)g)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default NAME.invite.toml, here")


def _folder(arguments: argparse.Namespace) -> Path:
    return arguments.state or Path(os.environ.get("FEDSCAN_COORDINATOR") or "coordinator")


def _coordinator(arguments: argparse.Namespace) -> "Coordinator":
    from fedscan_server.coordinator import state

    return state.load(_folder(arguments))


def _init(arguments: argparse.Namespace) -> int:
    from fedscan_core.invite import ca_fingerprint, spelled
    from fedscan_server.coordinator import service

    if bool(arguments.certificate) != bool(arguments.key) or (arguments.ca and not arguments.key):
        raise ConfigError("Your own certificate needs its key too.", remedy="Give --certificate and --key.")
    c = service.init(
        _folder(arguments),
        arguments.name or (arguments.address.rpartition(":")[0] or arguments.address).strip("[]"),
        arguments.address,
        arguments.bind,
        arguments.superlink_port,
        own=(arguments.certificate, arguments.key, arguments.ca) if arguments.key else None,
        key_file=str(Path(arguments.encrypt).absolute()) if arguments.encrypt else "",
    )
    print(f"Made {c.folder}. Back it up: pki and secrets above all.")
    if c.ca_pem:
        print(f"Fingerprint of its authority:\n{spelled(ca_fingerprint(c.ca_pem))}")
    if c.key_file:
        print(f"Runs are encrypted with {c.key_file}. Keep a copy elsewhere: without it they are lost.")
    where = f" --state {arguments.state}" if arguments.state else ""
    print(f"Next: fedscan server start{where}    and in a second terminal: fedscan server invite SITE{where}")
    return 0


def _start(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import service, status

    c = _coordinator(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())

    def tell(name: str, event: str) -> None:
        print(f"{name}: {event}", flush=True)

    def greet() -> None:
        while not stop.wait(0.5):
            if status.superlink_answers(c) and not status.probe_edge(c):
                print(f"ready: {c.address}", flush=True)
                return

    print(f"{c.name}: starting; logs are in {c.logs}; Ctrl-C ends it", flush=True)
    threading.Thread(target=greet, daemon=True).start()
    service.start(c, stop, tell)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import status

    c = _coordinator(arguments)
    now = status.look(c)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(now), "healthy": now.healthy}, indent=2))
    else:
        print(f"{c.name}, {c.address}: {f'process {now.process}' if now.process else 'does not run'}")
        print(f"  SuperLink     {now.superlink or 'answers'}\n  edge          {now.edge or 'answers'}")
        print(f"  sites online  {', '.join(now.online) or 'none'}\n  runs          {now.active_runs} under way")
    return 0 if now.healthy else 1


def _stop(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import service

    print("stopped" if service.stop(_coordinator(arguments)) else "it was not running")
    return 0


def _invite(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import sites

    c = _coordinator(arguments)
    path = _free(arguments.out or Path(f"{arguments.site}.invite.toml"))
    _hand_out(path, sites.invite(c, arguments.site, arguments.hours), "fedscan agent enrol")
    return 0


def _person_add(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import people

    c = _coordinator(arguments)
    path = _free(arguments.out or Path(f"{arguments.name}.invite.toml"))
    _hand_out(path, people.invite(c, arguments.name, arguments.role, arguments.hours), "fedscan login")
    return 0


def _free(path: Path) -> Path:
    """Only an older invitation may be replaced."""
    if path.exists() and not path.read_bytes().startswith(b"# Invitation to the fedscan federation"):
        raise FolderError(f"{path} exists and is no invitation; it was left alone.", remedy="Name another with --out.")
    if not path.absolute().parent.is_dir():
        raise FolderError(f"{path.parent} is no folder.", remedy="Name another with --out.")
    return path


def _hand_out(path: Path, invite: "Invite", command: str) -> None:
    from fedscan_core import invite as invitations

    invitations.write(path, invite)
    print(f"Wrote {path}: it works once, until {_minute(invite.expires)} UTC.")
    print(f"There they run: {command} {path.name}")
    if invite.ca_fingerprint:
        print(f"Read this out over the phone:\n{invitations.spelled(invite.ca_fingerprint)}")


def _minute(utc: str) -> str:
    """A UTC time in ISO 8601, to the minute."""
    return utc[:16].replace("T", " ")


def _revoke(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import control, sites

    c = _coordinator(arguments)
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise ConfigError("Nothing was revoked: nobody is there to ask.", remedy="Give --yes.")
        if input(f"Shut {arguments.site} out? Its key never works again. [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was changed.")
            return 0
    sites.revoke(c, arguments.site)
    try:
        control.reconcile(c)
        print(f"{arguments.site} is shut out.")
    except ConfigError:
        print(f"{arguments.site} is shut out; Flower hears of it when the coordinator starts.")
    return 0


def _sites(arguments: argparse.Namespace) -> int:
    from fedscan_core import node_key
    from fedscan_server.coordinator import control, sites

    c = _coordinator(arguments)
    try:
        online: set[int] | None = control.online_nodes(c)
    except ConfigError:
        online = None
    rows = []
    for site in sites.every(c):
        state = "revoked" if site.revoked else "online" if online and site.node_id in online else "offline"
        if online is None and state == "offline":
            state = "enrolled"
        rows.append((site.name, state, site.last_seen, node_key.fingerprint(site.public_key)))
    rows += [(name, f"invited until {_minute(expires)}", "", "") for name, expires in sites.invited(c)]
    keys = ("name", "state", "last_seen", "fingerprint")
    if arguments.json:
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
    elif not rows:
        print("No sites yet: fedscan server invite SITE")
    else:
        _table(
            ("site", "state", "last seen (UTC)", "key"),
            [(name, state, "" if state == "online" else _minute(seen), key) for name, state, seen, key in rows],
        )
    if online is None and rows and not arguments.json:
        print("Who is online is not known: the coordinator does not run.")
    return 0


def _person_remove(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import people

    people.remove(_coordinator(arguments), arguments.name)
    print(f"{arguments.name} has no access any more.")
    return 0


def _person_list(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import people

    rows = [(person.name, person.role, person.public_key) for person in people.every(_coordinator(arguments))]
    if rows:
        _table(("name", "role", "public key"), rows)
    else:
        print("Nobody yet: fedscan server person add NAME")
    return 0


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns, never cut; one that holds nothing is left out."""
    used = [i for i, name in enumerate(head) if any(row[i] for row in rows)]
    width = {i: max(len(head[i]), *(len(row[i]) for row in rows)) for i in used}
    for row in (head, *rows):
        print("  ".join(row[i].ljust(width[i]) for i in used).rstrip())


def _check(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import check

    marks = {"ok": "✓", "note": "·", "bad": "✗"}
    items = []
    for item in check.check(_coordinator(arguments)):
        items.append(item)
        if not arguments.json:
            print(f"{marks[item.verdict]} {item.text}" + (f"\n    {item.remedy}" if item.remedy else ""), flush=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(item) for item in items], indent=2))
    return 1 if any(item.verdict == "bad" for item in items) else 0


def _cert_renew(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import pki

    c = _coordinator(arguments)
    until = pki.renew(c)
    print(f"The certificate for {c.host} is good until {until:%Y-%m-%d}. Stop and start to use it.")
    return 0


def _cert_install(arguments: argparse.Namespace) -> int:
    from fedscan_server.coordinator import pki

    c = _coordinator(arguments)
    pki.install(c, arguments.certificate, arguments.key, arguments.ca)
    print(f"Installed for {c.host}. Stop and start to use it.")
    return 0
