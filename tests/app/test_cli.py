"""The command line as a person types it: a process of its own, its exit code, what it says and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedscan import cli
from fedscan_core import config, config_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = """
name = "small"
task = {labels = ["0", "1"], image_size = 16}
train = {rounds = ROUNDS, patients_per_step = "all"}
evaluation = {every = 0}
"""


@pytest.fixture
def run_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(SMALL.replace("ROUNDS", "2"))
    return path


def fedscan(*words, cwd, **options):
    command = [sys.executable, "-m", "fedscan.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def call(*words, capsys):
    """In this process, which is faster: (exit code, standard output, standard error)."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_help_and_version_answer_at_once(tmp_path):
    for words in (["--help"], ["--version"], ["simulate", "--help"]):
        took = []
        for _ in range(3):
            before = os.times()
            assert fedscan(*words, cwd=tmp_path).returncode == 0
            after = os.times()  # its processor's time: the clock also counts whoever else is busy here
            took.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert min(took) < 0.4


def test_every_command_teaches_by_example(capsys):
    topics = ("ledger", "ingest", "pull", "listen", "key backup", "quarantine", "patient show", "consent check")
    for command in ("simulate", "config", "phantom", "phantom from-table", *(f"agent {topic}" for topic in topics)):
        code, out, _ = call(*command.split(), "--help", capsys=capsys)
        assert code == 0
        assert f"\n  fedscan {command} " in out


def test_every_command_is_in_the_readme():
    readme = (CONFIGS.parent / "README.md").read_text()
    for command in ("simulate", "config", "phantom", "agent ledger", "agent ingest", "agent pull", "agent patient"):
        assert f"fedscan {command}" in readme


def test_simulate_json_prints_the_summary_and_nothing_else(run_toml, table, tmp_path, capsys, monkeypatch):
    done = fedscan("simulate", run_toml, "--data", table, "--out", "r", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "r/summary.json").read_text())
    assert "round 2/2" in done.stderr
    assert "Traceback" not in done.stderr
    log = (tmp_path / "r/log.txt").read_text()
    assert all(line in log for line in done.stderr.splitlines())
    monkeypatch.chdir(tmp_path)
    code, out, err = call("simulate", run_toml, "--data", table, "--out", "r", capsys=capsys)
    assert (code, out) == (2, "") and "not empty" in err and "--resume r" in err
    code, out, err = call("simulate", "--resume", "r", capsys=capsys)
    assert code == 0 and "AUROC" in out and "finished already" in err


def test_without_privacy_every_line_says_so(run_toml, table, tmp_path, capsys):
    words = ["--data", table, "--out", tmp_path / "r", "--set", "privacy.enabled=false"]
    code, out, err = call("simulate", run_toml, *words, capsys=capsys)
    assert code == 0 and err and all("NO PRIVACY" in line for line in err.splitlines())
    assert "NO PRIVACY" in out


