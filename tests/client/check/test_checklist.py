"""`fedscan agent check`: ticks where all is well, a cross with a remedy for each thing that is not; it only reads."""

import dataclasses
import functools
import hashlib
import os
import shutil
from datetime import date, timedelta
from types import SimpleNamespace

import numpy as np
import pytest

from fedscan_client import connection as connections
from fedscan_client import door, site, train
from fedscan_client.audit import log
from fedscan_client.check import checklist, machine, network, patients
from fedscan_client.check.finding import skip
from fedscan_client.cohort import Image
from fedscan_client.consent import Decision, Register
from fedscan_client.dp import ledger
from fedscan_core.errors import ConfigError

TOPICS = [
    "coordinator", "certificate", "clock", "registration", "versions", "folder", "disk", "memory", "gpu", "site key",
    "cache", "ledger", "audit log", "policy", "consent register", "consents", "cohort", "labels", "rehearsal",
]  # fmt: skip


def look(folder):
    """Findings by topic; no rule is broken by any of them."""
    found = list(checklist.findings(folder))
    for one in found:
        assert one.says and len(one.says.splitlines()) == 1 and "Traceback" not in one.says
        assert bool(one.remedy) or one.state in ("ok", "skip"), one
        for number in range(20):  # nobody's identifier, not even to people here
            assert f"MRN{number}" not in one.says + one.remedy
    return {one.topic: one for one in reversed(found)}  # the first of a topic


def edit(folder, old, new):
    text = (folder / site.FILE).read_text()
    assert old in text
    (folder / site.FILE).write_text(text.replace(old, new, 1))


def state_of(folder):
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in [folder, *folder.rglob("*")]
    }


@pytest.fixture
def quick(monkeypatch):
    """Without the step itself, which takes seconds."""
    from fedscan_client.check import rehearsal

    monkeypatch.setattr(rehearsal, "step", lambda *a: [])
    monkeypatch.setattr(machine, "gpu", lambda: skip("gpu", "not looked at"))


def test_all_is_well_and_nothing_is_written_sent_or_charged(north, fake, monkeypatch):
    budget = ledger.Budget(8.0, 1e-5)
    here = site.load(north)
    ledger.open_ledger(here.book, budget, 20, "sum")
    for path in north.glob("ledger.sqlite-*"):
        path.unlink()
    before, anchor = state_of(north), log.anchor(north)
    door.put_anchor(north, anchor)
    fake.calls.clear()
    drawn = []
    real = train.train_round

    def watched(module, patients, run, plan, **words):
        assert run.privacy.enabled and plan.noise_multiplier >= 1
        drawn.append((len(patients), real(module, patients, run, plan, **words)))
        return drawn[-1][1]

    monkeypatch.setattr(train, "train_round", watched)
    found = look(north)
    assert {topic: one.state for topic, one in found.items()} == dict.fromkeys(TOPICS, "ok")
    assert [topic for topic in found if topic in TOPICS][::-1] == TOPICS
    assert drawn[0][0] == 16 and all(np.isfinite(it).all() for it in drawn[0][1].values())
    assert {topic for topic, one in found.items() if one.local} == {"consents", "cohort", "labels", "rehearsal"}
    assert "1 anchors" in found["audit log"].says and "20 permitted" not in found["consent register"].says
    assert {path for _, path in fake.calls} == {"/hello", "/site", "/site/anchors"}  # and all of them are GETs
    assert {method for method, _ in fake.calls} == {"GET"}
    after = state_of(north)
    for name in [name for name in after if name.endswith(("-wal", "-shm"))]:  # SQLite's, empty, for a reader
        del after[name]
    after[str(north)], before[str(north)] = "", ""  # those change the folder's own time
    assert after == before


