"""`fedscan agent start`, `status`, `pause`, `resume` and `stop`: a site's connection to its coordinator."""

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedscan import stopping
from fedscan_core.errors import FedscanError

_LOOK_SECONDS = 5.0  # how soon the terminal says that a run waits

_START = """\
Keeps a site connected to its coordinator, in the foreground, until Ctrl-C, SIGTERM or `fedscan agent stop`. It opens
one outbound HTTPS connection to the coordinator's address and nothing else; no port is opened to the network. After
network cuts, restarts of a proxy or of the server it reconnects by itself, for ever.

  fedscan agent start /srv/fedscan/site
  systemctl enable --now fedscan-agent       as a service: client/deploy/fedscan-agent.service

HTTPS_PROXY and NO_PROXY are honoured. What its parts print is in SITE_DIR/agent/*.log; none of it leaves the site.
One agent serves a site: a second one is refused. A round in progress when it stops is lost, and stays charged."""

_STATUS = """\
Shows whether a site's agent runs, since when, what its parts last did, and whether the coordinator sees the site.

  fedscan agent status /srv/fedscan/site
  fedscan agent status /srv/fedscan/site --json --offline    without asking the coordinator

Exit code 0 if it runs, 3 if it is paused or stopped."""

_PAUSE = """\
Takes a site out of every run without stopping its agent: from now on it answers nothing, also after a reboot, until
`fedscan agent resume`. A round in progress is lost, and stays charged.

  fedscan agent pause /srv/fedscan/site"""

_RESUME = """\
Ends a pause. Runs that the site has approved go on with it.

  fedscan agent resume /srv/fedscan/site"""

_STOP = """\
Stops a site's agent and waits until it has stopped. A service manager may start it again; `systemctl stop` does not.

  fedscan agent stop /srv/fedscan/site"""


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds the five commands to those of `fedscan agent`."""
    start = _command(agent, "start", "connect to the coordinator and take part in runs", _START, _start)
    start.add_argument("--quiet", action="store_true", help="print errors only")
    status = _command(agent, "status", "does it run, and does the coordinator see it?", _STATUS, _status)
    status.add_argument("--json", action="store_true", help="print JSON on standard output")
    status.add_argument("--offline", action="store_true", help="do not ask the coordinator")
    _command(agent, "pause", "answer nothing until resumed", _PAUSE, _pause)
    _command(agent, "resume", "end a pause", _RESUME, _resume)
    _command(agent, "stop", "stop the running agent", _STOP, _stop)


def _command(
    agent: "argparse._SubParsersAction[Any]",
    name: str,
    help_: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = agent.add_parser(name, help=help_, description=text, formatter_class=plain)
    parser.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
    parser.set_defaults(command=run)
    return parser


def _start(arguments: argparse.Namespace) -> int:
    from fedscan_client.node import start

    def tell(line: str) -> None:
        if not arguments.quiet:
            print(line, flush=True)

    with stopping.on_signal("stopping") as stop:
        threading.Thread(target=_tell_of_waiting, args=(arguments.site, stop, tell), daemon=True).start()
        start.start(arguments.site, stop, tell)
    return 0


def _tell_of_waiting(folder: Path, stop: threading.Event, tell: Callable[[str], None]) -> None:
    """Says once of each run that it waits for a person: nobody looks at `agent runs` unasked."""
    told: set[str] = set()
    while not stop.wait(_LOOK_SECONDS):
        for run_id in _waiting(folder):
            if run_id not in told:
                told.add(run_id)
                tell(f"{time.strftime('%H:%M:%S')} a run waits for you: fedscan agent show {folder} {run_id}")


def _waiting(folder: Path) -> list[str]:
    """The runs that wait for a person here; none where they cannot be read."""
    from fedscan_client import approvals
    from fedscan_client import site as sites

    try:
        return [asked.run_id for asked in approvals.every(sites.load(folder)) if asked.state == "pending"]
    except FedscanError:
        return []


def _status(arguments: argparse.Namespace) -> int:
    from fedscan_client.node import status

    told = status.report(arguments.site, ask=not arguments.offline)
    told["waiting"] = _waiting(arguments.site)
    if arguments.json:
        print(json.dumps(told, indent=2))
    else:
        by = f" (process {told['pid']})" if told["pid"] is not None else ""
        print(f"{told['site']} at {told['coordinator']}, {told['address']}: {told['state']}{by}")
        if told["paused"] and told["state"] == "stopped":
            print("It is also paused: `fedscan agent resume` before it takes part again.")
        for part, said in told["parts"].items():
            print(f"  {said['utc'][:19].replace('T', ' ')}  {part}: {said['what']}")
        if "seen" in told:
            last = told["seen"]["last_seen"][:16].replace("T", " ")
            seen = "online" if told["seen"]["online"] else f"offline, last seen {f'{last} UTC' if last else 'never'}"
            print(f"The coordinator sees this site {seen}.")
        elif "seen_problem" in told:
            print(f"The coordinator could not be asked: {told['seen_problem']}")
        for run_id in told["waiting"]:
            print(f"A run waits for a decision: fedscan agent show {arguments.site} {run_id}")
    return 0 if told["state"] == "running" else 3


def _pause(arguments: argparse.Namespace) -> int:
    from fedscan_client.node import status

    print("Paused: the site answers nothing." if status.pause(arguments.site) else "It was paused already.")
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    from fedscan_client.node import status

    done = status.resume(arguments.site)
    print("Resumed." if done else "It was not paused.")
    if status.running(arguments.site.absolute()) is None:
        print("No agent runs: fedscan agent start", arguments.site)
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from fedscan_client.node import status

    print("Stopped." if status.stop(arguments.site) else "No agent was running.")
    return 0
