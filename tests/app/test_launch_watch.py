"""Watching a run: lines of any version, lost connections, and where it ends."""

import io
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedscan import people, view, watch
from fedscan.people import CoordinatorError
from fedscan_core import config, config_file
from fedscan_core.errors import ConfigError
from fedscan_server.tracking import Progress

LINE = {"utc": "2026-01-01T00:00:00+00:00", "phase": "round", "round": 1, "rounds": 3, "sites_done": 1, "sites": 2}
LINE |= {"epsilon_low": 0.5, "epsilon_high": 0.75, "metrics": {}, "notes": ["north: late"]}


@pytest.fixture
def http(edge, fake_edge):
    edge.add("cxr-1")
    with people.connect(edge.address, edge.ca, fake_edge.BEARER) as client:
        yield client


def test_a_line_becomes_a_step():
    assert watch.step(LINE) == Progress("round", 1, 3, 1, 2, 0.5, 0.75, {}, ("north: late",))
    unbounded = watch.step(LINE | {"epsilon_high": None})
    assert unbounded and unbounded.epsilon_high == math.inf
    assert watch.step(LINE | {"of a later version": 1}) == watch.step(LINE)


ANY = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.floats())


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(LINE)), ANY))
def test_any_line_is_shown_or_passed_over(changed):
    made = watch.step(LINE | changed)
    if made is not None:
        with view.View(None, Console(file=io.StringIO())) as show:
            show(made)


def test_every_line_is_shown_once_and_the_state_returned(http, edge):
    edge.lines = [LINE | {"round": n} for n in (1, 2, 3)]
    edge.states = ["running", "running", "finished"]
    shown = list[Progress]()
    assert watch.follow(http, "cxr-1", shown.append, sleep=lambda seconds: None) == "finished"
    assert [step.round for step in shown] == [1, 2, 3]
    assert watch.follow(http, "cxr-1", shown.append, after=2) == "finished"
    assert [step.round for step in shown] == [1, 2, 3, 3]


def test_a_coordinator_that_is_away_is_asked_again_with_growing_pauses(http, edge, monkeypatch):
    edge.lines = [LINE]
    said, slept, tries = list[str](), list[float](), list[object]()
    ask = people.progress

    def flaky(*words):
        tries.append(words)
        if 1 < len(tries) < 9:
            raise people.Unreachable("nobody there.")
        return ask(*words)

    monkeypatch.setattr(people, "progress", flaky)
    shown = list[Progress]()
    assert watch.follow(http, "cxr-1", shown.append, tell=said.append, sleep=slept.append) == "finished"
    assert len(shown) == 1
    assert slept == [1, 2, 4, 8, 16, 30, 30]
    assert len(said) == 2 and "the run itself goes on" in said[0] and "again" in said[1]


def test_a_server_that_never_waits_is_not_asked_all_the_time(http, edge):
    edge.states = ["running"] * 4 + ["stopped"]
    slept = list[float]()
    assert watch.follow(http, "cxr-1", lambda step: None, sleep=slept.append) == "stopped"
    assert slept == [1.0] * 3


def test_a_run_that_is_gone_ends_the_watching(http, edge):
    with pytest.raises(CoordinatorError, match="no run cxr-2"):
        watch.follow(http, "cxr-2", lambda step: None)


def test_a_run_is_found_by_the_beginning_of_its_id(http, edge):
    for name in ("cxr-12", "lung-1"):
        edge.add(name)
    assert watch.find(http, "lung").run_id == "lung-1"
    assert watch.find(http, "cxr-1").run_id == "cxr-1"  # whole, though cxr-12 begins so too
    with pytest.raises(ConfigError, match=r"2 runs begin with 'cxr': cxr-1, cxr-12|cxr-12, cxr-1"):
        watch.find(http, "cxr")
    with pytest.raises(ConfigError, match="no run 'brain'"):
        watch.find(http, "brain")


def test_what_the_run_is_comes_from_the_coordinator(http, edge):
    run = config_file.parse({"name": "cxr", "privacy": {"enabled": False}})
    edge.toml["cxr-1"] = config.to_toml(run)
    assert watch.config_of(people.run(http, "cxr-1")) == run
    for strange in ("", "not toml", "unknown = 1"):
        edge.toml["cxr-1"] = strange
        assert watch.config_of(people.run(http, "cxr-1")) is None


def test_time_left_counts_from_the_first_line_seen(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with view.View(None, Console(file=out, width=200)) as show:
        for n in (50, 51):
            show(Progress("round", n, 100, 2, 2, 1.0, 1.0, {}, (f"note {n}",)))
            now[0] += 10
    first, second = out.getvalue().splitlines()
    assert "left" not in first
    assert "8:10 left" in second  # 49 rounds of 10 s


def test_those_who_have_not_answered_are_shown_while_a_run_waits():
    out = io.StringIO()
    with view.View(None, Console(file=out, width=100, force_terminal=True)) as show:
        show(Progress("declare", 0, 100, 1, 3, notes=("north: pending",)))
        assert show._live
        show._live.refresh()
    assert "asking sites" in out.getvalue() and "north: pending" in out.getvalue()


def test_runs_are_a_table_and_reasons(http, edge):
    edge.add("lung-0123456789ab", state="failed", reason="too few [sites]", round=2)
    for fits in (80, 120):
        out = io.StringIO()
        view.show_runs(people.runs(http), Console(file=out, width=fits))
        text = out.getvalue()
        for part in ("lung-0123456789ab", "failed", "2/3", "ada", "2026-02-03 04:05", "too few [sites]"):
            assert part in text
        assert max(map(len, text.splitlines())) <= fits
    out = io.StringIO()
    view.show_runs((), Console(file=out))
    assert "no runs" in out.getvalue()
