"""What a site has left to spend, what it publishes of its policy, and raising its lifetime budget.

SITE/policy.json    the policy as it was last written to the audit log: a change of site.toml is noticed by it
"""

import json
from dataclasses import dataclass
from typing import Any

from fedscan_client import site as sites
from fedscan_client import two_people
from fedscan_client.audit import log
from fedscan_client.dp import ledger
from fedscan_client.dp.ledger import Budget
from fedscan_client.dp.ledger_file import Row
from fedscan_client.site import Site
from fedscan_core import auditlog, files, policy
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import ConfigError

SEEN = "policy.json"


@dataclass(frozen=True)
class Raise:
    """What became of a wish to raise the budget; `by` is "" while it waits for a second person."""

    before: Budget
    after: Budget
    by: str


def lifetime(here: Site) -> Budget:
    """What site.toml says."""
    return Budget(here.policy.max_epsilon, here.policy.max_delta)


def constants(here: Site) -> Row:
    """What the site's ledger would be opened with. Errors as `ledger.constants`."""
    return ledger.constants(lifetime(here), here.patients_declared, here.policy.gate)


def remaining(here: Site) -> tuple[float, float]:
    """Epsilon and delta that one more run could have now; public, as it follows from admitted plans alone.

    Raises:
        ConfigError: a budget that is none.
        RecordDamaged: the ledger was changed, is gone, or is an older copy.
    """
    return ledger.remaining(here.book, constants(here), here.policy.epsilon_per_year)


def over(here: Site, run_id: str, plan: SitePlan) -> str | None:
    """Why the ledger would not admit a run's plan, in public words, or None. Errors as `remaining`."""
    return ledger.over(here.book, run_id, plan, constants(here), here.policy.epsilon_per_year)


def public_policy(here: Site) -> dict[str, Any]:
    """What the site publishes, fit for JSON. Errors as `remaining`."""
    return policy.public(here.policy, here.name, here.patients_declared, remaining(here))


def note_policy(here: Site) -> None:
    """Writes the policy to the audit log where it is not the one written last."""
    told = policy.public(here.policy, here.name, here.patients_declared, (0.0, 0.0))
    del told["remaining"]
    text = json.dumps(told, sort_keys=True, indent=2) + "\n"
    path = here.folder / SEEN
    if _seen(here) == text:
        return
    with auditlog.exclusive(path):
        if _seen(here) != text:
            log.append(here.folder, "policy", policy=told)
            files.write_atomic(path, text.encode())


def _seen(here: Site) -> str:
    try:
        return (here.folder / SEEN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def raising(here: Site, epsilon: float | None, delta: float | None) -> Raise:
    """What a raise would change; changes nothing. None leaves a value as it is.

    Raises:
        ConfigError: nothing would be raised, or something lowered.
        RecordDamaged: as `remaining`.
    """
    before = lifetime(here)
    if here.ledger.exists() or here.book.counter.exists():
        before = Budget(**ledger.summary(here.book)["budget"])
    after = Budget(before.epsilon if epsilon is None else epsilon, before.delta if delta is None else delta)
    ledger.constants(after, here.patients_declared, here.policy.gate)
    same = after == before and lifetime(here) == after
    if same or after.epsilon < before.epsilon or after.delta < before.delta:
        raise ConfigError(
            f"The budget is epsilon {before.epsilon:g} and delta {before.delta:g}: it is only ever raised.",
            remedy="To allow less from now on, set policy.epsilon_per_year or policy.valid_until in site.toml.",
        )
    return Raise(before, after, "")


def raise_(here: Site, epsilon: float | None, delta: float | None, *, by: str, why: str) -> Raise:
    """Raises the lifetime budget for ever: in the audit log, in the ledger, then in site.toml.

    Where the policy says `two_people = ["budget"]`, a second person must ask for exactly the same within 14 days.
    Stopped half way, ask again: nobody is asked twice once the ledger holds the new budget.

    Args:
        here: the site.
        epsilon: the whole new budget; None leaves it as it is.
        delta: as epsilon.
        by: who decides.
        why: for the audit log.

    Raises:
        ConfigError: as `raising`, no name or no reason, or site.toml cannot be changed by program.
        RecordDamaged, FolderError: the ledger was changed, or an agent holds it.
    """
    wish, name = raising(here, epsilon, delta), two_people.person(by)
    if not why.strip():
        raise ConfigError("Raising a budget needs a reason.", remedy="Give --why.")
    limits = {"max_epsilon": wish.after.epsilon, "max_delta": wish.after.delta}
    text = sites.with_policy(here.folder, limits)  # before anything is written: a file that needs a person's hand
    if wish.after != wish.before:
        if "budget" in here.policy.two_people:
            subject = {key: [it.epsilon, it.delta] for key, it in (("from", wish.before), ("to", wish.after))}
            first = two_people.agree(here.folder, "budget", subject, name, why.strip())
            if first is None:
                return wish
            name, why = f"{first.by} and {name}", f"{first.why}; {why.strip()}"
        told = {"epsilon": wish.after.epsilon, "delta": wish.after.delta, "by": name, "login": two_people.login()}
        log.append(here.folder, "budget", step="raised", why=why.strip(), **told)
        if here.ledger.exists():
            ledger.raise_budget(here.book, wish.after, name)
    files.write_atomic(here.folder / sites.FILE, text.encode())
    return Raise(wish.before, wish.after, name)
