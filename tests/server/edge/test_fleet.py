"""The way through to Flower: for enrolled sites only, to the fleet API only, and made anew."""

import base64
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from tests.server.edge.conftest import Live, Site, until

from fedscan_server.coordinator import sites
from fedscan_server.edge import fleet, limits, who

N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973  # of P-384
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-object"


def test_the_names_are_flowers() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    assert (who.NODE_KEY, who.NODE_TIME) == (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER)
    assert who.NODE_SIGNATURE == FLEET_HTTP_SIGNATURE_HEADER
    assert (SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE) == (5, 305)
    flowers = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert flowers - set(fleet.PATHS) == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert set(fleet.PATHS) <= flowers


def test_a_chunk_goes_through_byte_for_byte(live: Live) -> None:
    site = live.site()
    live.link.answer = (200, {"content-type": "application/protobuf", "x-secret": "of the SuperLink"}, b"z" * 3_000_000)
    chunk = bytes(range(256)) * 20 * 1024  # 5 MiB
    answer = site.fleet(PUSH, chunk, more={"x-forwarded-for": "1.2.3.4", "authorization": "Bearer a", "cookie": "c"})
    assert answer.status_code == 200 and answer.content == b"z" * 3_000_000
    assert "x-secret" not in answer.headers and "server" not in answer.headers
    [(path, headers, body)] = live.link.got
    assert path == PUSH and body == chunk
    assert set(headers) == {
        *("host", "connection", "content-type", "content-length", "accept", "accept-encoding", "user-agent"),
        *("flwr-public-key", "flwr-timestamp", "flwr-signature"),
    }
    assert headers["accept-encoding"] == "identity"


def test_flowers_refusals_come_back_and_its_failures_do_not(live: Live) -> None:
    site = live.site()
    live.link.answer = (412, {"content-type": "application/json"}, b'{"code": 1}')
    answer = site.fleet(PULL)
    assert (answer.status_code, answer.content) == (412, b'{"code": 1}')
    live.link.answer = (500, {"content-type": "application/json"}, b"Traceback /srv/secret")
    answer = site.fleet(PULL)
    assert answer.status_code == 500 and b"Traceback" not in answer.content


def test_strangers_get_no_byte_through(live: Live) -> None:
    stranger = Site("north", ec.generate_private_key(ec.SECP384R1()), live.http)
    live.site()
    assert stranger.fleet(PULL, b"body").status_code == 401
    assert live.http.post(PULL, content=b"body").status_code == 401
    p256 = Site("north", ec.generate_private_key(ec.SECP256R1()), live.http)
    assert p256.fleet(PULL, b"body").status_code == 401
    assert live.link.connections == 0


def test_a_key_without_its_signature_is_a_stranger(live: Live) -> None:
    site = live.site()
    headers = site.node_headers()
    for name, value in (("flwr-signature", headers["flwr-signature"][:-8] + "AAAAAAA="), ("flwr-signature", "!")):
        assert live.http.post(PULL, headers={**headers, name: value}).status_code == 401
    assert live.http.post(PULL, headers={**headers, "flwr-timestamp": "2026-01-01T00:00:00+00:00"}).status_code == 401
    assert live.link.connections == 0


def test_the_window_is_flowers(live: Live) -> None:
    site = live.site()
    for shift, status in ((4, 200), (8, 401), (-295, 200), (-310, 401)):
        answer = site.fleet(PULL, shift=shift)
        assert answer.status_code == status, shift
        assert ("utc" in answer.text) == (status == 401)


def test_a_signature_is_good_once_also_in_its_other_form(live: Live) -> None:
    headers = live.site().node_headers()
    assert live.http.post(PULL, headers=headers).status_code == 200
    assert live.http.post(PULL, headers=headers).status_code == 401
    r, s = decode_dss_signature(base64.b64decode(headers["flwr-signature"]))
    other = {**headers, "flwr-signature": base64.b64encode(encode_dss_signature(r, N - s)).decode()}
    assert live.http.post(PULL, headers=other).status_code == 401
    assert len(live.link.got) == 1


def test_a_revoked_site_is_shut_out_and_the_others_are_not(live: Live) -> None:
    north, south = live.site("north"), live.site("south")
    assert north.fleet(PULL).status_code == 200
    sites.revoke(live.c, "north")  # another process's doing
    until(lambda: north.fleet(PULL).status_code == 401, 3)
    assert south.fleet(PULL).status_code == 200


