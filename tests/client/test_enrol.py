"""Enrolment: one file in, a site with keys and safe defaults out; stopped anywhere, it is gone on with."""

import shutil
import stat
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedscan_client import connection as connections
from fedscan_client import door, enrol, keys, site, site_template
from fedscan_client.audit import log
from fedscan_core import node_key
from fedscan_core.errors import ConfigError, FolderError, SiteKeyError


@pytest.fixture
def invitation(fake, tmp_path):
    return fake.invitation(tmp_path / "INVITE.toml")


def test_a_new_site(fake, invitation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = enrol.enrol(invitation)
    folder = Path("north")
    public = node_key.public_text(node_key.load(folder / connections.NODE_KEY))
    assert done.site.folder == folder and fake.sites["north"]["key"] == public
    assert (
        done.known["fingerprint"] == node_key.fingerprint(public) and "anna" in done.launchers and len(done.made) == 3
    )
    assert done.ca_fingerprint in (invitation.read_text()) and done.connection == connections.load(folder)
    assert (folder / connections.CA_FILE).read_text() == fake.ca_pem
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.rglob("*"):
        assert not path.stat().st_mode & 0o077, path
    keys.load(folder, done.site.key)
    assert door.about(folder)["site"] == "north"
    assert [it["event"] for it in log.read(folder)].count("enrol") == 1


def test_a_launcher_that_would_be_more_than_a_line_of_site_toml_is_not_shown():
    """A person copies what is printed into [policy.launchers]."""
    good = "ssh-ed25519 " + "A" * 68
    told = {
        "ana": good + " ana@example.org",
        "eve": f'{good}"\n[policy]\nresearch_cohort = true\nx = "',
        "tab": 'ssh-ed25519 "\n[policy]',
        "x\n[policy": good,
        "dsa": "ssh-dss AAAA",
        "none": 7,
    }
    assert enrol._launchers(told) == {"ana": good}


def test_what_the_coordinator_says_steers_no_terminal(fake, invitation, tmp_path):
    fake.hello = {"coordinator": "centre\x1b[2J\n\u202eok" + "x" * 999}
    done = enrol.enrol(invitation, tmp_path / "north")
    assert done.connection.coordinator.isprintable() and len(done.connection.coordinator) < 500


def test_nothing_secret_leaves(fake, invitation, tmp_path):
    folder = tmp_path / "north"
    enrol.enrol(invitation, folder)
    secrets = [keys.text_of(keys.load(folder, keys.Settings())).partition(":")[2]]
    secrets += (folder / connections.NODE_KEY).read_text().splitlines()[1:-1]
    assert len(secrets) > 3 and fake.sites["north"]["key"].encode() in fake.bodies
    for secret in secrets[:1] + secrets[-4:]:  # a private key's first lines hold its public half
        assert secret.encode() not in fake.bodies
    assert set(fake.sites["north"]) == {"key", "policy"}


def test_what_is_written_is_safe_until_filled_in(invitation, tmp_path):
    here = enrol.enrol(invitation, tmp_path / "north").site
    assert here.patients_declared == 0 and here.policy.approval == "manual" and not here.policy.research_cohort
    assert here.consent is not None and here.policy.groups == () and here.policy.min_noise_multiplier == 0.3
    text = (tmp_path / "north/site.toml").read_text()
    assert text.count("FILL IN") >= 4 and max(map(len, text.splitlines())) <= 120
    twin = Path(__file__).parents[2] / "client/deploy/site.toml"
    assert twin.read_text() == site_template.text("north")
    every = text.replace("# issuer", "issuer").replace("# purposes", "purposes").replace("# ethics", "ethics")
    every = every.replace("# data_use", "data_use").replace("# agreement", "agreement").replace("# valid", "valid")
    (tmp_path / "north/site.toml").write_text(every.replace("# epsilon_per_year", "epsilon_per_year"))
    full = site.load(tmp_path / "north")
    assert full.policy.epsilon_per_year == 4.0 and full.policy.purposes == ("pneumonia",) and full.issuer
    assert set(tomllib.loads(every)["policy"]) >= {"valid_until", "agreement_until", "ethics_approval"}


def test_again_changes_nothing_and_publishes_what_was_filled_in(fake, invitation, tmp_path):
    folder = tmp_path / "north"
    enrol.enrol(invitation, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = enrol.enrol(invitation, folder)  # the token is used up: the coordinator knows the key
    assert not again.made and not again.launchers
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    text = (folder / site.FILE).read_text().replace("patients_declared = 0", "patients_declared = 41")
    (folder / site.FILE).write_text(text)
    assert enrol.enrol(invitation, folder).known["policy"]["patients_declared"] == 41
    assert fake.sites["north"]["policy"]["patients_declared"] == 41


def test_a_site_that_is_there_is_enrolled_as_it_is(make_site, fake, invitation, tmp_path):
    here = make_site(tmp_path / "north")
    text = (here.folder / site.FILE).read_text()
    done = enrol.enrol(invitation, here.folder)
    assert done.site == here and (here.folder / site.FILE).read_text() == text
    assert fake.sites["north"]["policy"]["research_cohort"] is True


def test_a_revoked_site_comes_back_with_a_new_invitation_and_a_new_key(fake, invitation, tmp_path, monkeypatch):
    """A revoked key is dead for ever. The new one takes its place only once the coordinator has it."""
    folder = tmp_path / "north"
    first = enrol.enrol(invitation, folder)
    fake.revoked.add("north")
    old = (folder / connections.NODE_KEY).read_bytes()
    with pytest.raises(door.DoorError, match="was used"):
        enrol.enrol(invitation, folder)
    assert (folder / connections.NODE_KEY).read_bytes() == old
    fake.tokens["again"] = "north"
    again = fake.invitation(tmp_path / "again.toml", token="again")

    def stopped(source, target):
        if str(source).endswith(enrol.NEXT_KEY):
            raise ZeroDivisionError
        shutil.move(source, target)

    with monkeypatch.context() as patch:  # killed after the coordinator took the key
        patch.setattr("fedscan_client.enrol.os.replace", stopped)
        with pytest.raises(ZeroDivisionError):
            enrol.enrol(again, folder)
    second = enrol.enrol(again, folder)
    assert second.known["fingerprint"] != first.known["fingerprint"] and not second.made
    assert not (folder / enrol.NEXT_KEY).exists() and door.about(folder)["site"] == "north"


@pytest.mark.slow
def test_stopped_at_every_moment(fake, invitation, tmp_path, at_every_write):
    """Whatever was on disk when it was killed, typing it again ends with the one key that the coordinator knows."""
    folder = tmp_path / "north"
    for number in at_every_write(lambda: enrol.enrol(invitation, folder)):
        assert number >= 0
        done = enrol.enrol(invitation, folder)
        assert done.connection.enrolled and door.about(folder)["fingerprint"] == done.known["fingerprint"]
        assert site.load(folder).name == "north"
        keys.load(folder, keys.Settings())
        shutil.rmtree(folder, ignore_errors=True)
        fake.tokens["once"] = "north"
        fake.sites.clear()


def test_the_reply_was_lost(fake, invitation, tmp_path, monkeypatch):
    """The coordinator redeemed the token, and the answer never came."""
    real = door.enrol

    def lost(*args):
        fake.lose_reply = True
        return real(*args)

    monkeypatch.setattr(door, "enrol", lost)
    with pytest.raises(door.DoorError):
        enrol.enrol(invitation, tmp_path / "north")
    assert fake.sites and not connections.load(tmp_path / "north").enrolled
    fake.lose_reply = False
    monkeypatch.setattr(door, "enrol", real)
    assert enrol.enrol(invitation, tmp_path / "north").connection.enrolled


def test_what_is_refused(fake, invitation, tmp_path, make_site):
    expired = datetime(2026, 1, 1, tzinfo=UTC).isoformat()
    with pytest.raises(ConfigError, match="expired"):
        enrol.enrol(fake.invitation(tmp_path / "old.toml", expires=expired), tmp_path / "north")
    assert not (tmp_path / "north").exists()
    other = make_site(tmp_path / "south", name="south")
    with pytest.raises(ConfigError, match="of site 'south'"):
        enrol.enrol(invitation, other.folder)
    enrol.enrol(invitation, tmp_path / "north")
    elsewhere = fake.invitation(tmp_path / "else.toml", address="https://elsewhere.example")
    with pytest.raises(FolderError, match="is enrolled as 'north'"):
        enrol.enrol(elsewhere, tmp_path / "north")
    (tmp_path / "north" / site.RETIRED).write_text("2026-01-01\n")
    with pytest.raises(FolderError, match="retired"):
        enrol.enrol(invitation, tmp_path / "north")
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="cannot be made"):
        enrol.enrol(invitation, tmp_path / "file" / "north")


def test_the_token_is_not_given_to_somebody_else(fake, fake_coordinator, tmp_path):
    """Who answers at the address with another authority never sees the token."""
    with fake_coordinator["coordinator"](tmp_path / "evil") as evil:
        with pytest.raises(door.DoorError, match="not vouched for"):
            enrol.enrol(fake.invitation(tmp_path / "i.toml", address=evil.address), tmp_path / "north")
        assert not evil.calls


def test_keys_that_are_there_are_never_replaced(fake, invitation, tmp_path, monkeypatch):
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "key").write_text("damaged")
    (folder / "key").chmod(0o600)
    with pytest.raises(SiteKeyError, match="whole site key"):
        enrol.enrol(invitation, folder)
    assert (folder / "key").read_text() == "damaged" and fake.tokens
    (folder / "key").unlink()
    (folder / site.FILE).write_text(site_template.text("north").replace('source = "file"', 'source = "environment"'))
    monkeypatch.delenv("FEDSCAN_SITE_KEY", raising=False)
    done = enrol.enrol(invitation, folder)
    assert any("key.environment" in line for line in done.made)
    assert not enrol.enrol(invitation, folder).made  # it waits to be moved
