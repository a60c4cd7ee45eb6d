"""The consent register and the cohort, in numbers. They are this hospital's own: findings with them are `local`."""

from collections import Counter
from collections.abc import Iterator
from datetime import date

from fedscan_client import cohort, consent, keys
from fedscan_client.check.finding import Finding, fail, ok, skip, warn
from fedscan_client.cohort import Image
from fedscan_client.consent import Register
from fedscan_client.intake import cache, cache_keys
from fedscan_client.site import Site
from fedscan_core.config import RunConfig


def register_of(here: Site) -> Register | None:
    """The register as a round would read it; None where the site has none. Errors as `consent.load`."""
    if here.consent is None:
        return None
    key = here.names(keys.load(here.folder, here.key))
    return consent.load(here.consent, key, site_folder=here.folder, today=date.today())


def may_train(register: Register | None, image: Image, today: date) -> bool:
    """Whether an image's patient may be used today. Stricter than a round: a guardian's permit is not enough here."""
    if register is None:
        return True
    decision = register.decide(image.patient)
    ended = image.until is not None and image.until < today
    return decision.permit and not decision.by_guardian and not ended


def consents(here: Site, register: Register | None) -> Iterator[Finding]:
    """Whether the register is there and fresh."""
    topic = "consent register"
    if here.consent is None or register is None:
        if here.policy.research_cohort:
            yield skip(topic, "none; the cohort is marked phantom or public (policy.research_cohort)")
        else:
            yield fail(
                topic, "site.toml has no [consent]: every run is refused.", "Name the register: client/docs/consent.md"
            )
        return
    age = (date.today() - register.drawn_up).days
    left = here.consent.max_age_days - age
    words = f"drawn up on {register.drawn_up}, {age} days ago; it may be {here.consent.max_age_days} days old"
    permits = sum(decision.permit for decision in register.decisions.values())
    if left <= max(1, here.consent.max_age_days // 10):
        yield warn(topic, f"It is {words}.", f"Export a fresh one to {here.folder / here.consent.path}.")
    else:
        yield ok(topic, words)
    if register.decisions and not permits and not register.others.permit:
        yield fail("consents", "It permits nobody.", f"fedscan agent consent check {here.folder}", local=True)
    elif register.notes:
        yield warn(
            "consents",
            f"{permits} patients permitted; {sum(register.notes.values())} entries were not understood.",
            f"fedscan agent consent check {here.folder}",
            local=True,
        )
    elif register.others.permit:
        yield ok("consents", f"everybody but {len(register.decisions) - permits} who objected", local=True)
    else:
        yield ok("consents", f"{permits} of {len(register.decisions)} patients in it permitted", local=True)


def counts(here: Site, register: Register | None, images: list[Image], left_out: int) -> Iterator[Finding]:
    """How large the cohort is, beside what is declared. A difference is nobody's business outside."""
    today = date.today()
    may = {image.patient for image in images if may_train(register, image, today)}
    there = {image.patient for image in images}
    split = Counter(dict.fromkeys((image.split, image.patient) for image in images if image.patient in may))
    parts = Counter(name for name, _ in split)
    words = f"{len(there)} patients with {len(images)} images, {len(may)} of them permitted today ("
    words += ", ".join(f"{parts[name]} {name}" for name in ("train", "val", "test")) + ")"
    ingest = f"fedscan agent ingest {here.folder}"
    if not there:
        yield fail("cohort", "There is nobody in it.", f"{ingest} --dry-run says why.", local=True)
    elif not parts["train"]:
        yield fail("cohort", f"{words}: nobody to train on.", f"See labels and consent: {ingest} --dry-run", local=True)
    elif left_out:
        yield warn(
            "cohort", f"{words}; {left_out} patients cannot be read.", f"They are named by: {ingest}", local=True
        )
    else:
        yield ok("cohort", words, local=True)
    declared = here.patients_declared
    if declared and there and not 0.5 <= len(may) / declared <= 2:
        yield warn(
            "cohort size",
            f"{declared} patients are declared, {len(may)} are here.",
            "Declare what you expect before the ledger opens; afterwards take in more, or leave it. It only weighs.",
            local=True,
        )
    labels = Counter(image.label for image in images)
    if there and len(labels) < 2:
        yield warn("labels", "All images have one label.", "Check the label table ([intake] labels).", local=True)
    elif there:
        yield ok("labels", ", ".join(f"{name} {count}" for name, count in sorted(labels.items())[:10]), local=True)


def all_images(here: Site, run: RunConfig) -> tuple[list[Image], int]:
    """Every image of the site, undecoded, and how many patients cannot be read.

    Raises:
        SiteKeyError: the key cannot be had, or is not the cache's.
        DataError, OSError: a research table cannot be read.
    """
    if here.table is None and cache_keys.is_cache(here.cache):
        cache_keys.check_key(here.cache, keys.load(here.folder, here.key))
    elif here.table is None and not cache.patients(here.cache):
        return [], 0
    images, left_out = cohort.images_of(here, run)
    return images, len(left_out)
