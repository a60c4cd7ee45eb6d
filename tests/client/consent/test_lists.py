"""CSV registers: the rule said plainly, and what stops everything."""

import datetime
from datetime import date, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedscan_core.errors import ConsentError

from .conftest import TODAY, name_of

HEAD = "# as-of: 2026-01-10\npatient_id,status,date\n"


def reasons(register, *numbers: str) -> list[str]:
    return [register.decide(name_of(number)).reason for number in numbers]


def test_only_a_listed_patient_with_a_permit_passes(load):
    rows = "A,permit,2025-01-01\nB,deny,2025-01-01\nC,withdrawn,2025-01-01\nD,maybe,2025-01-01\n"
    rows += "E,permit,2027-01-01\nF,permit,sometime\nG,permit,\nH,PERMIT,2026-01-15\n,,\n"
    register = load(HEAD + rows)
    expected = ["permit", "denied", "denied", "not_understood", "not_yet", *["not_understood"] * 2, "permit"]
    assert reasons(register, *"ABCDEFGH") == expected
    assert reasons(register, "a", "Z", "0A") == ["not_listed"] * 3
    assert register.notes == {"status": 1, "date": 2}
    assert not any(decision.permit != (decision.reason == "permit") for decision in register.decisions.values())


@pytest.mark.parametrize("spoiler", ["deny,2020-01-01", "withdrawn,2020-01-01", "?,2020-01-01"])
@pytest.mark.parametrize("first", [True, False])
def test_one_other_row_beats_any_number_of_permits(load, spoiler, first):
    rows = ["A,permit,2025-06-01"] * 3
    rows.insert(0 if first else 3, f"A,{spoiler}")
    assert not load(HEAD + "\n".join(rows)).decide(name_of("A")).permit


STATUS = st.sampled_from(["permit", "Permit", "deny", "withdrawn", "", "yes", "permitted"])
DAY = st.dates(TODAY - timedelta(900), TODAY + timedelta(30)).map(date.isoformat) | st.sampled_from(
    ["", "01.02.2025", "2025-13-01", "20250101", "2025-1-1"]
)
UNTIL = st.sampled_from(["", "2026-01-14", "2026-01-15", "2030-01-01", "soon"])


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("ABC"), STATUS, DAY, UNTIL), min_size=1))
def test_against_the_rule_said_plainly(load, rows):
    text = "# as-of: 2026-01-10\npatient_id,status,date,until\n" + "\n".join(",".join(row) for row in rows)
    found = load(text)

    def parsed(text: str) -> date | None:
        try:
            return datetime.datetime.strptime(text, "%Y-%m-%d").date() if len(text) == 10 else None
        except ValueError:
            return None

    for patient in "ABC":
        mine = [row[1:] for row in rows if row[0] == patient]
        sound = bool(mine)
        for status, day, until in mine:
            given_on = parsed(day)
            sound &= status.lower() == "permit" and given_on is not None and given_on <= TODAY
            sound &= not until or parsed(until) is not None
        newest = max((day for _, day, _ in mine), default="")
        ends = {until for _, day, until in mine if day == newest and until}
        decision = found.decide(name_of(patient))
        assert decision.permit == (sound and all(end >= TODAY.isoformat() for end in ends))
        if decision.permit:
            assert decision.given is not None and decision.given.isoformat() == newest
            assert decision.until == parsed(min(ends, default=""))


