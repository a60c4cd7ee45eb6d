"""The coordinator's state folder: what is in it, and the one file a person edits, coordinator.toml.

    STATE/  coordinator.toml      settings
            pki/                  ca.key, ca.crt, server.key, server.crt
            secrets/              superexec, control: what our own processes show each other
            coordinator.sqlite    sites, people, invitations, anchors
            superlink/state.db    Flower's state: a site's update lies here in clear until it is delivered
            runs/RUN_ID/          run folders
            logs/                 of every process
            lock                  held while `fedscan server start` runs; its process id

The folder is 0700 and every file 0600: whoever can read it can pose as the coordinator.
"""

import ipaddress
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from fedscan_core.config_sections import Section
from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.files import write_atomic

FILE = "coordinator.toml"
FOLDERS = ("pki", "secrets", "superlink", "runs", "logs")
_HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"

TEMPLATE = """\
# Settings of this coordinator. `fedscan server check` looks at them; restart after a change.

name = {name}                # shown to sites and researchers
address = {address}          # HOST:PORT where sites and researchers reach it; the certificate is made for HOST
bind = {bind}                # HOST:PORT that the edge listens on; behind a proxy of yours: 127.0.0.1 and a port
superlink_port = {superlink_port}        # Flower, on 127.0.0.1 only: nobody but our own processes speaks to it

# true = checkpoints and what else a run keeps are written encrypted (AES-256-GCM). The key is 64 hex digits in the
# environment (FEDSCAN_VAULT_KEY), in the file that FEDSCAN_VAULT_KEY_FILE names, or in the file named here. Keep a copy
# elsewhere: without it the runs are lost.
encrypt = {encrypt}
key_file = {key_file}
"""


@dataclass(frozen=True)
class Coordinator:
    """A coordinator's settings and where its things are.

    `address` is https://HOST:PORT as sites see it; `bind` what the edge listens on; Flower's SuperLink listens on
    127.0.0.1:`superlink_port`. `key_file` is the vault key's file, or None.
    """

    folder: Path
    name: str
    address: str
    bind: tuple[str, int]
    superlink_port: int
    encrypt: bool = False
    key_file: Path | None = None

    @property
    def host(self) -> str:
        """The name in the address, which the certificate is for."""
        return split(self.address.removeprefix("https://"))[0]

    @property
    def superlink(self) -> str:
        """HOST:PORT of Flower's SuperLink, on loopback."""
        return f"127.0.0.1:{self.superlink_port}"

    @property
    def runs(self) -> Path:
        """Folder of the run folders."""
        return self.folder / "runs"

    @property
    def logs(self) -> Path:
        """Folder of the processes' logs."""
        return self.folder / "logs"

    @property
    def database(self) -> Path:
        """Our registry (SQLite)."""
        return self.folder / "coordinator.sqlite"

    @property
    def flower_database(self) -> Path:
        """Flower's state (SQLite)."""
        return self.folder / "superlink" / "state.db"

    @property
    def certificate(self) -> Path:
        """The server's certificate and what stands between it and its authority (PEM)."""
        return self.folder / "pki" / "server.crt"

    @property
    def private_key(self) -> Path:
        """The server's private key (PEM)."""
        return self.folder / "pki" / "server.key"

    @property
    def ca_pem(self) -> str:
        """The certificate that sites are to trust; "" if a public authority signed the server's."""
        path = self.folder / "pki" / "ca.crt"
        return path.read_text() if path.exists() else ""

    @property
    def control_secret(self) -> str:
        """What opens Flower's Control API.

        Raises:
            FolderError: it is not there.
        """
        return _secret(self.folder / "secrets" / "control")

    @property
    def superexec_secret(self) -> Path:
        """File of the secret with which SuperExec asks for tasks."""
        return self.folder / "secrets" / "superexec"


def split(address: str) -> tuple[str, int]:
    """(HOST, PORT) of HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(rf"({_HOST}|\[[0-9a-fA-F:.]+\]):(\d{{1,5}})", address)
    if not found or not 0 < int(found[3]) < 65536:
        raise ValueError("must be HOST:PORT, for example fedscan.example.org:8443")
    host = found[1].strip("[]")
    if ":" in host:
        ipaddress.IPv6Address(host)
    return host, int(found[3])


def _checked(address: str) -> str:
    split(address)
    return address


Address = Annotated[str, AfterValidator(_checked)]


class _Settings(Section):
    name: str = Field(min_length=1, max_length=100, pattern=r'^[^\x00-\x1f"\\]+$')
    address: Address
    bind: Address
    superlink_port: int = Field(ge=1, le=65535, strict=True)
    encrypt: bool = Field(False, strict=True)
    key_file: str = ""


def load(folder: Path) -> Coordinator:
    """Reads STATE/coordinator.toml.

    Raises:
        ConfigError: missing, not TOML, or a wrong key or value.
        FolderError: others can look into the folder.
    """
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} is no coordinator's folder: it holds no {FILE}.",
            remedy="Name it with --state, or make one: fedscan server init --address HOST:PORT",
        )
    if folder.stat().st_mode & 0o077:
        raise FolderError(f"Others can look into {folder}.", remedy=f"chmod 700 {folder}")
    try:
        settings = _Settings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", remedy="Correct it.") from None
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(map(str, item["loc"]))
        text = str(item["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{path}: '{key}': {text}.", remedy="Correct that key.") from None
    return Coordinator(
        folder=folder.absolute(),
        name=settings.name,
        address=f"https://{settings.address}",
        bind=split(settings.bind),
        superlink_port=settings.superlink_port,
        encrypt=settings.encrypt,
        key_file=folder.absolute() / settings.key_file if settings.key_file else None,
    )


def write_settings(
    folder: Path, name: str, address: str, bind: str, superlink_port: int, encrypt: bool = False, key_file: str = ""
) -> None:
    """Writes STATE/coordinator.toml with its comments.

    Raises:
        ConfigError: an address that is none, or a name with quotes or control characters.
    """
    try:
        settings = _Settings(
            name=name, address=address, bind=bind, superlink_port=superlink_port, encrypt=encrypt, key_file=key_file
        )
    except ValidationError as error:
        item = error.errors()[0]
        text = str(item["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{item['loc'][0]}: {text}.", remedy="Give another one.") from None
    values = {key: (str(value).lower() if isinstance(value, bool | int) else _quoted(value)) for key, value in settings}
    write_atomic(folder / FILE, TEMPLATE.format(**values).encode())


def _quoted(text: str) -> str:
    import tomli_w

    return tomli_w.dumps({"v": text}).removeprefix("v = ").strip()


def _secret(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}.", remedy="Restore it from a backup.") from None
