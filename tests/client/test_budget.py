"""What is left is published as the ledger has it; a raise is in log, ledger and site.toml, and survives a stop."""

import dataclasses
import json
import shutil
import tomllib

import pytest

from fedscan_client import budget, site
from fedscan_client.audit import log
from fedscan_client.dp import ledger, ledger_file
from fedscan_core import accounting, files, policy
from fedscan_core.errors import ConfigError, FolderError

WORDS = {"by": "A. Meier", "why": "second study"}


def write(here, text):
    (here.folder / site.FILE).write_text(text)
    return site.load(here.folder)


@pytest.fixture
def here(make_site, make_run, tmp_path):
    """A site of (8, 1e-4) that has admitted a run of epsilon 3, with comments in its site.toml."""
    here = make_site(tmp_path / "north", rows=[], max_epsilon=8.0, max_delta=1e-4)
    ledger.open_ledger(here.book, budget.lifetime(here), 20)
    plan = dataclasses.replace(accounting.plan_for(make_run(), 20), epsilon=3.0, delta=1e-5)
    ledger.admit(here.book, "demo", plan, "c")
    text = (here.folder / site.FILE).read_text().replace("max_epsilon = 8.0", "max_epsilon = 8.0   # voted 2026-01")
    return write(here, "# our site\n" + text)


def raised(here, epsilon=12.0, delta=None, **words):
    return budget.raise_(here, epsilon, delta, **{**WORDS, **words})


def test_what_is_published_is_what_the_ledger_has_left(make_site, here, tmp_path):
    assert budget.remaining(here) == pytest.approx((5.0, 9e-5))
    told = json.loads(json.dumps(budget.public_policy(here)))
    assert policy.from_public(told)[0].max_epsilon == 5.0 and told["site"] == "north" and told["max_epsilon"] == 8.0
    assert budget.remaining(make_site(tmp_path / "new", max_epsilon=2.0)) == (2.0, 1e-3)  # no run was admitted yet


def test_a_raise_is_in_the_log_the_ledger_and_the_file(here):
    done = raised(here)
    assert (done.before.epsilon, done.after.epsilon, done.by) == (8.0, 12.0, "A. Meier")
    text = (here.folder / site.FILE).read_text()
    assert "# our site" in text and "max_epsilon = 12.0   # voted 2026-01" in text
    now = site.load(here.folder)
    assert now.policy == dataclasses.replace(here.policy, max_epsilon=12.0)
    ledger.open_ledger(now.book, budget.lifetime(now), 20)
    assert budget.remaining(now)[0] == 9.0
    (record,) = [record for record in log.read(here.folder) if record["event"] == "budget"]
    assert (record["epsilon"], record["by"], record["why"]) == (12.0, "A. Meier", "second study")


def test_two_people_raise_where_the_site_says_so(here):
    both = write(here, (here.folder / site.FILE).read_text() + 'two_people = ["budget"]\n')
    for by in ("A. Meier", "a. meier"):
        assert raised(both, by=by).by == ""
        assert site.load(here.folder) == both and ledger.summary(here.book)["budget"]["epsilon"] == 8.0
    assert raised(both, epsilon=13.0, by="B. Schmidt").by == ""  # not the same
    assert raised(both, by="B. Schmidt", why="yes").by == "A. Meier and B. Schmidt"
    assert ledger.summary(here.book)["raised"][0]["by"] == "A. Meier and B. Schmidt"
    assert site.load(here.folder).policy.max_epsilon == 12.0
    done = [record for record in log.read(here.folder) if record.get("step") == "raised"]
    assert [record["why"] for record in done] == ["second study; yes"]


@pytest.mark.parametrize("people", [1, 2])
def test_a_raise_that_was_stopped_before_site_toml_is_ended_by_the_same_command(here, monkeypatch, people):
    if people == 2:
        here = write(here, (here.folder / site.FILE).read_text() + 'two_people = ["budget"]\n')
        assert raised(here, by="B. Schmidt").by == ""
    with monkeypatch.context() as patch:
        patch.setattr(budget, "files", None)  # stopped at the file
        with pytest.raises(AttributeError):
            raised(here)
    assert site.load(here.folder).policy.max_epsilon == 8.0 and ledger.summary(here.book)["budget"]["epsilon"] == 12.0
    assert raised(here).after.epsilon == 12.0
    now = site.load(here.folder)
    ledger.open_ledger(now.book, budget.lifetime(now), 20)
    assert len(ledger.summary(here.book)["raised"]) == 1


