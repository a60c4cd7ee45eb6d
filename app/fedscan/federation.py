"""Pretend hospitals: which rows of a research table, or which phantoms, make which site, and each site's folder.

Everything that can be wrong with a table is found here, before anything is trained. A deployed site has no such step:
what it would find out here depends on its patients, so it must keep it to itself.
"""

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedscan import partition
from fedscan.phantom import draw_hospital
from fedscan_client import cohort, keys
from fedscan_client import site as sites
from fedscan_client.gate.policy import Policy
from fedscan_client.intake.ingest import ingest
from fedscan_client.intake.sources import TableRow, read_table
from fedscan_client.keys import SiteKey
from fedscan_client.site import Site, Source
from fedscan_core import accounting
from fedscan_core.config import RunConfig, SiteRule
from fedscan_core.errors import ConfigError, DataError, PrivacyError

PHANTOM_TRAIN_SHARE = 0.7  # what `cohort.split_of` aims at


@dataclass(frozen=True)
class PretendSite:
    """One site before its folder exists. `declared` is what a person would declare: its training patients."""

    name: str
    declared: int
    trains: bool = True
    rows: tuple[TableRow, ...] = ()  # none: a phantom hospital


def plan(run: RunConfig) -> list[PretendSite]:
    """The run's sites, checked as far as it goes without decoding an image.

    Raises:
        ConfigError: the run does not say where its images are, or its rules do not fit the table.
        DataError: the table, or what follows from it for a site, cannot be used.
        PrivacyError: a site's budget cannot be calibrated.
    """
    found = _phantoms(run) if run.data.source == "phantom" else _from_table(run)
    for site in found:
        if site.trains:
            try:
                accounting.plan_for(run, site.declared)
            except PrivacyError as error:
                raise PrivacyError(f"Site '{site.name}': {error.message}", remedy=error.remedy) from None
    return found


def build(run: RunConfig, planned: Sequence[PretendSite], folder: Path, tell: Callable[[int], None]) -> list[Site]:
    """Makes each site's folder below `folder` and checks its images; the order is that of `planned`.

    Args:
        run: the experiment.
        planned: from `plan`.
        folder: new; gets one folder for each site, and `hospitals/` with the phantoms' DICOM files beside it.
        tell: told how many sites are done.

    Raises:
        DataError: an image that cannot be read, or a site that cannot train.
    """
    built = []
    for number, pretend in enumerate(planned):
        tell(number)
        site = _folder(run, pretend, folder / pretend.name)
        if run.data.source == "phantom":
            _fill_from_phantoms(run, site, folder.parent / "hospitals" / pretend.name)
        else:
            _write_rows(site, pretend.rows)
        check_site(run, site, pretend.trains)
        built.append(site)
    tell(len(planned))
    return built


def splits(run: RunConfig, trains: bool) -> tuple[str, ...]:
    """What a site is measured on. A site that never trains holds out everybody, but for those used for tuning."""
    return ("train", "test") if run.evaluation.split == "test" and not trains else (run.evaluation.split,)


# ---------------------------------------------------------------------------------------------------------- phantoms


def _phantoms(run: RunConfig) -> list[PretendSite]:
    declared = max(1, round(PHANTOM_TRAIN_SHARE * run.simulation.patients))
    return [PretendSite(f"hospital-{n + 1}", declared) for n in range(run.simulation.sites)]


def _fill_from_phantoms(run: RunConfig, site: Site, archive: Path) -> None:
    """Draws the hospital's archive and takes it in through the door that the agent uses."""
    height, width = run.task.image_size
    draw_hospital(
        archive,
        name=site.name,
        patients=run.simulation.patients,
        seed=run.train.seed,
        image_size=min(256, max(32, height, width)),
    )
    # A pretend key for pretend patients, so that the same seed deals them to the same splits.
    names = hashlib.sha256(f"fedscan phantom key|{run.train.seed}|{site.name}".encode()).digest()
    key = SiteKey(names, hashlib.sha256(names).digest())
    keys.put(site.folder, site.key, key, "key created")
    ingest(
        archive / "dicom",
        consent_csv=archive / "consent.csv",
        labels_csv=archive / "labels.csv",
        image_size=(height, width),
        site_key=key,
        out=site.source.folder,
        channels=run.task.channels,
    )


