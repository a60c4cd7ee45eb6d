"""`fedscan agent ledger`: what it says is what the ledger holds; it only looks, also while an agent is at work."""

import json
import subprocess
import sys

import pytest

from fedscan import cli
from fedscan_client import agent
from fedscan_client.dp import ledger
from fedscan_client.dp.ledger import Release
from fedscan_core import accounting, config
from fedscan_core.errors import BudgetError

HELD = """
import sys, time
from pathlib import Path
from fedscan_client.dp import ledger_file, ledger_lock
book = ledger_file.Book(Path(sys.argv[1]), Path(sys.argv[2]))
ledger_lock.hold(book.ledger)
with ledger_file.writing(book):
    print("at work", flush=True)
    time.sleep(60)
"""


def call(*words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["agent", "ledger", *map(str, words)])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(params=["sum", "rdp"])
def used(request, make_site, make_run, tmp_path):
    """A site, and its run of three rounds: one answered, one burned, the evaluation answered."""
    run = make_run(privacy={"noise_multiplier": 4.0}, evaluation={"private": True})
    here = make_site(tmp_path / "north", gate=request.param, max_epsilon=8.0, max_delta=1e-4)
    plan = accounting.plan_for(run, 20)
    ledger.open_ledger(here.book, ledger.Budget(8.0, 1e-4), 20, request.param)
    ledger.admit(here.book, "demo", plan, "c")
    step = Release("poisson_gauss", plan.sampling_rate, plan.noise_multiplier, 1.0, 20.0, 1)
    query = Release("gaussian", 1.0, plan.evaluation_noise, 1.0, 1.0, 0)
    for round_, release in ((1, step), (2, step), (0, query)):
        book = here.book
        ledger.reserve(book, "demo", round_, plan=plan, config_sha="c", input_sha="i", release=release)
        if round_ != 2:
            ledger.settle(here.book, "demo", round_, "o")
    (tmp_path / "run.toml").write_text(config.to_toml(run))
    return here, run, plan


def test_json_says_budget_reserved_spent_by_run_and_round(used, capsys):
    here, _, plan = used
    code, out, err = call(here.folder, "--json", capsys=capsys)
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["budget"] == {"epsilon": 8.0, "delta": 1e-4} and told["rows"] == 7 and told["unit"] == "patient"
    (run,) = told["runs"]
    assert (run["epsilon"], run["delta"], run["steps"]) == (plan.epsilon, plan.delta, 3)
    assert run["epsilon_replace_one"] == accounting.replace_one(plan.events(), plan.delta) > 1.5 * plan.epsilon
    states = [(row["round"], row["what"], row["state"], row["steps"]) for row in run["rounds"]]
    assert states == [(1, "training", "answered", 1), (2, "training", "no answer", 1), (0, "evaluation", "answered", 0)]
    so_far = [row["epsilon_so_far"] for row in run["rounds"]]
    truth = [accounting.epsilon(events, plan.delta) for events in (plan.events(1), plan.events(2))]
    truth.append(accounting.epsilon((*plan.events(2), *plan.events()[1:]), plan.delta))  # two steps and the query
    assert all(t <= s <= plan.epsilon for t, s in zip(truth, so_far, strict=True)) and so_far == sorted(so_far)
    assert run["spent"] == so_far[-1]
    if here.policy.gate == "sum":
        assert told["spent"] == {"epsilon": so_far[-1], "delta": plan.delta}
        assert told["reserved"] == {"epsilon": plan.epsilon, "delta": plan.delta, "share": plan.epsilon / 8.0}
    else:
        assert 0 < told["spent"]["rdp"] < told["reserved"]["rdp"] < told["reserved"]["rdp_allowed"]
        assert told["spent"]["epsilon"] < told["reserved"]["epsilon"] < 8


def test_one_more_run_is_the_last_again_or_that_of_a_file_and_right_about_the_future(used, tmp_path, capsys):
    here, run, plan = used
    again = json.loads(call(here.folder, "--json", capsys=capsys)[1])["one_more_run"]
    same = json.loads(call(here.folder, "--run", tmp_path / "run.toml", "--json", capsys=capsys)[1])["one_more_run"]
    assert again["of"] == "demo again" and same["of"].endswith("run.toml")
    assert {**again, "of": ""} == {**same, "of": ""} and again["epsilon"] == plan.epsilon
    number = 0
    while agent.report(here)["one_more_run"]["fits"]:
        ledger.admit(here.book, f"more-{number}", plan, "c")
        number += 1
    assert number >= 1
    with pytest.raises(BudgetError):
        ledger.admit(here.book, "last", plan, "c")
    assert "is left" in call(here.folder, capsys=capsys)[1]
    low = run.model_copy(update={"privacy": run.privacy.model_copy(update={"noise_multiplier": 0.2})})
    (tmp_path / "low.toml").write_text(config.to_toml(low))
    told = agent.report(here, tmp_path / "low.toml")["one_more_run"]
    assert not told["fits"] and "this site" in told["reason"]


def test_the_table_names_both_adjacencies_and_joins_rounds(used, capsys):
    here, _, _ = used
    code, out, _ = call(here.folder, capsys=capsys)
    assert code == 0 and "chain whole" in out and f"Gate {here.policy.gate}" in out
    for words in ("adding or removing one patient", "replacing one", "REPLACE_ONE", "no answer", "reserved", "spent"):
        assert words in out


def test_it_looks_while_an_agent_writes_and_changes_nothing(used, capsys):
    here, _, _ = used
    command = [sys.executable, "-c", HELD, str(here.ledger), str(here.book.counter)]
    busy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert busy.stdout is not None and busy.stdout.readline() == "at work\n"
        before = (here.ledger.read_bytes(), here.book.counter.read_bytes())
        code, out, _ = call(here.folder, "--json", capsys=capsys)
        assert code == 0 and json.loads(out)["rows"] == 7
        assert (here.ledger.read_bytes(), here.book.counter.read_bytes()) == before
    finally:
        busy.kill()
        busy.wait()


def test_a_site_that_has_not_begun_is_told_what_a_run_would_cost(make_site, make_run, tmp_path, capsys):
    here = make_site(tmp_path / "north", max_epsilon=8.0, max_delta=1e-4)
    (tmp_path / "run.toml").write_text(config.to_toml(make_run(privacy={"noise_multiplier": 4.0})))
    code, out, _ = call(here.folder, "--run", tmp_path / "run.toml", capsys=capsys)
    assert code == 0 and "no ledger yet" in out and "It fits" in out
    assert "--run RUN.toml" in call(here.folder, capsys=capsys)[1]
    assert not here.ledger.exists() and not here.book.counter.exists()


@pytest.mark.parametrize(
    ("break_", "words"),
    [
        (lambda here: (here.folder / "site.toml").unlink(), "site.toml"),
        (lambda here: here.ledger.unlink(), "is gone"),
        (lambda here: here.book.counter.write_text('{"seq": 9, "head": "x"}'), "older copy"),
        (lambda here: here.ledger.write_bytes(b"nothing of this is a ledger" * 99), "damaged"),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy(used, break_, words, capsys):
    here, _, _ = used
    break_(here)
    code, out, err = call(here.folder, "--json", capsys=capsys)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_a_run_toml_that_cannot_be_had_is_refused(used, tmp_path, capsys):
    here, _, _ = used
    code, _, err = call(here.folder, "--run", tmp_path / "none.toml", capsys=capsys)
    assert code == 2 and "none.toml" in err
