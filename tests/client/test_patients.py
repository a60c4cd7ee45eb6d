"""A patient's rights: shown whole, and nobody else's; withdrawn for good; no identifier left in the site's folder."""

from datetime import date
from pathlib import Path

import numpy as np
import pytest

from fedscan_client import eligible, patients, site
from fedscan_client.consent import Settings, withdrawals
from fedscan_client.dp import ledger
from fedscan_client.intake import cache, index, quarantine
from fedscan_client.intake.deid import patient_name
from fedscan_client.intake.index import Header
from fedscan_client.intake.records import PatientId, Volume
from fedscan_client.intake.sources import spool
from fedscan_client.intake.sources.settings import Folder
from fedscan_client.keys import SiteKey
from fedscan_client.site import Site
from fedscan_core import accounting, rdp
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import ConfigError, ConsentError
from fedscan_core.policy import Policy

KEY = SiteKey(bytes(range(32)), bytes(range(32, 64)))
TODAY = date(2026, 1, 15)
ANNA, BEN = PatientId("SECRET-0815"), PatientId("SECRET-4711", "NORTH")
REGISTER = """\
# as-of: 2026-01-10
patient_id,issuer,status,date,until,by_guardian,birth_date
SECRET-0815,,permit,2025-06-01,2026-02-01,,
SECRET-4711,NORTH,permit,2025-07-01,,yes,
SECRET-9999,,deny,2025-07-01,,,
SECRET-8888,,perhaps,2025-07-01,,,
"""


def name(patient: PatientId) -> str:
    return patient_name(KEY.project("fedscan"), patient)


@pytest.fixture
def here(tmp_path: Path) -> Site:
    """A hospital with two patients in its cache; its register lies outside of its folder."""
    folder = tmp_path / "site"
    (tmp_path / "register.csv").write_text(REGISTER)
    made = Site(
        name="north",
        patients_declared=100,
        source={"source": Folder(kind="folder", folder=tmp_path / "pacs")},
        policy=Policy(20.0, 1e-3),
        consent=Settings(kind="register", path=tmp_path / "register.csv", contact="Ask Dr. Who"),
        folder=folder,
    )
    site.save(made)
    for patient, labels in ((ANNA, ["ill", "well", "ill"]), (BEN, ["canary-of-ben"])):
        images = [
            (cache.Entry(str(n), "s", label, "train", "F", 50, {}, ""), Volume(np.zeros((1, 4, 4), np.uint8), "CR"))
            for n, label in enumerate(labels)
        ]
        cache.write_patient(made.cache, KEY, name(patient), images)
    return made


def plan(epsilon: float) -> SitePlan:
    return SitePlan(100, 1e-5, epsilon, 0.2, 1.0, 10, 0.0)


def admit(here: Site, *runs: str) -> None:
    ledger.open_ledger(here.book, ledger.Budget(20.0, 1e-3), 100, here.policy.gate)
    for number, run in enumerate(runs):
        ledger.admit(here.book, run, plan(1.0 + number), "sha")
        eligible.record(here.folder, run, f"net-{run}", [name(ANNA)] + ([name(BEN)] if number == 0 else []))


def test_everything_held_on_a_patient_and_nothing_on_another(here):
    admit(here, "first", "second")
    told = patients.show(here, KEY, ANNA, today=TODAY)
    assert told["patient"] == name(ANNA) and told["images"] == 3
    assert told["held"] == [
        {"study": "s", "modality": "CR", "label": "ill", "split": "train", "images": 2},
        {"study": "s", "modality": "CR", "label": "well", "split": "train", "images": 1},
    ]
    consent = told["consent"]
    assert (consent["permit"], consent["given"], consent["until"]) == (True, "2025-06-01", "2026-02-01")
    assert [(run["run_id"], run["model"], run["epsilon"], run["delta"]) for run in told["runs"]] == [
        ("first", "net-first", 1.0, 1e-5),
        ("second", "net-second", 2.0, 1e-5),
    ]
    assert told["in_all"] == {"epsilon": 3.0, "delta": 2e-5} and told["withdrawals"] == []
    assert name(BEN) not in str(told) and "canary-of-ben" not in str(told) and "SECRET" not in str(told)
    other = patients.show(here, KEY, BEN, today=TODAY)
    assert [run["run_id"] for run in other["runs"]] == ["first"] and other["in_all"]["epsilon"] == 1.0
    assert other["consent"]["by_guardian"]


