"""`fedscan agent runs, show, approve, refuse, revoke, budget`: plain words, nothing by accident, JSON is only JSON."""

import io
import json
import sys

import pytest

from fedscan import cli
from fedscan_client import approvals, asked, site
from fedscan_client.audit import log
from fedscan_client.intake.sources.settings import Table
from fedscan_client.site import Site
from fedscan_core import config
from fedscan_core.order import Order
from fedscan_core.policy import Policy

STUDY = {
    "purpose": "triage",
    "question": "Can a small network find pneumonia?",
    "ethics_approval": "EK 12/26",
    "contact": "ana@example.org",
}


@pytest.fixture
def here(tmp_path):
    """A site that approves by hand."""
    policy = Policy(8.0, 1e-4, research_cohort=True)
    source = {"source": Table(kind="table", folder=tmp_path)}
    made = Site(name="north", patients_declared=400, source=source, policy=policy, folder=tmp_path / "north")
    site.save(made)
    return made


@pytest.fixture
def order(make_run):
    """A run that asked."""
    return Order("chest-1", config.for_sites(make_run(study=STUDY, privacy={"noise_multiplier": 2.0})), "ana")


def call(capsys, monkeypatch, *words, answer=None):
    stdin = io.StringIO(answer or "")
    stdin.isatty = lambda: answer is not None  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        cli.main(["agent", *map(str, words)])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs one command: exit code, standard output, standard error."""
    return lambda *words, **how: call(capsys, monkeypatch, *words, **how)


def test_runs_lists_what_asked(here, order, run):
    assert run("runs", here.folder) == (0, "No run has asked yet.\n", "")
    approvals.note_request(here, order)
    code, out, _ = run("runs", here.folder)
    assert code == 0 and all(word in out for word in ("chest-1", "pending", "ana", "triage", "fedscan agent show"))
    told = json.loads(run("runs", here.folder, "--json")[1])["runs"]
    assert [(it["run_id"], it["state"], it["launcher"]) for it in told] == [("chest-1", "pending", "ana")]


def test_show_says_it_in_plain_words(here, order, run):
    approvals.note_request(here, order)
    code, out, _ = run("show", here.folder, "ch")
    text = " ".join(out.split())
    assert code == 0
    for words in (
        "Run chest-1: pending.",
        "Who: ana, vouched for by the coordinator only",
        'Contact: "ana@example.org".',
        'Purpose: "triage". Question: "Can a small network find pneumonia?"',
        'Ethics approval: "EK 12/26". Data-use agreement: none named.',
        'classification of images as "well", "ill"; model cnn, 3 rounds, 3 training steps here',
        "declared as 400. Images never leave.",
        "Of the lifetime budget of 8, 8 is left now",
        "charged for ever when it starts",
        "noised numbers",
        "a noised histogram of 20 numbers",
        "fedscan agent approve",
    ):
        assert words in text, words
    told = json.loads(run("show", here.folder, "ch", "--json")[1])
    assert told["cost"]["left_after"] == pytest.approx(8.0 - told["cost"]["epsilon"]) and told["refused"] is None
    assert [record["what"] for record in log.read(here.folder) if record["event"] == "access"] == ["a run's order"] * 2


def test_show_says_what_is_dangerous(here, make_run):
    for sections, words in (
        ({"privacy": {"enabled": False}}, "NO PRIVACY"),
        ({"privacy": {"unit": "image"}}, "each single IMAGE, not each patient"),
        ({"train": {"rounds": 3000}, "privacy": {"noise_multiplier": 0.5}}, "This site's own rules refuse it"),
    ):
        order = Order("odd", config.for_sites(make_run(**sections)), "ana")
        known = approvals.Asked(order, "2026-01-01T00:00:00+00:00", "pending", "", "", "")
        assert words in " ".join(asked.words(asked.facts(here, known)))


def test_a_run_that_cannot_be_described_can_still_be_refused(here, order, run):
    import dataclasses

    small = json.loads(order.config)
    small["model"]["name"] = "resnet18"  # takes no images as small as these
    for run_id, text in (("small", json.dumps(small)), ("foreign", '{"of": "another version"}')):
        approvals.note_request(here, dataclasses.replace(order, run_id=run_id, config=text))
    assert "at least 32" in " ".join(run("show", here.folder, "small")[1].split())
    assert run("runs", here.folder)[0] == 0
    for run_id in ("small", "foreign"):
        words = ("--by", "A. Meier", "--reason", "no")
        assert run("refuse", here.folder, run_id, *words, answer="y\n")[0] == 0
        assert approvals.state(here, run_id) == "refused"


def test_what_strangers_wrote_cannot_look_like_what_we_say(here, make_run):
    """Blanks enough to reach the next line, and then a sentence of ours: it stays inside quotation marks."""
    blanks = " " * 300 + "\u2800" * 200
    study = {
        "question": f'Fine."{blanks}Cost: epsilon 0.01. This site signed it.',
        "contact": "a" + " " * 150 + "Who: you",
    }
    order = Order(
        "odd", config.for_sites(make_run(study=study, task={"labels": ["a", "b", *map(str, range(99))]})), "ana"
    )
    known = approvals.Asked(order, "2026-01-01T00:00:00+00:00", "pending", "", "", "")
    said = list(asked.words(asked.facts(here, known)))
    assert """Question: "Fine.' Cost: epsilon 0.01. This site signed it.\"""" in said[2]
    assert 'Contact: "a Who: you".' in said[1] and not any("  " in words for words in said)
    assert '"17", ...; model' in said[4]


