"""The ledger never spends more than it was opened with, and gives one answer per question."""

import dataclasses
import math
import multiprocessing
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.dp import ledger_file
from fedscan_client.dp.ledger import (
    Budget,
    Release,
    admit,
    answer_of,
    constants,
    one_more,
    open_ledger,
    reserve,
    settle,
    summary,
)
from fedscan_client.dp.ledger_file import Book
from fedscan_core import accounting, rdp
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import BudgetError, ConfigError, RecordDamaged

PLAN = SitePlan(100, 1e-5, 2.0, 0.1, 1.5, 30, 4.0)
CONFIG: dict[str, Any] = {"config_sha": "c" * 64}
STEP = Release("poisson_gauss", 0.1, 1.5, 1.0, 10.0, 1)
QUERY = Release("gaussian", 1.0, 4.0, 1.0, 1.0, 0)
ASKED: dict[str, Any] = {"plan": PLAN, **CONFIG, "input_sha": "i" * 64, "release": STEP}


def plan(epsilon=2.0, delta=1e-5, **changes):
    return dataclasses.replace(PLAN, epsilon=epsilon, delta=delta, **changes)


def new_book(folder: Path) -> Book:
    return Book(folder / "ledger.sqlite", folder / "ledger.counter")


def rows(book: Book) -> list[dict[str, Any]]:
    with ledger_file.reading(book) as db:
        return ledger_file.find(db, "1 ORDER BY seq")


def states(book: Book) -> list[str]:
    return [row["state"] for row in rows(book)]


@pytest.fixture
def book(tmp_path):
    """A ledger of (8, 1e-4) with one admitted run, "a"."""
    book = new_book(tmp_path)
    open_ledger(book, Budget(8.0, 1e-4), 640)
    admit(book, "a", PLAN, **CONFIG)
    return book


# ------------------------------------------------------------------------------------------- one answer per question


def test_one_answer_per_question(book):
    assert reserve(book, "a", 1, **ASKED) == "new" and answer_of(book, "a", 1) is None
    settle(book, "a", 1, "o" * 64)
    for _ in range(2):
        assert reserve(book, "a", 1, **ASKED) == "answered" and answer_of(book, "a", 1) == "o" * 64
    with pytest.raises(RecordDamaged, match="another model"):
        reserve(book, "a", 1, **{**ASKED, "input_sha": "j" * 64})
    assert reserve(book, "a", 2, **{**ASKED, "input_sha": "j" * 64}) == "new"
    assert states(book) == ["opened", "admitted", "reserved", "settled", "reserved"]


def test_a_crash_between_reservation_and_answer_burns_the_round(book):
    assert reserve(book, "a", 1, **ASKED) == "new"
    for _ in range(2):
        assert reserve(book, "a", 1, **ASKED) == "burned"
    with pytest.raises(RecordDamaged):  # and another question is no way round it
        reserve(book, "a", 1, **{**ASKED, "input_sha": "j" * 64})
    assert reserve(book, "a", 2, **ASKED) == "new"


def test_rounds_of_two_runs_are_two_things(book):
    admit(book, "b", PLAN, **CONFIG)
    assert reserve(book, "a", 1, **ASKED) == "new"
    settle(book, "a", 1, "o" * 64)
    assert reserve(book, "b", 1, **ASKED) == "new"
    assert reserve(book, "b", 1, **ASKED) == "burned"


def test_only_what_was_reserved_is_settled_and_once(book):
    with pytest.raises(RecordDamaged, match="not waiting"):
        settle(book, "a", 1, "o" * 64)
    reserve(book, "a", 1, **ASKED)
    settle(book, "a", 1, "o" * 64)
    with pytest.raises(RecordDamaged, match="not waiting"):
        settle(book, "a", 1, "p" * 64)
    assert states(book)[2:] == ["reserved", "settled"]


@pytest.mark.parametrize(
    ("run_id", "changed"),
    [
        ("b", {}),
        ("a", {"config_sha": "d" * 64}),  # more steps in a round than the plan pays for
        ("a", {"plan": plan(noise_multiplier=0.5)}),  # less noise than was paid for
        ("a", {"plan": plan(patients_declared=1000, sampling_rate=0.01)}),
    ],
    ids=["no plan", "configuration", "noise", "declared size"],
)
def test_a_reservation_needs_the_sealed_plan_and_configuration(book, run_id, changed):
    with pytest.raises(RecordDamaged, match="not admitted"):
        reserve(book, run_id, 1, **{**ASKED, **changed})
    assert states(book) == ["opened", "admitted"]


