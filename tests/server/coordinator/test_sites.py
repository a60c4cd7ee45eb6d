import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedscan_core import invite as invitations
from fedscan_core import node_key
from fedscan_core.errors import ConfigError, FolderError
from fedscan_server.coordinator import registry, sites


def enrolled(c, name="a") -> sites.Enrolled:
    site = sites.by_name(c, name)
    assert site
    return site


def enrol(c, name, key, policy=None):
    return sites.redeem(c, sites.invite(c, name, 1).token, key, policy or {})


def test_an_invitation_works_once(bare, site_key):
    invite = sites.invite(bare, "a", 24)
    assert (invite.kind, invite.name, invite.address) == ("site", "a", "https://localhost:8443")
    key = site_key()
    site = sites.redeem(bare, invite.token, key + " root@agent", {"rounds": 3})
    assert (site.name, site.public_key, site.policy, site.node_id) == ("a", key, {"rounds": 3}, 0)
    with pytest.raises(ConfigError, match="not valid"):
        sites.redeem(bare, invite.token, site_key(), {})
    assert sites.redeem(bare, invite.token, key, {}) == site  # the answer was lost on its way
    assert sites.by_name(bare, "a") == site
    assert sites.by_name(bare, "b") is None


def test_a_token_is_stored_as_a_digest_only(bare, site_key):
    invite = sites.invite(bare, "a", 1)
    assert invite.token.encode() not in bare.database.read_bytes()
    assert bare.database.stat().st_mode & 0o777 == 0o600


def test_an_expired_or_made_up_or_other_invitation_is_refused(bare, site_key, monkeypatch):
    invite = sites.invite(bare, "a", 1)

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=1, seconds=1)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "datetime", Later)
        with pytest.raises(ConfigError, match="not valid"):
            sites.redeem(bare, invite.token, site_key(), {})
    for token in ("", "x", registry.hashed(invite.token), registry.invite(bare, "person", "a", "viewer", 1).token):
        with pytest.raises(ConfigError, match="not valid"):
            sites.redeem(bare, token, site_key(), {})
    assert sites.redeem(bare, invite.token, site_key(), {})


def test_a_newer_invitation_replaces_an_unused_one_of_this_site_only(bare, site_key):
    first, other = sites.invite(bare, "a", 1), sites.invite(bare, "b", 1)
    second = sites.invite(bare, "a", 1)
    with pytest.raises(ConfigError, match="not valid"):
        sites.redeem(bare, first.token, site_key(), {})
    assert sites.redeem(bare, second.token, site_key(), {}).name == "a"
    assert sites.redeem(bare, other.token, site_key(), {}).name == "b"


def test_inviting_again_changes_nothing_until_it_is_used(bare, site_key):
    a, b = enrol(bare, "a", site_key()), enrol(bare, "b", site_key())
    sites.set_node(bare, "a", 7)
    sites.set_node(bare, "b", 8)
    invite = sites.invite(bare, "a", 1)
    assert sites.node_names(bare) == {7: "a", 8: "b"}
    new = sites.redeem(bare, invite.token, site_key(), {})
    assert new.public_key != a.public_key
    assert sites.node_names(bare) == {8: "b"}  # until the new key's node is registered
    assert sites.by_name(bare, "b") == dataclasses.replace(b, node_id=8)
    with pytest.raises(ConfigError, match="enrolled before"):  # Flower never takes an unregistered key again
        sites.redeem(bare, sites.invite(bare, "a", 1).token, a.public_key, {})


def test_the_same_key_again_keeps_its_node(bare, site_key):
    key = site_key()
    enrol(bare, "a", key)
    sites.set_node(bare, "a", 7)
    assert enrol(bare, "a", key).node_id == 7


def test_a_revoked_site_is_out_with_its_key_and_its_invitations(bare, site_key):
    site = enrol(bare, "a", site_key())
    sites.set_node(bare, "a", 7)
    invite = sites.invite(bare, "a", 1)
    sites.revoke(bare, "a")
    assert enrolled(bare).revoked
    assert sites.node_names(bare) == {}
    with pytest.raises(ConfigError, match="not valid"):
        sites.redeem(bare, invite.token, site_key(), {})
    with pytest.raises(ConfigError, match="enrolled before"):
        enrol(bare, "a", site.public_key)
    again = enrol(bare, "a", site_key())
    assert not again.revoked
    with pytest.raises(ConfigError, match="no site"):
        sites.revoke(bare, "nobody")


