"""Enrolment and the site's own door."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tests.server.edge.conftest import PREFIX, Live, Site, enrolment, until

from fedscan_core import node_key, policy, wire
from fedscan_server.coordinator import registry, sites

KEY = ec.generate_private_key(ec.SECP384R1())


def test_hello(live: Live) -> None:
    told = live.http.get(f"{PREFIX}/hello").json()
    assert told["coordinator"] == "Testing centre" and told["flower"] == "1.41.0"
    assert told["protocol"] == wire.PROTOCOL and told["version"]
    assert abs((datetime.fromisoformat(told["utc"]) - datetime.now(UTC)).total_seconds()) < 5


def test_enrolment_once_and_again_with_the_same_key(live: Live) -> None:
    ada, _ = live.person("ada"), live.person("eve", "viewer")
    body = enrolment(sites.invite(live.c, "north", 1).token, "north", KEY)
    first = live.http.post(f"{PREFIX}/enrol", json=body)
    assert first.status_code == 200
    told = first.json()
    assert told.keys() == {"site", "coordinator", "node_id", "launchers"}
    assert told["site"] == "north" and told["node_id"] == str(live.flower.nodes["north"])
    assert list(told["launchers"]) == ["ada"], "viewers do not launch"
    assert live.http.post(f"{PREFIX}/enrol", json=body).json() == told  # the first answer may be lost
    other = {**body, "public_key": node_key.public_text(ec.generate_private_key(ec.SECP384R1()))}
    assert live.http.post(f"{PREFIX}/enrol", json=other).status_code == 403
    assert ada


def test_enrolment_while_flower_is_away(live: Live) -> None:
    live.flower.away = True
    site = live.site()
    assert live.http.post(f"{PREFIX}/enrol", json={}).status_code == 400
    assert site.ask("GET", "/site").json()["node_id"] == ""


def test_what_does_not_enrol_and_uses_no_invitation_up(live: Live) -> None:
    token = sites.invite(live.c, "north", 1).token
    good = enrolment(token, "north", KEY)
    p256 = node_key.public_text(ec.generate_private_key(ec.SECP256R1()))
    for bad, status in (
        ({"site": "south"}, 400),  # the policy is north's
        ({"site": "south", "policy": enrolment(token, "south", KEY)["policy"]}, 403),  # the invitation is north's
        ({"public_key": p256}, 400),
        ({"public_key": "ssh-ed25519 AAAA"}, 400),
        ({"public_key": "x" * 5000}, 400),
        ({"policy": {}}, 400),
        ({"policy": {**good["policy"], "max_epsilon": "x"}}, 400),
        ({"policy": []}, 400),
        ({"token": 1}, 400),
        ({"token": "A" * 43}, 403),
        ({"extra": 1}, 400),
    ):
        answer = live.http.post(f"{PREFIX}/enrol", json={**good, **bad})
        assert answer.status_code == status, (bad, answer.text)
        assert answer.json().keys() == {"error", "remedy"}
    assert sites.by_name(live.c, "north") is None and sites.by_name(live.c, "south") is None
    assert live.http.post(f"{PREFIX}/enrol", json=good).status_code == 200


def test_all_bad_invitations_read_the_same(live: Live) -> None:
    used = enrolment(sites.invite(live.c, "south", 1).token, "south", KEY)
    assert live.http.post(f"{PREFIX}/enrol", json=used).status_code == 200
    expired = enrolment(sites.invite(live.c, "north", 1).token, "north", KEY)
    with registry.open_(live.c) as db:
        db.execute("UPDATE invitation SET expires = '2020-01-01T00:00:00+00:00' WHERE name = 'north'")
    person = live.http.post(f"{PREFIX}/login", json={"token": "A" * 43, "public_key": "x"})
    assert person.status_code == 400
    other = node_key.public_text(ec.generate_private_key(ec.SECP384R1()))
    answers = {
        live.http.post(f"{PREFIX}/enrol", json=body).text
        for body in ({**used, "public_key": other}, expired, {**expired, "token": "A" * 43})
    }
    assert len(answers) == 1


def test_a_guesser_waits_and_others_do_not(live: Live) -> None:
    guess = enrolment("A" * 43, "north", KEY)
    answers = [live.http.post(f"{PREFIX}/enrol", json=guess).status_code for _ in range(25)]
    assert answers == [403] * 20 + [429] * 5
    south = Site("south", ec.generate_private_key(ec.SECP384R1()), live.http)
    body = enrolment(sites.invite(live.c, "south", 1).token, "south", south.key)
    # Bound to loopback there is a proxy of ours in front, which says who is asking.
    there = {"x-forwarded-for": "127.0.0.1, 192.0.2.7"}
    assert live.http.post(f"{PREFIX}/enrol", json=body, headers=there).status_code == 200
    assert live.http.get(f"{PREFIX}/hello").status_code == 200


def test_bound_to_the_outside_no_peer_says_where_it_comes_from(live: Live) -> None:
    live.edge.coordinator = dataclasses.replace(live.c, bind=("0.0.0.0", live.c.bind[1]))
    guess = enrolment("A" * 43, "north", KEY)
    for number in range(21):
        there = {"x-forwarded-for": f"192.0.2.{number}"}
        status = live.http.post(f"{PREFIX}/enrol", json=guess, headers=there).status_code
        assert status == (403 if number < 20 else 429), number


def test_about_itself(live: Live) -> None:
    site = live.site()
    live.edge.online = frozenset(live.flower.nodes.values())
    told = site.ask("GET", "/site").json()
    assert told.keys() == {
        *("site", "enrolled", "fingerprint", "node_id", "online", "last_seen", "policy", "policy_utc"),
    }
    assert told["fingerprint"] == node_key.fingerprint(node_key.public_text(site.key))
    assert told["online"] is True and told["policy"]["patients_declared"] == 100


def test_policy_and_anchors(live: Live) -> None:
    site = live.site()
    new = policy.public(policy.Policy(max_epsilon=2.0, max_delta=1e-6), "north", 50, (2.0, 1e-6))
    assert site.ask("PUT", "/site/policy", json.dumps(new).encode()).status_code == 200
    assert site.ask("GET", "/site").json()["policy"] == new
    for bad in (b"{}", b"[]", b"x", b'{"max_epsilon": NaN}', json.dumps({**new, "site": "south"}).encode()):
        assert site.ask("PUT", "/site/policy", bad).status_code == 400, bad
    assert site.ask("PUT", "/site/policy", b"[" * 60_000).status_code == 400
    assert site.ask("PUT", "/site/policy", b" " * 70_000).status_code == 413
    assert site.ask("POST", "/site/anchor", json.dumps({"anchor": "ab" * 32}).encode()).status_code == 200
    assert site.ask("POST", "/site/anchor", b'{"anchor": "x"}').status_code == 400
    [kept] = site.ask("GET", "/site/anchors").json()["anchors"]
    assert kept["anchor"] == "ab" * 32 and kept["run_id"] == "" and kept["round"] == 0


def test_retired_is_for_good(live: Live) -> None:
    site = live.site()
    assert site.ask("POST", "/site/retire", b"{}").status_code == 200
    assert live.flower.nodes == {}
    assert site.ask("GET", "/site").status_code == 403
    assert site.fleet("/v1/fleet/pull-messages").status_code == 401
    again = live.http.post(f"{PREFIX}/enrol", json=enrolment(sites.invite(live.c, "x", 1).token, "x", site.key))
    assert again.status_code == 403


def test_a_signature_is_for_one_request_once(live: Live) -> None:
    site = live.site()
    signed = node_key.sign_request(site.key, "north", "POST", f"{PREFIX}/site/retire", b"{}")
    for method, path, body in (
        ("POST", "/site/retire", b"{ }"),
        ("POST", "/site/anchor", b"{}"),
        ("PUT", "/site/policy", b"{}"),
        ("POST", "/site/retire?x=1", b"{}"),
    ):
        answer = live.http.request(method, PREFIX + path, content=body, headers=signed)
        assert answer.status_code in (400, 401), (method, path)
    signed = node_key.sign_request(site.key, "north", "GET", f"{PREFIX}/site", b"")
    assert live.http.get(f"{PREFIX}/site", headers=signed).status_code == 200
    assert live.http.get(f"{PREFIX}/site", headers=signed).status_code == 401
    assert sites.by_name(live.c, "north") is not None and not sites.by_name(live.c, "north").revoked  # type: ignore[union-attr]


def test_strangers_and_wrong_clocks(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    site = live.site()
    other = Site("north", KEY, live.http)
    nobody = Site("nowhere", site.key, live.http)
    assert other.ask("GET", "/site").text == nobody.ask("GET", "/site").text
    assert other.ask("GET", "/site").status_code == live.http.get(f"{PREFIX}/site").status_code == 401
    late = "2026-01-01T00:00:00.000+00:00"
    monkeypatch.setattr(node_key, "datetime", _Clock(late))
    answer = site.ask("GET", "/site")
    assert answer.status_code == 401 and abs(_seconds(answer.json()["utc"])) < 5
    assert "utc" not in other.ask("GET", "/site").json(), "only who signed it hears of the time"


def test_the_log_says_who_and_what_and_no_more(live: Live) -> None:
    from fedscan_core import auditlog

    site = live.site()
    site.ask("GET", "/site")
    live.http.get("/etc/passwd?token=secret", headers={"authorization": "Bearer secret"})
    files = list((live.c.logs).glob("edge-*.jsonl"))
    until(lambda: len(auditlog.read(files[0])) == 3)
    assert files[0].stat().st_mode & 0o777 == 0o600
    lines = [(line["who"], line["what"], line["status"]) for line in auditlog.read(files[0])]
    assert lines == [("north", "POST /enrol", 200), ("north", "GET /site", 200), ("", "other", 400)]
    assert "secret" not in Path(files[0]).read_text()


class _Clock:
    def __init__(self, time: str) -> None:
        self.time = time

    def now(self, zone: object) -> datetime:
        return datetime.fromisoformat(self.time)

    def fromisoformat(self, text: str) -> datetime:
        return datetime.fromisoformat(text)


def _seconds(utc: str) -> float:
    return (datetime.fromisoformat(utc) - datetime.now(UTC)).total_seconds()
