"""`fedscan audit-privacy` as it is typed."""

import json

import pytest

from fedscan import cli
from fedscan_client import train
from fedscan_client.dp import noise
from fedscan_core import config

QUICK = ("--canaries", "100", "--set", "train.rounds=2")


@pytest.fixture
def run_file(run_for, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(run_for()))
    return str(path)


def typed(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["audit-privacy", *words])
    return stop.value.code


def test_it_passes_and_says_what_it_is(run_file, capsys):
    assert 0 in (typed(run_file, *QUICK), typed(run_file, *QUICK))  # an honest pipeline fails once in 1000
    shown = capsys.readouterr()
    for words in ("PASS", "Synthetic patients only", "not a proof", "9 of 10 audits would notice", "one-run bound"):
        assert words in shown.out
    assert "loading" in shown.err and "steps" in shown.err


def test_a_broken_pipeline_ends_with_1(run_file, capsys, monkeypatch):
    monkeypatch.setattr(
        train, "add_noise", lambda sums, scale, stream, **c: noise.add_noise(sums, scale / 4, stream, **c)
    )
    assert typed(run_file, *QUICK) == 1
    assert "FAIL in" in capsys.readouterr().out


def test_json_is_all_there_is_on_standard_output(run_file, capsys, tmp_path):
    code = typed(run_file, *QUICK, "--json", "--out", str(tmp_path / "new" / "out"))
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] == (code == 0) and report["canaries"] == 100 and report["steps"] == 2
    assert json.loads((tmp_path / "new/out/audit.json").read_text()) == report
    assert {"claimed_epsilon", "one_run_epsilon", "gaussian_epsilon", "seen_influence", "note"} <= report.keys()


def test_the_declared_size_decides_the_rate(run_file, capsys):
    typed(run_file, *QUICK, "--patients", "50", "--set", "train.patients_per_step=10", "--json")
    assert json.loads(capsys.readouterr().out)["plan"]["sampling_rate"] == 0.2


def test_inversion_needs_no_run_and_writes_a_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert typed("--inversion") == 0
    (picture,) = tmp_path.glob("runs/run-inversion-*/inversion.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "recovered with DP: 0" in capsys.readouterr().out
    assert typed("--inversion", "--out", "here", "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["recovered_without"] > 10 and (tmp_path / numbers["picture"]).is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "There is no RUN.toml given"),
        (("--inversion", "--set", "train.rounds=2"), "--set changes a RUN.toml"),
        (("RUN", "--canaries", "7"), "7 canaries"),
        (("RUN", "--set", "privacy.enabled=false"), "no claim to audit"),
        (("RUN", "--inversion", "--set", "privacy.enabled=false"), "no privacy to show"),
        (("RUN", "--out", "RUN"), "cannot be used"),
        (("RUN", "--patients", "0"), "Declare at least 1 patient"),
    ],
)
def test_refusals(run_file, capsys, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    assert typed(*(run_file if word == "RUN" else word for word in words)) == 2
    assert says in capsys.readouterr().err