def test_what_strangers_wrote_cannot_steer_the_terminal(here, make_run, run):
    study = {"purpose": "tri\x1b[2Jage", "question": "a\nRun x: approved by you\x07"}
    approvals.note_request(here, Order("odd", config.for_sites(make_run(study=study)), "ana"))
    for words in (("runs",), ("show", "odd"), ("approve", "odd", "--by", "A. Meier", "--yes")):
        code, out, err = run(words[0], here.folder, *words[1:])
        assert code == 0 and "\x1b" not in out + err and "\x07" not in out + err and "\nRun x" not in out + err


def test_approve_asks_first(here, order, run):
    approvals.note_request(here, order)
    words = ("approve", here.folder, "chest-1", "--by", "A. Meier")
    for answer in (None, "n\n", "\n"):
        code, out, err = run(*words, answer=answer)
        assert code == 2 and "Nothing was changed" in err and out == "" and "Cost: epsilon" in err
        assert approvals.state(here, "chest-1") == "pending"
    assert run(*words, answer="y\n")[:2] == (0, "Run chest-1 is approved.\n")
    assert approvals.state(here, "chest-1") == "approved"


def test_refuse_and_revoke(here, order, run):
    approvals.note_request(here, order)
    by = ("--by", "A. Meier", "--yes")
    code, _, err = run("refuse", here.folder, "chest-1", *by)
    assert code == 2 and "--reason" in err
    told = json.loads(run("refuse", here.folder, "chest-1", *by, "--reason", "not covered", "--json")[1])
    assert (told["state"], told["by"], told["reason"]) == ("refused", "A. Meier", "not covered")
    assert run("approve", here.folder, "chest-1", *by)[0] == 0
    code, out, _ = run("revoke", here.folder, "chest-1", *by)
    assert code == 0 and "Nothing more of it leaves" in out and approvals.state(here, "chest-1") == "revoked"
    decided = [record["decision"] for record in log.read(here.folder) if record["event"] == "approval"]
    assert decided == ["refused", "approved", "revoked"]


def test_a_run_that_is_none_or_two_is_not_guessed(here, order, run):
    import dataclasses

    for run_id in ("chest-1", "chest-2", "chest-3"):
        approvals.note_request(here, dataclasses.replace(order, run_id=run_id))
    assert "Several runs" in run("show", here.folder, "che")[2]
    assert "No run 'x'" in run("show", here.folder, "x")[2]
    assert run("show", here.folder, "chest-1")[0] == 0


@pytest.mark.parametrize("words", [("--by", ""), ("--by", "\x1b[2J")])
def test_a_decision_has_a_name(here, order, run, words):
    approvals.note_request(here, order)
    code, _, err = run("approve", here.folder, "chest-1", "--yes", *words)
    assert code == 2 and "name" in err and approvals.state(here, "chest-1") == "pending"


def test_an_order_that_ran_out_cannot_be_approved(here, order, run):
    import dataclasses

    approvals.note_request(here, dataclasses.replace(order, valid_until="2021-01-01T00:00:00+00:00"))
    code, _, err = run("approve", here.folder, "chest-1", "--by", "A. Meier", "--yes")
    assert code == 2 and "no longer valid" in err and approvals.state(here, "chest-1") == "expired"


def test_budget_raise_is_a_dry_run_first(here, run):
    assert "epsilon 8, delta 0.0001" in run("budget", "show", here.folder)[1]
    words = ("budget", "raise", here.folder, "--epsilon", "12")
    code, out, _ = run(*words)
    assert code == 0 and "would be raised from epsilon 8" in out and "Nothing was changed" in out
    assert site.load(here.folder).policy.max_epsilon == 8.0
    told = json.loads(run(*words, "--by", "A. Meier", "--why", "vote", "--yes", "--json")[1])
    assert told["done"] and told["after"]["epsilon"] == 12.0
    assert site.load(here.folder).policy.max_epsilon == 12.0
    assert run("budget", "raise", here.folder, "--epsilon", "11")[0] == 2


def test_budget_raise_waits_for_the_second_person(here, run):
    path = here.folder / site.FILE
    path.write_text(path.read_text() + 'two_people = ["budget"]\n')
    words = ("budget", "raise", here.folder, "--epsilon", "12", "--why", "vote", "--yes", "--by")
    assert "A second person must ask" in run(*words, "A. Meier")[1]
    assert site.load(here.folder).policy.max_epsilon == 8.0
    assert "by A. Meier and B. Schmidt" in run(*words, "B. Schmidt")[1]
    assert site.load(here.folder).policy.max_epsilon == 12.0


@pytest.mark.parametrize("command", ["runs", "show", "approve", "refuse", "revoke", "budget"])
def test_help_teaches(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and len(out) > 400
