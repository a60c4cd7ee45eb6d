"""The intake as one function: source -> consent -> kind and quarantine -> de-identification -> pixels -> cache.

Two passes. The first reads headers only and writes down, as keyed HMACs, who is in which object (`scan`, `index`). The
second goes patient by patient and series by series: is the patient cleared? may an image of this kind pass? has it a
label? only then are pixels touched (`series`). So memory holds one series, and pixels of somebody who did not consent
are never decoded.

After it the cache holds the patients accepted by this run: whoever withdrew or is denied is destroyed, and whoever is
gone from register or source, unless those are so many at once that the register or the source looks wrong. The same
input again reads nothing again and changes nothing; an interrupted run goes on where it was. A withdrawal recorded
while it runs holds: it is asked again before a patient is written, when nobody else can write.
"""

import contextlib
import fcntl
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date

from fedscan_client import consent, key_use, keys
from fedscan_client.audit import log
from fedscan_client.consent import NoPermit, Register, withdrawals
from fedscan_client.intake import cache, cache_keys, index, labels, objects, quarantine, series
from fedscan_client.intake.index import Row
from fedscan_client.intake.records import Refused
from fedscan_client.intake.report import Counts, Outcome, Report, Tallies
from fedscan_client.intake.scan import scan
from fedscan_client.intake.series import Piece, Work
from fedscan_client.site import Site
from fedscan_core.errors import ConfigError, DataError, FolderError

LOCK = "ingest.lock"

Tell = Callable[[str, int, int | None], None]
Everything = list[tuple[str, list[Row]]]  # a patient's series


@dataclass
class _Losses:
    """Who is destroyed; and who is kept although gone, because so many at once look like a mistake."""

    destroyed: set[str] = field(default_factory=set)
    unlisted_kept: set[str] = field(default_factory=set)
    gone_kept: set[str] = field(default_factory=set)


def ingest(
    site: Site,
    *,
    dry_run: bool = False,
    allow_loss: bool = False,
    today: date | None = None,
    tell: Tell = lambda what, done, of: None,
) -> Report:
    """Takes the images of a site into its encrypted cache.

    Args:
        site: from site.toml, with [source], [consent] and [intake].
        dry_run: only headers are read, and nothing is written or destroyed.
        allow_loss: patients whom register or source do not have any more are destroyed however many they are.
        today: the day for which consent is asked, default today.
        tell: progress: "headers" or "patients", how many are done, of how many (None: not known yet).

    Raises:
        ConfigError: site.toml does not say where labels or consent are, or its project or issuer changed.
        ConsentError: no usable consent register; nothing was read.
        DataError: no usable labels, nothing in the source, or a site key that is not the cache's.
        FolderError: another ingest is at work.
        SiteKeyError: a rotation of the site's key is.
    """
    if site.intake is None or site.consent is None:
        raise ConfigError(
            f"{site.folder / 'site.toml'} has no [intake] or no [consent].",
            remedy="Say where the label table and the consent register are.",
        )
    with contextlib.ExitStack() as stack:
        if not dry_run:
            stack.enter_context(_alone(site))
            stack.enter_context(key_use.held(site.folder))
        return _ingest(site, dry_run, allow_loss, today or date.today(), tell)


def _ingest(site: Site, dry: bool, allow_loss: bool, today: date, tell: Tell) -> Report:
    assert site.intake is not None and site.consent is not None
    key = keys.load(site.folder, site.key)
    cache_keys.check_key(site.cache, key)  # with another key nobody in the cache would seem permitted
    names = site.names(key)
    register = consent.load(site.consent, names, site_folder=site.folder, today=today)
    if not dry:
        site.claim_names(key)
        cache.sweep(site.cache)
    cached, losses = frozenset(cache.patients(site.cache)), _Losses()
    # Withdrawals first: whatever happens later in this run, they have been honoured.
    why = {name: decision.reason for name in cached if not (decision := register.decide(name)).permit}
    unlisted = {name for name, reason in why.items() if reason == "not_listed"}
    if not allow_loss and _too_many(unlisted, cached):
        losses.unlisted_kept |= unlisted
    for name in why.keys() - losses.unlisted_kept:
        _destroy(site, name, losses, dry, for_good=name not in unlisted)
    table = labels.read(site.folder / site.intake.labels, names)

    tallies, accepted, skipped = Tallies(), set[str](), Counter[str]()
    with index.opened(site.folder, key.wrapping, dry=dry) as seen:
        found = objects.found(site, key, skipped)
        scan(found, seen, key=names, issuer=site.issuer, register=register, tell=lambda n: tell("headers", n, None))
        # What was skipped, or could not be read, may still be there: then nothing follows from absence.
        whole = not skipped and "unreadable" not in seen.reasons()
        if whole:
            seen.sweep()
        seen.commit()
        if not seen.count():
            raise DataError("The source holds nothing.", remedy="Check that the share is mounted, or pull first.")
        tallies.headers(seen.reasons())
        work = Work(site, key, names, seen, table, register, cached, dry)
        everybody = seen.patients()
        for number, name in enumerate(everybody):
            tell("patients", number, len(everybody))
            if _patient(work, name, register, today, tallies, losses):
                accepted.add(name)
            seen.commit()
        tell("patients", len(everybody), len(everybody))
        total = seen.count()
        if not dry:
            _list_damaged(work, drop=not losses.unlisted_kept, whole=whole)
    left = set(cached) - accepted - losses.destroyed - losses.unlisted_kept
    gone = left if whole else left & seen.moved  # whose object is another patient's now: that is no absence
    if not allow_loss and _too_many(gone - seen.moved, cached):
        losses.gone_kept |= gone - seen.moved
    for name in gone - losses.gone_kept:
        _destroy(site, name, losses, dry, for_good=False)
    if dry:  # those of whom nothing would be left count too
        losses.destroyed |= (cached & set(everybody)) - accepted - losses.unlisted_kept
    else:
        losses.destroyed = set(cached) - set(cache.patients(site.cache))
    report = Report(
        dry=dry,
        objects=total,
        skipped=dict(skipped),
        patients=len(everybody),
        lines=tallies.lines(),
        cached_patients=len(cache.patients(site.cache)),
        destroyed=len(losses.destroyed),
        unlisted_kept=len(losses.unlisted_kept),
        gone_kept=len(losses.gone_kept),
        read=work.read["instances"],
    )
    if not dry:
        told = {"objects": total, "accepted": report.instances("accepted"), "destroyed": report.destroyed}
        log.append(site.folder, "ingest", key=key.key_id, **told)
    return report


