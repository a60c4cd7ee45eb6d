"""Guardians, coming of age, and withdrawals that outlive registers."""

from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.consent import Decision, NoPermit, Settings, until, withdrawals
from fedscan_client.consent.register import birthday
from fedscan_core.errors import ConsentError

from .conftest import bundle, name_of, r5_consent

HEAD = "# as-of: 2026-01-10\npatient_id,status,date,by_guardian,birth_date,until\n"
A = name_of("A")


def chosen(**changes) -> Settings:
    return Settings(kind="register", path=Path("list.csv"), **changes)


@pytest.mark.parametrize(
    ("row", "reason", "end"),
    [
        ("A,permit,2025-01-01,no,,", "permit", None),
        ("A,permit,2025-01-01,,2000-01-01,", "permit", None),  # an adult's own
        ("A,permit,2025-01-01,yes,2010-05-07,", "permit", date(2028, 5, 6)),
        ("A,permit,2025-01-01,yes,2010-05-07,2027-01-01", "permit", date(2027, 1, 1)),
        ("A,permit,2025-01-01,yes,2008-01-15,", "guardian_ended", date(2026, 1, 14)),  # 18 today
        ("A,permit,2025-01-01,yes,2008-01-16,", "permit", date(2026, 1, 15)),  # 18 tomorrow
        ("A,permit,2025-01-01,yes,2025-06-01,", "guardian_birth", None),  # born after it
        ("A,permit,2025-01-01,perhaps,2010-05-07,", "not_understood", None),
        ("A,permit,2025-01-01,yes,7 May 2010,", "not_understood", None),
    ],
)
def test_a_guardians_permit_ends_when_the_patient_comes_of_age(load, row, reason, end):
    decision = load(f"{HEAD}{row}\n").decide(A)
    assert (decision.permit, decision.reason, decision.until) == (reason == "permit", reason, end)


def test_the_newest_permit_says_by_whom(load):
    own = "A,permit,2025-01-01,no,,\nA,permit,2020-01-01,yes,2006-01-01,\n"
    assert load(HEAD + own).decide(A).permit
    same_day = own.replace("2020-01-01", "2025-01-01")
    assert load(HEAD + same_day).decide(A).reason == "guardian_ended"


def test_a_birth_date_of_the_header_counts_where_the_register_has_none(load):
    decision = load(f"{HEAD}A,permit,2025-01-01,yes,,\n").decide(A)
    assert decision.permit and decision.until is None and decision.by_guardian
    assert until(decision, date(2010, 5, 7), chosen()) == date(2028, 5, 6)
    assert until(decision, date(2010, 5, 7), chosen(guardian_age=16)) == date(2026, 5, 6)
    for born in (None, date(2025, 1, 2)):
        with pytest.raises(NoPermit) as caught:
            until(decision, born, chosen())
        assert caught.value.reason == "guardian_birth"
    listed = Decision(True, "permit", "", date(2025, 1, 1), None, True, date(2012, 1, 1))
    assert until(listed, date(2020, 1, 1), chosen()) == date(2029, 12, 31)
    with pytest.raises(NoPermit):
        until(Decision(False, "denied", ""), None, chosen())


def test_the_29th_of_february():
    assert birthday(date(2008, 2, 29), 18) == date(2026, 2, 28)
    assert birthday(date(2008, 2, 29), 16) == date(2024, 2, 29)
    assert birthday(date(1900, 3, 1), 130) == date(2030, 3, 1)


@settings(max_examples=60)
@given(st.dates(date(1900, 1, 1), date(2025, 1, 1)), st.integers(0, 130))
def test_nobody_is_of_age_before_the_birthday(born, age):
    """Against counting years: completed on the birthday, not the day before; 29 February has the 28th."""

    def completed(day: date) -> int:
        anniversary = (2, 28) if (born.month, born.day) == (2, 29) else (born.month, born.day)
        years: int = day.year - born.year
        return years - 1 if (day.month, day.day) < anniversary else years

    day = birthday(born, age)
    leap = born.month == 2 and born.day == 29 and day.day == 29  # completed() counts from the 28th
    assert completed(day) == age and (leap or age == 0 or completed(day - timedelta(days=1)) == age - 1)


# --------------------------------------------------------------------------------------------------------- withdrawals


def test_a_withdrawal_outlives_every_older_register(load, tmp_path):
    old = f"{HEAD}A,permit,2025-01-01,,,\nB,permit,2025-01-01,,,\n"
    withdrawals.add(tmp_path, A, date(2026, 1, 12))
    assert load(old).decide(A).reason == "withdrawn_here"
    assert load(old).decide(name_of("B")).permit
    for day, permitted in (("2026-01-12", False), ("2026-01-13", True)):  # given later, strictly
        assert load(old.replace("A,permit,2025-01-01", f"A,permit,{day}")).decide(A).permit == permitted
    withdrawals.add(tmp_path, A, date(2026, 1, 14))
    withdrawals.add(tmp_path, A, date(2026, 1, 1))  # an older one, entered late
    assert not load(old.replace("A,permit,2025-01-01", "A,permit,2026-01-14")).decide(A).permit


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("# as-of: 2026-01-15\npatient_id\nA\n", "cleared-list"),
        ("# as-of: 2026-01-15\npatient_id\nB\n", "opt-out"),
    ],
)
def test_lists_without_dates_never_overrule_a_withdrawal(load, tmp_path, text, kind):
    assert load(text, kind=kind, legal_basis="law").decide(A).permit
    withdrawals.add(tmp_path, A, date(2020, 1, 1))
    assert load(text, kind=kind, legal_basis="law").decide(A).reason == "withdrawn_here"


def test_a_fhir_consent_given_later_overrules_it(load, tmp_path):
    withdrawals.add(tmp_path, name_of(), date(2024, 2, 23))
    assert load(bundle(r5_consent())).decide(name_of()).reason == "withdrawn_here"
    assert load(bundle(r5_consent(date="2024-02-24"))).decide(name_of()).permit


def test_a_changed_record_of_withdrawals_stops_everything(load, tmp_path):
    withdrawals.add(tmp_path, A, date(2026, 1, 12))
    withdrawals.add(tmp_path, name_of("B"), date(2026, 1, 12))
    assert [row["state"] for row in withdrawals.history(tmp_path, A)] == ["withdrawn"]
    path = tmp_path / withdrawals.FILE
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])  # the first one taken out
    with pytest.raises(ConsentError):
        load(f"{HEAD}A,permit,2025-01-01,,,\n")
