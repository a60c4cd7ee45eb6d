"""`fedscan agent patient` and `fedscan agent consent`: a patient's rights, and the consent register in numbers."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fedscan_client.intake.records import PatientId
    from fedscan_client.keys import SiteKey
    from fedscan_client.site import Site

_SHOW = """\
Shows everything the site holds on one patient: images, the consent they rest on, the runs for which the patient was
eligible (never whether they were drawn), and what those cost the patient in privacy. Changes nothing.

  fedscan agent patient show /srv/fedscan/site -            type the number, then Enter
  fedscan agent patient show /srv/fedscan/site 4711 --issuer HOSPITAL-A
  fedscan agent patient show /srv/fedscan/site - --letter letter.html < number.txt

ID is the number by which the hospital knows the patient, as the register and the image headers have it: case and
leading zeros count. "-" reads it from standard input, so that it does not end up in the shell's history or in the list
of processes. --letter writes a letter in plain words for the patient; it names the number, so it may not lie in the
site's folder."""

_WITHDRAW = """\
Takes one patient out for good: records the withdrawal, destroys the patient's key and files, and lists the runs and
models for which the patient had been eligible. Without --yes it only says what it would do.

  fedscan agent patient withdraw /srv/fedscan/site -
  fedscan agent patient withdraw /srv/fedscan/site - --yes

The patient stays out, whatever the register says, until the register holds a consent given on a later day. Models that
were released are not trained again. The key is gone from this disk at once; backups must not hold keys (see the
README)."""

