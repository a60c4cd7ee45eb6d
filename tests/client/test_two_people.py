"""Two named people: the same word twice by one of them decides nothing, and only the very same is agreed on."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from fedscan_client import two_people
from fedscan_client.audit import log
from fedscan_core.errors import ConfigError, FolderError

TO = {"from": [8.0, 1e-5], "to": [12.0, 1e-5]}


def agree(folder, by, subject=None, what="budget"):
    return two_people.agree(folder, what, subject or TO, by, "because")


def test_a_second_person_makes_it_two(tmp_path):
    assert agree(tmp_path, "A. Meier") is None
    first = agree(tmp_path, "B. Schmidt")
    assert first is not None and (first.by, first.why, first.login) == ("A. Meier", "because", two_people.login())
    assert agree(tmp_path, "B. Schmidt") is None  # used up: the next raise needs two again
    assert [(r["step"], r["by"]) for r in log.read(tmp_path) if r["event"] == "budget"] == [
        ("first of two people", "A. Meier"),
        ("first of two people", "B. Schmidt"),
    ]
    assert (tmp_path / two_people.FILE).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("same", ["A. Meier", "a.meier", "  A.  MEIER ", "A Meier"])
def test_one_person_is_not_two(tmp_path, same):
    assert agree(tmp_path, "A. Meier") is None and agree(tmp_path, same) is None
    assert len(json.loads((tmp_path / two_people.FILE).read_text())) == 1


@pytest.mark.parametrize("other", [{"subject": {**TO, "to": [13.0, 1e-5]}}, {"what": "quarantine"}])
def test_something_else_is_not_the_same(tmp_path, other):
    assert agree(tmp_path, "A. Meier") is None
    assert agree(tmp_path, "B. Schmidt", **other) is None
    assert agree(tmp_path, "C. Wolf") is not None  # and the first word waits on


def test_a_word_waits_fourteen_days(tmp_path):
    assert agree(tmp_path, "A. Meier") is None
    path = tmp_path / two_people.FILE
    (word,) = json.loads(path.read_text())
    for days, agreed in ((13, True), (15, False)):
        word["utc"] = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
        path.write_text(json.dumps([word]))
        assert (agree(tmp_path, "B. Schmidt") is not None) == agreed


@pytest.mark.parametrize("name", ["", "  ", "...", "A\x1b[2J", "x" * 101])
def test_nobody_decides_without_a_name(tmp_path, name):
    with pytest.raises(ConfigError, match="name"):
        agree(tmp_path, name)
    assert not (tmp_path / two_people.FILE).exists()


@pytest.mark.parametrize("text", ["no json", "[1]", '[{"what": "budget"}]', "{}x"])
def test_a_damaged_file_agrees_to_nothing(tmp_path, text):
    (tmp_path / two_people.FILE).write_text(text)
    with pytest.raises(FolderError):
        agree(tmp_path, "B. Schmidt")


def test_two_names_in_one_text():
    assert two_people.several("A. Meier and B. Schmidt") and two_people.several("A. Meier, B. Schmidt")
    assert not two_people.several("A. Meier") and not two_people.several("A. Meier and a meier")
    assert not two_people.several("Andrea Sandland")
