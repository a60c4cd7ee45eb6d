"""An enrolled hospital with a consent register and eight patients in its encrypted cache."""

import copy
import dataclasses
import shutil
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest

from fedscan_client import connection as connections
from fedscan_client import enrol, keys, site
from fedscan_client.intake import cache, deid
from fedscan_client.intake.cache import Entry
from fedscan_client.intake.records import PatientId, Volume, Window

IDS = [f"MRN{number}" for number in range(20)]
TOML = """\
name = "north"
patients_declared = 20
[source]
kind = "folder"
folder = "pacs"
[consent]
kind = "register"
path = "consent.csv"
[intake]
labels = "labels.csv"
[policy]
max_epsilon = 8.0
max_delta = 1e-5
"""


def _register(folder: Path, *, age: int = 0, denied: tuple[str, ...] = ()) -> None:
    rows = [f"{number},{'deny' if number in denied else 'permit'},2020-01-01" for number in IDS]
    text = f"# as-of: {date.today() - timedelta(days=age)}\npatient_id,status,date\n" + "\n".join(rows) + "\n"
    (folder / "consent.csv").write_text(text)


@pytest.fixture(scope="session")
def write_register():
    """Writes SITE/consent.csv."""
    return _register


@pytest.fixture(scope="session")
def drawn(fake_coordinator, tmp_path_factory):
    """The site's folder, written once, and what the coordinator holds of it."""
    folder = tmp_path_factory.mktemp("drawn") / "north"
    folder.mkdir(mode=0o700)
    (folder / site.FILE).write_text(TOML)
    with fake_coordinator["coordinator"](folder.parent / "centre") as fake:
        enrol.enrol(fake.invitation(folder.parent / "INVITE.toml"), folder)
    key = keys.load(folder, keys.Settings())
    for number, patient in enumerate(IDS):
        values = np.random.default_rng(number).integers(0, 256, (1, 16, 16), np.uint8)
        entry = Entry(str(number), "s", ("well", "ill")[number % 2], "train", "", None, {}, "")
        name = deid.patient_name(site.load(folder).names(key), PatientId(patient))
        cache.write_patient(folder / "cache", key, name, [(entry, Volume(values, "DX", windows=(Window(128, 256),)))])
    _register(folder)
    return folder, fake.sites


@pytest.fixture
def north(fake, drawn, tmp_path):
    """The folder of a site in which everything is as it should be."""
    folder = tmp_path / "north"
    shutil.copytree(drawn[0], folder)
    fake.sites = copy.deepcopy(drawn[1])
    (folder / connections.CA_FILE).write_text(fake.ca_pem)
    connections.save(folder, dataclasses.replace(connections.load(folder), address=fake.address))
    return folder