@pytest.mark.parametrize("kind", ["register", "cleared-list", "opt-out"])
def test_without_its_own_date_the_files_counts_and_never_a_rows(load, kind):
    """With one patient more or less, a server must not see the site refuse."""
    rows = {"register": ("patient_id,status,date", "permit,")}.get(kind, ("patient_id,date", ""))
    for days in (["2020-01-01"], ["2020-01-01", "2026-01-14"], ["2026-02-01"], ["", "soon"]):
        text = "\n".join([rows[0], *(f"{n},{rows[1]}{day}" for n, day in enumerate(days))])
        for head, drawn_up in (("", date(2026, 1, 5)), ("# as-of: 2026-01-07\n", date(2026, 1, 7))):
            told = {"kind": kind, "legal_basis": "law", "modified": date(2026, 1, 5)}
            age = (TODAY - drawn_up).days
            assert load(head + text, **told, max_age_days=age).drawn_up == drawn_up
            with pytest.raises(ConsentError, match=str(drawn_up)):
                load(head + text, **told, max_age_days=age - 1)
        with pytest.raises(ConsentError, match="future"):
            load(text, kind=kind, legal_basis="law", modified=date(2026, 1, 16))


def test_spreadsheet_habits_are_read(load):
    text = '\ufeff# as-of: 2026-01-10,,\r\nstatus,Patient_ID,date,until\r\npermit," A ",2025-01-01,\r\n\r\n'
    assert load(text).decide(name_of("A")).permit


def test_issuers_keep_equal_numbers_apart(load):
    text = HEAD.replace("date", "date,issuer", 2).replace("as-of,issuer", "as-of")
    text = "# as-of: 2026-01-10\npatient_id,status,date,issuer\n1,permit,2025-01-01,NORTH\n1,deny,2025-01-01,\n"
    register = load(text, issuer="SOUTH")
    assert register.decide(name_of("1", "NORTH")).permit
    assert register.decide(name_of("1", "SOUTH")).reason == "denied"
    assert register.decide(name_of("1")).reason == "not_listed"


def test_a_cleared_list_permits_whom_it_names(load):
    text = "# as-of: 2026-01-10\n# rows: 3\npatient_id,date\nA,\nB,2025-03-01\nC,2026-03-01\n"
    register = load(text, kind="cleared-list")
    assert reasons(register, *"ABCD") == ["cleared", "cleared", "not_yet", "not_listed"]
    assert (register.decide(name_of("A")).given, register.decide(name_of("B")).given) == (None, date(2025, 3, 1))
    for old, new in (("rows: 3", "rows: 4"), ("2026-01-10", "2025-11-01")):
        with pytest.raises(ConsentError):
            load(text.replace(old, new), kind="cleared-list")


def test_an_opt_out_list_permits_whom_it_does_not_name(load):
    text = "# as-of: 2026-01-10\npatient_id\nA\n"
    register = load(text, kind="opt-out", legal_basis="Section 6 of the Act ")
    assert reasons(register, *"AB") == ["objected", "no_objection"]
    assert register.decide(name_of("B")).basis == "Section 6 of the Act"
    for broken in (text[:31], text.replace("2026-01", "2025-01")):
        with pytest.raises(ConsentError):
            load(broken, kind="opt-out", legal_basis="Section 6")
    empty = load("# as-of: 2026-01-10\n# rows: 0\npatient_id\n", kind="opt-out", legal_basis="Section 6")
    assert reasons(empty, "A") == ["no_objection"]


def test_an_objection_is_not_missed_for_its_issuer(load):
    text = "# as-of: 2026-01-10\npatient_id,issuer\n1,NORTH\n2,\n"
    register = load(text, kind="opt-out", legal_basis="law", issuer="SOUTH")
    for issuer, expected in (("NORTH", False), ("SOUTH", False), ("", False), ("EAST", True)):
        assert register.decide(name_of("1", issuer)).permit == expected
    assert register.decide(name_of("2", "NORTH")).permit and not register.decide(name_of("2")).permit
    assert not register.decide(name_of("2", "SOUTH")).permit and register.covers("EAST")
    with pytest.raises(ConsentError, match=r"^Row 2 .* who issued"):
        load(text, kind="opt-out", legal_basis="law")
    assert load("# as-of: 2026-01-10\npatient_id,issuer\n1,NORTH\n", kind="opt-out", legal_basis="law").covers("EAST")


