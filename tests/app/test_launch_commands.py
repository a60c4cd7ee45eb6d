"""`fedscan login` to `fetch` as typed, against a coordinator's edge over TLS in this process."""

import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import pytest

from fedscan import cli, profiles
from fedscan_core import config, config_file, order, policy
from fedscan_core.policy import Policy

RUN = """
name = "cxr"
task = {labels = ["0", "1"], image_size = 16}
train = {rounds = 3, patients_per_step = "all"}
"""
COST = {"epsilon": 7.99, "delta": 1e-5, "noise_multiplier": 4.65, "sampling_rate": 1.0, "unit": "patient"}
SUMMARY = {"run": "cxr", "rounds": 3, "rounds_void": 0, "model": "scatter", "parameters": 10, "privacy_enabled": True}
SUMMARY |= {"metrics": {}, "sites": [{"name": "north", "patients_declared": 84, **COST}]}
STEP = {"phase": "round", "round": 3, "rounds": 3, "sites_done": 3, "sites": 3, "epsilon_low": 1, "epsilon_high": 2}


@pytest.fixture
def call(capsys):
    """In this process: (exit code, standard output, standard error)."""

    def typed(*words):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(word) for word in words])
        return caught.value.code, *capsys.readouterr()

    return typed


@pytest.fixture
def run_toml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


@pytest.fixture
def ada(edge, invite, call):
    """Somebody who is logged in where three sites are enrolled."""
    told = {n: policy.public(Policy(max_epsilon=20.0, max_delta=1e-4), n, 400, (20.0, 1e-4)) for n in "abc"}
    edge.sites = [{"name": n, "online": True, "last_seen": "", "policy": told[n]} for n in told]
    assert call("login", invite)[0] == 0
    edge.seen.clear()


def test_login_makes_a_key_and_a_profile_and_says_what_is_next(edge, invite, call, home):
    code, out, _ = call("login", invite)
    assert code == 0
    assert edge.public_key == order.public_text(profiles.key("trial"))
    assert edge.public_key in out and "fedscan launch RUN.toml --dry-run" in out
    assert profiles.load().token not in out
    assert call("login")[1] == f"* trial: Trial ({edge.address}), ada, researcher\n"


def test_an_invitation_that_was_used_is_refused_and_the_key_stays(edge, invite, call, home):
    call("login", invite)
    key, before = profiles.key("trial"), profiles.file().read_bytes()
    code, _, err = call("login", invite)
    assert code == 2 and "used" in err
    assert profiles.file().read_bytes() == before
    edge.public_key = ""  # as with a new invitation
    assert call("login", invite)[0] == 0
    assert order.public_text(profiles.key("trial")) == order.public_text(key) == edge.public_key


def test_a_profile_is_not_turned_to_another_coordinator(edge, invite, call, home):
    other = profiles.Profile("trial", "https://other.example", "Other", "", "ada", "viewer", "t")
    profiles.save(other)
    code, _, err = call("login", invite)
    assert code == 2 and "another coordinator" in err and edge.seen == []
    code, out, _ = call("login", invite, "--profile", "mine")
    assert code == 0 and "--profile mine" in out
    assert profiles.load() == other and profiles.load("mine").address == edge.address


def test_commands_before_a_login_say_what_to_do(call, home, run_toml):
    for words in (["launch", run_toml, "--dry-run"], ["runs"], ["watch", "x"], ["fetch", "x"], ["login"]):
        code, _, err = call(*words)
        assert code == 2 and "fedscan login INVITE" in err


def test_a_dry_run_only_reads(ada, edge, call, run_toml):
    code, out, err = call("launch", run_toml, "--dry-run")
    assert code == 0 and "3 of 3 sites would take part" in out and "Nothing was sent" in out, err
    code, out, _ = call("launch", run_toml, "--dry-run", "--json", "--set", "aggregation.min_sites=4")
    told = json.loads(out)
    assert code == 2 and told["would_start"] is False
    assert set(edge.seen) == {"GET /hello", "GET /sites"}


def test_a_mistake_in_run_toml_is_found_before_anybody_is_asked(ada, edge, call, run_toml):
    code, _, err = call("launch", run_toml, "--dry-run", "--set", "train.round=3")
    assert code == 2 and "train.rounds" in err and edge.seen == []


