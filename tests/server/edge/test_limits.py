"""The memories of the open port, against plain references; slow and greedy connections, for real."""

import socket
import ssl
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.edge.conftest import PREFIX, Live, until

from fedscan_core import auditlog
from fedscan_server.edge import serve
from fedscan_server.edge.limits import Busy, Failures, Replays, network
from fedscan_server.edge.refused import Refused
from fedscan_server.edge.requestlog import RequestLog


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 40), st.sampled_from("abc"), st.booleans()), max_size=60))
def test_failures_are_counted_in_a_sliding_window(steps: list[tuple[float, str, bool]]) -> None:
    clock, plain = Clock(), []
    failures = Failures(most=3, window=60.0, clock=clock)
    for wait, address, fails in steps:
        clock.now += wait
        waits = sum(a == address and t >= clock.now - 60.0 for t, a in plain) >= 3
        if waits:
            with pytest.raises(Refused):
                failures.check("site", network_of(address))
        else:
            failures.check("site", network_of(address))
            if fails:
                failures.note("site", network_of(address))
                plain.append((clock.now, address))


def network_of(letter: str) -> str:
    return f"192.0.2.{ord(letter)}"


def test_failures_forget_the_longest_idle_and_know_doors() -> None:
    failures = Failures(most=1, addresses=2)
    for last in (1, 2, 3):
        failures.note("site", f"192.0.2.{last}")
    failures.check("site", "192.0.2.1")
    with pytest.raises(Refused) as caught:
        failures.check("site", "192.0.2.3")
    assert caught.value.status == 429
    failures.check("people", "192.0.2.3")
    failures.note("fleet", "192.0.2.3")
    with pytest.raises(Refused) as caught:
        failures.check("fleet", "192.0.2.3")
    assert caught.value.status == 503, "Flower's SuperNode ends itself after most others"


def test_whom_an_address_stands_for() -> None:
    assert network("2001:db8:1:2:3::1") == network("2001:db8:1:2:ffff::2") != network("2001:db8:1:3::1")
    assert network("::ffff:192.0.2.1") == network("192.0.2.1") == "192.0.2.1"
    assert network("x" * 500) == "?"


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 300), st.sampled_from("ab"), st.integers(0, 5)), max_size=60))
def test_a_signature_is_new_once_as_long_as_it_could_be_valid(steps: list[tuple[float, str, int]]) -> None:
    clock, plain = Clock(), dict[tuple[str, int], float]()
    replays = Replays(clock=clock)
    for wait, site, r in steps:
        clock.now += wait
        first = clock.now - plain.get((site, r), float("-inf")) > 640.0
        assert replays.first(site, r) == first
        if first:
            plain[site, r] = clock.now


def test_what_is_remembered_is_bounded() -> None:
    clock = Clock()
    replays = Replays(most=3, clock=clock)
    assert all(replays.first("a", r) for r in range(3))
    with pytest.raises(Refused) as caught:
        replays.first("a", 3)
    assert caught.value.status == 503
    assert replays.first("b", 0)
    clock.now += 700
    assert replays.first("a", 3) and len(replays._seen["a"]) == 1


def test_busy_counts_down_after_errors() -> None:
    busy = Busy(1)
    with pytest.raises(ZeroDivisionError), busy("a"):
        with busy("b"), pytest.raises(Refused), busy("a"):
            pass
        raise ZeroDivisionError
    assert busy._now == {}


def test_a_connection_that_asks_nothing_is_cut(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.4)
    for start in (b"", b"GET /fedscan/v1/hello HTTP/1.1\r\nHost: x\r\nX-Slow: "):
        begin = time.monotonic()
        with (
            socket.create_connection(live.c.bind, timeout=5) as plain,
            live.trust.wrap_socket(plain, server_hostname="localhost") as wire,
        ):
            wire.sendall(start)
            while time.monotonic() - begin < 4:  # a byte now and then does not keep it open
                try:
                    wire.sendall(b"x" if start else b"")
                    wire.settimeout(0.1)
                    if wire.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
                except (ConnectionError, ssl.SSLError):
                    break
            assert time.monotonic() - begin < 3
    until(lambda: not serve._open["127.0.0.1"] or live.http.get(f"{PREFIX}/hello").status_code == 200)


def test_plain_http_and_old_tls_are_not_spoken(live: Live) -> None:
    with socket.create_connection(live.c.bind, timeout=5) as plain:
        plain.sendall(b"GET /fedscan/v1/hello HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP")
    old = ssl.create_default_context(cadata=live.c.ca_pem)
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(live.c.bind, timeout=5) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(plain, server_hostname="localhost")


def test_methods_and_headers_out_of_bounds(live: Live) -> None:
    assert live.http.request("DELETE", f"{PREFIX}/hello").status_code == 405
    assert live.http.request("TRACE", f"{PREFIX}/hello").status_code == 405
    assert live.http.get(f"{PREFIX}/hello", headers={"x": "y" * 200_000}).status_code == 400
    assert live.http.get(f"{PREFIX}/site", headers={"fedscan-site": "y" * 2000}).status_code == 400


def test_the_log_counts_what_it_drops(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    for _ in range(200):
        log.add("", "other", 404, "192.0.2.1")
    log.add("north", "GET /site", 200, "192.0.2.2")
    log.close()
    [file] = tmp_path.glob("edge-*.jsonl")
    lines = auditlog.read(file)
    assert len(lines) == 121 and lines[-1]["who"] == "north" and lines[-1]["dropped"] == 80


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    log = RequestLog(tmp_path / "file")
    log.add("north", "GET /site", 200, "192.0.2.2")
    log.close()
    assert "cannot be written" in capsys.readouterr().err
