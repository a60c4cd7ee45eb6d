"""The `[source]` section of site.toml: where the site's images come from.

One source, or several with names of their own:

    [source]                  [source.archive]              [source.routed]
    kind = "folder"           kind = "dicomweb"             kind = "dimse-store"

Secrets never stand in site.toml: a password or token is read from a file that only its owner may read, or from an
environment variable. AE titles are not authentication, they are names that anybody can claim: a `dimse-store` accepts
an AE title only from the addresses beside it, and only TLS with client certificates keeps others out for certain.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from datetime import date
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic import model_validator as check
from pydicom.datadict import dictionary_VR, tag_for_keyword

from fedscan_core.errors import ConfigError

FILE = "site.toml"


def _below_site(path: Path, info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", "")) / path.expanduser()


def _ae_title(text: str) -> str:
    """PS3.5 section 6.2, VR AE."""
    text = text.strip(" ")
    if not 0 < len(text) <= 16 or not text.isascii() or not text.isprintable() or "\\" in text:
        raise ValueError("an AE title has 1 to 16 ASCII characters and no backslash")
    return text


def _network(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    if network.prefixlen == 0:
        raise ValueError("this is every address there is; give the PACS's own")
    return network


def _filters(wanted: Mapping[str, str]) -> Mapping[str, str]:
    for keyword in wanted:
        tag = tag_for_keyword(keyword)
        if tag is None:
            raise ValueError(f"'{keyword}' is not a DICOM keyword (PS3.6), for example StudyDescription")
        if dictionary_VR(tag) in ("UI", "PN") or tag >> 16 == 0x0010 or keyword == "AccessionNumber":
            raise ValueError(f"'{keyword}' identifies patients or studies, which do not belong in site.toml")
    return wanted


SitePath = Annotated[Path, AfterValidator(_below_site)]
AETitle = Annotated[str, AfterValidator(_ae_title)]
Network = Annotated[IPv4Network | IPv6Network, AfterValidator(_network)]
Matching = Annotated[dict[str, str], AfterValidator(_filters)]
Code = Annotated[str, Field(pattern=r"^[A-Z0-9 _]{1,16}$")]  # VR CS
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]


class Section(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Folder(Section):
    """DICOM files in a folder, at any depth, also in zip archives."""

    kind: Literal["folder"]
    folder: SitePath = Field(description="the folder, or the DICOMDIR of a medium")
    settle_seconds: float = Field(10.0, ge=0, le=3600, description="a file must not have changed for so long")


class Table(Section):
    """A research table (CSV) beside image files."""

    kind: Literal["table"]
    folder: SitePath


class Filter(Section):
    """What a PACS is asked for; all of it has to match."""

    modality: tuple[Code, ...] = Field((), description="any of these, for example CR and DX; empty: all")
    body_part: tuple[Code, ...] = Field(
        (), description="Body Part Examined, any of these, as the PACS lists it; empty: all"
    )
    study_date_from: date | None = Field(None, description="first day")
    study_date_to: date | None = Field(None, description="last day")
    study: Matching = Field({}, description="further keys of the study, * and ? are wildcards")
    series: Matching = Field({}, description="further keys of the series")

    @check(mode="after")
    def _in_order(self) -> Self:
        if self.study_date_from and self.study_date_to and self.study_date_from > self.study_date_to:
            raise ValueError("study_date_from is after study_date_to")
        return self

    @property
    def dates(self) -> str:
        """Range matching of Study Date (PS3.4 C.2.2.2.5.1); "" for all."""
        first, last = (f"{day:%Y%m%d}" if day else "" for day in (self.study_date_from, self.study_date_to))
        return f"{first}-{last}" if first or last else ""


class Asking(Section):
    """What asking any PACS needs."""

    filter: Filter = Filter()
    timeout_seconds: Seconds = Field(60.0, description="without a word from the PACS, then it counts as gone")
    attempts: int = Field(6, ge=1, le=20, description="how often the same thing is tried")
    retry_seconds: float = Field(1.0, ge=0, le=600, description="pause before the second attempt; each next doubles it")


class DicomWeb(Asking):
    """A PACS over DICOMweb: QIDO-RS to ask, WADO-RS to retrieve."""

    kind: Literal["dicomweb"]
    url: str = Field(description="up to where /studies begins")
    username: str = ""
    password_file: SitePath | None = None
    password_env: str = ""
    token_file: SitePath | None = Field(None, description="a bearer token")
    token_env: str = ""
    ca_file: SitePath | None = Field(None, description="certificates (PEM) of who may vouch for the PACS")
    client_certificate: SitePath | None = Field(None, description="our certificate (PEM), where the PACS wants one")
    client_key: SitePath | None = None
    page_size: int = Field(500, ge=1, le=10_000, description="results asked for at once")

    @check(mode="after")
    def _sound(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url is not of the form https://host:port/path")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("url holds a user name, token or query; these go into username and the _file or _env keys")
        password, token = (self.password_file or self.password_env), (self.token_file or self.token_env)
        if bool(self.username) != bool(password) or (password and token):
            raise ValueError("give username with password_file or password_env, or token_file or token_env, or neither")
        if (password or token) and parts.scheme == "http" and not _local(parts.hostname):
            raise ValueError("url is http: the password or token would travel in clear; use https")
        if self.client_key and not self.client_certificate:
            raise ValueError("client_key needs client_certificate")
        return self


class Tls(Section):
    """TLS with certificates on both sides (PS3.15 annex B)."""

    ca_file: SitePath = Field(description="certificates (PEM) of who may vouch for the other side")
    certificate: SitePath = Field(description="our certificate (PEM)")
    key: SitePath = Field(description="its key (PEM)")


class Peer(Section):
    """Who may send: the AE title and the address must both match."""

    ae_title: AETitle
    address: Network = Field(description="an address, or a network like 10.1.2.0/28")


class Dimse(Asking):
    """A PACS that is asked by C-FIND."""

    host: str = Field(min_length=1)
    port: Port
    pacs_ae_title: AETitle = Field(description="the called AE title")
    ae_title: AETitle = Field("FEDSCAN", description="ours, as the PACS knows it")
    tls: Tls | None = None


class DimseGet(Dimse):
    """C-FIND and C-GET: the images come back on the connection that we open."""

    kind: Literal["dimse-get"]


class DimseMove(Dimse):
    """C-FIND and C-MOVE: the PACS opens a connection to us, so it must know our AE title, address and port."""

    kind: Literal["dimse-move"]
    listen_address: str = Field(description="ours, of the network card that faces the PACS")
    listen_port: Annotated[int, Field(ge=1, le=65535)]
    move_timeout_seconds: Seconds = Field(
        1800.0, description="of a C-MOVE without a word: many PACS say none meanwhile"
    )
    senders: tuple[Peer, ...] = Field((), description="who may send; default: pacs_ae_title from the addresses of host")


class DimseStore(Section):
    """A C-STORE SCP: the PACS routes images to us by its own rules (`fedscan agent listen`)."""

    kind: Literal["dimse-store"]
    ae_title: AETitle = Field("FEDSCAN", description="ours; calls to any other are refused")
    listen_address: str
    listen_port: Port
    allow: tuple[Peer, ...] = Field(min_length=1)
    tls: Tls | None = None
    max_associations: int = Field(10, ge=1, le=200)
    timeout_seconds: Seconds = 60.0


Source = Folder | Table | DicomWeb | DimseMove | DimseGet | DimseStore
_KINDS: dict[str, type[Section]] = {
    "folder": Folder,
    "table": Table,
    "dicomweb": DicomWeb,
    "dimse-move": DimseMove,
    "dimse-get": DimseGet,
    "dimse-store": DimseStore,
}
_ADAPTER: TypeAdapter[Source] = TypeAdapter(Annotated[Source, Field(discriminator="kind")])


def load(site_folder: Path) -> Mapping[str, Source]:
    """The sources of SITE_DIR/site.toml by name; one without a name is called "source". Relative paths start there.

    Raises:
        ConfigError: unreadable, not TOML, no source, or a wrong key or value.
    """
    path = site_folder / FILE
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", remedy="A site's folder holds a site.toml.") from None
    return parse(tree.get("source"), site_folder)


def parse(section: Any, site_folder: Path) -> Mapping[str, Source]:
    """Checks the section; see `load`."""
    if not isinstance(section, dict) or not section:
        raise ConfigError("site.toml has no [source].", remedy=f'For example kind = "folder"; {_kinds_text()}')
    trees = section if all(isinstance(value, dict) for value in section.values()) else {"source": section}
    return {name: _one(name, tree, site_folder) for name, tree in trees.items()}


def read_secret(file: Path | None, variable: str, what: str) -> str:
    """A password or token, from a file that only its owner may read or from an environment variable.

    Raises:
        ConfigError: absent, empty, or readable by others.
    """
    if file is not None:
        try:
            mode = file.stat().st_mode
            text = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(
                f"The file of the {what}, {file}, cannot be read.", remedy="Check the path and its owner."
            ) from None
        if mode & 0o077:
            raise ConfigError(f"Others may read the {what} in {file}.", remedy=f"Type: chmod 600 {file}")
        source = str(file)
    else:
        text, source = os.environ.get(variable, "").strip(), f"the environment variable {variable}"
    if not text or not text.isprintable():
        raise ConfigError(f"There is no usable {what} in {source}.", remedy="Put it there, on one line.")
    return text


def _one(name: str, tree: Mapping[str, Any], site_folder: Path) -> Source:
    where = "source" if name == "source" else f"source.{name}"
    if tree.get("kind") not in _KINDS:
        near = difflib.get_close_matches(str(tree.get("kind")), _KINDS, n=1)
        remedy = f"Did you mean '{near[0]}'?" if near else _kinds_text()
        raise ConfigError(f"site.toml: [{where}] has no kind that is known.", remedy=remedy)
    try:
        return _ADAPTER.validate_python(tree, context={"folder": site_folder})
    except ValidationError as error:
        items = error.errors(include_input=False, include_url=False)
        item = next((each for each in items if each["type"] == "extra_forbidden"), items[0])  # a misspelt key first
        loc = [str(part) for part in item["loc"][1:]]
        key = ".".join([where, *loc])
        if item["type"] == "extra_forbidden":
            raise _unknown(key, loc, _KINDS[tree["kind"]]) from None
        says = item["msg"].removeprefix("Value error, ")
        raise ConfigError(f"site.toml: '{key}': {says}.", remedy="Correct that key.") from None


def _unknown(key: str, loc: list[str], section: type[Section]) -> ConfigError:
    last = loc[-1]
    if last in ("password", "token"):
        return ConfigError(
            f"site.toml: '{key}': secrets do not stand in site.toml.",
            remedy=f"Put it into a file of its own and name that in {last}_file, or use {last}_env.",
        )
    inner: dict[str, type[Section]] = {"filter": Filter, "tls": Tls, "allow": Peer, "senders": Peer}
    names = list((inner.get(loc[0], section) if len(loc) > 1 else section).model_fields)
    near = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
    remedy = f"Did you mean '{near[0]}'?" if near else f"Keys here are {', '.join(names)}."
    return ConfigError(f"site.toml: there is no key '{key}'.", remedy=remedy)


def _kinds_text() -> str:
    return f"the kinds are {', '.join(_KINDS)}."


def _local(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
