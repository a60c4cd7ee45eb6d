"""A site: its folder, its `site.toml`, and what it declares in public.

    FOLDER/site.toml       name, declared cohort size, source of the images, consent, labels, the hospital's policy
           cohort.csv      source "table": the rows of this site
           key             the site's key, where it is kept in a file (0600)
           names.check     fingerprint of project and issuer, which every pseudonym depends on
           cache/          its consenting patients' images, encrypted: what `intake.ingest` writes
           spool/          what came over the network, encrypted
           intake.sqlite   what the intake has seen; quarantine.sqlite: what waits for a person; withdrawals.jsonl
           audit/          the audit log: what left, by hash; what was done to keys, cache and quarantine; decisions
           ledger.sqlite   what has been spent, for ever
           ledger.counter  how far it had got: tells an older copy (key `counter` puts it on another disk)
           runs.sqlite     which runs asked, and what people decided; two_people.json: words that wait for a second one
           policy.json     the policy as the audit log has it
           eligible.sqlite which patients were eligible in which run
           outbox/         the last noisy answer, kept until the next one is there
           site.log        everything that may depend on patients: never leaves

A pretend site of a simulation and a deployed one are the same thing to every line of code below this one.
"""

import hashlib
import hmac
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedscan_client import consent as consents
from fedscan_client import keys
from fedscan_client.audit import settings as audits
from fedscan_client.dp.ledger_file import Book
from fedscan_client.intake.rules import QuarantineSettings
from fedscan_client.intake.sources import settings as sources
from fedscan_client.intake.sources.settings import Source
from fedscan_client.two_people import several
from fedscan_core import policy as policies
from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError
from fedscan_core.files import write_atomic
from fedscan_core.policy import Policy

FILE = "site.toml"
PAUSED = "paused"  # while this file is there nothing made of data leaves: see `node.status.pause`
RETIRED = "retired"  # the day on which the site left for good
NAMED = "names.check"  # fingerprint of what the site's pseudonyms are made with


