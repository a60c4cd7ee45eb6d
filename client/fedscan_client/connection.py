"""Where a site's coordinator is and whom to trust there: SITE/connection.toml, written by `fedscan agent enrol`.

SITE/connection.toml       address, coordinator, site, ca ("coordinator-ca.pem", or "" = a public authority), enrolled
     coordinator-ca.pem    the only authority that this site believes about that address
     node.key              the site's network identity (0600): `fedscan_core.node_key`
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError
from fedscan_core.files import write_atomic

FILE, CA_FILE, NODE_KEY = "connection.toml", "coordinator-ca.pem", "node.key"
_ABOUT = "# Written by `fedscan agent enrol`: where this site connects to. Nothing in here is secret.\n"
_ADDRESS = r"https://[^/\s:@]+(:\d{1,5})?"


@dataclass(frozen=True)
class Connection:
    """A site's way to its coordinator.

    Attributes:
        address: https://HOST[:PORT].
        coordinator: its name.
        ca: PEM file of the only authority to trust; None: those that the operating system trusts.
        site: the name under which this site is enrolled.
        enrolled: UTC, ISO 8601; "" while enrolment is under way.
    """

    address: str
    coordinator: str
    ca: Path | None
    site: str = ""
    enrolled: str = ""

    @property
    def host(self) -> str:
        """The host's name."""
        return self.address.removeprefix("https://").partition(":")[0]

    @property
    def port(self) -> int:
        """The only port that this site connects to."""
        return int(self.address.removeprefix("https://").partition(":")[2] or 443)


def load(site_folder: Path) -> Connection:
    """Reads SITE/connection.toml.

    Raises:
        ConfigError: the site is not enrolled, or the file or its certificate is missing or damaged.
    """
    path = site_folder / FILE
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        ca = site_folder / str(tree["ca"]) if tree["ca"] else None
        read = Connection(tree["address"], tree["coordinator"], ca, tree["site"], tree["enrolled"])
        sound = bool(
            all(isinstance(tree[name], str) for name in ("coordinator", "enrolled"))
            and re.fullmatch(_ADDRESS, read.address)
            and re.fullmatch(NAME_PATTERN, read.site)
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{site_folder} is not enrolled: it holds no {FILE}.", remedy="fedscan agent enrol INVITE.toml SITE_DIR"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ConfigError(f"{path} cannot be read or is damaged.", remedy="Enrol again with a new invitation.")
    if ca is not None and not ca.is_file():
        raise ConfigError(f"{ca} is missing: the coordinator cannot be known.", remedy="Enrol again.")
    return read


def save(site_folder: Path, connection: Connection) -> None:
    """Writes SITE/connection.toml; the certificate itself is the caller's."""
    tree = {
        "address": connection.address,
        "coordinator": connection.coordinator,
        "site": connection.site,
        "ca": "" if connection.ca is None else connection.ca.name,
        "enrolled": connection.enrolled,
    }
    write_atomic(site_folder / FILE, (_ABOUT + tomli_w.dumps(tree)).encode())
