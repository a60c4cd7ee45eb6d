"""Section `[audit]` of site.toml."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Where copies of the audit log's records go besides the site's own disk; by default nowhere.

    Attributes:
        syslog: host:port (or [IPv6]:port) of the hospital's own log collector, which speaks RFC 5424 over TLS.
        syslog_ca: PEM file of the authority that signed the collector's certificate; default: the system's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    syslog: str = Field(default="", pattern=r"^(|(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5})$")
    syslog_ca: Path | None = None

    @model_validator(mode="after")
    def _port(self) -> Self:
        if self.syslog and not 1 <= self.address[1] <= 65535:
            raise ValueError("syslog: a port is a number from 1 to 65535")
        if self.syslog_ca is not None and not self.syslog:
            raise ValueError("syslog_ca goes with syslog")
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the collector; only where one is named."""
        host, _, port = self.syslog.rpartition(":")
        return host.strip("[]"), int(port)