def test_without_a_folder_enrolment_or_site_toml(tmp_path, north, quick):
    with pytest.raises(ConfigError, match="no folder"):
        list(checklist.findings(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no site's folder"):
        list(checklist.findings(tmp_path))
    (north / connections.FILE).rename(tmp_path / "aside")
    found = look(north)
    assert found["coordinator"].state == "fail" and "fedscan agent enrol" in found["coordinator"].remedy
    assert found["cohort"].state == "ok" and found["audit log"].state == "warn"
    (north / site.FILE).unlink()
    assert look(north)["site.toml"].state == "fail"  # its key and log are there: it was a site's
    (tmp_path / "aside").rename(north / connections.FILE)
    assert look(north)["site.toml"].state == "fail"


def test_a_retired_site(north):
    (north / "retired").write_text("2026-01-01\n")
    assert list(look(north)) == ["site"]


def test_the_network_fails_and_the_rest_is_looked_at_all_the_same(north, fake_coordinator, tmp_path, quick):
    it = connections.load(north)
    connections.save(north, dataclasses.replace(it, address="https://127.0.0.1:9"))
    found = look(north)
    assert found["coordinator"].state == "fail" and "port 9" in found["coordinator"].remedy
    assert {found[name].state for name in ("certificate", "clock", "registration", "versions")} == {"skip"}
    assert found["policy"].state == found["cohort"].state == "ok"
    with fake_coordinator["coordinator"](tmp_path / "old", days=-1) as old:
        (north / connections.CA_FILE).write_text(old.ca_pem)
        connections.save(north, dataclasses.replace(it, address=old.address))
        assert "expired" in look(north)["certificate"].says
    with fake_coordinator["coordinator"](tmp_path / "soon", days=5) as soon:
        connections.save(north, dataclasses.replace(it, address=soon.address))
        assert look(north)["certificate"].state == "fail"  # another authority
        (north / connections.CA_FILE).write_text(soon.ca_pem)
        assert look(north)["certificate"].state == "warn"


@pytest.mark.parametrize(
    ("ahead", "state"),  # of the coordinator; our clock is off by the opposite
    [(-8, "fail"), (-2.5, "warn"), (0, "ok"), (100, "warn"), (295, "fail"), (-4000, "fail")],
)
def test_clock(north, fake, quick, ahead, state):
    fake.ahead = ahead
    found = look(north)
    assert found["clock"].state == state
    if state == "fail":
        assert f"{abs(ahead):.0f}.".rstrip(".") in found["clock"].says and "NTP" in found["clock"].remedy


def test_a_slow_network_does_not_make_a_clock_wrong():
    from datetime import UTC, datetime

    start = datetime(2026, 1, 1, tzinfo=UTC)
    one = network._clock((start + timedelta(seconds=0.1)).isoformat(), start, start + timedelta(seconds=12))
    assert one.state == "warn"  # 6 s ahead in the middle, and perhaps not at all
    assert network._clock("yesterday", start, start).state == network._clock("2026-01-01", start, start).state == "fail"


def test_registration_and_versions(north, fake, quick):
    fake.hello = {"flower": "1.40.0"}
    assert look(north)["versions"].state == "fail"
    fake.hello = {"version": "9.9.9"}
    assert look(north)["versions"].state == "warn"
    fake.hello = {"protocol": 1}
    assert look(north)["versions"].state == "fail"
    fake.hello = {}
    edit(north, "max_epsilon = 8.0", "max_epsilon = 3.0")
    assert look(north)["published policy"].state == "warn"
    fake.revoked.add("north")
    found = look(north)["registration"]
    assert found.state == "fail" and "revoked" in found.remedy and "INVITE" in found.remedy
    (north / connections.NODE_KEY).chmod(0o644)
    assert "chmod 600" in look(north)["registration"].remedy
    (north / connections.NODE_KEY).unlink()
    assert look(north)["registration"].state == "fail"
    edit(north, 'name = "north"', 'name = "south"')
    assert "enrolled as 'north'" in look(north)["site.toml"].says


def test_a_proxy_of_the_shell_is_not_the_services(north, fake_coordinator, quick, monkeypatch):
    with fake_coordinator["proxy"]() as (url, asked):
        monkeypatch.setenv("HTTPS_PROXY", url)
        monkeypatch.delenv("INVOCATION_ID", raising=False)
        found = look(north)
        assert "through the proxy" in found["coordinator"].says and found["registration"].state == "ok" and asked
        assert found["proxy"].state == "warn" and "Environment=HTTPS_PROXY" in found["proxy"].remedy
        monkeypatch.setenv("INVOCATION_ID", "x")
        assert "proxy" not in look(north)
    with fake_coordinator["proxy"](403) as (url, _):
        monkeypatch.setenv("HTTPS_PROXY", url)
        assert "CONNECT" in look(north)["coordinator"].remedy


def test_machine(north, quick, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=machine.GIB // 2))
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    north.chmod(0o755)
    found = look(north)
    assert (found["disk"].state, found["memory"].state, found["folder"].state) == ("fail", "fail", "warn")
    monkeypatch.setattr(os, "geteuid", lambda: north.stat().st_uid + 1)
    assert look(north)["folder"].state == "fail"


def test_records(north, fake, quick, tmp_path):
    door.put_anchor(north, log.anchor(north))
    for number in range(3):
        log.append(north, "start", number=number)
    door.put_anchor(north, log.anchor(north))
    assert look(north)["audit log"].state == "ok"
    (path,) = log.files(north / log.FOLDER)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))  # rolled back
    assert "1 of 2 anchors" in look(north)["audit log"].says
    path.write_bytes(whole.replace(b'"number":1', b'"number":7'))
    assert look(north)["audit log"].state == "fail"
    path.unlink()
    assert look(north)["audit log"].state == "fail"
    path.write_bytes(whole)
    (image,) = sorted((north / "cache/patients").glob("*/*.img"))[:1]
    image.write_bytes(b"\x93NUMPY")
    assert "1 files" in look(north)["cache"].says
    (north / "key").rename(tmp_path / "key")
    found = look(north)
    assert found["site key"].state == found["cache"].state == found["consent register"].state == "fail"
    assert found["rehearsal"].state == "skip"


def test_ledger(north, quick):
    here = site.load(north)
    assert "not opened yet" in look(north)["ledger"].says
    ledger.open_ledger(here.book, ledger.Budget(8.0, 1e-5), 20, "sum")
    assert "chain whole" in look(north)["ledger"].says
    edit(north, "patients_declared = 20", "patients_declared = 21")
    assert "opened with patients_declared = 20" in look(north)["ledger"].says
    here.ledger.unlink()
    assert look(north)["ledger"].state == "fail"


def test_consent_and_cohort(north, quick, write_register, tmp_path):
    write_register(north, age=29)
    assert look(north)["consent register"].state == "warn"
    write_register(north, age=40)
    found = look(north)
    assert found["consent register"].state == "fail" and found["cohort"].state == found["rehearsal"].state == "skip"
    write_register(north, denied=tuple(f"MRN{n}" for n in range(15)))
    found = look(north)
    assert (
        "5 of 20" in found["consents"].says and found["cohort"].local and "5 of them permitted" in found["cohort"].says
    )
    assert found["cohort size"].state == "warn" and found["cohort size"].local
    write_register(north, denied=tuple(f"MRN{n}" for n in range(20)))
    assert look(north)["consents"].state == "fail"
    write_register(north)
    shutil.rmtree(north / "cache")
    found = look(north)
    assert (found["cache"].state, found["cohort"].state) == ("warn", "fail") and "ingest" in found["cohort"].remedy


def test_the_rehearsal_leaves_out_who_may_not_train(north, write_register, monkeypatch):
    seen = []

    def broken(module, patients, *args, **words):
        seen.append(patients.ids)
        raise ZeroDivisionError

    monkeypatch.setattr(train, "train_round", broken)
    write_register(north, denied=tuple(f"MRN{n}" for n in range(6, 20)))
    found = look(north)
    assert len(seen[0]) == 6
    assert found["rehearsal"].state == "fail" and "ZeroDivisionError" in found["rehearsal"].says


@pytest.mark.parametrize(
    ("decision", "until", "may"),
    [
        (Decision(True, "permit", ""), None, True),
        (Decision(False, "denied", ""), None, False),
        (Decision(True, "permit", "", by_guardian=True), None, False),
        (Decision(True, "permit", ""), date(2026, 1, 1), False),
        (Decision(True, "permit", ""), date(2026, 1, 2), True),
    ],
)
def test_who_may_be_rehearsed_with(decision, until, may):
    register = Register(date(2026, 1, 1), {"a" * 32: decision}, Decision(False, "not_listed", ""))
    image = Image("a" * 32, "ill", "train", "", None, functools.partial(np.zeros, 3), until)
    assert patients.may_train(register, image, date(2026, 1, 2)) is may


def test_images_that_cannot_be_decoded(north):
    images = sorted((north / "cache/patients").glob("*/*.img"))
    data = images[0].read_bytes()
    images[0].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = list(checklist.findings(north))[-2:]
    assert [one.state for one in found] == ["ok", "warn"] and "1 of " in found[1].says
    assert images[0].parent.name not in found[1].says and found[1].local


@pytest.mark.parametrize(
    ("old", "new", "state", "words"),
    [
        ("patients_declared = 20", "patients_declared = 0", "fail", "every run is refused"),
        ("max_epsilon = 8.0", "max_epsilon = 0.0", "fail", "max_epsilon is 0"),
        ("max_epsilon = 8.0", "max_epsilon = 50.0", "warn", "weak"),
        ("max_delta = 1e-5", "max_delta = 0.5", "warn", "1 / 20"),
        ("[policy]", "[policy]\nmin_noise_multiplier = 0.0", "warn", "stops nothing"),
        ("[policy]", "[policy]\nvalid_until = 2020-01-01", "fail", "has passed"),
        ("[policy]", f"[policy]\nvalid_until = {date.today() + timedelta(days=3)}", "warn", "is near"),
        ("[policy]", "[policy]\nresearch_cohort = true", "warn", "switch privacy off"),
        ("[policy]", '[policy]\napproval = "auto-within-policy"', "warn", "whomever the coordinator"),
        ('[consent]\nkind = "register"\npath = "consent.csv"\n', "", "fail", "every run is refused"),
    ],
)
def test_policy(north, quick, old, new, state, words):
    edit(north, old, new)
    found = [one for one in look(north).values() if words in one.says]
    assert [one.state for one in found] == [state]