@pytest.mark.parametrize(
    "release",
    [
        dataclasses.replace(STEP, noise_multiplier=1.4),
        dataclasses.replace(STEP, sampling_rate=0.2),
        dataclasses.replace(STEP, steps=31),
        dataclasses.replace(STEP, steps=0),
        dataclasses.replace(STEP, steps=-1),
        dataclasses.replace(QUERY, noise_multiplier=1.5),
        dataclasses.replace(QUERY, steps=1),
    ],
    ids=lambda r: f"{r.mechanism} {r.noise_multiplier} {r.sampling_rate} {r.steps}",
)
def test_a_release_that_the_plan_does_not_pay_for_is_not_reserved(book, release):
    with pytest.raises(RecordDamaged, match="does not pay"):
        reserve(book, "a", 1, **{**ASKED, "release": release})
    assert states(book) == ["opened", "admitted"]


def test_the_one_query_that_a_plan_pays_for_is_reserved_once(book):
    assert reserve(book, "a", 0, **{**ASKED, "release": QUERY}) == "new"
    with pytest.raises(RecordDamaged, match="does not pay"):
        reserve(book, "a", 1, **{**ASKED, "release": QUERY})
    assert reserve(book, "a", 1, **ASKED) == "new"


@given(wishes=st.lists(st.integers(0, 14), min_size=1, max_size=12))
@settings(max_examples=12, deadline=None)
def test_steps_and_queries_in_all_never_pass_the_sealed_plan(wishes):
    """Whatever rounds ask for: 0 = a query, else that many steps."""
    with tempfile.TemporaryDirectory() as folder:
        book, steps, queries = new_book(Path(folder)), 0, 0
        open_ledger(book, Budget(8.0, 1e-4), 640)
        admit(book, "a", PLAN, **CONFIG)
        for round_, wish in enumerate(wishes):
            release = dataclasses.replace(STEP, steps=wish) if wish else QUERY
            fits = steps + wish <= 30 and queries + (not wish) <= 1
            try:
                assert reserve(book, "a", round_, **{**ASKED, "release": release}) == "new" and fits
                steps, queries = steps + wish, queries + (not wish)
            except RecordDamaged:
                assert not fits
        reserved = [row for row in rows(book) if row["state"] == "reserved"]
        assert sum(row["steps_reserved"] for row in reserved) == steps <= 30
        assert sum(row["mechanism"] == "gaussian" for row in reserved) == queries <= 1


def test_a_row_says_what_was_done_to_the_last_bit(book):
    reserve(book, "a", 1, **ASKED)
    reserve(book, "a", 0, **{**ASKED, "release": QUERY})
    opened, admitted, step, query = rows(book)
    assert len(opened["ledger_id"]) == 16 and opened["patients_declared"] == 640 and opened["gate"] == "sum"
    assert (admitted["epsilon"], admitted["delta"], admitted["plan"]) == ("2.0", "1e-05", dataclasses.asdict(PLAN))
    assert admitted["orders"] == list(rdp.ORDERS) and admitted["accountant"]["version"]
    assert tuple(map(float, admitted["rdp"])) == accounting.renyi(PLAN.events())
    assert step["q"] == {"decimal": "0.1", "hex": (0.1).hex()} and float.fromhex(step["sigma"]["hex"]) == 1.5
    for row in (admitted, step, query):
        assert (row["unit"], row["adjacency"], row["run_id"]) == ("patient", "add_or_remove_one", "a")
        assert row["utc"].endswith("+00:00") and len(row["prev_hash"]) == 64
    assert (step["plan"], step["input"], step["steps_reserved"], step["steps_so_far"]) == (2, "i" * 64, 1, 1)
    assert (query["mechanism"], query["queries_so_far"], query["round"], query["steps_so_far"]) == ("gaussian", 1, 0, 1)


# --------------------------------------------------------------------------------------------------------- the budget


def test_a_plan_is_charged_once_and_never_exchanged(book):
    admit(book, "a", PLAN, **CONFIG)
    assert len(rows(book)) == 2
    for other, sha in ((plan(epsilon=1.0), "c" * 64), (plan(noise_multiplier=0.5), "c" * 64), (PLAN, "d" * 64)):
        with pytest.raises(BudgetError, match="another plan"):
            admit(book, "a", other, sha)
    assert len(rows(book)) == 2


def test_over_budget_is_refused_in_public_words(book):
    admit(book, "b", plan(epsilon=5.0), **CONFIG)
    with pytest.raises(BudgetError, match="of 8, 1 is left") as caught:
        admit(book, "c", plan(epsilon=1.01), **CONFIG)
    assert str(book.ledger.parent) not in str(caught.value) and caught.value.remedy
    admit(book, "c", plan(epsilon=1.0), **CONFIG)
    with pytest.raises(BudgetError):
        admit(book, "d", plan(epsilon=1e-3), **CONFIG)