class Intake(BaseModel):
    """Section [intake]: how images become a cohort.

    Attributes:
        labels: the label table, see `intake.labels`.
        project: pseudonyms of two projects cannot be linked. Another one needs another site folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    labels: Path
    project: str = Field(default="fedscan", min_length=1)


class Site(BaseModel):
    """One hospital. `patients_declared` is typed by a person and constant for the ledger.

    `counter` is the file that notices an older copy of the ledger; on another disk than the folder it outlives a
    restored backup. Default: FOLDER/ledger.counter. `source` is one section or several with names of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(pattern=NAME_PATTERN)
    patients_declared: int = Field(ge=0)
    source: Mapping[str, Source]
    policy: Policy
    consent: consents.Settings | None = None
    intake: Intake | None = None
    quarantine: QuarantineSettings = QuarantineSettings()
    audit: audits.Settings = audits.Settings()
    key: keys.Settings = keys.Settings()
    counter: Path | None = None
    folder: Path = Field(exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _sources(cls, tree: Any) -> Any:
        source = tree.get("source")
        if isinstance(source, Mapping) and not any(isinstance(value, BaseModel) for value in source.values()):
            return {**tree, "source": sources.parse(source, Path(tree["folder"]))}
        return tree

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if any(it.kind == "table" for it in self.source.values()) and len(self.source) > 1:
            raise ValueError("a source of kind 'table' stands alone")
        if self.table is not None and (self.consent or self.intake):
            raise ValueError(
                "[consent] and [intake] do not go with a research table, whose patients are not the register's"
            )
        return self

    @model_validator(mode="after")
    def _sane_policy(self) -> Self:
        if wrong := policies.fault(self.policy):
            raise ValueError(f"policy.{wrong}")
        if "quarantine" in self.policy.two_people:
            for rule in self.quarantine.rule:
                if not several(rule.approved_by):
                    raise ValueError(f"policy.two_people: rule '{rule.name}' needs approved_by = \"NAME and NAME\"")
        return self

    @property
    def table(self) -> Path | None:
        """The folder of the images, where the cohort is a research table; else the cohort is what the cache holds."""
        return next((it.folder for it in self.source.values() if it.kind == "table"), None)

    def names(self, key: keys.SiteKey) -> bytes:
        """The secret that makes this project's pseudonyms.

        Raises:
            ConfigError: project or issuer are not those with which this site's patients were named: everybody would be
                somebody else, and every withdrawal forgotten.
        """
        secret = key.project((self.intake or Intake(labels=Path())).project)
        path = self.folder / NAMED
        if path.exists() and path.read_text(encoding="ascii", errors="replace").strip() != self._mark(secret):
            raise ConfigError(
                f"{self.folder / FILE}: [intake] project, [consent] issuer or the site's key changed since this site's "
                "patients got their pseudonyms.",
                remedy="Put them back as they were. Another project needs a site folder of its own.",
            )
        return secret

    def claim_names(self, key: keys.SiteKey) -> None:
        """From now on this folder's pseudonyms are those of this project and issuer. Errors as `names`."""
        secret = self.names(key)
        if not (self.folder / NAMED).exists():
            write_atomic(self.folder / NAMED, f"{self._mark(secret)}\n".encode())

    def _mark(self, secret: bytes) -> str:
        told = b"fedscan names 1\0" + self.issuer.encode()
        return hmac.new(secret, told, hashlib.sha256).hexdigest()[:32]

    @property
    def issuer(self) -> str:
        """Who gave out patient ids where neither a header nor a register says."""
        return self.consent.issuer if self.consent else ""

    @property
    def cache(self) -> Path:
        """The encrypted cache."""
        return self.folder / "cache"

    @property
    def spool(self) -> Path:
        """What came over the network."""
        return self.folder / "spool"

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return self.folder / "ledger.sqlite"

    @property
    def book(self) -> Book:
        """The ledger with its counter."""
        return Book(self.ledger, self.folder / (self.counter or "ledger.counter"))


def load(folder: Path) -> Site:
    """Reads FOLDER/site.toml; FOLDER may be the path of that file itself.

    Raises:
        ConfigError: missing, not TOML, or a wrong key or value.
    """
    folder = folder.parent if folder.name == FILE else folder
    path = folder / FILE
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        return Site.model_validate({**tree, "folder": folder})
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder} is no site's folder: it holds no {FILE}.",
            remedy="Give the folder that enrol made; a new one: fedscan agent enrol INVITE.toml",
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", remedy="Use its owner's account.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", remedy="Mend that line.") from None
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(map(str, item["loc"]))
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise ConfigError(
                f"{path}: unknown key '{key}'.", remedy="Correct its name: client/deploy/site.toml has every key."
            ) from None
        raise ConfigError(f"{path}: '{key}': {item['msg']}.", remedy="Correct that key.") from None


def with_policy(folder: Path, changes: Mapping[str, float]) -> str:
    """FOLDER/site.toml with other numbers in its [policy], everything else as people wrote it.

    Raises:
        ConfigError: the file cannot be read, or is written so that a program cannot change these numbers safely.
    """
    path = folder / FILE
    load(folder)
    old = path.read_text(encoding="utf-8")
    head, mark, rest = old.partition("[policy]")
    end = found.start() if (found := re.search(r"(?m)^\s*\[", rest)) else len(rest)
    section, tail = rest[:end], rest[end:]
    for key, value in changes.items():
        section = re.sub(rf"(?m)^(\s*{key}\s*=\s*)[^#\s]+", rf"\g<1>{value!r}", section, count=1)
    new = head + mark + section + tail
    before, after = tomllib.loads(old), tomllib.loads(new)
    before["policy"] |= changes
    if after != before:
        raise ConfigError(
            f"{path}: [policy] is not written in the usual way, so no program should change it.",
            remedy="Write " + ", ".join(f"{key} = {value!r}" for key, value in changes.items()) + " there, and again.",
        )
    return new


def save(site: Site) -> None:
    """Writes FOLDER/site.toml."""
    tree = site.model_dump(mode="json", exclude_none=True, exclude_defaults=True)  # what a person would write
    if list(tree["source"]) == ["source"]:  # the only one
        tree["source"] = tree["source"]["source"]
    site.folder.mkdir(parents=True, exist_ok=True)
    (site.folder / FILE).write_text(tomli_w.dumps(tree), encoding="utf-8")
