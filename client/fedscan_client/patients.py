"""One patient's rights: what the site holds on them, for what it was used, and how it is destroyed.

A withdrawal is recorded before anything is destroyed: a crash in between leaves a patient who is out, and the next
withdrawal or ingest finishes the rest. What it cannot do: take the patient out of models that were released.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from math import fsum
from typing import Any

from fedscan_client import agent, consent, eligible
from fedscan_client.audit import log
from fedscan_client.consent import withdrawals
from fedscan_client.dp import ledger
from fedscan_client.intake import cache, objects
from fedscan_client.intake.deid import patient_name
from fedscan_client.intake.records import PatientId
from fedscan_client.keys import SiteKey
from fedscan_client.site import Site
from fedscan_core import accounting, rdp
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import ConfigError, ConsentError


@dataclass(frozen=True)
class Held:
    """Images of one patient that are alike: pseudonym of the study, modality, label, split, and how many."""

    study: str
    modality: str
    label: str
    split: str
    images: int


def show(site: Site, key: SiteKey, patient: PatientId, *, today: date) -> dict[str, Any]:
    """Everything the site holds on a patient; plain values that JSON can hold, and not the patient's own number.

    Args:
        site: the hospital.
        key: the site's.
        patient: as the hospital names them.
        today: the day of the question.

    Raises:
        RecordDamaged: the ledger was changed.
        FolderError: the record of runs cannot be read.
        DataError: the key is too short, or the patient's file in the cache was altered.
    """
    name = patient_name(site.names(key), patient)
    held = _held(site, key, name)
    runs = _runs(site, name)
    return {
        "site": site.name,
        "patient": name,
        "day": today.isoformat(),
        "images": sum(group.images for group in held),
        "held": [asdict(group) for group in held],
        "besides": {
            what: count
            for what, count in objects.everything_of(site, key, name, destroy=False).items()
            if what in ("objects in the spool", "objects in quarantine")
        },
        "consent": _consent(site, key, name, today),
        "withdrawals": [
            {"day": row["day"], "destroyed": row.get("what")} for row in withdrawals.history(site.folder, name)
        ],
        "runs": runs,
        "in_all": _in_all(site, [run["run_id"] for run in runs]),
    }


def withdraw(site: Site, key: SiteKey, patient: PatientId, *, today: date, yes: bool) -> dict[str, Any]:
    """Takes a patient out for good: recorded, then key and files destroyed. Without `yes` only says what would happen.

    May be repeated: what was left by a crash, or came since, is destroyed.

    Args:
        site: the hospital.
        key: the site's.
        patient: as the hospital names them.
        today: the day of the withdrawal.
        yes: do it.

    Raises:
        ConsentError: the record of withdrawals was changed; nothing is destroyed.
        FolderError: the record of runs cannot be read.
    """
    name = patient_name(site.names(key), patient)
    runs = [{"run_id": run.run_id, "model": run.model} for run in eligible.runs_of(site.folder, name)]
    before = [row["day"] for row in withdrawals.history(site.folder, name) if row["state"] == "withdrawn"]
    if yes:
        site.claim_names(key)
        withdrawals.add(site.folder, name, today)
    else:
        withdrawals.read(site.folder)  # a record that was changed is found before, not half way
    counts = objects.everything_of(site, key, name, destroy=yes)
    if yes:
        withdrawals.destroyed(site.folder, name, today, counts, runs)
        log.append(site.folder, "withdrawal", destroyed=counts)  # last: nothing may keep a patient in
    return {
        "site": site.name,
        "patient": name,
        "day": today.isoformat(),
        "before": before,
        "done": yes,
        "destroyed": counts,
        "runs": runs,
    }


def check(site: Site, key: SiteKey, *, today: date) -> dict[str, Any]:
    """The consent register in numbers, for the hospital's own eyes.

    Raises:
        ConsentError: there is no register, or it cannot be used.
        ConfigError: site.toml has no [consent].
    """
    settings = _settings(site)
    register = consent.load(settings, site.names(key), site_folder=site.folder, today=today)
    decisions = {name: register.decide(name) for name in register.decisions}
    permits = [decision for decision in decisions.values() if decision.permit]
    cached = cache.patients(site.cache)
    age = (today - register.drawn_up).days
    warnings = [f"not understood: {where} ({count})" for where, count in sorted(register.notes.items())]
    unborn = sum(decision.by_guardian and decision.born is None for decision in permits)
    soon = sum(decision.until is not None and (decision.until - today).days <= 30 for decision in permits)
    out = sum(not register.decide(name).permit for name in cached)
    back = sum(name in register.withdrawn for name, decision in decisions.items() if decision.permit)
    for count, text in (
        (unborn, "permits by a guardian without a birth date: the image's header has to give it"),
        (soon, "permits end within 30 days"),
        (out, "patients in the cache are not permitted: the next ingest destroys them"),
        (back, "patients who withdrew here have a newer permit and are back"),
        (age * 4 >= settings.max_age_days * 3 and 1, f"register is {age} of at most {settings.max_age_days} days old"),
    ):
        if count:
            warnings.append(f"{count} {text}")
    return {
        "site": site.name,
        "kind": settings.kind,
        "drawn_up": register.drawn_up.isoformat(),
        "age_days": age,
        "max_age_days": settings.max_age_days,
        "patients": len(decisions),
        "reasons": dict(sorted(Counter(decision.reason for decision in decisions.values()).items())),
        "others": register.others.reason,
        "by_guardian": sum(decision.by_guardian for decision in permits),
        "withdrawn_here": len(register.withdrawn),
        "cached": len(cached),
        "warnings": warnings,
    }


def _settings(site: Site) -> consent.Settings:
    """[consent] of site.toml.

    Raises:
        ConfigError: it has none.
    """
    if site.consent is None:
        raise ConfigError(
            f"Site '{site.name}' does not say where its consent register is.",
            remedy="Add [consent] with kind and path to site.toml.",
        )
    return site.consent


def _held(site: Site, key: SiteKey, name: str) -> list[Held]:
    """What the cache holds of a patient, image by image counted together."""
    if name not in cache.patients(site.cache):
        return []
    entries = cache.read_index(site.cache, key, name).entries
    groups = Counter((entry.study, entry.modality, entry.label, entry.split) for entry in entries)
    return [Held(*group, images) for group, images in sorted(groups.items())]


def _consent(site: Site, key: SiteKey, name: str, today: date) -> dict[str, Any]:
    """The register's decision as plain values. `error`: why there is none; then nothing is permitted."""
    try:
        settings = _settings(site)
        decision = consent.load(settings, site.names(key), site_folder=site.folder, today=today).decide(name)
    except (ConfigError, ConsentError) as error:
        return {"permit": False, "reason": "no_register", "words": "there is no usable register", "error": str(error)}
    told = {"permit": decision.permit, "reason": decision.reason, "words": consent.WHY[decision.reason]}
    days = {"given": decision.given, "until": decision.until}
    told |= {"basis": decision.basis, "by_guardian": decision.by_guardian}
    return told | {what: day.isoformat() if day else None for what, day in days.items()}