TARGETS = [
    *("/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/health", "/", "*"),
    *("/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet/pull-messages/"),
    *("//v1/control/list-runs", "/v1/fleet/pull-messages/../../runtime/acquire-task", "/v1/Fleet/pull-messages"),
    *("/v1/fleet/pull%2Dmessages", "/v1/fleet/pull-messages;x", "/v1/fleet/pull-messages?x=1"),
    *("/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/", "/v1/fleet/pull-messages%00"),
    *("http://127.0.0.1/v1/control/list-runs", "/fedscan/v1/../../v1/control/list-runs", "\\v1\\fleet"),
]


def test_no_path_leads_anywhere_else(live: Live, raw: Callable[..., bytes]) -> None:
    site = live.site()
    for target in TARGETS:
        start = f"POST {target} HTTP/1.1\r\nHost: localhost\r\n{_lines(site)}Content-Length: 1\r\n\r\nx"
        answer = raw(start.encode())
        assert answer.split(b" ")[1] in (b"404", b"400"), (target, answer[:200])
    assert live.link.connections == 0


UNCLEAR = [
    ("Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", b"411"),
    ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
    ("Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", b"400"),
    ("Content-Length: +1\r\n\r\nx", b"400"),
    ("Content-Length: 99999999999\r\n\r\nx", b"413"),
    ("\r\n", b"411"),
    ("flwr-public-key: AAAA\r\nContent-Length: 1\r\n\r\nx", b"400"),
    ("flwr-component-name: a\r\nflwr-component-name: b\r\nContent-Length: 1\r\n\r\nx", b"400"),
]


def test_unclear_requests_are_refused(live: Live, raw: Callable[..., bytes]) -> None:
    site = live.site()
    for lines, status in UNCLEAR:
        start = f"POST {PULL} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{_lines(site)}{lines}"
        answer = raw(start.encode())
        assert answer.split(b" ")[1] == status, (lines, answer[:300])
    assert live.link.got == []


def _lines(site: Site) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in site.node_headers().items())


def test_a_body_hides_no_second_request(live: Live, raw: Callable[..., bytes]) -> None:
    head = _lines(live.site())
    hidden = b"POST /v1/control/list-runs HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    start = f"POST {PULL} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(hidden)}\r\n\r\n".encode()
    raw(start + hidden, 1.0)
    [(path, _, body)] = live.link.got
    assert (path, body) == (PULL, hidden)


def test_what_is_larger_than_a_chunk_is_refused_unread(live: Live) -> None:
    site = live.site()
    assert site.fleet(PUSH, b"x" * (8 * 2**20)).status_code == 200
    assert site.fleet(PULL, b"x" * (2**20 + 1)).status_code == 413
    assert len(live.link.got) == 1


def test_a_slow_body_is_cut_off(live: Live, raw: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.3)
    head = _lines(live.site())
    answer = raw(f"POST {PUSH} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: 100\r\n\r\nx".encode())
    assert answer.startswith(b"HTTP/1.1 408"), answer[:200]
    assert live.link.got == []
    until(lambda: live.edge.fleet_busy._now == {})


def test_without_the_superlink_the_answer_means_later(live: Live) -> None:
    site = live.site()
    live.edge.link = fleet.client(1)
    assert site.fleet(PULL).status_code == 502
    until(lambda: live.edge.fleet_busy._now == {})


def test_one_site_cannot_take_all(live: Live) -> None:
    site = live.site()
    live.edge.fleet_busy._now["north"] = live.edge.fleet_busy.most
    assert site.fleet(PULL).status_code == 503
    assert live.site("south").fleet(PULL).status_code == 200
    live.edge.fleet_busy._now.clear()


def test_sites_cannot_fill_the_disk(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    site = live.site()
    monkeypatch.setattr(fleet, "KEPT_FREE", 2**60)  # as if nearly nothing were left
    for path in fleet.GROWING:
        answer = site.fleet(path, b"x")
        assert answer.status_code == 503 and "disk is nearly full" in answer.text
    assert live.link.got == []
    assert site.fleet(PULL).status_code == 200  # what is there can still be fetched