@pytest.mark.parametrize("rows", ["# rows: 0\npatient_id\n", "patient_id\n1\n"], ids=["nobody", "somebody"])
@pytest.mark.parametrize("issuer", ["", "KLINIKUM M\u00dcNCHEN"])
def test_objections_without_issuers_cover_only_the_sites_own(load, rows, issuer):
    """Whom a list covers depends on its columns, never on who objected."""
    register = load(f"# as-of: 2026-01-10\n{rows}", kind="opt-out", legal_basis="law", issuer=issuer)
    own = {"", "KLINIKUM MU\u0308NCHEN", "KLINIKUM M\u00dcNCHEN"} if issuer else {""}
    covered = {name for name in {"NORTH", "KLINIKUM M\u00dcNCHEN"} | own if register.covers(name)}
    assert covered == own
    for name in covered:  # with the issuer as `deid.identity` gives it
        assert register.decide(name_of("1", name or issuer)).permit == ("rows" in rows)


def test_only_a_list_of_objections_has_to_cover_an_issuer(load):
    assert load(HEAD + "A,permit,2025-01-01\n").covers("NORTH")
    assert load("# as-of: 2026-01-10\npatient_id\nA\n", kind="cleared-list").covers("NORTH")


def test_unicode_composes_an_objection_in_two_ways(load):
    register = load("# as-of: 2026-01-10\npatient_id\nMU\u0308-7\n", kind="opt-out", legal_basis="law")
    assert reasons(register, "M\u00dc-7", "MU\u0308-7", "MU-7") == ["objected", "objected", "no_objection"]


@pytest.mark.parametrize("basis", ["", "  "])
def test_an_opt_out_list_without_a_legal_basis_is_refused(load, basis):
    with pytest.raises(ValueError, match="legal_basis"):
        load("# as-of: 2026-01-10\npatient_id\nA\n", kind="opt-out", legal_basis=basis)


SECRET = "SECRET-4711"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "patient_id,status,date\n",
        f"patient_id,status\n{SECRET},permit\n",
        f"{SECRET},permit,2025-01-01\n",  # no column names: the first patient stands there
        f"patient_id,status,date,{SECRET}\nA,permit,2025-01-01,\n",
        "patient_id,status,date,valid_until\nA,permit,2025-01-01,2020-01-01\n",  # a column that would be overlooked
        f"# {SECRET}\npatient_id,status,date\nA,permit,2025-01-01\n",
        "# as-of: 2025-12-01\npatient_id,status,date\nA,permit,2025-01-01\n",  # stale
        "# as-of: 2026-01-16\npatient_id,status,date\nA,permit,2025-01-01\n",  # from the future
        HEAD,  # an empty export
        f"{HEAD},withdrawn,2025-01-01\n",  # whose withdrawal?
        f"{HEAD}{SECRET}\ufffd,permit,2025-01-01\n",
        f"{HEAD}{SECRET},permit\n",
        f"{HEAD}{SECRET},permit,2025-01-01,B\n",
        f'{HEAD}"{SECRET},permit,2025-01-01\n',
        f'{HEAD}"{SECRET}"x,permit,2025-01-01\n',
        HEAD + f"{SECRET}\0,permit,2025-01-01\n",
    ],
)
def test_a_register_that_cannot_be_trusted_stops_everything(load, text):
    with pytest.raises(ConsentError) as caught:
        load(text)
    assert caught.value.remedy and SECRET not in str(caught.value)


def test_missing_or_unreadable(load, tmp_path):
    (tmp_path / "latin.csv").write_bytes(HEAD.encode() + "Ä,permit,2025-01-01".encode("latin-1"))
    for path, words in (("none.csv", "cannot be read"), ("latin.csv", "UTF-8"), (".", "cannot be read")):
        with pytest.raises(ConsentError, match=words):
            load(HEAD + "A,permit,2025-01-01\n", path=path)
