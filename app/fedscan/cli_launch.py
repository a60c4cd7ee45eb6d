"""`fedscan login`, `launch`, `runs`, `watch`, `stop`, `resume`, `fetch`: a researcher and the coordinators."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import httpx
    from rich.console import Console

    from fedscan import people
    from fedscan.launch import Prospects
    from fedscan.profiles import Profile
    from fedscan_core.config import RunConfig
    from fedscan_core.order import Order

_LOGIN = """\
Exchanges a coordinator's invitation for a login, and makes the key that signs what you launch there. The key stays on
this machine. Without INVITE it lists where you are logged in.

  fedscan login ada.invite.toml
  fedscan login ada.invite.toml --profile trial     under a name of your own, where you have several coordinators
  fedscan login

Profiles lie in coordinators.toml under $XDG_CONFIG_HOME/fedscan (~/.config/fedscan); its `default` is the one that is
meant where no --profile is given. A new invitation to the same coordinator keeps your key."""

_LAUNCH = """\
Asks real hospitals to train the RUN.toml that `fedscan simulate` trains on pretend ones. First it shows the sites, what
each would answer by its policy and why, the epsilon it would cost each, bytes and minutes; then it asks you; then it
signs the order with your key and sends it.

  fedscan launch my.toml --dry-run          only look: nothing is sent
  fedscan launch my.toml
  fedscan launch my.toml --yes --wait       no question; stay until the run has ended
  fedscan launch my.toml --dry-run --json > before.json

Fill in [study] and [federation] (fedscan config --explain study): people at the hospitals read them before they agree.
Exit code 2 if the run would not start: nothing was sent. With --wait 1 if it failed or was stopped."""

_WATCH = """\
Shows a run as `fedscan simulate` does, from where it is until it ends. Ctrl-C ends the watching, not the run.

  fedscan watch my-run-3f
  fedscan watch my-run-3f --json      at the end: the run's state and summary on standard output

A run may be named by the beginning of its id. Exit code 1 if it failed or was stopped."""

_RUNS = """\
Lists the coordinator's runs, the newest first, with the state and the last round of each.

  fedscan runs
  fedscan runs --json"""

_STOP = """\
Ends a run between two messages. What sites have spent stays spent; `fedscan resume` goes on after the last whole round.

  fedscan stop my-run-3f"""

_RESUME = """\
Goes on with a run that was stopped or failed, after its last whole round.

  fedscan resume my-run-3f"""

_FETCH = """\
Brings a run's folder here: run.toml, rounds.jsonl, summary.json and, once it is finished, model.safetensors. It is
checked against the coordinator's hash, and is there whole or not at all.

  fedscan fetch my-run-3f
  fedscan fetch my-run-3f --out results/first"""


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the commands to those of `fedscan`."""

    def new(name: str, text: str, description: str, command: Any) -> argparse.ArgumentParser:
        plain = argparse.RawDescriptionHelpFormatter
        made: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=description, formatter_class=plain
        )
        made.add_argument("--profile", metavar="NAME", help="the coordinator; see `fedscan login`")
        made.set_defaults(command=command)
        return made

    login = new("login", "log in at a coordinator", _LOGIN, _login)
    login.add_argument("invite", nargs="?", metavar="INVITE", type=Path, help="the file that the coordinator sent")
    launch = new("launch", "ask hospitals to train a RUN.toml", _LAUNCH, _launch)
    launch.add_argument("run", metavar="RUN.toml", type=Path, help="the experiment (fedscan config)")
    launch.add_argument("--dry-run", action="store_true", help="show what would happen, and send nothing")
    launch.add_argument("--wait", action="store_true", help="watch the run until it ends")
    launch.add_argument("--set", metavar="key=value", action="append", default=[], help="override a key of RUN.toml")
    launch.add_argument("--yes", action="store_true", help="do not ask before sending")
    launch.add_argument("--json", action="store_true", help="print JSON on standard output")
    runs = new("runs", "list the coordinator's runs", _RUNS, _runs)
    runs.add_argument("--json", action="store_true", help="print JSON on standard output")
    watch = new("watch", "watch a run", _WATCH, _watch)
    watch.add_argument("--json", action="store_true", help="print JSON on standard output at the end")
    stop = new("stop", "end a run; it stays resumable", _STOP, _stop)
    resume = new("resume", "go on with a run that was ended", _RESUME, _resume)
    fetch = new("fetch", "bring a run's folder here", _FETCH, _fetch)
    fetch.add_argument("--out", metavar="DIR", type=Path, help="the folder to make; default runs/RUN")
    for one in (watch, stop, resume, fetch):
        one.add_argument("run", metavar="RUN", help="a run's id, or the beginning of it")