def test_a_person_who_edits_the_file_first_still_needs_the_command(here):
    edited = write(here, (here.folder / site.FILE).read_text().replace("max_epsilon = 8.0", "max_epsilon = 12.0"))
    with pytest.raises(Exception, match="fedscan agent budget raise"):
        ledger.open_ledger(edited.book, budget.lifetime(edited), 20)
    assert raised(edited).by == "A. Meier"
    ledger.open_ledger(edited.book, budget.lifetime(edited), 20)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"epsilon": 7.0}, "only ever raised"),
        ({"epsilon": 8.0}, "only ever raised"),
        ({"epsilon": None}, "only ever raised"),
        ({"delta": 1e-6}, "only ever raised"),
        ({"epsilon": float("inf")}, "lifetime budget"),
        ({"epsilon": float("nan")}, "lifetime budget"),
        ({"by": " "}, "name"),
        ({"why": " "}, "reason"),
    ],
)
def test_a_raise_that_is_none_changes_nothing(here, wish, words):
    before = (here.folder / site.FILE).read_text()
    with pytest.raises(ConfigError, match=words):
        raised(here, **wish)
    assert (here.folder / site.FILE).read_text() == before and not log.read(here.folder)
    assert ledger.summary(here.book)["rows"] == 2


def test_a_file_that_a_program_cannot_change_safely_is_left_to_a_person(here):
    text = (here.folder / site.FILE).read_text().replace("max_epsilon =", '"max_epsilon" =')
    odd = write(here, text)
    with pytest.raises(ConfigError, match="no program should change it"):
        raised(odd)
    assert (here.folder / site.FILE).read_text() == text and ledger.summary(here.book)["rows"] == 2
    for start, end in (("[policy]", "[ policy ]"), ("max_delta = 0.0001", "max_delta = 1e-4")):
        changed = (here.folder / site.FILE).read_text().replace('"max_epsilon"', "max_epsilon").replace(start, end)
        write(here, changed)
        try:
            now = tomllib.loads(site.with_policy(here.folder, {"max_epsilon": 12.0, "max_delta": 1e-4}))
            assert now["policy"]["max_epsilon"] == 12.0 and "source" in now
        except ConfigError as error:
            assert "max_epsilon = 12.0" in error.remedy


def test_a_site_without_a_ledger_raises_in_its_file_only(make_site, tmp_path):
    here = make_site(tmp_path / "new", max_epsilon=2.0)
    assert raised(here).by == "A. Meier" and not here.ledger.exists()
    assert site.load(here.folder).policy.max_epsilon == 12.0


def test_nothing_is_raised_under_an_agent_at_work(here, monkeypatch):
    def taken(*args, **kwargs):
        raise FolderError("Another agent works with it.", remedy="Stop it first.")

    monkeypatch.setattr(ledger_file, "writing", taken)
    before = (here.folder / site.FILE).read_text()
    with pytest.raises(FolderError):
        raised(here)
    assert (here.folder / site.FILE).read_text() == before


def test_the_policy_is_logged_once_for_each_change(here, monkeypatch):
    for _ in range(3):
        budget.note_policy(here)
    other = here.model_copy(update={"policy": dataclasses.replace(here.policy, max_rounds=5)})
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", lambda *args: 1 / 0)  # stopped after the log
        with pytest.raises(ZeroDivisionError):
            budget.note_policy(other)
    budget.note_policy(other)  # rather twice than never
    logged = [record["policy"]["max_rounds"] for record in log.read(here.folder) if record["event"] == "policy"]
    assert logged == [None, 5, 5]


@pytest.mark.slow
def test_a_raise_killed_at_any_write_is_ended_by_the_same_command(here, at_every_write, tmp_path):
    """And at no moment does site.toml allow what the ledger does not hold, or the ledger what the log does not."""
    kept = tmp_path / "kept"
    shutil.copytree(here.folder, kept)
    moments = 0
    for _ in at_every_write(lambda: raised(here)):
        moments += 1
        held = ledger.summary(here.book)["budget"]["epsilon"]
        logged = [record for record in log.read(here.folder) if record["event"] == "budget"]
        assert site.load(here.folder).policy.max_epsilon <= held and (held == 8.0 or logged)
        now = site.load(here.folder)
        if now.policy.max_epsilon < 12.0:
            assert raised(now).after.epsilon == 12.0
        now = site.load(here.folder)
        ledger.open_ledger(now.book, budget.lifetime(now), 20)
        assert len(ledger.summary(now.book)["raised"]) == 1 and budget.remaining(now)[0] == 9.0
        shutil.rmtree(here.folder)
        shutil.copytree(kept, here.folder)
    assert moments > 8
