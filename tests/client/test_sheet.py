"""The page for the firewall and PACS teams: the one rule, every DICOM node, nothing secret."""

import pytest

from fedscan_client import connection as connections
from fedscan_client import sheet, site
from fedscan_client.connection import Connection
from fedscan_core import invite
from fedscan_core.errors import ConfigError

TOML = """\
name = "north"
patients_declared = 20
[source.archive]
kind = "dicomweb"
url = "https://pacs.example/dicom-web"
username = "fedscan"
password_env = "SECRET_WORD"
[source.asked]
kind = "dimse-move"
host = "10.1.2.5"
port = 104
pacs_ae_title = "PACS1"
ae_title = "FEDSCAN"
listen_address = "10.1.2.9"
listen_port = 11112
[source.fetched]
kind = "dimse-get"
host = "10.1.2.6"
port = 105
pacs_ae_title = "PACS2"
[source.routed]
kind = "dimse-store"
ae_title = "FEDROUTE"
listen_address = "10.1.2.9"
listen_port = 11113
allow = [{ ae_title = "SENDER", address = "10.1.2.7" }]
[policy]
max_epsilon = 8.0
max_delta = 1e-5
"""


@pytest.fixture
def folder(fake_coordinator, tmp_path, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    pem, _ = fake_coordinator["_certificates"](tmp_path, "fed.invalid", 9)
    (tmp_path / site.FILE).write_text(TOML)
    (tmp_path / connections.CA_FILE).write_text(pem)
    connections.save(tmp_path, Connection("https://fed.invalid:8443", "c", tmp_path / connections.CA_FILE, "north"))
    return tmp_path


def test_everything_a_ticket_needs(folder, monkeypatch):
    text = sheet.page(folder)
    pem = (folder / connections.CA_FILE).read_text()
    for words in ("fed.invalid", "TCP 8443", "outbound", "NTP", "cannot resolve"):
        assert words in text
    assert invite.ca_fingerprint(pem).replace(":", "") in "".join(text.split()).replace(":", "")
    for words in ("pacs.example", "PACS1 at 10.1.2.5 TCP 104", "10.1.2.9 TCP 11112", "FEDSCAN = 10.1.2.9:11112"):
        assert words in text
    for words in ("PACS2 at 10.1.2.6 TCP 105", "C-GET", "FEDROUTE", "10.1.2.9 TCP 11113", "SENDER from 10.1.2.7"):
        assert words in text
    assert "SECRET_WORD" not in text and max(map(len, text.splitlines())) <= 122
    monkeypatch.setenv("HTTPS_PROXY", "http://user:word@proxy.example:3128")
    text = sheet.page(folder)
    assert "proxy.example:3128" in text and "word" not in text.replace("password", "")


def test_a_folder_needs_no_node(folder):
    text = (
        TOML[: TOML.index("[source.archive]")]
        + '[source]\nkind = "folder"\nfolder = "x"\n'
        + TOML[TOML.index("[policy]") :]
    )
    (folder / site.FILE).write_text(text)
    assert "no DICOM node is needed" in sheet.page(folder)


def test_not_enrolled(folder):
    (folder / connections.FILE).unlink()
    with pytest.raises(ConfigError, match="not enrolled"):
        sheet.page(folder)