# ---------------------------------------------------------------------------------------------------------- commands


def _login(arguments: argparse.Namespace) -> int:
    from fedscan import people, profiles
    from fedscan_core import invite as invites
    from fedscan_core import order
    from fedscan_core.errors import ConfigError

    if arguments.invite is None:
        return _list_profiles(arguments.profile)
    invite = invites.read(arguments.invite, "person")
    name = arguments.profile or profiles.name_for(invite.coordinator)
    profiles.check_name(name)
    known = profiles.every()[0].get(name)
    if known is not None and known.address != invite.address:
        raise ConfigError(
            f"The profile '{name}' is of another coordinator ({known.address}).", remedy="Give a free --profile NAME."
        )
    key = profiles.make_key(name)
    with people.connect(invite.address, invite.ca) as http:
        people.check(people.hello(http), datetime.now(UTC))
        try:
            got = people.login(http, invite.token, order.public_text(key))
        except people.Unreachable as error:
            remedy = "Try again; if the invitation turns out to be used, ask for a new one. Your key stays."
            raise people.Unreachable(error.message, remedy=remedy) from None
    found = profiles.Profile(name, invite.address, got.coordinator, invite.ca, got.name, got.role, got.token)
    default = profiles.save(found)
    print(f"Logged in at {got.coordinator} ({invite.address}) as {got.name}, {got.role}.")
    print(
        f"Your key signs what you launch; it is in {profiles.folder() / 'keys' / name}. Keep a copy where it is safe."
    )
    print("Hospitals that admit only launchers whom they know put this into site.toml:\n")
    print(f'  [policy.launchers]\n  {got.name} = "{order.public_text(key)}"\n')
    print("Next: fedscan launch RUN.toml --dry-run" + ("" if default else f" --profile {name}"))
    return 0


def _list_profiles(wanted: str | None) -> int:
    from fedscan import profiles

    profiles.load(wanted)  # none at all, or none of that name: an error that helps
    found, default = profiles.every()
    for name, each in sorted(found.items()):
        if wanted in (None, name):
            mark = "*" if name == default else " "
            print(f"{mark} {name}: {each.coordinator} ({each.address}), {each.person}, {each.role}")
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    from fedscan import profiles, view
    from fedscan_core import config_file
    from fedscan_core.errors import ConfigError

    run = config_file.load(arguments.run, arguments.set)
    profile = profiles.load(arguments.profile)
    key = profiles.key(profile.name)
    if not (arguments.dry_run or arguments.yes or sys.stdin.isatty()):
        raise ConfigError("Nobody is there to be asked.", remedy="Add --yes to send it, or --dry-run to look.")
    progress, results = view.consoles(arguments.json)

    with _client(profile) as http:
        with _busy(progress, "asking the coordinator"):
            from fedscan import launch, launch_page, people

            now = datetime.now(UTC)
            people.check(people.hello(http), now)
            sent, init = launch.deployed(run)
            order = launch.make_order(sent, profile, key, now)
            found = launch.look(sent, order, people.sites(http), profile.role, now)
        told = launch.as_json(found, profile)
        shown = not arguments.json or not (arguments.dry_run or arguments.yes)
        if shown:
            launch_page.show(found, profile, results)
        if arguments.dry_run:
            if arguments.json:
                print(json.dumps(told, indent=2))
            elif not found.faults:
                results.print("Nothing was sent. Without --dry-run it asks, and then sends.", soft_wrap=True)
            return 2 if found.faults else 0
        if found.faults:
            why = "The page above says why." if shown else _reasons(found)
            raise ConfigError(f"Nothing was sent: {'; '.join(found.faults)}.", remedy=why)
        if not arguments.yes and not _agreed(results):
            print("fedscan: nothing was sent.", file=sys.stderr)
            return 2
        _send(http, order, sent, init, progress)
        if not arguments.wait:
            if arguments.json:
                print(json.dumps({**told, "sent": True}, indent=2))
            else:
                results.print(f"{order.run_id} is on its way. Watch it: fedscan watch {order.run_id}", soft_wrap=True)
            return 0
        print(f"fedscan: {order.run_id} is on its way.", file=sys.stderr)
        return _until_end(http, profile, order.run_id, 0, arguments.json)


