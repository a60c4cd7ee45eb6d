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
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from fedscan import partition
from fedscan.phantom import draw_hospital
from fedscan_client import cohort, consent, keys
from fedscan_client import site as sites
from fedscan_client.intake.ingest import ingest
from fedscan_client.intake.sources.settings import Folder, Table
from fedscan_client.intake.sources.table import TableRow, read_table
from fedscan_client.site import Intake, Site
from fedscan_core import accounting
from fedscan_core.config import RunConfig, SiteRule
from fedscan_core.errors import ConfigError, DataError, PrivacyError
from fedscan_core.policy import Policy

HOSPITALS = "hospitals"  # beside the sites: what the phantoms' PACS would hold
TRAIN_SHARE = 0.7  # what `cohort.split_of` aims at


@dataclass(frozen=True)
class PretendSite:
    """One site before its folder exists. `declared` is what a person would declare: its training patients."""

    name: str
    declared: int
    trains: bool = True
    rows: tuple[TableRow, ...] = ()
    hospital: Path | None = (
        None  # where its dicom/, labels.csv and consent.csv are; from the site's folder, or absolute
    )


def plan(run: RunConfig) -> list[PretendSite]:
    """The run's sites, checked as far as it goes without decoding an image.

    Raises:
        ConfigError: the run does not say where its images are, or its rules do not fit the table.
        DataError: the table, or what follows from it for a site, cannot be used.
        PrivacyError: a site's budget cannot be calibrated.
    """
    found = {"phantom": _phantoms, "table": _from_table, "hospitals": _hospitals}[run.data.source](run)
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
        if pretend.hospital is None:
            _write_rows(site, pretend.rows)
        else:
            if run.data.source == "phantom":
                _draw(run, site)
            else:
                keys.create(site.folder, site.key)
            ingest(site)
        check_site(run, site, pretend.trains)
        built.append(site)
    tell(len(planned))
    return built


def splits(run: RunConfig, trains: bool) -> tuple[str, ...]:
    """What a site is measured on. A site that never trains holds out everybody, but for those used for tuning."""
    return ("train", "test") if run.evaluation.split == "test" and not trains else (run.evaluation.split,)


# --------------------------------------------------------------------------------------------------------- hospitals


def _phantoms(run: RunConfig) -> list[PretendSite]:
    declared = max(1, round(TRAIN_SHARE * run.simulation.patients))
    names = [f"hospital-{n + 1}" for n in range(run.simulation.sites)]
    # From the site's folder, so that the run can be moved.
    return [PretendSite(name, declared, hospital=Path("..", "..", HOSPITALS, name)) for name in names]


def _draw(run: RunConfig, site: Site) -> None:
    """Draws the hospital's archive, and a key for its patients."""
    draw_hospital(
        site.folder.parent.parent / HOSPITALS / site.name,
        name=site.name,
        patients=run.simulation.patients,
        seed=run.train.seed,
        image_size=min(256, max(32, *run.task.image_size)),
    )
    # A pretend key for pretend patients, so that the same seed deals them to the same splits.
    secret = hashlib.sha512(f"fedscan phantom key|{run.train.seed}|{site.name}".encode()).digest()
    keys.put(site.folder, site.key, keys.SiteKey(secret[:32], secret[32:]), "key of a pretend site")


def _hospitals(run: RunConfig) -> list[PretendSite]:
    """The folders below `data.dir`; a site declares the share of its consenting patients that trains."""
    folder = _data_folder(run)
    found = sorted(
        (path for path in folder.iterdir() if (path / "dicom").is_dir()), key=lambda path: _natural(path.name)
    )
    if not found:
        raise DataError(
            f"No folder in {folder} holds a hospital.",
            remedy="Each needs dicom/, labels.csv and consent.csv, as 'fedscan phantom from-table' writes them.",
        )
    planned = []
    for path in found:
        register = consent.load(_register(path), bytes(keys.KEY_BYTES), site_folder=path, today=date.today())
        permitted = sum(register.decide(name).permit for name in register.decisions)
        planned.append(PretendSite(_plain(path.name), max(1, round(TRAIN_SHARE * permitted)), hospital=path))
    if len({site.name for site in planned}) != len(planned):
        raise ConfigError("Two hospitals have the same name once written plainly.", remedy="Rename one folder.")
    return planned


def _register(hospital: Path) -> consent.Settings:
    """Nobody withdraws from a simulation that is gone on with months later."""
    return consent.Settings(kind="register", path=hospital / "consent.csv", max_age_days=36_500)


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
    folder = _data_folder(run)
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


def _data_folder(run: RunConfig) -> Path:
    if run.data.dir is None:
        raise ConfigError(
            "The run does not say where its images are.", remedy="Give --data DIR, or [data] dir in RUN.toml."
        )
    folder = Path(run.data.dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.", remedy="Give --data DIR, the folder that holds the images.")
    return folder


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
    from_where: dict[str, Any] = {"source": {"source": Table(kind="table", folder=Path(str(run.data.dir)))}}
    if pretend.hospital is not None:
        from_where = {
            "source": {"source": Folder(kind="folder", folder=pretend.hospital / "dicom", settle_seconds=0)},
            "consent": _register(pretend.hospital),
            "intake": Intake(labels=pretend.hospital / "labels.csv"),
        }
    site = Site(
        name=pretend.name,
        patients_declared=pretend.declared,
        **from_where,
        policy=Policy(
            max_epsilon=budget.epsilon if budget else 0.0,
            max_delta=budget.delta if budget else 0.0,
            min_noise_multiplier=0.0,
            research_cohort=True,
            approval="auto-within-policy",
        ),
        folder=folder,
    )
    sites.save(site)
    return sites.load(folder)


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