def test_a_used_invitation_does_not_open_a_revoked_site_again(bare, site_key):
    invite, key = sites.invite(bare, "a", 1), site_key()
    sites.redeem(bare, invite.token, key, {})
    sites.revoke(bare, "a")
    with pytest.raises(ConfigError, match="not valid"):
        sites.redeem(bare, invite.token, key, {})


def test_revoking_an_invited_site_takes_the_invitation_away(bare, site_key):
    invite = sites.invite(bare, "a", 1)
    assert [name for name, _ in sites.invited(bare)] == ["a"]
    sites.revoke(bare, "a")
    assert sites.invited(bare) == []
    with pytest.raises(ConfigError, match="not valid"):
        sites.redeem(bare, invite.token, site_key(), {})


def test_two_sites_never_share_a_key(bare, site_key):
    key = site_key()
    enrol(bare, "a", key)
    with pytest.raises(ConfigError, match="enrolled before"):
        enrol(bare, "b", key)


def test_only_p384_keys_are_keys(bare, person_key):
    small = node_key.public_text(ec.generate_private_key(ec.SECP256R1()))
    for key in ("", "ssh-rsa AAAA", "rubbish", person_key(), small):
        with pytest.raises(ConfigError, match="P-384"):
            enrol(bare, "a", key)


@pytest.mark.parametrize("name", ["", "../x", "a b", "ä", "x" * 65, "-x", "a\n"])
def test_a_name_that_is_none_is_refused(bare, name):
    with pytest.raises(ConfigError, match="not a name"):
        sites.invite(bare, name, 1)


@pytest.mark.parametrize("hours", [0, -1, 1e9, float("nan"), float("inf")])
def test_hours_have_bounds(bare, hours):
    with pytest.raises(ConfigError, match="hours"):
        sites.invite(bare, "a", hours)


def test_policies_are_kept_and_bounded(bare, site_key):
    enrol(bare, "a", site_key())
    sites.set_policy(bare, "a", {"epsilon": 1})
    assert enrolled(bare).policy == {"epsilon": 1}
    with pytest.raises(ConfigError, match="too large"):
        sites.set_policy(bare, "a", {"x": "y" * sites.POLICY_BYTES})
    with pytest.raises(ConfigError, match="no site"):
        sites.set_policy(bare, "b", {})


def test_node_ids_are_flowers_64_bits(bare, site_key):
    enrol(bare, "a", site_key())
    sites.set_node(bare, "a", 2**64 - 1)
    assert sites.node_names(bare) == {2**64 - 1: "a"}


def test_anchors_are_kept_in_order_and_once(bare, site_key):
    for name in ("a", "b"):
        enrol(bare, name, site_key())
    for anchor in ("1" * 64, "1" * 64, "2" * 64, "", "1" * 64, "3" * 64):
        sites.add_anchor(bare, "a", "run", 3, anchor)
    sites.add_anchor(bare, "b", "run", 3, "9" * 64)
    assert [row["anchor"][0] for row in sites.anchors(bare, "a")] == ["1", "2", "1", "3"]
    assert [row["anchor"][0] for row in sites.anchors(bare, "a", last=2)] == ["1", "1", "3"]  # with the day's first
    assert set(sites.anchors(bare, "b")[0]) == {"utc", "run_id", "round", "anchor"}


def test_nobody_at_a_site_can_push_its_old_anchors_out(bare, site_key, monkeypatch):
    """Who rewrites the log with its key, and then sends many anchors, is still found: the first of each day stays."""
    enrol(bare, "a", site_key())
    for day in ("2026-01-01", "2026-01-02"):
        monkeypatch.setattr(registry, "utc", lambda day=day: f"{day}T08:00:00+00:00")
        sites.add_anchor(bare, "a", "", 0, f"{day:>064}")
        sites.add_anchor(bare, "a", "", 0, "e" * 64)
    monkeypatch.setattr(registry, "utc", lambda: "2026-01-03T08:00:00+00:00")
    monkeypatch.setattr(sites, "_ANCHORS", 150)
    for number in range(320):
        sites.add_anchor(bare, "a", "", 0, f"{number:064x}")
    kept = sites.anchors(bare, "a")
    assert [row["anchor"] for row in kept[:3]] == [f"{'2026-01-01':>064}", f"{'2026-01-02':>064}", "0" * 64]
    assert [int(row["anchor"], 16) for row in kept[3:]] == list(range(220, 320))
    assert len(sites.anchors(bare, "a", last=9999)) < 300  # and they fill no disk