def test_runs_without_privacy_have_no_number(here):
    admit(here, "first")
    eligible.record(here.folder, "bare", "net", [name(ANNA)])
    told = patients.show(here, KEY, ANNA, today=TODAY)
    assert told["runs"][1]["epsilon"] is None and told["in_all"] == {"epsilon": None, "delta": None}


def test_at_a_renyi_gate_all_runs_together_cost_what_the_filter_says(here):
    here = here.model_copy(update={"policy": Policy(20.0, 1e-3, gate="rdp")})
    admit(here, "first", "second")
    told = patients.show(here, KEY, ANNA, today=TODAY)
    order = ledger.summary(here.book)["order"]
    curve = rdp.add(*[accounting.renyi(plan(1.0).events(), (order,))] * 2)
    assert told["in_all"] == {"epsilon": rdp.to_epsilon(curve, 1e-3, [order]), "delta": 1e-3}


def test_a_patient_whom_nobody_knows(here):
    told = patients.show(here, KEY, PatientId("nobody"), today=TODAY)
    assert (told["images"], told["runs"], told["consent"]["reason"]) == (0, [], "not_listed")
    assert told["in_all"] == {"epsilon": 0.0, "delta": 0.0}


@pytest.mark.parametrize("broken", ["away", "no section"])
def test_without_a_register_the_rest_is_still_shown(here, broken):
    if broken == "away":
        here.consent.path.unlink()
    else:
        here = here.model_copy(update={"consent": None})
    told = patients.show(here, KEY, ANNA, today=TODAY)
    assert told["images"] == 3 and not told["consent"]["permit"] and told["consent"]["error"]


# ---------------------------------------------------------------------------------------------------------- withdrawal


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HELD = {
    "key and files in the cache": 1,
    "objects in the spool": 1,
    "lines in the intake's index": 2,
    "objects in quarantine": 1,
}


def hold_more(here: Site) -> None:
    """An object of Anna's in the spool and in quarantine, and two in the index; one of Ben's in each."""
    known: set[str] = set()
    for number, patient in enumerate((ANNA, BEN)):
        spool.put(here.spool, KEY.wrapping, b"DICOM", f"1.2.{number}")
        (locator,) = (it.locator for it in spool.found(here.spool, KEY.wrapping) if it.locator not in known)
        known.add(locator)
        header = Header("", name(patient), "t", f"s{number}", f"i{number}")
        with index.opened(here.folder, KEY.wrapping) as seen:
            seen.put(f"\n{locator}", "1", header)
            seen.put(f"source\nfile{number}", "1", header)
        found = quarantine.Found("kind", name(patient), f"s{number}", f"i{number}", f"\n{locator}")
        quarantine.put(here.folder, KEY.wrapping, [found])


def test_a_withdrawal_first_says_what_it_would_do(here):
    admit(here, "first")
    hold_more(here)
    before = files(here.folder)
    told = patients.withdraw(here, KEY, ANNA, today=TODAY, yes=False)
    after = files(here.folder).keys()
    assert {path for path in after if not path.endswith(("-shm", "-wal"))} <= before.keys()
    assert told["destroyed"] == HELD and not told["done"]
    assert cache.read_index(here.cache, KEY, name(ANNA)).entries