def _runs(site: Site, name: str) -> list[dict[str, Any]]:
    """The runs a patient was eligible for, with their price; None where a run was not charged: it had no privacy."""
    priced = {run["run_id"]: run for run in agent.report(site)["runs"]}
    prices = ("epsilon", "epsilon_replace_one", "delta", "spent")
    return [
        {"run_id": run.run_id, "model": run.model, "since": run.since.isoformat()}
        | {what: priced.get(run.run_id, {}).get(what) for what in prices}
        for run in eligible.runs_of(site.folder, name)
    ]


def _in_all(site: Site, run_ids: Sequence[str]) -> dict[str, float | None]:
    """What these runs cost together at the ledger's gate: as admitted, an upper bound of what was spent."""
    if not run_ids:
        return {"epsilon": 0.0, "delta": 0.0}
    booked = ledger.summary(site.book) if site.ledger.exists() else {"runs": {}}
    if not set(run_ids) <= booked["runs"].keys():
        return {"epsilon": None, "delta": None}  # one of them had no privacy
    plans = [SitePlan(**booked["runs"][run_id]["plan"]) for run_id in run_ids]
    if booked["gate"] == "sum":
        return {"epsilon": fsum(plan.epsilon for plan in plans), "delta": fsum(plan.delta for plan in plans)}
    orders, delta = (booked["order"],), booked["budget"]["delta"]
    curve = rdp.add(*(accounting.renyi(plan.events(), orders) for plan in plans))
    return {"epsilon": rdp.to_epsilon(curve, delta, orders), "delta": delta}