def test_seen_is_written_now_and_then(bare, site_key):
    enrol(bare, "a", site_key())
    before = enrolled(bare).last_seen
    sites.seen(bare, "a")
    assert enrolled(bare).last_seen == before  # seconds ago
    with registry.open_(bare) as db:
        db.execute("UPDATE site SET last_seen = ?", ((datetime.now(UTC) - timedelta(minutes=1)).isoformat(),))
    sites.seen(bare, "a")
    assert enrolled(bare).last_seen >= before
    sites.seen(bare, "nobody")


def test_a_missing_or_damaged_database_is_said(bare):
    bare.database.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(FolderError, match=r"coordinator\.sqlite"):
        sites.every(bare)
    bare.database.unlink()
    with pytest.raises(FolderError, match=r"coordinator\.sqlite"):
        sites.every(bare)
    assert not bare.database.exists()  # an empty one would shut every site out


def test_an_error_inside_a_transaction_undoes_it(bare, site_key):
    enrol(bare, "a", site_key())
    with pytest.raises(ZeroDivisionError), registry.open_(bare) as db:
        db.execute("DELETE FROM site")
        raise ZeroDivisionError
    assert len(sites.every(bare)) == 1


KEYS = [node_key.public_text(ec.generate_private_key(ec.SECP384R1())) for _ in range(4)]
NAMES = ["a", "b"]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("invite"), st.sampled_from(NAMES), st.none()),
        st.tuples(st.just("redeem"), st.integers(0, 5), st.sampled_from(KEYS)),
        st.tuples(st.just("revoke"), st.sampled_from(NAMES), st.none()),
    ),
    max_size=14,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_against_a_plain_model(bare, steps):
    """Whatever the order: a token enrols one key once, a key that went out never comes back, keys are never shared."""
    with registry.open_(bare) as db:
        for table in ("site", "invitation", "dead_key"):
            db.execute(f"DELETE FROM {table}")
    tokens: list[tuple[str, str]] = []
    state: dict[str, dict[str, str | None]] = {}  # token -> name, used by
    held_by: dict[str, str] = {}
    ever_out: set[str] = set()
    for what, which, key in steps:
        if what == "invite":
            for token, one in list(state.items()):
                if one["name"] == which and one["used"] is None:
                    del state[token]
            token = sites.invite(bare, which, 1).token
            tokens.append((token, which))
            state[token] = {"name": which, "used": None}
        elif what == "revoke":
            for token, one in list(state.items()):
                if one["name"] == which:
                    del state[token]
            if which in held_by:
                ever_out.add(held_by.pop(which))
            try:
                sites.revoke(bare, which)
            except ConfigError:
                assert which not in held_by
        elif which < len(tokens):
            token, name = tokens[which]
            found = state.get(token)
            if found is not None and found["used"] is None:
                good = key not in ever_out and all(held != key for n, held in held_by.items() if n != name)
            else:
                good = found is not None and found["used"] == key and held_by.get(name) == key
            try:
                site = sites.redeem(bare, token, key, {})
            except ConfigError:
                assert not good
            else:
                assert good and (site.name, site.public_key) == (name, key)
                if name in held_by and held_by[name] != key:
                    ever_out.add(held_by[name])
                held_by[name] = key
                state[token] = {"name": name, "used": key}
    assert {site.name: site.public_key for site in sites.every(bare) if not site.revoked} == held_by


def test_the_invitation_file_is_read_by_the_agent(coordinator, tmp_path):
    invitations.write(tmp_path / "a.toml", sites.invite(coordinator, "a", 1))
    read = invitations.read(tmp_path / "a.toml", "site")
    assert read.ca == coordinator.ca_pem != ""
