"""Consent at every round: who withdrew, or whose consent ended, is out of the next; a stale register trains nobody."""

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fedscan.grid import InlineGrid
from fedscan_client import cohort, consent, eligible, keys, train
from fedscan_client.app import make_app
from fedscan_client.dp import ledger_file
from fedscan_client.intake import cache, deid
from fedscan_client.intake.cache import Entry
from fedscan_client.intake.records import PatientId, Volume, Window
from fedscan_client.intake.sources.settings import Folder
from fedscan_client.site import Intake
from fedscan_core import config, wire
from fedscan_core.order import Order
from fedscan_core.wire import Request
from fedscan_models import registry

SECRET = keys.SiteKey(bytes(range(32)), bytes(range(32, 64)))
IDS = [f"MRN{number}" for number in range(8)]
NAMES = [deid.patient_name(SECRET.project("fedscan"), PatientId(number)) for number in IDS]


def write_register(here, denied=(), age=0):
    day = date.today() - timedelta(days=age)
    rows = [f"{number},{'deny' if number in denied else 'permit'},2020-01-01" for number in IDS]
    path = here.folder / "consent.csv"
    path.write_text(f"# as-of: {day}\npatient_id,status,date\n" + "\n".join(rows) + "\n")


@pytest.fixture
def here(make_site, tmp_path):
    """A site without the right to switch anything off, whose eight patients are in the cache."""
    here = make_site(tmp_path / "north", rows=[], research_cohort=False)
    here = here.model_copy(
        update={
            "source": {"source": Folder(kind="folder", folder=tmp_path / "pacs")},
            "consent": consent.Settings(kind="register", path=Path("consent.csv")),
            "intake": Intake(labels=Path("labels.csv")),
        }
    )
    keys.put(here.folder, here.key, SECRET, "test")
    for number, name in enumerate(NAMES):
        values = np.random.default_rng(number).integers(0, 256, (1, 16, 16), np.uint8)
        entry = Entry("0", "s", ("well", "ill")[number % 2], "train", "", None, {}, "")
        image = [(entry, Volume(values, "DX", windows=(Window(128, 256),)))]
        cache.write_patient(here.cache, SECRET, name, image, consent_until=date(2001, 1, 1) if number == 7 else None)
    write_register(here)
    return here


@pytest.fixture
def took_part(monkeypatch):
    """The ids of those who were given to training, round by round."""
    seen = []
    real = train.train_round

    def watched(module, patients, *args, **kwargs):
        seen.append(patients.ids)
        return real(module, patients, *args, **kwargs)

    monkeypatch.setattr(train, "train_round", watched)
    return seen


def ask(here, kind, run, round_=0):
    model = {n: t.numpy() for n, t in registry.for_run(run).module.state_dict().items()} if round_ else None
    record = wire.request_record(Request(Order("demo", config.for_sites(run)), round_, model))
    grid = InlineGrid(make_app(lambda context: here), 1)
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(record, node, kind)])
    return wire.read_reply(reply.content)


def test_a_withdrawal_counts_from_the_next_round(here, make_run, took_part):
    run = make_run()
    assert ask(here, "query", run).status == "ok"
    assert ask(here, "train", run, 1).status == "ok"
    assert set(took_part[-1]) == set(NAMES[:7])  # the eighth's consent ended in 2001
    write_register(here, denied=IDS[2:4])
    assert ask(here, "train", run, 2).status == "ok"
    assert set(took_part[-1]) == {*NAMES[:2], *NAMES[4:7]}
    cache.destroy_patient(here.cache, NAMES[0])
    assert ask(here, "train", run, 3).status == "ok"
    assert set(took_part[-1]) == {NAMES[1], *NAMES[4:7]}
    assert [it.run_id for it in eligible.runs_of(here.folder, NAMES[2])] == ["demo"]
    assert eligible.runs_of(here.folder, NAMES[7]) == []


def test_an_old_register_trains_nobody_and_burns_nothing(here, make_run, took_part):
    run = make_run()
    assert ask(here, "query", run).status == "ok"
    write_register(here, age=90)
    reply = ask(here, "query", run)
    assert reply.status == "refused" and reply.reason == "this site has no consent register that can be used now"
    assert ask(here, "train", run, 1).status == "failed" and not took_part
    with ledger_file.reading(here.book) as db:
        states = [row["state"] for row in ledger_file.find(db, "1 ORDER BY seq")]
    assert states == ["opened", "admitted"]
    write_register(here)
    assert ask(here, "train", run, 1).status == "ok"


def test_a_hospital_without_a_register_takes_no_part(here, make_run):
    reply = ask(here.model_copy(update={"consent": None}), "query", make_run())
    assert reply.status == "refused" and reply.reason == "this site has no consent register"


def test_nothing_of_a_register_is_said_to_the_server(here, make_run):
    (here.folder / "consent.csv").write_text("patient_id,status,date\n,permit,MRN-CANARY\n")
    reply = ask(here, "query", make_run())
    assert reply.status == "refused" and "CANARY" not in reply.reason and "csv" not in reply.reason


def test_a_guardians_permit_whose_end_nobody_knows_trains_nobody(here, make_run, took_part):
    """The register says only now that it is a guardian's: the intake knew no end, and the round knows no birth date."""
    path = here.folder / "consent.csv"
    lines = path.read_text().replace("status,date", "status,date,by_guardian").splitlines()
    rows = [f"{line},{'yes' if number < 3 else ''}" for number, line in enumerate(lines[2:])]
    path.write_text("\n".join([*lines[:2], *rows]) + "\n")
    run = make_run()
    assert ask(here, "query", run).status == "ok"
    assert ask(here, "train", run, 1).status == "ok"
    assert set(took_part[-1]) == set(NAMES[3:7])


def test_one_unreadable_index_stops_no_round_and_a_withdrawn_patient_leaves_every_runs_memory(
    here, make_run, took_part
):
    run, other = make_run(), make_run(task={"image_size": [32, 32]})
    assert ask(here, "query", run).status == "ok"
    cohort.load_patients(here, other, "train")
    (here.cache / "patients" / NAMES[0] / cache.INDEX).unlink()
    (here.cache / "patients" / NAMES[0] / cache.INDEX).mkdir()  # not readable as a file, even for root
    assert ask(here, "train", run, 1).status == "ok" and NAMES[0] not in took_part[-1]
    assert len(cohort._MEMORY) == 1


@pytest.mark.parametrize("spoil", ["key", "project"])
def test_no_path_of_the_site_is_said_to_the_server(here, make_run, spoil, tmp_path):
    here.claim_names(SECRET)
    if spoil == "key":
        (here.folder / "key").unlink()
    else:
        here = here.model_copy(update={"intake": Intake(labels=Path("labels.csv"), project="other")})
    reply = ask(here, "query", make_run())
    assert (reply.status, reply.reason) == ("refused", "this site has no consent register that can be used now")
    assert ask(here, "train", make_run(), 1).status == "failed"
    assert str(tmp_path) in (here.folder / "site.log").read_text()
