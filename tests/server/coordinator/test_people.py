import pytest

from fedscan_core.errors import ConfigError
from fedscan_server.coordinator import people, sites


def test_login_gives_a_token_that_names_the_person(bare, person_key):
    invite, key = people.invite(bare, "ann", "researcher", 1), person_key()
    assert invite.kind == "person"
    person, token = people.redeem(bare, invite.token, key + " ann@laptop")
    assert person == people.Person("ann", "researcher", key)
    assert people.authenticate(bare, token) == person
    assert people.every(bare) == [person]
    assert token.encode() not in bare.database.read_bytes()
    for wrong in ("", "x", token[:-1], token + "x", invite.token):
        assert people.authenticate(bare, wrong) is None


def test_an_invitation_works_once_even_with_the_same_key(bare, person_key):
    """The second answer would be a new token for whoever knows the public key."""
    invite, key = people.invite(bare, "ann", "viewer", 1), person_key()
    people.redeem(bare, invite.token, key)
    with pytest.raises(ConfigError, match="not valid"):
        people.redeem(bare, invite.token, key)


def test_a_sites_invitation_is_nobodys(bare, person_key):
    with pytest.raises(ConfigError, match="not valid"):
        people.redeem(bare, sites.invite(bare, "ann", 1).token, person_key())


def test_logging_in_again_replaces_token_key_and_role(bare, person_key):
    _, old = people.redeem(bare, people.invite(bare, "ann", "operator", 1).token, person_key())
    person, new = people.redeem(bare, people.invite(bare, "ann", "viewer", 1).token, person_key())
    assert people.authenticate(bare, old) is None
    assert people.authenticate(bare, new) == person
    assert person.role == "viewer"


def test_who_is_removed_is_out_at_once(bare, person_key):
    _, token = people.redeem(bare, people.invite(bare, "ann", "viewer", 1).token, person_key())
    waiting = people.invite(bare, "ann", "operator", 1)
    people.remove(bare, "ann")
    assert people.authenticate(bare, token) is None
    with pytest.raises(ConfigError, match="not valid"):
        people.redeem(bare, waiting.token, person_key())
    with pytest.raises(ConfigError, match="nobody"):
        people.remove(bare, "ann")


def test_two_people_never_share_a_key(bare, person_key):
    key = person_key()
    people.redeem(bare, people.invite(bare, "ann", "viewer", 1).token, key)
    with pytest.raises(ConfigError, match="another person"):
        people.redeem(bare, people.invite(bare, "bob", "viewer", 1).token, key)


def test_only_ed25519_keys_sign_orders(bare, site_key):
    for key in ("", "rubbish", site_key()):
        with pytest.raises(ConfigError, match="Ed25519"):
            people.redeem(bare, people.invite(bare, "ann", "viewer", 1).token, key)


def test_roles_are_ordered():
    may = {role: [people.Person("x", role, "").may(other) for other in people.ROLES] for role in people.ROLES}
    assert may == {"viewer": [True, False, False], "researcher": [True, True, False], "operator": [True, True, True]}


def test_an_unknown_role_is_refused(bare):
    with pytest.raises(ConfigError, match="no role"):
        people.invite(bare, "ann", "admin", 1)
