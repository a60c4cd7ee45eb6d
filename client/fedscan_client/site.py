"""A site: its folder, its `site.toml`, and what it declares in public.

    FOLDER/site.toml       name, declared cohort size, where its images are, the hospital's policy
           cohort.csv      source "table": the rows of this site
           cache/ key      source "cache": what `intake.ingest` wrote, and the site's key: see `keys`
           ledger.sqlite   what has been spent, for ever
           ledger.counter  how far it had got: tells an older copy (key `counter` puts it on another disk)
           outbox/         the last noisy answer, kept until the next one is there
           released.jsonl  what left, by hash
           site.log        everything that may depend on patients: never leaves

A pretend site of a simulation and a deployed one are the same thing to every line of code below this one.
"""

import tomllib
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedscan_client.dp.ledger_file import Book
from fedscan_client.gate.policy import Policy
from fedscan_client.keys import Settings
from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError

FILE = "site.toml"


class Source(BaseModel):
    """Where the site's cohort is read from: `folder` holds images (table) or the encrypted cache (cache)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["table", "cache"]
    folder: Path


class Site(BaseModel):
    """One hospital. `patients_declared` is typed by a person and constant for the ledger.

    `counter` is the file that notices an older copy of the ledger; on another disk than the folder it outlives a
    restored backup. Default: FOLDER/ledger.counter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(pattern=NAME_PATTERN)
    patients_declared: int = Field(ge=0)
    source: Source
    policy: Policy
    counter: Path | None = None
    key: Settings = Settings()
    folder: Path = Field(exclude=True)

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return self.folder / "ledger.sqlite"

    @property
    def book(self) -> Book:
        """The ledger with its counter."""
        return Book(self.ledger, self.folder / (self.counter or "ledger.counter"))


def load(folder: Path) -> Site:
    """Reads FOLDER/site.toml.

    Raises:
        ConfigError: missing, not TOML, or a wrong key or value.
    """
    path = folder / FILE
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        return Site.model_validate({**tree, "folder": folder})
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", remedy="A site's folder holds a site.toml.") from None
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(map(str, item["loc"]))
        raise ConfigError(f"{path}: '{key}': {item['msg']}.", remedy="Correct that key.") from None


def save(site: Site) -> None:
    """Writes FOLDER/site.toml."""
    site.folder.mkdir(parents=True, exist_ok=True)
    (site.folder / FILE).write_text(tomli_w.dumps(site.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
