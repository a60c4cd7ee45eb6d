"""site.toml: read back as written, and refused with the key that is wrong."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from fedscan_client import site
from fedscan_client.dp.ledger_file import Book
from fedscan_client.intake.sources.settings import Folder, Table
from fedscan_client.site import Site
from fedscan_core.errors import ConfigError
from fedscan_core.policy import Policy

GOOD = """\
name = "north"
patients_declared = 120
[source]
kind = "folder"
folder = "/srv/images"
[policy]
max_epsilon = 8.0
max_delta = 1e-5
"""


def test_round_trip(tmp_path):
    policy = Policy(8.0, 1e-5, min_noise_multiplier=0.7, research_cohort=True)
    here = Site(
        name="north",
        patients_declared=120,
        source={"source": Table(kind="table", folder=Path("/data"))},
        policy=policy,
        folder=tmp_path / "a",
    )
    site.save(here)
    assert site.load(tmp_path / "a") == here
    assert str(tmp_path) not in (tmp_path / "a" / site.FILE).read_text()
    (tmp_path / "a").rename(tmp_path / "b")  # a site can be moved
    assert site.load(tmp_path / "b").book == Book(tmp_path / "b" / "ledger.sqlite", tmp_path / "b" / "ledger.counter")


def test_a_consent_register_is_kept_and_a_wrong_one_named(tmp_path):
    section = '[consent]\nkind = "fhir"\npath = "export"\ncodes = []\n[consent.issuers]\n"urn:oid:1.2.3" = "SOUTH"\n'
    (tmp_path / site.FILE).write_text(GOOD + section)
    here = site.load(tmp_path)
    assert here.consent is not None and here.consent.issuers == {"urn:oid:1.2.3": "SOUTH"} and not here.consent.codes
    site.save(here)
    assert site.load(tmp_path) == here
    for old, new, words in (
        ("codes = []", "code = []", "consent.code"),
        ('"fhir"', '"opt-out"', "legal_basis"),
        ('[consent.issuers]\n"urn:oid:1.2.3" = "SOUTH"\n', "", "issuers"),
    ):
        (tmp_path / site.FILE).write_text((GOOD + section).replace(old, new))
        with pytest.raises(ConfigError, match=words):
            site.load(tmp_path)


def test_the_counter_of_the_ledger_may_lie_on_another_disk(tmp_path):
    for text, counter in (("/mnt/other/north.counter", Path("/mnt/other/north.counter")), ("c", tmp_path / "c")):
        (tmp_path / site.FILE).write_text(f'counter = "{text}"\n{GOOD}')
        here = site.load(tmp_path)
        assert here.book == Book(tmp_path / "ledger.sqlite", counter)
        site.save(here)
        assert site.load(tmp_path) == here


def test_what_the_hospital_does_not_say_is_strict(tmp_path):
    (tmp_path / site.FILE).write_text(GOOD)
    assert site.load(tmp_path).policy == Policy(8.0, 1e-5, 0.3, False, "sum")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"north"', '"../north"', "name"),
        ('"north"', '""', "name"),
        ("120", "-1", "patients_declared"),
        ("120", '"many"', "patients_declared"),
        ('kind = "folder"', 'kind = "folder"\nsettle_seconds = -1', "source.settle_seconds"),
        ("max_epsilon = 8.0\n", "", "policy.max_epsilon"),
        ("max_epsilon = 8.0", 'max_epsilon = 8.0\ngate = "pld"', "policy.gate"),
        ("max_epsilon = 8.0", "max_epsilon = 8.0\nmin_noise_multipler = 2.0", "policy.min_noise_multipler"),
        ('name = "north"', 'name = "north"\nmax_epsilon = 1', "max_epsilon"),
        ('folder = "/srv/images"', 'folder = "/srv/images"\nsecret = 1', "source.secret"),
    ],
)
def test_a_wrong_or_unknown_key_is_named(tmp_path, old, new, key):
    """A limit that is written wrongly must not go unheard."""
    assert old in GOOD
    (tmp_path / site.FILE).write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f"'{key}'") as caught:
        site.load(tmp_path)
    assert caught.value.remedy


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / site.FILE).write_text("name = north")
    with pytest.raises(ConfigError, match="cannot be read"):
        site.load(tmp_path)


def test_a_folder_that_is_no_sites(tmp_path):
    with pytest.raises(ConfigError, match="no site's folder") as told:
        site.load(tmp_path)
    assert "fedscan agent enrol" in str(told.value)


def test_sources_may_have_names_and_a_table_stands_alone(tmp_path):
    two = GOOD.replace("[source]", "[source.archive]").replace(
        "[policy]", '[source.routed]\nkind = "folder"\nfolder = "in"\n[policy]'
    )
    (tmp_path / site.FILE).write_text(two)
    here = site.load(tmp_path / site.FILE)  # the file itself will do
    assert set(here.source) == {"archive", "routed"} and here.table is None
    routed = here.source["routed"]
    assert isinstance(routed, Folder) and routed.folder == tmp_path / "in"  # from the site's folder
    site.save(here)
    assert site.load(tmp_path) == here
    (tmp_path / site.FILE).write_text(two.replace('kind = "folder"\nfolder = "in"', 'kind = "table"\nfolder = "in"'))
    with pytest.raises(ConfigError, match="stands alone"):
        site.load(tmp_path)
    table = GOOD.replace('kind = "folder"', 'kind = "table"') + '[consent]\nkind = "register"\npath = "c.csv"\n'
    (tmp_path / site.FILE).write_text(table)
    with pytest.raises(ConfigError, match="do not go with a research table"):
        site.load(tmp_path)


def test_the_file_that_is_deployed_has_every_section(tmp_path):
    text = (Path(__file__).parents[2] / "client/deploy/site.toml").read_text()
    (tmp_path / site.FILE).write_text(text)
    here = site.load(tmp_path)
    assert here.consent and here.intake and here.intake.project == "fedscan" and here.table is None
    said = tomllib.loads(text)
    every = set(Site.model_fields)
    assert every - {"folder", "counter", "audit"} <= set(said) <= every
    commented = re.sub(r"(?m)^# (issuer = )", r"\1", text)
    (tmp_path / site.FILE).write_text(commented)
    assert site.load(tmp_path).issuer == "HOSPITAL-A"


def test_the_policy_as_a_person_writes_it(tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedscan_core import order

    text = (Path(__file__).parents[2] / "client/docs/policy.md").read_text()
    example = "\n".join(re.findall(r"(?ms)^```toml\n(.*?)^```", text))
    key = order.public_text(Ed25519PrivateKey.generate())
    (tmp_path / site.FILE).write_text(GOOD.partition("[policy]")[0] + example.replace("ssh-ed25519 AAAA...", key))
    policy = site.load(tmp_path).policy
    written = {it.name for it in dataclasses.fields(Policy) if getattr(policy, it.name) != it.default}
    # Every key is shown with a value of its own, but for those whose default is what a hospital wants.
    assert {it.name for it in dataclasses.fields(Policy)} - written == {"research_cohort", "gate", "approval"}
    assert all(f"`{it.name}`" in text or it.name in example for it in dataclasses.fields(Policy))
    site.save(site.load(tmp_path))
    assert site.load(tmp_path).policy == policy


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('launchers = { ana = "ssh-rsa AAAA" }', "launchers.ana is no Ed25519 public key"),
        ("max_rounds = 0", "max_rounds must be at least 1"),
        ('approval = "automatic"', "approval"),
        ('two_people = ["everything"]', "two_people"),
        ("valid_until = 2027-13-01", "cannot be read"),
        ("epsilon_per_year = -1.0", "epsilon_per_year"),
        ("agreement_until = 2027-01-01", "name ethics_approval or data_use_agreement"),
        ('groups = ["postcode"]', "groups"),
    ],
)
def test_a_policy_that_cannot_mean_what_a_person_meant(tmp_path, line, words):
    (tmp_path / site.FILE).write_text(GOOD + line + "\n")
    with pytest.raises(ConfigError, match=words):
        site.load(tmp_path)