def test_nothing_is_sent_without_a_yes(ada, edge, call, run_toml, monkeypatch):
    code, _, err = call("launch", run_toml)
    assert code == 2 and "--yes" in err and edge.seen == []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for answer in ("", "\n", "n\n", "yess\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        code, out, err = call("launch", run_toml)
        assert code == 2 and "Send it? [y/N]" in out and "nothing was sent" in err
    assert "POST /runs" not in edge.seen
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    code, out, _ = call("launch", run_toml)
    assert code == 0 and f"fedscan watch {next(iter(edge.runs))}" in out


def test_a_run_that_would_not_start_is_not_sent(ada, edge, call, run_toml):
    code, _, err = call("launch", run_toml, "--yes", "--json", "--set", "privacy.target_epsilon=30")
    assert code == 2 and "Nothing was sent: 0 of 3 sites" in err and "this site allows 20" in err
    assert "POST /runs" not in edge.seen


def test_a_viewer_sends_nothing(ada, edge, call, run_toml):
    profiles.save(dataclasses.replace(profiles.load(), role="viewer"))
    code, _, err = call("launch", run_toml, "--yes", "--json")
    assert code == 2 and "viewers do not launch" in err
    assert set(edge.seen) == {"GET /hello", "GET /sites"}


def test_what_is_sent_is_what_was_read_and_signed(ada, edge, call, run_toml):
    code, out, _ = call("launch", run_toml, "--yes", "--json", "--set", "train.rounds=5")
    told = json.loads(out)
    assert code == 0 and told["sent"] is True and list(edge.runs) == [told["run_id"]]
    sent = config_file.parse(tomllib.loads(edge.toml[told["run_id"]]))
    assert sent.train.rounds == 5
    assert edge.orders[0].config == config.for_sites(sent)
    assert order.fault(edge.orders[0]) is None


def test_waiting_shows_the_end_and_its_exit_code_says_how(ada, edge, call, run_toml):
    edge.lines, edge.states = [STEP], ["running", "finished"]
    submit = edge.submit

    def taken(body):
        status, tree = submit(body)
        edge.summary[tree["run_id"]] = SUMMARY
        return status, tree

    edge.submit = taken
    code, out, err = call("launch", run_toml, "--yes", "--wait")
    assert code == 0 and "round 3/3, sites 3/3, epsilon spent per site 1.00 to 2.00 of 8" in err
    assert "north" in out and "fedscan fetch cxr-" in out
    edge.states = ["failed"]
    code, out, err = call("launch", run_toml, "--yes", "--wait", "--json")
    assert code == 1 and json.loads(out)["state"] == "failed" and "fedscan resume" in err


def test_runs_stop_resume_watch_by_the_beginning_of_an_id(ada, edge, call):
    assert "no runs" in call("runs")[1]
    edge.add("cxr-0123456789ab", state="running")
    edge.add("lung-0123456789ab", state="failed", reason="Too few sites.")
    code, out, _ = call("runs")
    assert code == 0 and "cxr-0123456789ab" in out and "Too few sites." in out
    assert len(json.loads(call("runs", "--json")[1])) == 2
    code, out, _ = call("stop", "cxr")
    assert code == 0 and edge.runs["cxr-0123456789ab"]["state"] == "stopped" and "fedscan resume" in out
    assert call("resume", "cxr")[0] == 0 and edge.runs["cxr-0123456789ab"]["state"] == "running"
    edge.lines, edge.states = [STEP | {"round": 1}, STEP], ["stopped"]
    code, _, err = call("watch", "cxr")
    assert code == 1 and "round 3/3" in err and "round 1/3" not in err and "was stopped" in err
    assert call("stop", "brain")[0] == 2


def test_fetch_brings_the_folder_and_shows_the_summary(ada, edge, call, fake_edge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edge.add("cxr-1", state="running", round=2)
    edge.archive = fake_edge.tar({"cxr-1/run.toml": b"x", "cxr-1/rounds.jsonl": b""})
    code, out, _ = call("fetch", "cxr")
    assert code == 0 and "round 2 of 3" in out and (tmp_path / "runs/cxr-1/run.toml").is_file()
    edge.summary["cxr-1"] = SUMMARY
    code, out, _ = call("fetch", "cxr", "--out", "there")
    assert code == 0 and "7.990" in out and "is in there" in out
    code, _, err = call("fetch", "cxr", "--out", "there")
    assert code == 2 and "there already" in err


def test_leaving_a_watch_leaves_the_run(ada, edge, tmp_path):
    edge.add("cxr-1", state="running")
    edge.lines, edge.states = [STEP | {"round": 1}], ["running"]
    command = [sys.executable, "-m", "fedscan.cli", "watch", "cxr-1"]
    pipe = subprocess.PIPE
    # A shell's background jobs ignore SIGINT, and so would their children.
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    start = functools.partial(subprocess.Popen, cwd=tmp_path, env=os.environ, stderr=pipe, text=True, preexec_fn=hears)
    both = [start(command) for _ in range(2)]
    try:
        for watching, (number, code) in zip(both, ((signal.SIGINT, 130), (signal.SIGTERM, 143)), strict=True):
            assert watching.stderr and "round 1/3" in watching.stderr.readline()
            time.sleep(0.1)
            watching.send_signal(number)
            _, err = watching.communicate(timeout=20)
            assert watching.returncode == code, err
            assert "Traceback" not in err
            assert ("the run goes on" in err) == (number == signal.SIGINT)
    finally:
        for watching in both:
            watching.kill()
            watching.wait()
    assert edge.runs["cxr-1"]["state"] == "running"
    assert not [asked for asked in edge.seen if asked.startswith("POST")]


@pytest.mark.parametrize("command", ["login", "launch", "runs", "watch", "stop", "resume", "fetch"])
def test_help_teaches_by_example(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0 and f"  fedscan {command}" in out and max(map(len, out.splitlines())) <= 120