def test_decimals_add_up_as_people_add_them(tmp_path):
    """Three times 0.1 fills 0.3, which floats deny; and not the smallest part more fits."""
    book = new_book(tmp_path)
    open_ledger(book, Budget(0.3, 1e-4), 640)
    for name in "abc":
        admit(book, name, plan(epsilon=0.1), **CONFIG)
    with pytest.raises(BudgetError):
        admit(book, "d", plan(epsilon=5e-324, delta=1e-9), **CONFIG)
    assert summary(book)["reserved"] == {"epsilon": 0.3, "delta": 3e-5, "share": 1.0}


def test_delta_is_a_budget_too(book):
    admit(book, "b", plan(epsilon=0.1, delta=9e-5), **CONFIG)
    with pytest.raises(BudgetError, match="delta"):
        admit(book, "c", plan(epsilon=0.1, delta=1e-6), **CONFIG)


@pytest.mark.parametrize("gate", ["sum", "rdp"])
@pytest.mark.parametrize(
    "bad", [{"epsilon": math.inf}, {"epsilon": math.nan}, {"delta": math.nan}, {"epsilon": -1.0}, {"delta": -1e-6}]
)
def test_a_price_that_is_no_number_is_refused(tmp_path, gate, bad):
    book = new_book(tmp_path)
    open_ledger(book, Budget(8.0, 1e-4), 640, gate)
    if gate == "rdp" and bad == {"epsilon": math.inf}:
        bad = {"noise_multiplier": 0.0}
    with pytest.raises(BudgetError):
        admit(book, "b", plan(**bad), **CONFIG)
    assert states(book) == ["opened"]


WISHES = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.floats(0.001, 6), st.floats(1e-9, 6e-5)), min_size=1, max_size=12
)


@given(wishes=WISHES)
@settings(max_examples=30, deadline=None)
def test_the_sum_over_all_plans_ever_admitted_stays_within_the_budget(wishes):
    with tempfile.TemporaryDirectory() as folder:
        book, spent, delta_spent, seen = new_book(Path(folder)), Fraction(0), Fraction(0), set()
        for name, epsilon, delta in wishes:
            open_ledger(book, Budget(8.0, 1e-4), 640)
            more, delta_more = spent + Fraction(repr(epsilon)), delta_spent + Fraction(repr(delta))
            fits = more <= 8 and delta_more <= Fraction("1e-4")
            try:
                admit(book, name, plan(epsilon, delta), **CONFIG)
            except BudgetError:
                assert name in seen or not fits  # refused only with cause
                continue
            if name not in seen:  # a second call is free only for the same plan
                assert fits
                spent, delta_spent = more, delta_more
                seen.add(name)
        assert summary(book)["reserved"]["epsilon"] == float(spent)
        assert summary(book)["reserved"]["delta"] == float(delta_spent)


@given(runs=st.lists(st.tuples(st.sampled_from([0.02, 0.1, 1.0]), st.floats(0.8, 20), st.integers(1, 80)), max_size=8))
@settings(max_examples=15, deadline=None)
def test_the_filter_admits_while_the_curve_at_its_order_has_room(runs):
    """And all that it ever admits, priced together as if it had been one sealed plan, is within the budget."""
    with tempfile.TemporaryDirectory() as folder:
        book, admitted = new_book(Path(folder)), list[accounting.Event]()
        open_ledger(book, Budget(8.0, 1e-5), 640, "rdp")
        order, allowed = rdp.filter_order(8.0, 1e-5), rdp.allowance(8.0, 1e-5, rdp.filter_order(8.0, 1e-5))
        total = 0.0
        for number, (q, sigma, steps) in enumerate(runs):
            wish = plan(sampling_rate=q, noise_multiplier=sigma, steps=steps, evaluation_noise=0.0)
            cost = steps * rdp.sampled_gaussian(q, sigma, (order,))[0]
            try:
                admit(book, f"r{number}", wish, **CONFIG)
            except BudgetError:
                assert total + cost > allowed * (1 - 1e-9)
                continue
            total += cost
            admitted += wish.events()
        assert total <= allowed and accounting.epsilon(admitted, 1e-5) <= 8.0
        told = summary(book)["reserved"]
        assert told["epsilon"] <= 8.0 and total <= told["rdp"] <= total * (1 + 1e-8) and told["share"] <= 1


