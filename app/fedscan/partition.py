"""Who goes to which pretend site. Patients are dealt out whole: never in two sites, never in two splits.

Own functions of a few lines instead of flwr-datasets' partitioners: those deal out rows of a Hugging Face dataset, not
patients, and bring `datasets` and `matplotlib` along.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from fedscan_core.config import SiteRule
from fedscan_core.errors import ConfigError, DataError


def iid(patients: Sequence[str], sites: int, rng: np.random.Generator) -> list[list[str]]:
    """Deals shuffled patients out evenly; sizes differ by at most 1."""
    order = [patients[i] for i in rng.permutation(len(patients))]
    return [order[k::sites] for k in range(sites)]


def quantity(patients: Sequence[str], sites: int, alpha: float, rng: np.random.Generator) -> list[list[str]]:
    """Size skew: the shares are one Dirichlet(alpha) draw; each site gets at least one patient if there are enough."""
    order = [patients[i] for i in rng.permutation(len(patients))]
    return _cut(order, _shares(rng.dirichlet(np.full(sites, alpha)), len(order), at_least=1))


def dirichlet(label_of: Mapping[str, str], sites: int, alpha: float, rng: np.random.Generator) -> list[list[str]]:
    """Label skew (Hsu et al. 2019, arXiv 1909.06335): the patients of each label are shared by a Dirichlet draw."""
    result: list[list[str]] = [[] for _ in range(sites)]
    for label in sorted(set(label_of.values())):
        own = [patient for patient, value in label_of.items() if value == label]
        order = [own[i] for i in rng.permutation(len(own))]
        parts = _cut(order, _shares(rng.dirichlet(np.full(sites, alpha)), len(order), at_least=1))
        for site, part in zip(result, parts, strict=True):
            site.extend(part)
    return result


def split_of(patient: str, seed: int) -> str:
    """train, val or test (70/10/20) by a keyed hash of the patient, for tables that do not say."""
    digest = hashlib.sha256(f"{seed}|{patient}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.7 else "val" if share < 0.8 else "test"


def by_rules(rules: Sequence[SiteRule], names: Sequence[str]) -> dict[str, SiteRule]:
    """Value of the site column -> the rule that takes it.

    Raises:
        ConfigError: a rule names a site that is not in the table, or two rules name the same one.
    """
    taken: dict[str, SiteRule] = {}
    for rule in rules:
        for member in rule.members or (rule.name,):
            if member not in names:
                raise ConfigError(
                    f"data.sites: '{rule.name}' takes site '{member}', which the table does not have.",
                    remedy=f"The table's sites are: {', '.join(sorted(names))}.",
                )
            if member in taken:
                raise ConfigError(f"data.sites: site '{member}' is taken by two rules.", remedy="Name it once.")
            taken[member] = rule
    return taken


def check_whole(site_of: Sequence[tuple[str, str, str]]) -> None:
    """Checks (patient, site, split) of every image.

    Raises:
        DataError: a patient in two sites or in two splits, named.
    """
    sites: dict[str, set[str]] = defaultdict(set)
    splits: dict[str, set[str]] = defaultdict(set)
    for patient, site, split in site_of:
        sites[patient].add(site)
        splits[patient].add(split)
    for where, what, remedy in (
        (sites, "sites", "Give the patient to one site, or merge the sites with a [[data.sites]] rule."),
        (splits, "splits", "Give every patient one split."),
    ):
        torn = [patient for patient, values in where.items() if len(values) > 1]
        if torn:
            raise DataError(
                f"Patient {torn[0]} is in two {what} ({', '.join(sorted(where[torn[0]]))}); "
                f"{len(torn)} such patients in all.",
                remedy=remedy,
            )


def _shares(weights: np.ndarray, total: int, at_least: int) -> list[int]:
    """Whole numbers near weights * total that add up to total; each at least `at_least` where total allows."""
    floor = at_least if total >= at_least * len(weights) else 0
    free = total - floor * len(weights)
    sizes = np.floor(weights * free).astype(int)
    rest = np.argsort(-(weights * free - sizes), kind="stable")[: free - sizes.sum()]
    sizes[rest] += 1
    return [int(size) + floor for size in sizes]


def _cut(order: list[str], sizes: list[int]) -> list[list[str]]:
    ends = np.cumsum([0, *sizes])
    return [order[a:b] for a, b in itertools.pairwise(ends)]
