"""What a researcher reads before a run is sent: the question, each hospital's answer by its policy, the price."""

import io

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedscan.launch import Prospect, Prospects
from fedscan.profiles import Profile
from fedscan.view import NO_PRIVACY

_WIDTH = 80
_NAME = 22  # columns; longer names take two lines
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def show(found: Prospects, profile: Profile, console: Console) -> None:
    """Prints the page; it fits 80 columns, and is no wider than 100."""
    parts: list[RenderableType] = [_head(found, profile), "", _asked(found), "", _sites(found), _remarks(found), ""]
    parts += [_price(found), "", _verdict(found)]
    if console.is_terminal:
        console.print(Group(*parts), width=min(max(console.width, 40), 100))
        return
    as_there = io.TextIOWrapper(io.BytesIO(), encoding=console.encoding)  # says which characters can be drawn
    plain = Console(file=as_there, width=_WIDTH, highlight=False)
    with plain.capture() as page:
        plain.print(Group(*parts))
    for line in page.get().splitlines():  # a pipe or a file: no spaces at the ends of lines
        console.print(line.rstrip(), markup=False, soft_wrap=True)


def size(number: float) -> str:
    """Bytes for people: 55.6 kB."""
    unit = 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.0f} {_UNITS[unit]}" if unit == 0 or number >= 99.95 else f"{number:.3g} {_UNITS[unit]}"


def _head(found: Prospects, profile: Profile) -> Text:
    run = found.run
    head = Text.assemble(("Run ", ""), (run.name, "bold"), f" at {profile.coordinator} ({profile.address})")
    head.append(f"\nlaunched by {profile.person}")
    if not run.privacy.enabled:
        head.append(f"\n{NO_PRIVACY}: this run protects nobody; only phantom or public cohorts admit it.", "bold red")
    return head


def _asked(found: Prospects) -> Table:
    run, study = found.run, found.run.study
    rows = {
        "purpose": study.purpose,
        "question": study.question,
        "ethics approval": study.ethics_approval,
        "agreement": study.data_use_agreement,
        "contact": study.contact,
    }
    keys = {"ethics approval": "ethics_approval", "agreement": "data_use_agreement"}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        missing = Text(f"not given: study.{keys.get(name, name)}", style="yellow")
        grid.add_row(Text(name), Text(value) if value else missing)
    train = run.train
    steps = "one step" if train.local_steps == 1 else f"{train.local_steps} steps"
    grid.add_row(
        Text("training"),
        Text(
            f"{run.model.name} ({found.parameters:,} parameters), {' / '.join(run.task.labels)}; "
            f"{train.rounds} rounds of {steps}"
        ),
    )
    grid.add_row(Text("privacy"), Text(_privacy(found)))
    return grid


def _privacy(found: Prospects) -> str:
    run = found.run
    if not run.privacy.enabled:
        return NO_PRIVACY
    unit = run.privacy.unit
    if run.privacy.target_epsilon is not None:
        text = f"at most epsilon {run.privacy.target_epsilon:g} at each site"
    else:
        text = f"noise {run.privacy.noise_multiplier:g}; epsilon follows from each site's size"
    asked = "training and private evaluation" if run.evaluation.private else "training, without private evaluation"
    deltas = [site.plan.delta for site in found.sites if site.plan is not None]
    delta = f" (delta {max(deltas):.0e})" if deltas else ""
    return f"{text}{delta}, for each {unit}; {asked}"