# ------------------------------------------------------------------------------------------------------------- table


def _from_table(run: RunConfig) -> list[PretendSite]:
    rows = _rows(run)
    if run.simulation.partition != "none" or not any(row.site for row in rows):
        if run.data.sites:
            raise ConfigError(
                "data.sites names sites, but patients are dealt out (simulation.partition, or a table without sites).",
                remedy="Remove one of the two.",
            )
        rows = _dealt(run, rows)
        roles = {row.site: "train" for row in rows}
    else:
        rows, roles = _by_column(run, rows)
    partition.check_whole([(row.patient_id, row.site, row.split) for row in rows])

    by_site: dict[str, list[TableRow]] = defaultdict(list)
    for row in rows:
        by_site[row.site].append(row)
    planned = []
    for name in sorted(by_site, key=_natural):
        trains = roles[name] == "train"
        training = {row.patient_id for row in by_site[name] if row.split == "train"}
        planned.append(PretendSite(name, len(training) if trains else 0, trains, tuple(by_site[name])))
        if trains and not training:
            raise DataError(
                f"Site '{name}' has no patient to train on.",
                remedy="Give it patients in the split 'train', or the role 'evaluate' in [[data.sites]].",
            )
    return planned


def _rows(run: RunConfig) -> list[TableRow]:
    """The table's rows, each with a split and a label of the task."""
    if run.data.dir is None:
        raise ConfigError(
            "The run does not say where its images are.", remedy="Give --data DIR, or [data] dir in RUN.toml."
        )
    folder = Path(run.data.dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.", remedy="Give --data DIR, the folder that holds the images.")
    rows = read_table(folder / run.data.table, label_column=run.data.label_column)
    for label in sorted({row.label for row in rows}):
        try:
            cohort.label_index(label, run.task.labels)
        except DataError as error:
            where = next(row.file for row in rows if row.label == label)
            raise DataError(f"{error.message} First at {where}.", remedy=error.remedy) from None
    return [
        row if row.split else replace(row, split=partition.split_of(row.patient_id, run.train.seed)) for row in rows
    ]


def _dealt(run: RunConfig, rows: list[TableRow]) -> list[TableRow]:
    """Deals patients out to sites, split by split; held-out patients always evenly, so that sites are comparable."""
    rng = np.random.default_rng(run.train.seed)
    highest: dict[str, int] = defaultdict(int)  # a patient's label: the highest of the images' labels
    split: dict[str, str] = {}
    for row in rows:
        highest[row.patient_id] = max(highest[row.patient_id], cohort.label_index(row.label, run.task.labels))
        split[row.patient_id] = row.split
    count, alpha = run.simulation.sites, run.simulation.alpha
    home: dict[str, str] = {}
    for wanted in ("train", "val", "test"):
        patients = sorted(patient for patient, value in split.items() if value == wanted)
        how = run.simulation.partition if wanted == "train" else "iid"
        if how == "dirichlet":
            parts = partition.dirichlet({p: str(highest[p]) for p in patients}, count, alpha, rng)
        elif how == "quantity":
            parts = partition.quantity(patients, count, alpha, rng)
        else:
            parts = partition.iid(patients, count, rng)
        for number, part in enumerate(parts):
            home |= {patient: f"site-{number + 1}" for patient in part}
    # A patient in two splits is found by `check_whole`, which reads the rows' own split.
    return [replace(row, site=home[row.patient_id]) for row in rows]


def _by_column(run: RunConfig, rows: list[TableRow]) -> tuple[list[TableRow], dict[str, str]]:
    """Sites from the table's column, merged and split by the run's rules; sites that no rule takes are left out."""
    blank = next((row.file for row in rows if not row.site), None)
    if blank is not None:
        raise DataError(
            f"{run.data.table} gives no site for {blank}, but gives one for others.",
            remedy="Fill in the column, or set simulation.partition to deal patients out.",
        )
    names = sorted({row.site for row in rows})
    rules = run.data.sites or tuple(SiteRule(name=_plain(name), members=(name,)) for name in names)
    rule_of = partition.by_rules(rules, names)
    if len({rule.name for rule in rules}) != len(rules):
        raise ConfigError(
            f"Two sites of the table have the same name once written plainly: {', '.join(names)}.",
            remedy="Name them by [[data.sites]] rules.",
        )
    merged = [replace(row, site=rule_of[row.site].name) for row in rows if row.site in rule_of]
    partition.check_whole([(row.patient_id, row.site, row.split) for row in merged])

    rng = np.random.default_rng(run.train.seed)
    home: dict[str, str] = {}
    roles: dict[str, str] = {}
    for rule in rules:
        parts = [rule.name] if rule.parts == 1 else [f"{rule.name}-{n + 1}" for n in range(rule.parts)]
        roles |= dict.fromkeys(parts, rule.role)
        for split in ("train", "val", "test"):
            patients = sorted({row.patient_id for row in merged if (row.site, row.split) == (rule.name, split)})
            for name, part in zip(parts, partition.iid(patients, rule.parts, rng), strict=True):
                home |= dict.fromkeys(part, name)
    return [replace(row, site=home[row.patient_id]) for row in merged], roles


def _plain(name: str) -> str:
    """A site's name as a folder can bear it."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:64]
    return plain or "site"


def _natural(name: str) -> tuple[object, ...]:
    """Sorting key: site-2 before site-10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


# ------------------------------------------------------------------------------------------------------- site folders


def _folder(run: RunConfig, pretend: PretendSite, folder: Path) -> Site:
    """The site's folder with its site.toml. Its lifetime budget is this run: pretend sites are made for one run."""
    budget = accounting.plan_for(run, pretend.declared) if pretend.trains and run.privacy.enabled else None
    phantom = run.data.source == "phantom"
    site = Site(
        name=pretend.name,
        patients_declared=pretend.declared,
        source=Source(
            kind="cache" if phantom else "table",
            folder=folder / "cache" if phantom else Path(str(run.data.dir)),
        ),
        policy=Policy(
            max_epsilon=budget.epsilon if budget else 0.0,
            max_delta=budget.delta if budget else 0.0,
            min_noise_multiplier=0.0,
            research_cohort=True,
        ),
        folder=folder,
    )
    sites.save(site)
    return site


def _write_rows(site: Site, rows: Sequence[TableRow]) -> None:
    with (site.folder / cohort.TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, cohort.COLUMNS)
        writer.writeheader()
        for row in rows:
            index = "" if row.index is None else row.index
            writer.writerow({name: getattr(row, name) for name in cohort.COLUMNS if name != "index"} | {"index": index})


def check_site(run: RunConfig, site: Site, trains: bool) -> None:
    """Decodes every image that the run will use, which fills the cohort's memory for the rounds to come.

    Raises:
        DataError: an image that cannot be used, or a site that cannot train.
    """
    for split in dict.fromkeys(("train", *splits(run, trains)) if trains else splits(run, trains)):
        patients = cohort.load_patients(site, run, split)
        if patients.left_out:
            cohort.forget()  # they may be there at the next try
            raise DataError(
                f"Site '{site.name}': {len(patients.left_out)} images cannot be used, first: {patients.left_out[0]}"
            )
        if trains and split == "train" and len(patients.targets.unique()) < 2:
            label = [run.task.labels[int(index)] for index in patients.targets.unique()]
            raise DataError(
                f"Site '{site.name}' has only images of label {label[0] if label else '(none at all)'} to train on.",
                remedy="Merge it with another site, give it the role 'evaluate', or use fewer or less unequal sites.",
            )
