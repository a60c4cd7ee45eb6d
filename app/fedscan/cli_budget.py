"""`fedscan agent budget`: what is left to spend, and raising the lifetime budget."""

import argparse
import json
from pathlib import Path
from typing import Any

_WHAT = """\
The lifetime budget of a site: what it may ever spend of its patients' privacy. It never refills.

  fedscan agent budget show SITE_DIR
  fedscan agent budget raise SITE_DIR --epsilon 12 --by "A. Meier" --why "second study, ethics vote 2026-88"
  fedscan agent ledger SITE_DIR                 by run and by round"""

_SHOW = "Shows the lifetime budget and what one more run could have of it now. Changes nothing."

_RAISE = """\
Raises the lifetime budget for ever: everything that left this site, also before, is then promised to be private with
the larger epsilon only. It is written to the audit log, to the ledger, and to site.toml. Stop the agent first.

Without --yes it only says what would be done. Where site.toml says two_people = ["budget"], the first person's word
waits, and it happens once a second person gives the same command with their name within 14 days."""


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command and its parts to `fedscan agent`."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = agent.add_parser(
        "budget", help="what is left to spend; raise it", description=_WHAT, formatter_class=plain
    )
    parts = parser.add_subparsers(metavar="COMMAND", required=True)
    show = parts.add_parser("show", help="what is left", description=_SHOW, formatter_class=plain)
    more = parts.add_parser("raise", help="allow more, for ever", description=_RAISE, formatter_class=plain)
    for part, command in ((show, _show), (more, _raise)):
        part.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
        part.add_argument("--json", action="store_true", help="print JSON on standard output")
        part.set_defaults(command=command)
    more.add_argument("--epsilon", type=float, metavar="E", help="the whole new lifetime epsilon")
    more.add_argument("--delta", type=float, metavar="D", help="the whole new lifetime delta")
    more.add_argument("--by", default="", metavar="NAME", help="who decides; goes into the audit log")
    more.add_argument("--why", default="", metavar="TEXT", help="goes into the audit log")
    more.add_argument("--yes", action="store_true", help="do it; otherwise only say what would be done")


def _show(arguments: argparse.Namespace) -> int:
    from fedscan_client import budget
    from fedscan_client import site as sites

    here = sites.load(arguments.site)
    epsilon, delta = budget.remaining(here)
    year = here.policy.epsilon_per_year
    told = {"lifetime": {"epsilon": here.policy.max_epsilon, "delta": here.policy.max_delta}, "epsilon_per_year": year}
    told |= {"remaining": {"epsilon": epsilon, "delta": delta}}
    if arguments.json:
        print(json.dumps(told, indent=2))
        return 0
    limit = "" if year is None else f" At most epsilon {year:g} within 365 days."
    print(f"Lifetime budget: epsilon {here.policy.max_epsilon:g}, delta {here.policy.max_delta:g}.{limit}")
    print(f"One more run could have epsilon {epsilon:.4g} and delta {delta:.2g}.")
    return 0


def _raise(arguments: argparse.Namespace) -> int:
    from fedscan_client import budget
    from fedscan_client import site as sites

    here = sites.load(arguments.site)
    wish = budget.raising(here, arguments.epsilon, arguments.delta)
    if arguments.yes:
        wish = budget.raise_(here, arguments.epsilon, arguments.delta, by=arguments.by, why=arguments.why)
    waits = arguments.yes and not wish.by
    if arguments.json:
        pair = {name: {"epsilon": it.epsilon, "delta": it.delta} for name, it in _both(wish)}
        print(json.dumps({**pair, "by": wish.by, "done": bool(wish.by), "waits_for_second_person": waits}, indent=2))
        return 0
    change = f"from epsilon {wish.before.epsilon:g}, delta {wish.before.delta:g}"
    change += f" to epsilon {wish.after.epsilon:g}, delta {wish.after.delta:g}"
    if wish.by:
        print(f"The lifetime budget was raised {change}, by {wish.by}.")
    elif waits:
        print(f"Noted, nothing changed yet. A second person must ask for the same within 14 days: raised {change}.")
    else:
        print(f"The lifetime budget would be raised {change}, for ever, also for what left before.")
        print("Nothing was changed. Add --yes, with --by and --why, to do it.")
    return 0


def _both(wish: Any) -> tuple[tuple[str, Any], ...]:
    return ("before", wish.before), ("after", wish.after)
