"""A budget that is raised, and a yearly limit inside it: neither lets out more than the newest budget."""

import dataclasses
import itertools
import os
import tempfile
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.dp import ledger_file, ledger_gate
from fedscan_client.dp.ledger import (
    Budget,
    admit,
    constants,
    one_more,
    open_ledger,
    over,
    raise_budget,
    remaining,
    summary,
)
from fedscan_client.dp.ledger_file import Book
from fedscan_core import accounting, rdp
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import BudgetError, ConfigError, RecordDamaged

_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # for a test that writes very often
PLAN = SitePlan(100, 1e-5, 2.0, 0.1, 1.5, 30, 4.0)


def plan(epsilon=2.0, **changes):
    return dataclasses.replace(PLAN, epsilon=epsilon, **changes)


def new_book(folder):
    return Book(folder / "ledger.sqlite", folder / "ledger.counter")


def rows(book):
    with ledger_file.reading(book) as db:
        return ledger_file.find(db, "1 ORDER BY seq")


@pytest.fixture
def book(tmp_path):
    """A ledger of (3, 1e-4) with one admitted run of epsilon 2."""
    book = new_book(tmp_path)
    open_ledger(book, Budget(3.0, 1e-4), 640)
    admit(book, "a", PLAN, "c")
    return book


def test_a_raised_budget_is_the_budget_and_is_raised_once(book):
    with pytest.raises(BudgetError, match="of 3, 1 is left"):
        admit(book, "b", plan(), "c")
    for _ in range(2):  # a command that was stopped half way is given again
        raise_budget(book, Budget(5.0, 1e-4), "A. Meier and B. Schmidt")
    assert [row["state"] for row in rows(book)] == ["opened", "admitted", "raised"]
    told = summary(book)
    assert told["budget"] == {"epsilon": 5.0, "delta": 1e-4} and told["reserved"]["epsilon"] == 2.0
    assert [(up["epsilon"], up["by"]) for up in told["raised"]] == [(5.0, "A. Meier and B. Schmidt")]
    open_ledger(book, Budget(5.0, 1e-4), 640)
    with pytest.raises(RecordDamaged, match=r"epsilon 5\.0, not 3\.0"):
        open_ledger(book, Budget(3.0, 1e-4), 640)  # site.toml and ledger must say the same
    admit(book, "b", plan(3.0), "c")
    with pytest.raises(BudgetError, match="of 5, 0 is left"):
        admit(book, "c", plan(0.1), "c")


@pytest.mark.parametrize("wish", [Budget(2.9, 1e-4), Budget(5.0, 9e-5), Budget(2.9, 1e-3), Budget(float("inf"), 1e-4)])
def test_a_budget_is_only_raised(book, wish):
    with pytest.raises(ConfigError):
        raise_budget(book, wish, "A. Meier")
    assert summary(book)["budget"] == {"epsilon": 3.0, "delta": 1e-4} and len(rows(book)) == 2


def test_no_budget_is_raised_before_there_is_a_ledger_or_in_a_changed_one(tmp_path, book):
    with pytest.raises(RecordDamaged):
        raise_budget(new_book(tmp_path / "none"), Budget(5.0, 1e-4), "A. Meier")
    book.ledger.write_bytes(book.ledger.read_bytes().replace(b'"epsilon":"3.0"', b'"epsilon":"9.0"'))
    with pytest.raises(RecordDamaged):
        raise_budget(book, Budget(10.0, 1e-4), "A. Meier")


def test_under_rdp_the_order_stays_that_of_the_opening(tmp_path):
    book = new_book(tmp_path)
    open_ledger(book, Budget(3.0, 1e-5), 640, "rdp")
    order = rows(book)[0]["order"]
    assert order != rdp.filter_order(8.0, 1e-5)  # else this shows nothing
    raise_budget(book, Budget(8.0, 1e-5), "A. Meier")
    assert summary(book)["order"] == order
    count = 0
    while over(book, f"r{count}", PLAN, {}) is None:
        admit(book, f"r{count}", PLAN, "c")
        count += 1
    spent = rdp.add(*[accounting.renyi(PLAN.events(), (order,))] * count)[0]
    assert 0 < spent <= rdp.allowance(8.0, 1e-5, order) < spent + accounting.renyi(PLAN.events(), (order,))[0]


_STEP = st.one_of(st.tuples(st.just("run"), st.floats(0.01, 3)), st.tuples(st.just("raise"), st.floats(0, 9)))


@settings(max_examples=12)
@given(st.lists(_STEP, max_size=8))
def test_admitted_plans_never_exceed_the_newest_budget(steps):
    """Against a plain reference: exact sums of what was admitted, and the largest budget that was asked for."""
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        book = new_book(Path(folder))
        open_ledger(book, Budget(1.0, 1e-3), 640)
        budget, spent, number = 1.0, Fraction(0), itertools.count()
        for what, value in steps:
            if what == "raise":
                if value >= budget:
                    raise_budget(book, Budget(value, 1e-3), "A. Meier")
                    budget = value
                else:
                    with pytest.raises(ConfigError):
                        raise_budget(book, Budget(value, 1e-3), "A. Meier")
                continue
            fits = spent + Fraction(repr(value)) <= Fraction(repr(budget))
            run_id = f"r{next(number)}"
            assert (over(book, run_id, plan(value), {}) is None) == fits
            try:
                admit(book, run_id, plan(value), "c")
                spent += Fraction(repr(value))
                assert fits
            except BudgetError:
                assert not fits
        assert spent <= Fraction(repr(budget)) and summary(book)["budget"]["epsilon"] == budget
        assert remaining(book, {})[0] == pytest.approx(float(Fraction(repr(budget)) - spent))


@pytest.mark.parametrize("gate", ["sum", "rdp"])
def test_a_yearly_limit_only_refuses_more(tmp_path, monkeypatch, gate):
    book, opened = new_book(tmp_path), constants(Budget(20.0, 1e-3), 640, gate)
    assert remaining(book, opened, 3.0)[0] == 3.0 and over(book, "a", plan(), opened, 1.9)
    assert gate == "sum" or one_more(book, plan(), opened, 1.9)["fits"] is False  # "sum" looks for noise for seconds
    open_ledger(book, Budget(20.0, 1e-3), 640, gate)
    admit(book, "a", plan(2.0), "c", 3.0)
    with pytest.raises(BudgetError, match="of the 3 that this site gives within 365 days, 1 is left"):
        admit(book, "b", plan(1.5), "c", 3.0)
    assert remaining(book, {}, 3.0)[0] == pytest.approx(1.0)
    admit(book, "a", plan(2.0), "c", 0.5)  # admitted before: a limit that comes later does not break a run
    admit(book, "b", plan(1.0), "c", 3.0)
    assert over(book, "c", plan(0.1), {}, 3.0) and over(book, "c", plan(0.1), {}) is None
    assert over(book, "c", plan(0.1), {}, float("nan"))  # a limit that is no number lets nothing through

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(UTC) + timedelta(days=366)

    monkeypatch.setattr(ledger_gate, "datetime", Later)
    assert over(book, "c", plan(2.5), {}, 3.0) is None  # a year later there is room again
    assert summary(book)["reserved"]["epsilon"] == 3.0 or gate == "rdp"  # and nothing of the lifetime budget came back


def test_the_lifetime_budget_holds_inside_the_yearly_limit(book):
    with pytest.raises(BudgetError, match="of 3, 1 is left"):
        admit(book, "b", plan(1.5), "c", 100.0)
    assert remaining(book, {}, 100.0)[0] == pytest.approx(1.0)
