"""The site's door over real HTTPS: what goes through it, whom it trusts, and what a person reads when it does not."""

import dataclasses
import json

import pytest

from fedscan_client import connection as connections
from fedscan_client import door
from fedscan_client.connection import Connection
from fedscan_client.door import DoorError
from fedscan_core import node_key


def connected(fake, folder, address=""):
    """A site's folder that knows this coordinator."""
    folder.mkdir(exist_ok=True)
    (folder / connections.CA_FILE).write_text(fake.ca_pem)
    it = Connection(address or fake.address, "centre", folder / connections.CA_FILE, "north", "")
    connections.save(folder, it)
    return it


def enrolled(fake, folder):
    it = connected(fake, folder)
    public = node_key.public_text(node_key.create(folder / connections.NODE_KEY))
    return it, door.enrol(it, "once", "north", public, {"site": "north"})


def refused(call, *words):
    with pytest.raises(DoorError) as caught:
        call()
    text = str(caught.value)
    assert caught.value.remedy and "Traceback" not in text and len(text.splitlines()) == 1
    for word in words:
        assert word in text
    return caught.value


def test_a_life_at_the_door(fake, tmp_path):
    site = tmp_path / "north"
    it, told = enrolled(fake, site)
    assert door.hello(it)["coordinator"] == "centre" and door.hello(it)["certificate_until"] > "2"
    assert (told["site"], told["node_id"]) == ("north", "7") and "anna" in told["launchers"]
    door.publish_policy(site, {"site": "north", "max_epsilon": 3.0})
    assert door.about(site)["policy"] == {"site": "north", "max_epsilon": 3.0}
    for head in ("a" * 64, "b" * 64):
        door.put_anchor(site, head)
    assert [one["anchor"] for one in door.anchors(site)] == ["a" * 64, "b" * 64]
    door.retire(site)
    assert refused(lambda: door.about(site), "revoked").status == 403


def test_a_request_is_bound_to_its_key_and_name(fake, tmp_path):
    it, _ = enrolled(fake, tmp_path / "north")
    (tmp_path / "north" / connections.NODE_KEY).unlink()
    node_key.create(tmp_path / "north" / connections.NODE_KEY)
    assert refused(lambda: door.about(tmp_path / "north")).kind == "refused"
    assert refused(lambda: door.enrol(it, "once", "north", "k", {}), "was used").kind == "refused"


def test_only_the_coordinators_own_authority_is_trusted(fake, fake_coordinator, tmp_path):
    """Also when the system trusts another one for that address: an inspecting proxy, or somebody in between."""
    with fake_coordinator["coordinator"](tmp_path / "other") as other:
        it = connected(other, tmp_path / "north", fake.address)
        error = refused(lambda: door.hello(it), "not vouched for", "TLS inspection", "telephone")
        assert error.kind == "certificate" and not fake.calls
        public = dataclasses.replace(it, ca=None)
        assert refused(lambda: door.hello(public)).kind == "certificate"
    (tmp_path / "north" / connections.CA_FILE).write_text("no certificate")
    assert refused(lambda: door.hello(it), "Enrol again").kind == "certificate"


def test_an_expired_certificate_and_one_for_another_name(fake_coordinator, tmp_path):
    with fake_coordinator["coordinator"](tmp_path / "old", days=-1) as old:
        error = refused(lambda: door.hello(connected(old, tmp_path / "a")), "has expired", "cert renew")
        assert error.kind == "expired"
    with fake_coordinator["coordinator"](tmp_path / "named", host="fed.example") as named:
        assert refused(lambda: door.hello(connected(named, tmp_path / "b")), "another name").kind == "certificate"


def test_through_a_proxy(fake, fake_coordinator, tmp_path, monkeypatch):
    it, _ = enrolled(fake, tmp_path / "north")
    with fake_coordinator["proxy"]() as (url, asked):
        monkeypatch.setenv("HTTPS_PROXY", url.replace("http://", "http://user:secret@"))
        assert door.about(tmp_path / "north")["site"] == "north"
        assert asked == [f"CONNECT {it.host}:{it.port} HTTP/1.1"]
        assert door.proxy_of(it) == url.removeprefix("http://")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert door.about(tmp_path / "north")["site"] == "north" and len(asked) == 1 and door.proxy_of(it) == ""
        monkeypatch.delenv("NO_PROXY")
    assert refused(lambda: door.hello(it), "proxy").kind == "unreachable"  # it is gone
    with fake_coordinator["proxy"](407) as (url, _):
        monkeypatch.setenv("HTTPS_PROXY", url.replace("http://", "http://user:secret@"))
        error = refused(lambda: door.hello(it), "407", it.host, str(it.port))
        assert error.kind == "proxy" and "secret" not in str(error)
    monkeypatch.setenv("HTTPS_PROXY", "ftp://x")
    assert refused(lambda: door.hello(it), "HTTPS_PROXY").kind == "proxy"


def test_a_clock_that_is_far_off(fake, tmp_path):
    enrolled(fake, tmp_path / "north")
    fake.ahead = 3600
    error = refused(lambda: door.about(tmp_path / "north"), "NTP")
    assert error.kind == "clock" and error.utc


def test_nobody_there(fake_coordinator, tmp_path, monkeypatch):
    monkeypatch.setattr(door, "TIMEOUT_SECONDS", 0.3)
    with fake_coordinator["coordinator"](tmp_path / "centre") as fake:
        it = connected(fake, tmp_path / "north")
    assert refused(lambda: door.hello(it), "refused the connection", "--for-it", str(it.port)).kind == "unreachable"
    it = dataclasses.replace(it, address="https://nowhere.invalid:8443")
    assert refused(lambda: door.hello(it), "nowhere.invalid", "DNS").kind == "name"
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        it = dataclasses.replace(it, address=f"https://127.0.0.1:{silent.getsockname()[1]}")
        assert refused(lambda: door.hello(it), "did not answer within").kind == "unreachable"


HUGE = b'{"coordinator":"c","version":"1","flower":"1","protocol":2,"utc":"","more":"' + b"x" * (5 * 2**20) + b'"}'


@pytest.mark.parametrize("raw", [b"<html>portal</html>", b"[]", b'{"coordinator": "centre"}', b"[" * 100_000, HUGE])
def test_what_answers_is_something_else(fake, tmp_path, raw):
    it = connected(fake, tmp_path / "north")
    fake.raw = raw
    assert refused(lambda: door.hello(it)).kind == "answer"


def test_what_a_coordinator_says_cannot_paint_the_terminal(fake, tmp_path):
    it = connected(fake, tmp_path / "north")

    class Answer:
        status_code = 403

    says = {"error": "no\x1b[2J\nfedscan: all is well " + "x" * 9999, "remedy": "ask"}
    with pytest.raises(DoorError) as caught:
        door._told(it, Answer(), json.dumps(says).encode())  # type: ignore[arg-type]
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