def test_a_withdrawal_destroys_and_holds(here):
    admit(here, "first", "second")
    hold_more(here)
    told = patients.withdraw(here, KEY, ANNA, today=TODAY, yes=True)
    assert told["done"] and told["destroyed"] == HELD
    assert len(list(spool.found(here.spool, KEY.wrapping))) == 1  # Ben's
    assert [it.patient for it in quarantine.items(here.folder)] == [name(BEN)]
    with index.opened(here.folder, KEY.wrapping) as seen:
        assert seen.patients() == [name(BEN)]
    assert told["runs"] == [{"run_id": n, "model": f"net-{n}"} for n in ("first", "second")]
    assert cache.patients(here.cache) == [name(BEN)]
    assert not any(name(ANNA) in path for path in files(here.folder / "cache"))
    recorded = withdrawals.history(here.folder, name(ANNA))
    assert [row["state"] for row in recorded] == ["withdrawn", "destroyed"]
    assert recorded[1]["runs"] == told["runs"] and recorded[1]["what"] == told["destroyed"]
    shown = patients.show(here, KEY, ANNA, today=TODAY)
    assert (shown["images"], shown["consent"]["reason"]) == (0, "withdrawn_here")  # the register still permits
    assert [row["day"] for row in shown["withdrawals"]] == ["2026-01-15"] * 2 and len(shown["runs"]) == 2
    again = patients.withdraw(here, KEY, ANNA, today=TODAY, yes=True)
    assert again["destroyed"] == dict.fromkeys(HELD, 0)


def test_a_crash_while_destroying_leaves_a_patient_who_is_out(here, monkeypatch):
    monkeypatch.setattr(cache, "destroy_patient", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patients.withdraw(here, KEY, ANNA, today=TODAY, yes=True)
    assert patients.show(here, KEY, ANNA, today=TODAY)["consent"]["reason"] == "withdrawn_here"


def test_a_changed_record_of_withdrawals_is_found_before_anything_is_destroyed(here):
    (here.folder / withdrawals.FILE).write_text('{"patient": "x"}\n')
    for yes in (False, True):
        with pytest.raises(ConsentError):
            patients.withdraw(here, KEY, ANNA, today=TODAY, yes=yes)
    assert len(cache.patients(here.cache)) == 2


# --------------------------------------------------------------------------------------------------------------- check


def test_the_register_in_numbers(here):
    withdrawals.add(here.folder, name(PatientId("SECRET-9999")), date(2025, 12, 1))
    cache.write_patient(here.cache, KEY, "ab" * 16, [(cache.Entry("0", "s", "ill", "", "", None, {}, ""), np.zeros(3))])
    told = patients.check(here, KEY, today=TODAY)
    assert told["patients"] == 4 and told["age_days"] == 5 and told["cached"] == 3 and told["by_guardian"] == 1
    assert told["reasons"] == {"not_understood": 1, "permit": 2, "withdrawn_here": 1}
    words = "; ".join(told["warnings"])
    for expected in (
        "not understood: status (1)",
        "1 permits by a guardian",
        "1 permits end",
        "1 patients in the cache",
    ):
        assert expected in words
    assert "days old" not in words
    old = here.model_copy(update={"consent": here.consent.model_copy(update={"max_age_days": 6})})
    assert "register is 5 of at most 6 days old" in "; ".join(patients.check(old, KEY, today=TODAY)["warnings"])
    with pytest.raises(ConfigError, match="consent"):
        patients.check(here.model_copy(update={"consent": None}), KEY, today=TODAY)
    with pytest.raises(ConsentError):
        patients.check(here, KEY, today=date(2027, 1, 1))


def test_no_identifier_is_left_in_the_sites_folder(here):
    admit(here, "first")
    patients.show(here, KEY, ANNA, today=TODAY)
    patients.check(here, KEY, today=TODAY)
    patients.withdraw(here, KEY, BEN, today=TODAY, yes=True)
    with pytest.raises(ConsentError):
        patients.check(here, KEY, today=date(2027, 1, 1))
    kept = files(here.folder)
    assert {"withdrawals.jsonl", "eligible.sqlite", "ledger.sqlite"} <= kept.keys()
    assert not [path for path, data in kept.items() if b"SECRET" in data or "SECRET" in path]