_CHECK = """\
Reads the consent register as an ingest would, and prints it in numbers: how old it is, how many patients it permits,
why the others are not, and what in it was not understood. It shows no patient and changes nothing.

  fedscan agent consent check /srv/fedscan/site

Exit code 2 if there is no register that can be used: then no patient would be read."""


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds `patient` and `consent` to the parser of `fedscan agent`."""
    plain = argparse.RawDescriptionHelpFormatter
    patient = agent.add_parser("patient", help="what is held on a patient; withdrawal", formatter_class=plain)
    of_patient = patient.add_subparsers(metavar="COMMAND", required=True)
    show = of_patient.add_parser("show", help="everything held on a patient", description=_SHOW, formatter_class=plain)
    withdraw = of_patient.add_parser(
        "withdraw", help="take a patient out and destroy what is held", description=_WITHDRAW, formatter_class=plain
    )
    for parser in (show, withdraw):
        parser.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
        parser.add_argument("id", metavar="ID", help="the hospital's number of the patient; - reads it from stdin")
        parser.add_argument("--issuer", help="who issued the number; default [consent] issuer of site.toml")
        parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    show.add_argument("--letter", metavar="FILE.html", type=Path, help="write a letter for the patient")
    withdraw.add_argument("--yes", action="store_true", help="do it; without it nothing is changed")
    show.set_defaults(command=_show)
    withdraw.set_defaults(command=_withdraw)

    consent = agent.add_parser("consent", help="the consent register", formatter_class=plain)
    of_consent = consent.add_subparsers(metavar="COMMAND", required=True)
    check = of_consent.add_parser("check", help="the register in numbers", description=_CHECK, formatter_class=plain)
    check.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
    check.add_argument("--json", action="store_true", help="print JSON on standard output")
    check.set_defaults(command=_check)


# ------------------------------------------------------------------------------------------------------------ handlers


def _show(arguments: argparse.Namespace) -> int:
    from datetime import date

    from fedscan_client import letter, patients, site
    from fedscan_client.audit import log
    from fedscan_core import files
    from fedscan_core.errors import FolderError

    here = site.load(arguments.site)
    target: Path | None = arguments.letter
    if target is not None and target.resolve().is_relative_to(here.folder.resolve()):
        raise FolderError(
            "A letter names its patient, and nothing in a site's folder may.", remedy="Write it somewhere else."
        )
    who = _patient(arguments, here)
    log.access(here.folder, "what is held on a patient")
    told = patients.show(here, _key(here), who, today=date.today())
    if target is not None:
        contact = here.consent.contact if here.consent else ""
        try:
            files.write_atomic(target, letter.write(told, who, contact).encode())
        except OSError as error:
            raise FolderError(f"The letter cannot be written ({error.strerror}).", remedy="Check --letter.") from None
    if arguments.json:
        print(json.dumps(told, indent=2))
    else:
        _print_patient(told, _console())
    return 0


def _withdraw(arguments: argparse.Namespace) -> int:
    from datetime import date

    from fedscan_client import patients, site

    here = site.load(arguments.site)
    who = _patient(arguments, here)
    told = patients.withdraw(here, _key(here), who, today=date.today(), yes=arguments.yes)
    if arguments.json:
        print(json.dumps(told, indent=2))
    else:
        _print_withdrawal(told, _console())
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from datetime import date

    from fedscan_client import patients, site

    here = site.load(arguments.site)
    told = patients.check(here, _key(here), today=date.today())
    if arguments.json:
        print(json.dumps(told, indent=2))
    else:
        _print_register(told, _console())
    return 0


def _key(here: "Site") -> "SiteKey":
    from fedscan_client import keys

    return keys.load(here.folder, here.key)


def _patient(arguments: argparse.Namespace, here: "Site") -> "PatientId":
    """The patient asked for. Its number is in no error text.

    Raises:
        ConfigError: no number.
    """
    from fedscan_client.consent.lists import is_identifier
    from fedscan_client.intake.records import PatientId
    from fedscan_core.errors import ConfigError

    number = sys.stdin.readline() if arguments.id == "-" else arguments.id
    issuer = arguments.issuer if arguments.issuer is not None else here.consent.issuer if here.consent else ""
    who = PatientId(number.strip(), issuer.strip())
    if not is_identifier(who):
        raise ConfigError("There is no patient number given.", remedy="Give ID, or - and the number on standard input.")
    return who


# ---------------------------------------------------------------------------------------------------------------- text


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _print_patient(told: dict[str, Any], console: "Console") -> None:
    from rich.table import Column, Table

    console.print(f"{told['site']}: patient {told['patient']} on {told['day']}", soft_wrap=True)
    consent = told["consent"]
    console.print(f"Consent: {'yes' if consent['permit'] else 'no'}, {consent['words']}.", soft_wrap=True)
    if consent.get("error"):
        console.print(f"  {consent['error']}", soft_wrap=True)
    else:
        by = ", by a guardian" if consent["by_guardian"] else ""
        days = [f"{word} {consent[what]}" for what, word in (("given", "given"), ("until", "until")) if consent[what]]
        console.print(f"  {'; '.join([consent['basis'], *days])}{by}", soft_wrap=True)
    for row in told["withdrawals"]:
        if row["destroyed"] is None:
            console.print(f"Withdrew on {row['day']}.", soft_wrap=True)
        else:
            _print_counts("destroyed", row["destroyed"], console)
    if told["held"]:
        table = Table("study", "modality", "label", "split", Column("images", justify="right"), title="Images")
        table.title_justify = "left"
        for group in told["held"]:
            words = (group[what] or "-" for what in ("study", "modality", "label", "split"))
            table.add_row(*words, str(group["images"]))
        console.print(table)
    else:
        console.print("No images are held in the cohort.")
    _print_counts("held besides", told["besides"], console)
    if not told["runs"]:
        console.print("Eligible for no run so far.")
        return
    names = ("epsilon", "replace", "delta", "spent")
    table = Table(Column("run", overflow="fold"), "model", "since", *(Column(n, justify="right") for n in names))
    table.title, table.title_justify = "Runs for which the patient was eligible; nobody knows who was drawn", "left"
    for run in told["runs"]:
        prices = (_price(run[what]) for what in ("epsilon", "epsilon_replace_one", "delta", "spent"))
        table.add_row(run["run_id"], run["model"], run["since"], *prices)
    console.print(table)
    both = told["in_all"]
    console.print(f"In all: epsilon {_price(both['epsilon'])} at delta {_price(both['delta'])}.", soft_wrap=True)


def _price(value: float | None) -> str:
    return "no privacy" if value is None else f"{value:.1e}" if 0 < value < 0.001 else f"{value:.3f}"


def _print_withdrawal(told: dict[str, Any], console: "Console") -> None:
    done = told["done"]
    console.print(f"{told['site']}: patient {told['patient']}", soft_wrap=True)
    if not any(told["destroyed"].values()) and not told["runs"]:
        text = "Nothing is held under this number and issuer: are they written as in the image headers?"
        console.print(text, style="bold", soft_wrap=True)
    for before in told["before"]:
        console.print(f"Had withdrawn already on {before}.")
    console.print(f"Withdrawn on {told['day']}." if done else "This would happen; nothing was changed yet:")
    _print_counts("destroyed" if done else "to be destroyed", told["destroyed"], console)
    for run in told["runs"]:
        console.print(f"  was eligible for run {run['run_id']} (model {run['model']})", soft_wrap=True)
    if told["runs"]:
        console.print("  Models of these runs that were released stay as they are.", soft_wrap=True)
    if not done:
        console.print("Add --yes to do it.")


def _print_counts(word: str, counts: dict[str, int], console: "Console") -> None:
    for what, number in counts.items():
        console.print(f"  {word}: {what}: {number}", soft_wrap=True)


def _print_register(told: dict[str, Any], console: "Console") -> None:
    from rich.table import Column, Table

    from fedscan_client.consent import WHY

    age = f"{told['age_days']} of at most {told['max_age_days']} days old"
    console.print(f"{told['site']}: {told['kind']} of {told['drawn_up']}, {age}", soft_wrap=True)
    table = Table(Column("patients", justify="right"), "of whom the register says")
    for reason, count in told["reasons"].items():
        table.add_row(str(count), WHY[reason])
    table.add_row("others", WHY[told["others"]])
    console.print(table)
    console.print(
        f"{told['by_guardian']} permits are a guardian's; {told['withdrawn_here']} patients withdrew here; "
        f"{told['cached']} patients are in the cache.",
        soft_wrap=True,
    )
    for warning in told["warnings"]:
        console.print(f"Note: {warning}", soft_wrap=True)