def test_the_filter_leaves_room_for_more_runs_than_the_sum(tmp_path):
    small = plan(0.0, noise_multiplier=20.0, sampling_rate=1.0, evaluation_noise=0.0, steps=10)
    small = dataclasses.replace(small, epsilon=accounting.epsilon(small.events(), 1e-5))
    counts = {}
    for gate in ("sum", "rdp"):
        book = new_book(tmp_path / gate)
        open_ledger(book, Budget(8.0, 1.0e-4), 640, gate)
        with pytest.raises(BudgetError) as caught:
            for number in range(200):
                admit(book, f"r{number}", small, **CONFIG)
        counts[gate] = len(rows(book)) - 1
        assert "is left" in str(caught.value)
    assert counts["sum"] == 10 and counts["rdp"] > 100


@pytest.mark.parametrize("gate", ["sum", "rdp"])
def test_one_more_run_says_with_which_noise_it_would_fit(tmp_path, gate):
    book = new_book(tmp_path)
    blank = constants(Budget(8.0, 1e-4), 640, gate)
    wish = plan(0.0, noise_multiplier=1.0, sampling_rate=1.0, steps=10, evaluation_noise=8.0)
    wish = dataclasses.replace(wish, epsilon=accounting.epsilon(wish.events(), 1e-5))
    before = one_more(book, wish, blank)
    open_ledger(book, Budget(8.0, 1e-4), 640, gate)
    told = one_more(book, wish, blank)
    assert told == before and not told["fits"] and told["share"] > 1 and "is left" in told["reason"]
    noise = told["noise_that_fits"]
    for factor, fits in ((1.0, True), (0.995, False)):
        tried = dataclasses.replace(wish, noise_multiplier=noise * factor)
        tried = dataclasses.replace(tried, epsilon=accounting.epsilon(tried.events(), 1e-5))
        assert one_more(book, tried, blank)["fits"] == fits
    assert states(book) == ["opened"]


# --------------------------------------------------------------------------------------------- what was fixed at first


@pytest.mark.parametrize(
    ("constants_", "word"),
    [
        ((Budget(9.0, 1e-4), 640), "epsilon 8.0, not 9.0"),
        ((Budget(7.0, 1e-4), 640), "epsilon"),
        ((Budget(8.0, 2e-4), 640), "delta"),
        ((Budget(8.0, 1e-4), 641), "declared size of 640, not 641"),
        ((Budget(8.0, 1e-4), 640, "rdp"), "gate sum, not rdp"),
    ],
)
def test_what_a_ledger_was_opened_with_never_changes(book, constants_, word):
    before = rows(book)
    with pytest.raises(RecordDamaged, match=word):
        open_ledger(book, *constants_)
    open_ledger(book, Budget(8.0, 1e-4), 640)
    assert rows(book) == before


@pytest.mark.parametrize("bad", [(math.inf, 1e-5), (math.nan, 1e-5), (-1.0, 1e-5), (8.0, math.nan), (8.0, 1.0)])
def test_a_budget_that_is_none_opens_no_ledger(tmp_path, bad):
    with pytest.raises(ConfigError, match="lifetime budget"):
        open_ledger(new_book(tmp_path), Budget(*bad), 640)
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_ledger_of_the_first_version_is_not_forgotten(tmp_path):
    (tmp_path / "ledger.jsonl").write_text("{}\n")
    with pytest.raises(RecordDamaged, match="earlier version") as caught:
        open_ledger(new_book(tmp_path), Budget(8.0, 1e-4), 640)
    assert "Subtract" in caught.value.remedy and not (tmp_path / "ledger.sqlite").exists()


def _try_to_admit(folder, number):
    try:
        admit(new_book(Path(folder)), f"run-{number}", plan(epsilon=3.0), **CONFIG)
        return 1
    except BudgetError:
        return 0


def test_two_processes_cannot_spend_the_same_budget(tmp_path):
    book = new_book(tmp_path)
    open_ledger(book, Budget(8.0, 1e-3), 640)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        admitted = pool.starmap(_try_to_admit, [(str(tmp_path), n) for n in range(8)])
    assert sum(admitted) == 2 and summary(book)["reserved"]["epsilon"] == 6.0


def test_summary_tells_each_round(book):
    admit(book, "b", plan(epsilon=1.0), **CONFIG)
    reserve(book, "a", 1, **ASKED)
    settle(book, "a", 1, "o" * 64)
    reserve(book, "a", 2, **ASKED)
    told = summary(book)
    assert told["budget"] == {"epsilon": 8.0, "delta": 1e-4} and told["rows"] == 6 and told["gate"] == "sum"
    assert told["reserved"] == {"epsilon": 3.0, "delta": 2e-5, "share": 0.375}
    assert {n: row["state"] for n, row in told["runs"]["a"]["rounds"].items()} == {1: "settled", 2: "reserved"}
    assert told["runs"]["a"]["epsilon"] == 2.0 and told["runs"]["b"]["rounds"] == {}
