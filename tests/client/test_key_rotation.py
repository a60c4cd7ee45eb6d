"""Rotation: killed anywhere, everything stays readable; done, the old key opens nothing."""

import shutil

import keyring
import numpy as np
import pytest

from fedscan_client import key_rotation, keys
from fedscan_client.audit import log
from fedscan_client.intake import cache, cache_keys
from fedscan_client.intake.cache_keys import Damaged
from fedscan_client.keys import Settings, SiteKey
from fedscan_core.errors import SiteKeyError
from fedscan_core.files import write_atomic

FILE = Settings()
ENVIRONMENT = Settings(source="environment")
NAMES = [f"{number:032x}" for number in range(3)]


def fill(site, key, names=NAMES):
    for name in names:
        entry = cache.Entry("2.25.1", "", name[-1], "", "", None, {}, "")
        cache.write_patient(site / "cache", key, name, [(entry, np.arange(9))])


def readable(site, key):
    """Pseudonyms of everybody whose image comes back."""
    found = []
    for name in cache.patients(site / "cache"):
        opened = cache.open_patient(site / "cache", key, name)
        (entry,) = opened.patient.entries
        assert entry.label == name[-1] and opened.values(entry).tolist() == list(range(9))
        found.append(name)
    return found


def rotate(site, settings=FILE, **more):
    return key_rotation.rotate(site, settings, site / "cache", **more)


def images(site):
    return {p.name: p.read_bytes() for p in sorted(site.rglob("*")) if p.suffix == ".img" or p.name == "index"}


def test_the_old_key_opens_nothing_afterwards(tmp_path):
    old = keys.create(tmp_path, FILE)
    fill(tmp_path, old)
    kept = images(tmp_path)
    backup = (tmp_path / "key").read_bytes()
    told = []
    assert key_rotation.plan(tmp_path, FILE, tmp_path / "cache") == key_rotation.Plan(3, 3, False)

    def progress(names):
        told.extend(names)
        return names

    assert rotate(tmp_path, progress=progress)
    new = keys.load(tmp_path, FILE)
    assert told == NAMES and images(tmp_path) == kept
    assert new.names == old.names and new.wrapping != old.wrapping and new.staged is None
    assert readable(tmp_path, new) == NAMES
    assert backup != (tmp_path / "key").read_bytes() and not (tmp_path / "key.next").exists()
    for name in NAMES:
        with pytest.raises(SiteKeyError, match="rotation"):
            cache.open_patient(tmp_path / "cache", old, name)
    (tmp_path / "cache" / "key.check").unlink()  # not the check alone: the files themselves do not open
    for name in NAMES:
        assert cache_keys._opened(tmp_path / "cache", old, name) is None
    with pytest.raises(SiteKeyError):
        fill(tmp_path, old)
    fill(tmp_path, new)
    events = [(line["did"], line["key"]) for line in log.read(tmp_path) if line["event"] == "key"]
    assert events == [("key created", old.key_id), ("rotation begun", old.key_id), ("key rotated", new.key_id)]


def test_killed_at_every_write_everything_is_readable_and_the_same_command_goes_on(memory_path, at_every_write):
    start, site = memory_path / "start", memory_path / "site"
    old = keys.create(start, FILE)
    fill(start, old)
    spool = memory_path / "site" / "spool"  # something else that is wrapped: here, simply named
    (start / "spool").write_text(old.wrapping_id)

    def also(key):
        assert spool.read_text() in key.wrappings()
        write_atomic(spool, key.after().wrapping_id.encode())

    shutil.copytree(start, site)
    deaths, states = 0, set()
    for _ in at_every_write(lambda: rotate(site, also=[also])):
        key = keys.load(site, FILE)
        assert readable(site, key) == NAMES and spool.read_text() in key.wrappings()
        plan = key_rotation.plan(site, FILE, site / "cache")
        states.add((plan.left, plan.unfinished))
        if deaths % 3 == 0:  # the intake may run in between
            fill(site, key, [f"{9:032x}"])
            fill(site, key, NAMES[:1])
        assert rotate(site, also=[also]) is True
        new = keys.load(site, FILE)
        everybody = sorted([*NAMES, f"{9:032x}"] if deaths % 3 == 0 else NAMES)
        assert new.staged is None and new.names == old.names and new.wrapping != old.wrapping
        assert readable(site, new) == everybody and spool.read_text() == new.wrapping_id
        assert not any(cache_keys._opened(site / "cache", old, name) for name in everybody)
        assert not [*site.glob(".key*.part"), *(site / "cache" / "keys").glob(".*.part")]
        deaths += 1
        shutil.rmtree(site)
        shutil.copytree(start, site)
    assert deaths > 15
    assert {(3, False), (3, True), (2, True), (1, True), (0, True)} <= states


