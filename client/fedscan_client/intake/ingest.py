"""The intake as one function: source -> consent -> kind and quarantine -> de-identification -> pixels -> cache.

Two passes. The first reads headers only and writes down, as keyed HMACs, who is in which object (`scan`, `index`). The
second goes patient by patient and series by series: is the patient cleared? may an image of this kind pass? has it a
label? only then are pixels touched (`series`). So memory holds one series, and pixels of somebody who did not consent
are never decoded.

After it the cache holds exactly the patients accepted by this run: whoever withdrew, or is gone from the source, is
destroyed. The same input again reads nothing again and changes nothing; an interrupted run goes on where it was.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime

from fedscan_client import consent, keys
from fedscan_client.consent import NoPermit, Register
from fedscan_client.intake import cache, cache_keys, index, labels, objects, series
from fedscan_client.intake.index import Row
from fedscan_client.intake.labels import one_split
from fedscan_client.intake.report import Counts, Report, Tallies
from fedscan_client.intake.scan import scan
from fedscan_client.intake.series import Piece, Work
from fedscan_client.site import Site
from fedscan_core import auditlog
from fedscan_core.errors import ConfigError, DataError

LOG = "intake.jsonl"
# Skipped for one of these, an object may still be in the source: then nobody is destroyed for being gone from it.
_UNSURE = ("still_writing", "unreadable", "zip_damaged")

Tell = Callable[[str, int, int | None], None]


def ingest(
    site: Site, *, dry_run: bool = False, today: date | None = None, tell: Tell = lambda what, done, of: None
) -> Report:
    """Takes the images of a site into its encrypted cache.

    Args:
        site: from site.toml, with [source], [consent] and [intake].
        dry_run: only headers are read, and nothing is written or destroyed.
        today: the day for which consent is asked, default today.
        tell: progress: "headers" or "patients", how many are done, of how many (None: not known yet).

    Raises:
        ConfigError: site.toml does not say where labels or consent are.
        ConsentError: no usable consent register; nothing was read.
        DataError: no usable labels, nothing in the source, or a site key that is not the cache's.
    """
    if site.intake is None or site.consent is None:
        raise ConfigError(
            f"{site.folder / 'site.toml'} has no [intake] or no [consent].",
            remedy="Say where the label table and the consent register are.",
        )
    today = today or date.today()
    key = keys.load(site.folder, site.key)
    names = site.names(key)
    register = consent.load(site.consent, names, site_folder=site.folder, today=today)
    cache_keys.check_key(site.cache, key)  # with another key nobody in the cache would seem permitted
    # Withdrawals first: whatever happens later in this run, they have been honoured.
    out = [name for name in cache.patients(site.cache) if not register.decide(name).permit]
    destroyed = 0 if dry_run else sum(objects.destroy(site, name) for name in out)
    table = labels.read(site.folder / site.intake.labels, names)

    tallies, accepted, skipped = Tallies(), set[str](), Counter[str]()
    with index.opened(site.folder, key.wrapping, dry=dry_run) as seen:
        found = objects.found(site, key, skipped)
        scan(found, seen, key=names, issuer=site.issuer, tell=lambda done: tell("headers", done, None))
        whole = not any(skipped[reason] for reason in _UNSURE)
        if whole:
            seen.sweep()
        if not seen.count():
            raise DataError("The source holds nothing.", remedy="Check that the share is mounted, or pull first.")
        tallies.headers(seen.reasons())
        work = Work(site, key, names, seen, table, frozenset(cache.patients(site.cache)), dry_run)
        everybody = seen.patients()
        for number, name in enumerate(everybody):
            tell("patients", number, len(everybody))
            if _patient(work, name, register, today, tallies):
                accepted.add(name)
        tell("patients", len(everybody), len(everybody))
        total = seen.count()
    if not dry_run and whole:
        destroyed += sum(objects.destroy(site, name) for name in cache.patients(site.cache) if name not in accepted)
    report = Report(
        dry=dry_run,
        objects=total,
        skipped=dict(skipped),
        patients=len(everybody),
        lines=tallies.lines(),
        cached_patients=len(cache.patients(site.cache)),
        destroyed=destroyed,
        read=work.read["instances"],
    )
    if not dry_run:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        told = {"objects": report.objects, "accepted": report.instances("accepted"), "destroyed": destroyed}
        with auditlog.exclusive(site.folder / LOG):
            auditlog.append(site.folder / LOG, {"utc": now, "what": "ingest", "key": key.key_id, **told})
    return report


def _patient(work: Work, name: str, register: Register, today: date, tallies: Tallies) -> bool:
    """One patient from consent to cache; says whether an image of theirs is (or, dry, would be) in the cache."""
    site, everything = work.site, list(work.index.series(name))
    reason, until, basis = _cleared(work, name, everything[0][1][0], register, today)
    if reason:
        tallies.patient(
            {(rows[0].header.study, uid): Counter({("no consent", reason): len(rows)}) for uid, rows in everything}
        )
        if not work.dry:
            objects.destroy(site, name)
            # What another patient claims as well stays: its absence would settle whose it is.
            clashing = work.index.clashing(name)
            headers = [row for _, rows in everything for row in rows]
            objects.drop_spooled(site, [row for row in headers if not clashing & series.uids(row)])
        return False

    counted: dict[tuple[str, str], Counts] = {}
    labelled = [label for _, rows in everything for row in rows if (label := work.labels.of(row.header))]
    split = one_split(labelled) if labelled else ""
    known = work.known(name)
    clashing = work.index.clashing(name)

    def pieces() -> Iterator[Piece]:
        for uid, rows in everything:
            counts: Counts = Counter()
            yield from series.pieces(work, name, uid, rows, clashing=clashing, known=known, split=split, counts=counts)
            counted[rows[0].header.study, uid] = counts

    if work.dry:
        some = any([True for _ in pieces()]) or any(counts["accepted", ""] for counts in counted.values())
    else:
        some = bool(cache.write_patient(site.cache, work.key, name, pieces(), consent_until=until, basis=basis).entries)
    tallies.patient(counted)
    return some


def _cleared(work: Work, name: str, row: Row, register: Register, today: date) -> tuple[str, date | None, str]:
    """Why the patient is not cleared ("" if they are), the last day on which they are, and on what basis."""
    assert work.site.consent is not None
    decision = register.decide(name)
    if not decision.permit:
        return decision.reason, None, decision.basis
    try:
        born = series.born(work, row) if decision.by_guardian else None
        until = consent.until(decision, born, work.site.consent)
    except NoPermit as error:
        return error.reason, None, decision.basis
    if until is not None and until < today:
        return "guardian_ended" if decision.by_guardian else "expired", until, decision.basis
    return "", until, decision.basis