def _list_damaged(work: Work, *, drop: bool, whole: bool) -> None:
    """Lists what its header alone set aside in quarantine, and takes off the list what is gone from the source.

    `drop`: objects of somebody who is not permitted leave the spool, whatever they are.
    """
    site, found = work.site, []
    for row in work.index.damaged():
        about = row.header
        if drop and about.patient and not work.register.decide(about.patient).permit:
            objects.drop_spooled(site, [row])
        elif about.reason != "catalogue":
            name = (
                about.instance or hashlib.sha256(work.names + row.locator.encode(errors="surrogateescape")).hexdigest()
            )
            found.append(quarantine.Found(about.reason, about.patient, about.series, name[:32], row.locator, row.stamp))
    if found:
        quarantine.put(site.folder, work.key.wrapping, found)
    if whole:
        listed = {it.instance for it in found}
        gone = [it for it in quarantine.instances(site.folder) - listed if not work.index.has(it)]
        quarantine.forget(site.folder, gone)


@contextlib.contextmanager
def _alone(site: Site) -> Iterator[None]:
    """One ingest at a time; the lock dies with the process."""
    with (site.folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(
                f"Another ingest is at work on {site.folder}.", remedy="Wait for it, or stop it first."
            ) from None
        yield


def _too_many(lost: set[str], cached: frozenset[str]) -> bool:
    return len(lost) > max(5, len(cached) // 5)


def _destroy(site: Site, name: str, losses: _Losses, dry: bool, *, for_good: bool) -> None:
    losses.destroyed.add(name)
    if not dry:
        objects.destroy(site, name, for_good=for_good)


def _patient(work: Work, name: str, register: Register, today: date, tallies: Tallies, losses: _Losses) -> bool:
    """One patient from consent to cache; says whether an image of theirs is (or, dry, would be) in the cache."""
    site, everything = work.site, list(work.index.series(name))
    if not everything:  # withdrawn just now
        return False
    try:
        reason, until, basis = _cleared(work, name, everything, register, today)
    except Refused as refused:
        tallies.patient(_all(everything, "refused", refused.reason))
        return name in work.cached  # nothing can be concluded: what is there stays
    clashing = work.index.clashing(name)
    if reason:
        tallies.patient(_all(everything, "no consent", reason))
        if reason != "not_listed" or not losses.unlisted_kept:
            if name in work.cached:
                losses.destroyed.add(name)
            if not work.dry:
                objects.destroy(site, name, for_good=reason != "not_listed")
                # What another patient claims as well stays: its absence would settle whose it is.
                rows = [row for _, found in everything for row in found if not clashing & series.uids(row)]
                objects.drop_spooled(site, rows)
        return False

    shared = work.index.shared_accessions(name)
    splits = {label.split for _, rows in everything for row in rows if (label := work.labels.of(row.header, shared))}
    if len(splits) > 1:  # could not be charged apart
        tallies.patient(_all(everything, "refused", "two_splits"))
        return False
    known, counted, seen = work.known(name), dict[tuple[str, str], Counts](), set[str]()

    def pieces() -> Iterator[Piece]:
        for uid, rows in everything:
            counts = counted.setdefault((rows[0].header.study, uid), Counter())
            yield from series.pieces(
                work,
                uid,
                rows,
                clashing=clashing,
                shared=shared,
                seen=seen,
                known=known,
                split=next(iter(splits), ""),
                counts=counts,
            )

    def still() -> bool:
        return replace(register, withdrawn=withdrawals.read(site.folder)).decide(name).permit

    if work.dry:
        some = any([True for _ in pieces()]) or any(counts["accepted", ""] for counts in counted.values())
    else:
        kept = cache.write_patient(site.cache, work.key, name, pieces(), consent_until=until, basis=basis, still=still)
        some = bool(kept.entries)
    tallies.patient(counted)
    return some


def _all(everything: Everything, outcome: Outcome, reason: str) -> dict[tuple[str, str], Counts]:
    return {(rows[0].header.study, uid): Counter({(outcome, reason): len(rows)}) for uid, rows in everything}


def _cleared(
    work: Work, name: str, everything: Everything, register: Register, today: date
) -> tuple[str, date | None, str]:
    """Why the patient is not cleared ("" if they are), the last day on which they are, and on what basis.

    Raises:
        Refused: it cannot be told: a header that may give the birth date cannot be read now.
    """
    assert work.site.consent is not None
    decision, born = register.decide(name), None
    if not decision.permit:
        return decision.reason, None, decision.basis
    try:
        if decision.by_guardian and decision.born is None:
            born = series.born(work, [rows[0] for _, rows in everything])
        until = consent.until(decision, born, work.site.consent)
    except NoPermit as error:
        return error.reason, None, decision.basis
    if until is not None and until < today:
        return "guardian_ended" if decision.by_guardian else "expired", until, decision.basis
    return "", until, decision.basis
