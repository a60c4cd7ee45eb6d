"""`fedscan agent`: the commands for hospital IT, one module each."""

import argparse
from pathlib import Path
from typing import Any

from fedscan import (
    cli_audit_log,
    cli_budget,
    cli_ingest,
    cli_key,
    cli_patient,
    cli_pull,
    cli_quarantine,
    cli_runs,
)

_AGENT_LEDGER = """\
Shows what a site's runs have cost its patients in privacy: the lifetime budget, what is reserved of it and spent, by
run and by round, and what one more run would cost. It checks the whole ledger first, changes nothing, and may be used
while an agent is at work.

  fedscan agent ledger /srv/fedscan/site
  fedscan agent ledger /srv/fedscan/site --run my.toml      would this run still fit?
  fedscan agent ledger /srv/fedscan/site --json > today.json

budget: what site.toml allows for ever. reserved: held by admitted runs, whole, whether they end early or not. spent:
the part of it whose noise may have been drawn. Exit code 2 if the ledger was changed, is gone, or is an older copy."""


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `agent` to the parser of `fedscan`."""
    plain = argparse.RawDescriptionHelpFormatter
    agent = commands.add_parser("agent", help="for hospital IT: look after a site", formatter_class=plain)
    of_agent = agent.add_subparsers(metavar="COMMAND", required=True)
    ledger = of_agent.add_parser(
        "ledger", help="budget, reserved, spent", description=_AGENT_LEDGER, formatter_class=plain
    )
    ledger.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
    ledger.add_argument("--run", metavar="RUN.toml", type=Path, help="price this run instead of the last one again")
    ledger.add_argument("--json", action="store_true", help="print JSON on standard output")
    ledger.set_defaults(command=_agent_ledger)
    topics = (cli_key, cli_pull, cli_ingest, cli_quarantine, cli_patient, cli_runs, cli_budget, cli_audit_log)
    for topic in topics:
        topic.add(of_agent)


def _agent_ledger(arguments: argparse.Namespace) -> int:
    from fedscan_client import agent

    return agent.show_ledger(arguments.site, arguments.run, arguments.json)