def test_an_agent_that_was_at_work_meanwhile_writes_no_more_with_the_old_key(tmp_path):
    old = keys.create(tmp_path, FILE)
    fill(tmp_path, old)
    rotate(tmp_path)
    with pytest.raises(SiteKeyError, match="start again"):
        fill(tmp_path, old, [f"{7:032x}"])
    assert cache.patients(tmp_path / "cache") == NAMES


def test_a_damaged_patient_stops_it_before_it_begins(tmp_path):
    old = keys.create(tmp_path, FILE)
    fill(tmp_path, old)
    (tmp_path / "cache" / "keys" / f"{NAMES[1]}.key").write_bytes(b"spoilt")
    with pytest.raises(Damaged, match=NAMES[1]):
        rotate(tmp_path)
    assert keys.load(tmp_path, FILE) == old and not (tmp_path / "key.next").exists()
    cache.destroy_patient(tmp_path / "cache", NAMES[1])
    assert rotate(tmp_path) and len(readable(tmp_path, keys.load(tmp_path, FILE))) == 2


def test_another_sites_key_rotates_nothing(tmp_path):
    fill(tmp_path, SiteKey(bytes(32), bytes(32)))
    keys.create(tmp_path, FILE)
    with pytest.raises(SiteKeyError, match="another site key"):
        rotate(tmp_path)
    assert not (tmp_path / "key.next").exists()
    (tmp_path / "key.next").write_text(keys.text_of(SiteKey(bytes(32), bytes(32))))
    (tmp_path / "key.next").chmod(0o600)
    with pytest.raises(SiteKeyError, match="unfinished rotation"):
        keys.load(tmp_path, FILE)


def test_a_site_without_a_cache(tmp_path):
    old = keys.create(tmp_path, FILE)
    assert key_rotation.rotate(tmp_path, FILE, None)
    new = keys.load(tmp_path, FILE)
    assert new.names == old.names and new.wrapping != old.wrapping


@pytest.mark.parametrize("mounted", [True, False])
def test_a_cache_that_is_not_mounted_stops_it(tmp_path, mounted):
    old = keys.create(tmp_path, FILE)
    fill(tmp_path, old)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    if mounted:
        (tmp_path / "cache").mkdir()
    with pytest.raises(SiteKeyError, match="mounted"):
        rotate(tmp_path)
    assert keys.load(tmp_path, FILE) == old
    if mounted:
        (tmp_path / "cache").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "cache")
    assert readable(tmp_path, old) == NAMES


@pytest.fixture
def variable(tmp_path, monkeypatch):
    """A site whose key is in the environment: sets the variable to a key's text; gives the first key."""
    monkeypatch.delenv("FEDSCAN_SITE_KEY", raising=False)
    old = keys.create(tmp_path, ENVIRONMENT)

    def put(key):
        monkeypatch.setenv("FEDSCAN_SITE_KEY", keys.text_of(key))

    put(old)
    return old, put


