"""The whole checklist, in the order in which things are put right."""

from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path

from fedscan_client import connection as connections
from fedscan_client import site
from fedscan_client.check import machine, network, patients, policies, records, rehearsal
from fedscan_client.check.finding import Finding, fail, skip
from fedscan_client.consent import Register
from fedscan_client.site import Site
from fedscan_core.errors import ConfigError, FedscanError


def findings(folder: Path) -> Iterator[Finding]:
    """Every finding, one by one as it is made: the last ones take seconds. Changes nothing.

    Args:
        folder: the site's; without a usable site.toml only network and machine are looked at.

    Raises:
        ConfigError: there is no such folder, or it is no site's.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder.", remedy="Give the site's folder, which holds site.toml.")
    if not any(
        (folder / name).exists() for name in (site.FILE, connections.FILE, connections.NODE_KEY, "audit", site.RETIRED)
    ):
        raise ConfigError(
            f"{folder} is no site's folder: it holds no {site.FILE}.",
            remedy="Give the folder that enrol made; a new one: fedscan agent enrol INVITE.toml",
        )
    if (folder / site.RETIRED).exists():
        yield fail("site", "This site was retired.", "A new site gets a folder and a name of its own.")
        return
    yield from _guarded("coordinator", lambda: network.look(folder))
    yield from _guarded("folder", lambda: machine.look(folder))
    yield from _guarded("gpu", lambda: [machine.gpu()])
    try:
        here = site.load(folder)
    except FedscanError as error:
        yield policies.broken(error)
        yield skip("rehearsal", "not possible without site.toml")
        return
    yield from _guarded("site.toml", lambda: _name(here))
    yield from _guarded("site key", lambda: [records.key(here)])
    yield from _guarded("cache", lambda: [records.encrypted_cache(here)])
    yield from _guarded("ledger", lambda: [records.budget(here)])
    yield from _guarded("audit log", lambda: records.audit_log(here))
    yield from _guarded("policy", lambda: policies.look(here, date.today()))
    yield from _patients(here)


def _name(here: Site) -> Iterator[Finding]:
    """The coordinator knows the site under the name of its enrolment, and drops answers under any other."""
    if (here.folder / connections.FILE).exists():
        enrolled = connections.load(here.folder).site
        if enrolled != here.name:
            yield fail(
                "site.toml",
                f"It says name = '{here.name}'; the site is enrolled as '{enrolled}'.",
                f'Put name = "{enrolled}" back into {here.folder / site.FILE}.',
            )


def _patients(here: Site) -> Iterator[Finding]:
    """Consent, cohort, rehearsal: each needs the one before."""
    register: list[Register | None] = []

    def consents() -> Iterator[Finding]:
        register.append(patients.register_of(here))
        yield from patients.consents(here, register[0])

    found = list(_guarded("consent register", consents))
    yield from found
    if not register or any(it.state == "fail" for it in found):
        yield skip("cohort", "not looked at without a consent register")
        yield skip("rehearsal", "not possible without a consent register")
        return
    run = rehearsal.run_for([], here.policy.min_noise_multiplier)
    try:
        images, left_out = patients.all_images(here, run)
    except (FedscanError, OSError, KeyError, ValueError) as error:
        yield _broke("cohort", error)
        yield skip("rehearsal", "not possible without a cohort")
        return
    yield from _guarded("cohort", lambda: patients.counts(here, register[0], images, left_out))
    yield from _guarded("rehearsal", lambda: rehearsal.step(here, register[0], images))


def _guarded(topic: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What goes wrong in one check is that check's finding: the others still have to be made."""
    try:
        yield from look()
    except Exception as error:  # every kind: this list is what a person reads when something is broken
        yield _broke(topic, error)


def _broke(topic: str, error: Exception) -> Finding:
    """Our own errors say what to do; of others only the kind is told, their text may name a patient's file."""
    if isinstance(error, FedscanError):
        return fail(topic, error.message, error.remedy or "See client/docs/.")
    if isinstance(error, PermissionError):
        return fail(topic, f"{error.filename} may not be read.", "Run this as the agent's own user.")
    return fail(topic, f"This check itself failed ({type(error).__name__}).", "Tell the maintainers this line.")
