"""Every error a person can meet, as one tree. Each says what is wrong and what to do next.

    FedscanError            base: message, remedy, exit code 2 (refused before anything started)
    ├── ConfigError         RUN.toml, site.toml or --set holds something wrong
    ├── DataError           images, tables, labels or DICOM that cannot be used as they are
    ├── ConsentError        no usable consent register: nothing may be read
    ├── SiteKeyError        the site's key is missing, damaged, readable by others, or not the one its files belong to
    ├── PrivacyError        the guarantee would be broken or cannot be reached
    │   ├── BudgetError     the ledger has not enough left for this run
    │   ├── RecordDamaged   a ledger or record of releases was changed, or a release was asked for in a wrong way
    │   └── NotPrivate      the model holds a layer that breaks the per-patient guarantee
    ├── FolderError         a run's or site's folder that cannot be written, is taken, or is another run's
    ├── WireError           a message between server and site that is malformed or not allowed
    ├── MissingExtra        an optional dependency is not installed
    └── RunFailed           exit code 1: failed after the start; the run folder is whole and resumable

Errors become text only at the command line's edge (`fedscan.cli`). Inside a site their text stays in the
site's own log: a reply to the server never carries it.
"""


class FedscanError(Exception):
    """An error with a remedy.

    Args:
        message: what is wrong, naming the file, key, patient count or site concerned.
        remedy: what the reader can do next, as a sentence.
    """

    exit_code = 2

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        """The paragraph shown to a person."""
        return f"{self.message} {self.remedy}".strip()


class ConfigError(FedscanError):
    """RUN.toml, site.toml or a --set holds something wrong."""


class DataError(FedscanError):
    """Images, tables, labels or DICOM that cannot be used as they are."""


class ConsentError(FedscanError):
    """No usable consent register."""


class SiteKeyError(FedscanError):
    """The site's key is missing, damaged, readable by others, or another one: nothing was written with it."""


class PrivacyError(FedscanError):
    """The guarantee would be broken or cannot be reached."""


class BudgetError(PrivacyError):
    """The ledger has not enough left for this run. Its text holds public values only: a researcher may read it."""


class RecordDamaged(PrivacyError):
    """A ledger or record of releases was changed, or a release was asked for in a wrong way. Stays at the site."""


class NotPrivate(PrivacyError):
    """The model holds a layer that breaks the per-patient guarantee."""


class FolderError(FedscanError):
    """A run's or site's folder that cannot be written, is taken, or belongs to another run."""


class WireError(FedscanError):
    """A message between server and site that is malformed or not allowed."""


class MissingExtra(FedscanError):
    """An optional dependency is not installed."""


class RunFailed(FedscanError):
    """Failed after the start: the run folder is whole and resumable."""

    exit_code = 1