def test_with_an_environment_variable_a_person_puts_the_new_key_in_place(tmp_path, variable):
    old, put = variable
    fill(tmp_path, old)
    for _ in range(2):
        assert rotate(tmp_path, ENVIRONMENT) is False
        new = keys.load(tmp_path, ENVIRONMENT)  # whoever loads it now works with the new one
        assert new.staged is None and new.wrapping != old.wrapping and readable(tmp_path, new) == NAMES
        both = keys.load_both(tmp_path, ENVIRONMENT)
        assert (both.wrapping, both.staged) == (old.wrapping, new.wrapping)
    fill(tmp_path, new, [f"{7:032x}"])  # the agent may go on
    assert rotate(tmp_path, ENVIRONMENT) is False
    line = (tmp_path / "key.next").read_text().splitlines()[1]
    assert line == keys.text_of(new)
    put(new)
    assert keys.load(tmp_path, ENVIRONMENT) == new and len(readable(tmp_path, new)) == 4
    calls: list[SiteKey] = []
    assert rotate(tmp_path, ENVIRONMENT, also=[calls.append]) is True
    assert calls == [both]  # what was written under the old key meanwhile is found
    assert keys.load(tmp_path, ENVIRONMENT) == keys.load_both(tmp_path, ENVIRONMENT) == new
    assert not [*tmp_path.glob("key.next"), *tmp_path.glob("key.before"), *tmp_path.glob("key.environment")]


def test_a_variable_that_is_set_too_early_loses_nothing(tmp_path, variable):
    old, put = variable
    fill(tmp_path, old)

    def stopped(key):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, ENVIRONMENT, also=[stopped])
    new = keys.load(tmp_path, ENVIRONMENT).after()
    put(new)
    assert readable(tmp_path, keys.load(tmp_path, ENVIRONMENT)) == NAMES
    calls: list[SiteKey] = []
    assert rotate(tmp_path, ENVIRONMENT, also=[calls.append]) is True
    assert [(key.wrapping, key.staged) for key in calls] == [(old.wrapping, new.wrapping)]
    assert readable(tmp_path, new) == NAMES


def test_an_environment_variable_killed_at_every_write_of_both_runs(memory_path, at_every_write, monkeypatch):
    start, site = memory_path / "start", memory_path / "site"
    monkeypatch.delenv("FEDSCAN_SITE_KEY", raising=False)
    old = keys.create(start, ENVIRONMENT)
    monkeypatch.setenv("FEDSCAN_SITE_KEY", keys.text_of(old))
    fill(start, old, NAMES[:1])
    for run in (1, 2):
        shutil.copytree(start, site)
        deaths = 0
        for _ in at_every_write(lambda: rotate(site, ENVIRONMENT)):
            assert readable(site, keys.load(site, ENVIRONMENT)) == NAMES[:1]
            if run == 1 or (site / "key.next").exists():  # else it had ended
                assert rotate(site, ENVIRONMENT) is (run == 2)
            new = keys.load(site, ENVIRONMENT)
            assert new.staged is None and new.wrapping != old.wrapping and readable(site, new) == NAMES[:1]
            assert not [*site.glob(".key*.part")]
            assert run == 1 or not [*site.glob("key.next"), *site.glob("key.before"), *site.glob("key.environment")]
            deaths += 1
            shutil.rmtree(site)
            shutil.copytree(start, site)
        assert deaths > 5
        if run == 1:
            rotate(start, ENVIRONMENT)
            monkeypatch.setenv("FEDSCAN_SITE_KEY", keys.text_of(keys.load(start, ENVIRONMENT)))
            shutil.rmtree(site)


def test_the_keyring_rotates(tmp_path, monkeypatch):
    kept: dict[tuple[str, ...], str] = {}
    monkeypatch.setattr(keyring, "get_password", lambda *name: kept.get(name))
    monkeypatch.setattr(keyring, "set_password", lambda service, user, text: kept.update({(service, user): text}))
    settings = Settings(source="keyring")
    old = keys.create(tmp_path, settings)
    fill(tmp_path, old)
    assert rotate(tmp_path, settings)
    new = keys.load(tmp_path, settings)
    assert readable(tmp_path, new) == NAMES and new.wrapping != old.wrapping and len(kept) == 1