def _runs(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from fedscan import people, profiles, view

    profile = profiles.load(arguments.profile)
    with _client(profile) as http:
        found = people.runs(http)
    if arguments.json:
        print(json.dumps([asdict(run) for run in found], indent=2))
    else:
        view.show_runs(found, view.consoles(False)[1])
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from fedscan import people, profiles, watch

    profile = profiles.load(arguments.profile)
    with _client(profile) as http:
        run = watch.find(http, arguments.run)
        start = max(0, people.run(http, run.run_id).progress_lines - 1)  # the past is in `fedscan fetch`
        return _until_end(http, profile, run.run_id, start, arguments.json)


def _stop(arguments: argparse.Namespace) -> int:
    with _one_run(arguments) as (http, run, _):
        from fedscan import people

        people.stop(http, run.run_id)
        print(f"{run.run_id} ends after the message in progress. Go on later: fedscan resume {run.run_id}")
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    with _one_run(arguments) as (http, run, _):
        from fedscan import people

        people.resume(http, run.run_id)
        print(f"{run.run_id} goes on after round {run.round}. Watch it: fedscan watch {run.run_id}")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    with _one_run(arguments) as (http, run, _):
        from fedscan import fetch, people, view

        progress, results = view.consoles(False)
        with _ends_tidily(), _busy(progress, f"fetching {run.run_id}"):
            out = fetch.fetch(http, run.run_id, arguments.out or Path("runs") / run.run_id)
            summary = people.run(http, run.run_id).summary
    if summary is not None:
        view.show_summary(summary, str(out), results)
    else:
        print(f"What there is of {run.run_id} ({run.state}, round {run.round} of {run.rounds}) is in {out}.")
    return 0


# ------------------------------------------------------------------------------------------------------------- parts


@contextlib.contextmanager
def _client(profile: "Profile") -> "Iterator[httpx.Client]":
    """A client that is logged in."""
    from fedscan import people

    with people.connect(profile.address, profile.ca, profile.token) as http:
        yield http


@contextlib.contextmanager
def _one_run(arguments: argparse.Namespace) -> "Iterator[tuple[httpx.Client, people.Run, Profile]]":
    """A client that is logged in, the run that is meant, and the profile."""
    from fedscan import profiles, watch

    profile = profiles.load(arguments.profile)
    with _client(profile) as http:
        yield http, watch.find(http, arguments.run), profile


def _send(http: "httpx.Client", order: "Order", run: "RunConfig", init: bytes, progress: "Console") -> None:
    from fedscan import people
    from fedscan_core import config

    try:
        with _busy(progress, "sending"):
            people.submit(http, order, config.to_toml(run), init)
    except KeyboardInterrupt:
        print(f"\nfedscan: if {order.run_id} was sent already, `fedscan runs` lists it.", file=sys.stderr)
        raise


def _agreed(console: "Console") -> bool:
    """Asks on the console that shows the page; only yes is yes."""
    console.print("Send it? [y/N] ", end="", markup=False)
    console.file.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _reasons(found: "Prospects") -> str:
    """The first refusals, for whoever did not see the page."""
    return "; ".join(f"{site.name}: {site.refusal}" for site in found.sites if site.refusal is not None)[:600]


def _until_end(http: "httpx.Client", profile: "Profile", run_id: str, after: int, as_json: bool) -> int:
    """Watches; returns the exit code: 0 finished, 1 failed or stopped, 130 where the watcher left."""
    from dataclasses import asdict

    from fedscan import people, view, watch

    progress, results = view.consoles(as_json)
    detail = people.run(http, run_id)

    def tell(text: str) -> None:
        progress.print(text, soft_wrap=True, markup=False)

    try:
        with _ends_tidily(), view.View(watch.config_of(detail), progress) as show:
            if detail.run.state == "waiting":
                tell("Waiting for the sites to agree.")
            watch.follow(http, run_id, show, after=after, tell=tell)
    except KeyboardInterrupt:
        print(f"\nfedscan: no longer watching; the run goes on. `fedscan stop {run_id}` ends it.", file=sys.stderr)
        return 130
    detail = people.run(http, run_id)
    if as_json:
        print(json.dumps({**asdict(detail.run), "summary": detail.summary}, indent=2))
    elif detail.summary is not None:
        view.show_summary(
            detail.summary, f"{profile.coordinator}'s run folder; bring it here: fedscan fetch {run_id}", results
        )
    if detail.run.state == "finished":
        return 0
    remedy = f"Go on: fedscan resume {run_id}. What there is: fedscan fetch {run_id}"
    print(f"fedscan: {run_id} {_ended(detail.run)} {remedy}", file=sys.stderr)
    return 1


def _ended(run: "people.Run") -> str:
    what = "was stopped" if run.state == "stopped" else "failed"
    return f"{what}: {run.reason.rstrip('.')}." if run.reason else f"{what}."


@contextlib.contextmanager
def _ends_tidily() -> Iterator[None]:
    """SIGTERM ends the command in order: the terminal is given back, half a download is removed."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _busy(console: "Console", what: str) -> "contextlib.AbstractContextManager[Any]":
    """Something moves on a terminal."""
    return console.status(what) if console.is_terminal else contextlib.nullcontext()
