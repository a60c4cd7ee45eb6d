import datetime
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedscan_client.intake.consent import read_register
from fedscan_core.errors import ConsentError

TODAY = date(2026, 1, 15)
HEAD = "# as-of: 2026-01-10\npatient_id,status,date\n"


def register(folder: Path, text: str, max_age_days: int = 30):
    path = folder / "consent.csv"
    path.write_text(text, encoding="utf-8")
    return read_register(path, as_of=TODAY, max_age_days=max_age_days)


def test_only_a_listed_patient_with_a_permit_passes(tmp_path):
    found = register(
        tmp_path,
        HEAD
        + "A,permit,2025-01-01\nB,deny,2025-01-01\nC,withdrawn,2025-01-01\nD,maybe,2025-01-01\n"
        + "E,permit,2027-01-01\nF,permit,sometime\nG,permit,\nH,PERMIT,2026-01-15\n,,\n",
    )
    assert found.permitted == {"A", "H"}
    assert found.permits("A ") and not found.permits("a")
    assert not found.permits("") and not found.permits("Z")


@pytest.mark.parametrize("spoiler", ["deny,2020-01-01", "withdrawn,2020-01-01", "?,2020-01-01"])
@pytest.mark.parametrize("first", [True, False])
def test_one_other_row_beats_any_number_of_permits(tmp_path, spoiler, first):
    rows = ["A,permit,2025-06-01"] * 3
    rows.insert(0 if first else 3, f"A,{spoiler}")
    assert not register(tmp_path, HEAD + "\n".join(rows)).permits("A")


STATUS = st.sampled_from(["permit", "Permit", "deny", "withdrawn", "", "yes", "permitted"])
DAY = st.dates(TODAY - timedelta(900), TODAY + timedelta(30)).map(date.isoformat) | st.sampled_from(
    ["", "01.02.2025", "2025-13-01", "20250101", "2025-1-1"]
)


@given(st.lists(st.tuples(st.sampled_from("ABC"), STATUS, DAY), min_size=1))
def test_against_the_rule_said_plainly(tmp_path_factory, rows):
    text = HEAD + "\n".join(",".join(row) for row in rows)
    found = register(tmp_path_factory.mktemp("r"), text)

    def good(status: str, day: str) -> bool:
        try:
            parsed = datetime.datetime.strptime(day, "%Y-%m-%d").date()
        except ValueError:
            return False
        return len(day) == 10 and status.lower() == "permit" and parsed <= TODAY

    for patient in "ABC":
        mine = [good(status, day) for name, status, day in rows if name == patient]
        assert found.permits(patient) == (bool(mine) and all(mine))


def test_without_its_own_date_the_newest_row_counts(tmp_path):
    text = "patient_id,status,date\nA,permit,2025-12-01\nB,deny,2026-01-05\n"
    assert register(tmp_path, text).drawn_up == date(2026, 1, 5)
    with pytest.raises(ConsentError, match="2026-01-05"):
        register(tmp_path, text, max_age_days=9)


def test_spreadsheet_habits_are_read(tmp_path):
    head = "\ufeff# as-of: 2026-01-10,,\r\nstatus,patient_id,date,ward\r\n"
    text = head + 'permit," A ",2025-01-01,"x, y"\r\n\r\n'
    assert register(tmp_path, text).permitted == {"A"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "patient_id,status,date\n",
        "patient_id,status\nA,permit\n",
        "# as-of: last week\npatient_id,status,date\nA,permit,2025-01-01\n",
        "# no date\npatient_id,status,date\nA,permit,2025-01-01\n",
        "# as-of: 2025-12-01\npatient_id,status,date\nA,permit,2025-01-01\n",  # stale
        "# as-of: 2026-01-16\npatient_id,status,date\nA,permit,2025-01-01\n",  # from the future
        HEAD,  # an empty export
        HEAD + ",withdrawn,2025-01-01\n",  # whose withdrawal?
        HEAD + "A,permit\n",
        HEAD + "A,permit,2025-01-01,B\n",
        HEAD + '"A,permit,2025-01-01\n',
    ],
)
def test_a_register_that_cannot_be_trusted_stops_everything(tmp_path, text):
    with pytest.raises(ConsentError) as caught:
        register(tmp_path, text)
    assert caught.value.remedy


def test_missing_or_unreadable(tmp_path):
    with pytest.raises(ConsentError):
        read_register(tmp_path / "none.csv", as_of=TODAY, max_age_days=30)
    (tmp_path / "latin.csv").write_bytes(HEAD.encode() + "Ä,permit,2025-01-01".encode("latin-1"))
    with pytest.raises(ConsentError, match="UTF-8"):
        read_register(tmp_path / "latin.csv", as_of=TODAY, max_age_days=30)
