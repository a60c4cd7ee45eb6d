"""Every record reaches the hospital's collector once and in order, however often it was away; nothing waits for it."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedscan_client.audit import log, syslog
from fedscan_client.audit.settings import Settings
from fedscan_core.errors import ConfigError, FolderError, RecordDamaged

RFC5424 = re.compile(
    rb"<110>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00) ([!-~]{1,255}) fedscan (\d{1,128}) ([!-~]{1,32}) - ({.*})"
)


def to(collector, **other):
    return Settings(**{"syslog": collector.address, "syslog_ca": collector.ca, **other})


def field(frame, number):
    match = RFC5424.fullmatch(frame)
    assert match is not None, frame
    return match[number]


def got(collector):
    return [json.loads(field(frame, 5)) for frame in collector.frames]


def wait_for(what, seconds=10.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_records_arrive_once_in_order_as_rfc_5424(tmp_path, collector):
    log.append(tmp_path, "release", run_id="r", note="ü\n<1>")
    assert syslog.ship(tmp_path, to(collector)) == 2
    log.append(tmp_path, "answer", status="ok")
    assert syslog.ship(tmp_path, to(collector)) == 1
    assert syslog.ship(tmp_path, to(collector)) == 0
    wait_for(lambda: len(collector.frames) == 3)
    assert got(collector) == [record for record, _ in log.records(tmp_path)]
    assert [field(frame, 4) for frame in collector.frames] == [b"begin", b"release", b"answer"]
    assert all(b"\n" not in frame and frame.isascii() for frame in collector.frames)
    assert not collector.problems


def test_a_collector_that_was_away_gets_everything_once_it_is_back(tmp_path, collector):
    log.append(tmp_path, "start")
    with pytest.raises(FolderError, match="cannot be reached"):
        syslog.ship(tmp_path, Settings(syslog="127.0.0.1:9"), timeout=1)
    log.append(tmp_path, "stop")
    assert syslog.ship(tmp_path, to(collector)) == 3
    wait_for(lambda: len(collector.frames) == 3)


def test_a_collector_whose_certificate_is_not_the_hospitals_gets_nothing(tmp_path, collector, make_collector):
    other = make_collector(tmp_path / "other")
    log.append(tmp_path, "start")
    for settings in (to(collector, syslog_ca=other.ca), to(collector, syslog_ca=None)):
        with pytest.raises(FolderError, match="CERTIFICATE_VERIFY_FAILED"):
            syslog.ship(tmp_path, settings)
    other.close()
    assert collector.frames == []
    with pytest.raises(ConfigError, match="syslog_ca"):
        syslog.ship(tmp_path, to(collector, syslog_ca="none.pem"))


def test_a_collector_that_answers_nothing_keeps_nobody_waiting(tmp_path, make_collector):
    stalled = make_collector(tmp_path / "collector", stall=True)
    log.append(tmp_path, "start")
    stop, told = threading.Event(), list[str]()
    thread = threading.Thread(target=syslog.follow, args=(tmp_path, to(stalled), stop, told.append))
    syslog.POLL_SECONDS, before = 0.01, syslog.POLL_SECONDS
    try:
        thread.start()
        wait_for(lambda: hasattr(stalled, "held"))
        began = time.monotonic()
        for _ in range(10):
            log.append(tmp_path, "answer", status="ok")
        assert time.monotonic() - began < 5
    finally:
        syslog.POLL_SECONDS = before
        stop.set()
        stalled.held.close()
        stalled.close()
        thread.join(15)
    assert not thread.is_alive() and len(told) <= 1


def test_followed_records_arrive_by_themselves_and_a_problem_is_told_once(tmp_path, collector, monkeypatch):
    monkeypatch.setattr(syslog, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(syslog, "LONGEST_PAUSE", 0.02)
    log.append(tmp_path, "start")
    (tmp_path / "audit" / "key").chmod(0o644)
    stop, told = threading.Event(), list[str]()
    thread = threading.Thread(target=syslog.follow, args=(tmp_path, to(collector), stop, told.append))
    thread.start()
    wait_for(lambda: told)
    time.sleep(0.2)
    assert len(told) == 1 and "can be read" in told[0]
    (tmp_path / "audit" / "key").chmod(0o600)
    wait_for(lambda: len(collector.frames) == 2)
    log.append(tmp_path, "stop")
    wait_for(lambda: len(collector.frames) == 3)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_an_older_copy_of_the_log_is_noticed_and_not_sent(tmp_path, collector):
    log.append(tmp_path, "start")
    (path,) = log.files(tmp_path / "audit")
    older = path.read_bytes()
    log.append(tmp_path, "stop")
    syslog.ship(tmp_path, to(collector))
    path.write_bytes(older)
    for _ in range(2):
        with pytest.raises(RecordDamaged, match="not the log that was sent"):
            syslog.ship(tmp_path, to(collector))
        log.append(tmp_path, "access", what="again")  # as long as the other one, then longer
    assert len(collector.frames) == 3


def test_two_senders_send_nothing_twice(tmp_path, collector):
    log.append(tmp_path, "start")
    with syslog._alone(tmp_path / "audit") as alone:
        assert alone and syslog.ship(tmp_path, to(collector)) == 0
    assert syslog.ship(tmp_path, to(collector)) == 2


def test_without_a_collector_nothing_is_done(tmp_path):
    log.append(tmp_path, "start")
    assert syslog.ship(tmp_path, Settings()) == 0
    syslog.follow(tmp_path, Settings(), threading.Event(), print)  # returns
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == ["key", "log-000001.jsonl", "log.lock"]


@pytest.mark.parametrize("address", ["host", "host:0", "host:70000", "host:x", ":1", "a b:1", "http://host:1", "h:1\n"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ValidationError):
        Settings(syslog=address)


def test_an_ipv6_address_has_brackets():
    assert Settings(syslog="[::1]:6514").address == ("::1", 6514)
    with pytest.raises(ValidationError, match="goes with"):
        Settings(syslog_ca=Path("ca.pem"))
