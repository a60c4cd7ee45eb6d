"""Strict JSON, FHIR dates and codes."""

from datetime import date, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.consent import fhir_values as values
from fedscan_client.consent.fhir_values import Malformed, NotUnderstood


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "c": 2, "b": 1}}',
        '{"a": NaN}',
        "[Infinity]",
        "[-Infinity]",
        "{",
        "",
        "{'a': 1}",
        '{"a": 1} {}',
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "9" * 5000,
        '"a\tb"',
    ],
)
def test_what_is_not_the_json_of_fhir_is_refused(text):
    with pytest.raises(Malformed):
        values.parse(text)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("2024", date(2024, 1, 1), date(2024, 12, 31)),
        ("2024-02", date(2024, 2, 1), date(2024, 2, 29)),
        ("2023-12", date(2023, 12, 1), date(2023, 12, 31)),
        ("2024-02-23", date(2024, 2, 23), date(2024, 2, 23)),
        ("2024-02-23T23:30:00-05:00", date(2024, 2, 23), date(2024, 2, 23)),
        ("9999-12-31", date(9999, 12, 31), date(9999, 12, 31)),
        ("2015-02-07T13:28:17.239482123Z", date(2015, 2, 7), date(2015, 2, 7)),
    ],
)
def test_dates_stand_for_all_their_days(text, first, last):
    found = values.moment(text, "x")
    assert (found.first, found.last, found.instant is not None) == (first, last, "T" in text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "23.02.2024", "2024-2-23", "2024-02-30", "2024-13", "0000", "1899-12-31", "20240223", "2024-02-23 "),
        *(f"2024-02-23T{time}" for time in ("12:00:00", "12:00Z", "25:00:00Z", "24:00:00Z", "23:59:60Z")),
        "\uff12\uff10\uff12\uff14",
    ],
)
def test_other_dates_are_not_understood(text):
    with pytest.raises(NotUnderstood):
        values.moment(text, "x")


@pytest.mark.parametrize(
    ("node", "days"),
    [
        ({"start": "2024"}, (date(2024, 1, 1), None, None)),
        ({"end": "2024-02"}, (None, date(2024, 2, 29), date(2024, 2, 29))),
        ({"end": "2024-02-23T17:50:23+02:00"}, (None, date(2024, 2, 23), date(2024, 2, 22))),
        ({"start": "2024-02-23", "end": "2024-02-23", "id": "x"}, (date(2024, 2, 23),) * 3),
    ],
)
def test_periods(node, days):
    found = values.period(node, "x")
    assert (found.start, found.end, found.whole_end) == days


@pytest.mark.parametrize(
    "node", [None, {}, [], "2024", {"start": "2025", "end": "2024"}, {"start": 1}, {"begin": "2024"}]
)
def test_other_periods_are_not_understood(node):
    with pytest.raises(NotUnderstood):
        values.period(node, "x")


def test_codes():
    assert values.coding({"system": "s", "code": "c", "display": "d", "version": "2"}, "x") == "s|c"
    assert values.concept({"coding": [{"system": "s", "code": "c"}], "text": "t"}, "x") == ("s|c",)
    assert values.concept({"text": "t"}, "x") == ("t",)
    for node in ({"system": "s"}, {"code": ""}, {"code": 1}, {"system": "a|b", "code": "c"}, {"code": "c", "new": 1}):
        with pytest.raises(NotUnderstood):
            values.coding(node, "x")
    concepts: list[Any] = [{"text": "s|c"}, {"coding": []}, {"coding": {"code": "c"}}, {}, None]
    for node in concepts:
        with pytest.raises(NotUnderstood):
            values.concept(node, "x")
    assert values.identifier({"system": "s", "value": "v", "use": "old"}, "x") == ("s", "v")
    assert values.known(["s|c", "t|d"], ["s|", "t|d"]) and not values.known(["s|c", "t|d"], ["s|", "t|e"])


def test_what_is_shown_of_a_resource_cannot_harm_a_terminal():
    assert NotUnderstood("Consent: \x1b[2J\u202e" + "x" * 1000).where.startswith("Consent: ?[2J?xxx")
    with pytest.raises(NotUnderstood) as caught:
        values.check({"Müller, 1980": 1}, (), "Consent")
    assert caught.value.where == "Consent: an element that is not known"


DAYS = st.dates(date(2024, 1, 1), date(2024, 3, 10))
OFFSETS = st.sampled_from(["Z", "+14:00", "-12:00", "+01:00"])
MOMENTS = st.one_of(
    DAYS.map(date.isoformat),
    DAYS.map(lambda day: day.isoformat()[:7]),
    st.just("2024"),
    st.builds(lambda day, hour, zone: f"{day}T{hour:02}:00:00{zone}", DAYS, st.integers(0, 23), OFFSETS),
).map(lambda text: values.moment(text, "x"))


@settings(max_examples=60)
@given(st.lists(MOMENTS, min_size=1, max_size=8))
def test_the_newest_are_those_than_which_none_is_later(moments):
    plain = [n for n, one in enumerate(moments) if not any(values.later(other, one) for other in moments)]
    assert values.newest(moments) == plain and plain


@settings(max_examples=60)
@given(MOMENTS, MOMENTS, MOMENTS)
def test_later_is_an_order(one, two, three):
    assert not values.later(one, one) and not (values.later(one, two) and values.later(two, one))
    if one.instant and two.instant and three.instant and values.later(one, two) and values.later(two, three):
        assert values.later(one, three)
    if not one.instant and not two.instant:
        assert values.later(one, two) == (one.first - two.last >= timedelta(days=1))
