import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedscan_client.intake.sources import settings
from fedscan_client.intake.sources.settings import Filter, parse
from fedscan_core.errors import ConfigError

WEB = {"kind": "dicomweb", "url": "https://pacs.example/dicom-web"}
GET = {"kind": "dimse-get", "host": "pacs", "port": 104, "pacs_ae_title": "PACS"}
MOVE = {**GET, "kind": "dimse-move", "listen_address": "10.0.0.9", "listen_port": 11112}
STORE = {
    "kind": "dimse-store",
    "listen_address": "10.0.0.9",
    "listen_port": 11112,
    "allow": [{"ae_title": "PACS", "address": "10.0.0.5"}],
}


def test_one_source_or_several_by_name(tmp_path):
    tree = {"name": "north", "source": WEB}
    (tmp_path / "site.toml").write_text(tomli_w.dumps(tree))
    assert list(settings.load(tmp_path)) == ["source"]
    tree["source"] = {"web": WEB, "routed": STORE, "ask": MOVE, "get": GET, "old": {"kind": "folder", "folder": "in"}}
    (tmp_path / "site.toml").write_text(tomli_w.dumps(tree))
    sources: Any = settings.load(tmp_path)
    assert {name: source.kind for name, source in sources.items()} == {
        "web": "dicomweb",
        "routed": "dimse-store",
        "ask": "dimse-move",
        "get": "dimse-get",
        "old": "folder",
    }
    assert sources["old"].folder == tmp_path / "in"
    assert str(sources["routed"].allow[0].address) == "10.0.0.5/32"


def test_paths_start_at_the_sites_folder(tmp_path):
    web: Any = parse({**WEB, "ca_file": "pems/ca.pem", "token_file": "/run/secrets/token"}, tmp_path)["source"]
    assert web.ca_file == tmp_path / "pems/ca.pem" and str(web.token_file) == "/run/secrets/token"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (None, "has no [source]"),
        ({}, "has no [source]"),
        ({"kind": "dicom-web"}, "Did you mean 'dicomweb'?"),
        ({"folder": "x"}, "the kinds are folder, table"),
        ({**WEB, "ulr": "x"}, "Did you mean 'url'?"),
        ({**WEB, "password": "hunter2"}, "secrets do not stand in site.toml"),
        ({**WEB, "token": "hunter2"}, "token_file"),
        ({**WEB, "url": "https://me:hunter2@pacs/x"}, "url holds a user name, token or query"),
        ({**WEB, "url": "https://pacs/x?access_token=hunter2"}, "url holds a user name, token or query"),
        ({**WEB, "url": "ftp://pacs/x"}, "not of the form https"),
        ({**WEB, "url": "http://pacs/x", "token_env": "T"}, "in clear"),
        ({**WEB, "username": "me"}, "password_file"),
        ({**WEB, "username": "me", "password_env": "P", "token_env": "T"}, "or neither"),
        ({**WEB, "client_key": "k"}, "client_key needs client_certificate"),
        ({**WEB, "filter": {"modalities": ["CT"]}}, "Did you mean 'modality'?"),
        ({**WEB, "filter": {"modality": ["ct"]}}, "filter.modality"),
        ({**WEB, "filter": {"study": {"PatientID": "hunter2"}}}, "identifies patients"),
        ({**WEB, "filter": {"series": {"SeriesInstanceUID": "1.2"}}}, "identifies patients"),
        ({**WEB, "filter": {"study": {"Referring": "x"}}}, "not a DICOM keyword"),
        ({**WEB, "filter": {"study_date_from": "2026-02-01", "study_date_to": "2026-01-01"}}, "is after"),
        ({**GET, "ae_title": "SEVENTEEN LETTERS"}, "1 to 16"),
        ({**GET, "port": 70000}, "port"),
        ({**MOVE, "listen_port": 0}, "listen_port"),
        ({**STORE, "allow": []}, "allow"),
        ({**STORE, "allow": [{"ae_title": "PACS", "address": "0.0.0.0/0"}]}, "every address"),
        ({**STORE, "allow": [{"ae_title": "PACS", "address": "10.0.0.5/24"}]}, "address"),
        ({**STORE, "allow": [{"ae_title": "PACS", "addres": "10.0.0.5"}]}, "Did you mean 'address'?"),
        ({"a": WEB, "b": {**WEB, "page_size": 0}}, "source.b.page_size"),
    ],
)
def test_what_is_wrong_is_named_and_no_secret_is_repeated(tmp_path, section, says):
    with pytest.raises(ConfigError) as caught:
        parse(section, tmp_path)
    assert says in str(caught.value) and caught.value.remedy
    assert "hunter2" not in str(caught.value)


def test_a_site_toml_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        settings.load(tmp_path)
    (tmp_path / "site.toml").write_text("[source")
    with pytest.raises(ConfigError, match="cannot be read"):
        settings.load(tmp_path)


@pytest.mark.parametrize(
    ("first", "last", "range_"),
    [(None, None, ""), ("2020-01-31", None, "20200131-"), (None, "2021-02-28", "-20210228")],
)
def test_dates_as_dicom_writes_them(first, last, range_):
    assert Filter(study_date_from=first, study_date_to=last).dates == range_


def test_local_http_may_carry_a_password(tmp_path):
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert parse({**WEB, "url": f"http://{host}:8042/x", "token_env": "T"}, tmp_path)


def test_the_example_of_the_docs_is_right(tmp_path):
    text = (Path(__file__).parents[4] / "client/docs/sources.md").read_text()
    example = text.split("```toml\n", 1)[1].split("```", 1)[0]
    sources = parse(tomllib.loads(example)["source"], tmp_path)
    assert {source.kind for source in sources.values()} == {"dicomweb", "dimse-move", "dimse-store", "folder"}
    commented = "\n".join(line.removeprefix("# ") for line in example.splitlines())
    assert parse(tomllib.loads(commented)["source"], tmp_path).keys() == sources.keys()