REFUSED = {
    "no RUN.toml": ([], "There is no RUN.toml"),
    "missing RUN.toml": (["none.toml"], "There is no file none.toml"),
    "unknown key": (["{run}", "--set", "train.runds=3"], "did you mean 'train.rounds'?"),
    "wrong value": (["{run}", "--set", "train.rounds=many"], "'train.rounds'"),
    "unknown model": (["{run}", "--set", "model.name=resnet"], "resnet18"),
    "no images": (["{run}"], "--data"),
    "no folder": (["{run}", "--data", "nowhere"], "nowhere"),
    "out of reach": (["{run}", "--data", "{table}", "--set", "privacy.target_epsilon=0.001"], "0.01"),
    "too much noise": (
        [
            *("{run}", "--data", "{table}", "--set", "privacy.target_epsilon=0.02", "--set", "train.rounds=9000"),
            *("--set", "evaluation.private=false"),
        ],
        "noise multiplier above 100",
    ),
    "too little for the evaluation": (
        ["{run}", "--data", "{table}", "--set", "privacy.target_epsilon=0.02"],
        "evaluation.private = false",
    ),
    "threshold": (["{run}", "--set", "evaluation.threshold=0.33"], "threshold 0.33 is not an edge of 10 bins"),
    "start weights": (["{run}", "--data", "{table}", "--set", "model.init=none.safetensors"], "none.safetensors"),
    "out is a file": (["{run}", "--data", "{table}", "--out", "{run}"], "is a file"),
    "resume and more": (["{run}", "--resume", "r"], "--resume goes on"),
    "resume nothing": (["--resume", "r"], "holds no run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_paragraph_with_exit_code_2_and_leave_nothing(
    case, run_toml, table, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words, text = REFUSED[case]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call("simulate", *(w.format(run=run_toml, table=table) for w in words), capsys=capsys)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def wait_for(path, what, seconds=60.0):
    end = time.monotonic() + seconds
    while not (path.exists() and what(path.read_text())):
        assert time.monotonic() < end, f"{path} never came that far"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_a_run_that_goes_on(number, code, table, tmp_path):
    (tmp_path / "run.toml").write_text(SMALL.replace("ROUNDS", "40"))
    command = [sys.executable, "-m", "fedscan.cli", "simulate", "run.toml", "--data", str(table), "--out", "r"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "r/rounds.jsonl", lambda text: text.count("\n") >= 3)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    if code > 0:
        assert "--resume r" in err
    assert not (tmp_path / "r/summary.json").exists()
    done = fedscan("simulate", "--resume", "r", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line)["round"] for line in (tmp_path / "r/rounds.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, 41))
    assert json.loads(done.stdout)["sites"][0]["epsilon"] <= 8.0


def test_a_signal_before_the_start_leaves_nothing(tmp_path):
    words = ["--out", "new/r", "--set", "simulation.patients=200"]
    command = [sys.executable, "-m", "fedscan.cli", "simulate", str(CONFIGS / "quickstart.toml"), *words]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "new/r/run.toml", bool)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()


def test_config_explains_checks_and_samples(tmp_path, capsys):
    code, out, _ = call("config", "--explain", capsys=capsys)
    assert code == 0
    for key, kind, _, meaning in config_file.explain():
        assert key in out
        assert not kind or meaning in out
    code, out, _ = call("config", "--explain", "privacy", capsys=capsys)
    assert "privacy.target_epsilon" in out
    assert "train.rounds" not in out
    code, out, _ = call("config", "--sample", capsys=capsys)
    (tmp_path / "my.toml").write_text(out)
    code, out, _ = call("config", tmp_path / "my.toml", "--set", "train.rounds=7", capsys=capsys)
    assert code == 0
    (tmp_path / "full.toml").write_text(out)
    full = config_file.load(tmp_path / "full.toml")
    assert full.train.rounds == 7
    assert config.to_toml(full) == out
    code, _, err = call("config", "--explain", "privcy", capsys=capsys)
    assert code == 2
    assert "privacy" in err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_runs_are_valid(path):
    run = config_file.load(path)
    assert run.privacy.enabled
    assert run.privacy.unit == "patient"


def test_phantom_draws_a_table_that_simulate_takes(run_toml, tmp_path, capsys):
    words = ["--patients", 60, "--sites", 2, "--size", 32]
    code, _, _ = call("phantom", tmp_path / "t", *words, capsys=capsys)
    assert code == 0
    done = fedscan("simulate", run_toml, "--data", "t", "--out", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code, _, err = call("phantom", tmp_path / "t", capsys=capsys)
    assert code == 2
    assert "not an empty folder" in err
    code, _, _ = call("phantom", tmp_path / "h", "--dicom", "--patients", 8, "--size", 32, capsys=capsys)
    assert code == 0
    assert {path.name for path in (tmp_path / "h").iterdir()} == {"dicom", "labels.csv", "consent.csv"}


def test_nothing_calls_home(run_toml, table, tmp_path):
    """A real run with name look-ups made impossible: whoever tries fails, and the run with it."""
    code = """
import socket, sys
def refuse(*a, **k): raise SystemExit("LOOKED UP " + repr(a))
socket.getaddrinfo = refuse
from fedscan.cli import main
main(sys.argv[1:])
"""
    words = ["simulate", str(run_toml), "--data", str(table), "--out", "r"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "LOOKED UP" not in done.stdout + done.stderr
