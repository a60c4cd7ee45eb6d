"""The coordinator's API from a researcher's side, over real TLS: whom it trusts, and what it makes of bad answers."""

import io
import json
from datetime import UTC, datetime, timedelta

import pytest

from fedscan import people, profiles
from fedscan.people import CoordinatorError, Unreachable
from fedscan_core import order
from fedscan_core.errors import ConfigError
from fedscan_core.order import Order


@pytest.fixture
def http(edge, fake_edge):
    with people.connect(edge.address, edge.ca, fake_edge.BEARER) as client:
        yield client


@pytest.fixture
def signed(edge, home):
    key = profiles.make_key("trial")
    edge.public_key = order.public_text(key)
    now = datetime.now(UTC).replace(microsecond=0)
    return order.sign(Order("cxr-0123456789ab", "{}", "ada", now.isoformat(), now.isoformat()), key)


def test_a_server_of_another_authority_is_not_spoken_to(edge, fake_edge, tmp_path):
    (tmp_path / "other").mkdir()
    other, _ = fake_edge.certificates(tmp_path / "other")
    for ca in (other, ""):  # "": public authorities
        with people.connect(edge.address, ca, "token") as client, pytest.raises(CoordinatorError, match="certificate"):
            people.sites(client)
    assert edge.seen == []


def test_an_expired_certificate_is_said_to_be_so(fake_edge, tmp_path, home):
    expired = pytest.raises(CoordinatorError, match="expired")
    with fake_edge.serving(tmp_path, days=-1) as edge, people.connect(edge.address, edge.ca) as client, expired:
        people.hello(client)


def test_nobody_there_is_said_with_the_address(edge, fake_edge):
    with (
        people.connect("https://127.0.0.1:9", edge.ca) as client,
        pytest.raises(Unreachable, match=r"https://127\.0\.0\.1:9 cannot be reached.*HTTPS_PROXY"),
    ):
        people.hello(client)


def test_a_proxy_is_used_where_there_is_one(edge, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    with people.connect(edge.address, edge.ca) as client, pytest.raises(Unreachable):
        people.hello(client)
    monkeypatch.setenv("HTTPS_PROXY", "nonsense://x y")
    with pytest.raises(ConfigError, match="HTTPS_PROXY"), people.connect(edge.address, edge.ca):
        pass
    assert edge.seen == []


def test_the_coordinators_own_words_are_shown(http, edge):
    edge.fail["/sites"] = (403, json.dumps({"error": "Not for viewers.", "remedy": "Ask an operator."}).encode())
    with pytest.raises(CoordinatorError, match=r"Not for viewers\. Ask an operator\."):
        people.sites(http)


@pytest.mark.parametrize(("status", "kind"), [(502, Unreachable), (503, Unreachable), (404, CoordinatorError)])
def test_a_proxys_page_in_between_is_not_shown(http, edge, status, kind):
    edge.fail["/runs"] = (status, b"<html>Bad gateway</html>")
    with pytest.raises(CoordinatorError, match=f"status {status}") as caught:
        people.runs(http)
    assert type(caught.value) is kind


def test_an_unknown_login_says_how_to_get_a_new_one(edge):
    with (
        people.connect(edge.address, edge.ca, "stolen") as client,
        pytest.raises(CoordinatorError, match="fedscan login"),
    ):
        people.runs(client)


RUN = {"run_id": "a-1", "name": "a", "launcher": "ada", "state": "waiting", "reason": "", "submitted": ""}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"runs": 3}',
        b'{"runs": [3]}',
        b'{"runs": [{"run_id": "a"}]}',
        json.dumps({"runs": [RUN | {"round": "x", "rounds": 1}]}).encode(),
        json.dumps({"runs": [RUN | {"round": 0, "rounds": 1, "run_id": "../../etc"}]}).encode(),
        json.dumps({"runs": [RUN | {"round": 0, "rounds": 1, "state": None}]}).encode(),
        b"\xff\xfe",
    ],
)
def test_answers_that_are_none_are_errors_of_ours(http, edge, body):
    edge.fail["/runs"] = (200, body)
    with pytest.raises(CoordinatorError, match="does not understand"):
        people.runs(http)


def test_an_endless_answer_is_cut(http, edge, monkeypatch):
    monkeypatch.setattr(people, "_LARGEST", 1000)
    edge.fail["/runs"] = (200, b'{"runs": "' + b"x" * 5000 + b'"}')
    with pytest.raises(CoordinatorError, match="too long"):
        people.runs(http)


def test_what_others_wrote_cannot_drive_the_terminal(http, edge):
    evil = "\x1b]0;owned\x07\x1b[2Jred\u202etxt\u009b31m"
    edge.add("cxr-1", reason=evil, launcher=evil)
    run = people.runs(http)[0]
    assert run.reason == run.launcher == "]0;owned[2Jredtxt31m"
    edge.fail["/runs"] = (400, json.dumps({"error": evil}).encode())
    with pytest.raises(CoordinatorError) as caught:
        people.runs(http)
    assert "\x1b" not in str(caught.value)


def test_a_redirect_is_not_followed_with_the_token(http, edge):
    edge.fail["/sites"] = (302, b"")
    with pytest.raises(CoordinatorError, match="302"):
        people.sites(http)
    assert edge.seen == ["GET /sites"]


def test_a_run_whose_answer_was_lost_is_looked_up(http, edge, signed):
    edge.drop_after_submit = True
    assert people.submit(http, signed, "", b"") == signed.run_id
    assert edge.seen == ["POST /runs", "GET /runs"]


def test_a_run_that_never_arrived_is_said_not_to_be_listed(http, edge, signed):
    edge.fail["/runs"] = (503, json.dumps({"error": "Starting.", "remedy": ""}).encode())
    with pytest.raises(Unreachable, match=r"Starting\. The run is not on the coordinator's list"):
        people.submit(http, signed, "", b"")


def test_when_nobody_knows_whether_it_was_taken_that_is_said(edge, fake_edge, signed):
    with (
        people.connect("https://127.0.0.1:9", edge.ca, fake_edge.BEARER) as client,
        pytest.raises(Unreachable, match=f"not known.*{signed.run_id}"),
    ):
        people.submit(client, signed, "", b"")


def test_a_folder_that_arrives_changed_is_refused(http, edge):
    edge.add("cxr-1")
    edge.archive, edge.sha = b"x" * 3_000_000, "0" * 64
    with pytest.raises(CoordinatorError, match="damaged"):
        people.archive(http, "cxr-1", io.BytesIO())
    edge.sha = None
    out = io.BytesIO()
    assert people.archive(http, "cxr-1", out) == 3_000_000 == len(out.getvalue())


def test_another_protocol_or_clock_ends_it_early(http, edge):
    now = datetime.now(UTC)
    people.check(people.hello(http), now)
    for edge.clock, words in ((timedelta(hours=1), "60 minutes behind"), (-timedelta(hours=1), "60 minutes ahead of")):
        with pytest.raises(ConfigError, match=words):
            people.check(people.hello(http), now)
    edge.clock, edge.protocol = timedelta(0), 99
    with pytest.raises(ConfigError, match="protocol 99"):
        people.check(people.hello(http), now)