def _sites(found: Prospects) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("site", overflow="fold", min_width=8, max_width=_NAME)
    table.add_column("now", no_wrap=True, min_width=len("offline"))
    for name in ("patients", "epsilon", "left", "noise"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    table.add_column("by its policy", no_wrap=True, min_width=len("asks a person"))
    for site in found.sites:
        now = Text("online", "green") if site.online else Text("offline", "yellow")
        patients = str(site.patients_declared) if site.patients_declared else "-"
        table.add_row(Text(site.name), now, patients, *_spends(site), _answer(site))
    return table


def _spends(site: Prospect) -> tuple[str, str, str]:
    """epsilon, what is left of the site's budget before the run, noise."""
    left = site.policy.get("remaining")
    epsilon = left.get("epsilon") if isinstance(left, dict) else None
    shown = f"{epsilon:.3g}" if isinstance(epsilon, int | float) else "-"
    if site.plan is None:
        return "-", shown, "-"
    if not site.plan.noise_multiplier:
        return "no bound", shown, "none"
    return f"{site.plan.epsilon:.3g}", shown, f"{site.plan.noise_multiplier:.3g}"


def _answer(site: Prospect) -> Text:
    if site.refusal is not None:
        return Text("refuses", "red")
    return Text("asks a person", "cyan") if site.approval == "manual" else Text("takes part", "green")


def _remarks(found: Prospects) -> RenderableType:
    """Why somebody would refuse, a line for each reason; who is away; what the words of the table mean."""
    refusals = Table.grid(padding=(0, 2, 0, 0))
    refusals.add_column(overflow="fold", max_width=_NAME)
    refusals.add_column(overflow="fold")
    for site in found.sites:
        for number, reason in enumerate((site.refusal or "").split("; ") if site.refusal is not None else ()):
            refusals.add_row(Text(site.name if number == 0 else "", "red"), Text(reason))
    parts: list[RenderableType] = (
        ["", Text("Refusals, and their reasons", "bold"), refusals] if _refusing(found) else []
    )
    legend = "patients: declared by the site; epsilon: of this run; left: of the site's budget before it"
    if any(site.refusal is None and site.approval == "manual" for site in found.sites):
        hours = found.run.federation.approval_hours
        legend += f"; asks a person: somebody there must approve, and is waited for up to {hours:g} hours"
    last = [site.name for site in found.sites if site.refusal is None and _takes_the_last_delta(site)]
    if last:
        legend += f". It takes the last delta of {', '.join(last)}: no further run like it would fit there"
    away = [site for site in found.sites if not site.online and site.refusal is None]
    notes = [f"{site.name} was last seen {_time(site.last_seen)}." for site in away[:5]]
    if len(away) > len(notes):
        notes.append(f"{len(away) - len(notes)} more are offline.")
    return Group(*parts, "", Text(" ".join([legend + ".", *notes]), "dim"))


def _takes_the_last_delta(site: Prospect) -> bool:
    """Epsilon may be left, and yet no other run fits: delta adds up too where the site's gate is "sum"."""
    left = site.policy.get("remaining")
    delta = left.get("delta") if isinstance(left, dict) else None
    if site.plan is None or not isinstance(delta, int | float) or site.policy.get("gate") != "sum":
        return False
    return site.plan.delta > 0 and delta - site.plan.delta < site.plan.delta * (1 - 1e-9)


def _refusing(found: Prospects) -> bool:
    return len(found.willing) < len(found.sites)


def _time(utc: str) -> str:
    """To the minute."""
    return f"{utc[:16].replace('T', ' ')} UTC" if utc else "never"


def _price(found: Prospects) -> Table:
    run = found.run
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    whole = (found.bytes_down + found.bytes_up) * run.train.rounds
    grid.add_row(
        Text("traffic"),
        Text(
            f"{size(found.bytes_down)} to and {size(found.bytes_up)} from each site in a round; "
            f"{size(whole)} in all for each"
        ),
    )
    grid.add_row(
        Text("time"),
        Text(
            f"at least {_minutes(found.least_minutes)}, once the sites agree: 3 s a round or the time on a line of "
            "1 Gbit/s; the sites' training comes on top"
        ),
    )
    grid.add_row(Text("valid"), Text(f"until {found.order.valid_until[:10]}; no site follows this order after that"))
    return grid


def _minutes(number: float) -> str:
    if number < 1.5:
        return f"{max(1, round(number * 60))} seconds"
    return f"{number:.0f} minutes" if number < 120 else f"{number / 60:.1f} hours"


def _verdict(found: Prospects) -> Text:
    if found.faults:
        return Text(f"It would not start: {'; '.join(found.faults)}.", "bold red")
    text = f"{len(found.willing)} of {len(found.sites)} sites would take part"
    return Text(f"{text}; {found.run.aggregation.min_sites} are needed in each round.", "bold")
