"""Whether the policy says what a person can have meant. Opinions of ours: all but a few are warnings."""

from collections.abc import Iterator
from datetime import date, timedelta

from fedscan_client.check.finding import Finding, fail, ok, warn
from fedscan_client.site import Site
from fedscan_core.errors import FedscanError

LARGE_EPSILON = 10.0  # beyond it the bound on what an attacker learns of one patient says little
_SOON = timedelta(days=30)


def look(here: Site, today: date) -> Iterator[Finding]:
    """The findings on `[policy]` and the declared size; "policy" alone where nothing is odd."""
    found = [*_size(here), *_budget(here), *_days(here, today), *_doors(here)]
    yield from found
    if not found:
        policy = here.policy
        way = "each run waits for a person" if policy.approval == "manual" else "runs within it start by themselves"
        yield ok(
            "policy",
            f"{here.patients_declared} patients declared; epsilon {policy.max_epsilon:g} and delta "
            f"{policy.max_delta:g} for ever; noise from {policy.min_noise_multiplier:g}; {way}",
        )


def _size(here: Site) -> Iterator[Finding]:
    declared = here.patients_declared
    if declared < 1:
        yield fail(
            "declared size",
            "patients_declared is 0: every run is refused.",
            f"Put into {here.folder / 'site.toml'} how many patients will train; it is public and stays as it is.",
        )
    elif declared < 20 and not here.policy.research_cohort:
        yield warn(
            "declared size",
            f"{declared} patients are declared: little is learnt from so few under noise.",
            "Take part once there are more, or declare what you expect.",
        )


def _budget(here: Site) -> Iterator[Finding]:
    policy = here.policy
    if not policy.max_epsilon > 0:
        yield fail("policy", "max_epsilon is 0: every run is refused.", "Set a lifetime budget, for example 8.0.")
    elif policy.max_epsilon > LARGE_EPSILON and not policy.research_cohort:
        yield warn(
            "policy",
            f"max_epsilon is {policy.max_epsilon:g}: above {LARGE_EPSILON:g} the promise to patients is weak.",
            "A common choice lies between 1 and 8; it can be raised later, and never lowered below what is spent.",
        )
    if here.patients_declared and policy.max_delta >= 1 / here.patients_declared:
        yield warn(
            "policy",
            f"max_delta {policy.max_delta:g} is not below 1 / {here.patients_declared} patients.",
            "A delta of that size allows giving one patient away whole: set 1e-5 or less.",
        )
    if policy.min_noise_multiplier < 0.1 and not policy.research_cohort:
        yield warn(
            "policy",
            f"min_noise_multiplier is {policy.min_noise_multiplier:g}: it stops nothing.",
            "0.3 is the floor that is written where nothing is said.",
        )


def _days(here: Site, today: date) -> Iterator[Finding]:
    for name in ("valid_until", "agreement_until"):
        day: date | None = getattr(here.policy, name)
        if day is not None and day < today:
            yield fail("policy", f"{name} = {day} has passed: every run is refused.", "Extend it, if you decide so.")
        elif day is not None and day - today <= _SOON:
            yield warn("policy", f"{name} = {day} is near.", "A run that is going on ends with it; extend it in time.")


def _doors(here: Site) -> Iterator[Finding]:
    policy, kinds = here.policy, {source.kind for source in here.source.values()}
    if policy.research_cohort and (
        here.consent is not None or kinds & {"dicomweb", "dimse-get", "dimse-move", "dimse-store"}
    ):
        yield warn(
            "policy",
            "research_cohort = true lets runs switch privacy off, and this site has a PACS or a consent register.",
            "Take it out unless every image is phantom or public.",
        )
    if policy.approval == "auto-within-policy" and not policy.launchers and not policy.research_cohort:
        yield warn(
            "policy",
            "Runs start by themselves, for whomever the coordinator lets through.",
            'Name who may launch in [policy.launchers], or set approval = "manual".',
        )


def broken(error: FedscanError) -> Finding:
    """site.toml cannot be read."""
    return fail("site.toml", error.message, error.remedy)
