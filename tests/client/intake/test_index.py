"""The intake's index: what is new, what has gone, who clashes; nothing in clear on disk."""

import sqlite3
from pathlib import Path

import pytest

from fedscan_client.intake import index
from fedscan_client.intake.index import Header
from fedscan_core.errors import DataError

KEY, OTHER = b"k" * 32, b"o" * 32
PLACE = "/pacs/DOE^JANE/MRN-12345/IM0001"


def header(patient: str, series: str = "s", instance: str = "i", study: str = "t") -> Header:
    return Header(patient=patient, study=study, series=series, instance=instance)


def test_only_what_is_new_or_changed_is_asked_for(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        assert not seen.seen(PLACE, "1")
        seen.put(PLACE, "1", header("p"))
    with index.opened(tmp_path, KEY) as seen:
        assert seen.seen(PLACE, "1")
        assert not seen.seen(PLACE, "2")
        assert not seen.seen(PLACE + "x", "1")


def test_what_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        seen.put("a", "1", Header("unreadable"))
        seen.put("b", "1", Header("not_dicom"))
        assert (seen.seen("a", "1"), seen.seen("b", "1")) == (False, True)
        assert seen.reasons() == {"not_dicom": 1, "unreadable": 1}


def test_another_key_has_seen_nothing(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        seen.put(PLACE, "1", header("p"))
    with index.opened(tmp_path, OTHER) as seen:
        assert not seen.seen(PLACE, "1")


def test_sweep_drops_what_this_run_did_not_find(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        seen.put("old", "1", header("p", instance="1"))
        seen.put("gone", "1", header("q", instance="2"))
    with index.opened(tmp_path, KEY) as seen:
        assert seen.seen("old", "1")
        seen.put("new", "1", header("r", instance="3"))
        seen.sweep()
        assert seen.patients() == ["p", "r"]


def test_series_come_patient_by_patient_in_order(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        seen.put("b", "1", header("p", "s2", "2"))
        seen.put("a", "1", header("p", "s1", "9"))
        seen.put("c", "1", header("p", "s2", "1"))
        seen.put("d", "1", header("q", "s3", "5"))
        found = [(series, [row.locator for row in rows]) for series, rows in seen.series("p")]
        assert found == [("s1", ["a"]), ("s2", ["c", "b"])]
        assert (seen.count(), seen.count("patient"), seen.count("series")) == (4, 2, 3)


def test_a_uid_of_two_patients_is_told_for_both(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        seen.put("a", "1", header("p", "s1", "i1", "t1"))
        seen.put("b", "1", header("q", "s2", "i1", "t2"))
        seen.put("c", "1", header("q", "s3", "i3", "t1"))
        assert seen.clashing("p") == {"i1", "t1"} == seen.clashing("q")
        seen.forget("q")
        assert seen.clashing("p") == frozenset()


def test_what_came_of_a_series_is_known_until_something_changes(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        seen.put("a", "1", header("p", "s1"))
        seen.settle("s1", "p", b"digest", {"entries": ["e"]})
    with index.opened(tmp_path, KEY) as seen:
        assert seen.outcome("s1", b"digest") == {"entries": ["e"]}
        assert seen.outcome("s1", b"other") is None
        seen.sweep()  # the object was not found again
        assert seen.outcome("s1", b"digest") is None


def test_dry_writes_nothing_and_knows_what_is_there(tmp_path: Path) -> None:
    with index.opened(tmp_path / "", KEY, dry=True) as seen:
        seen.put("a", "1", header("p"))
        assert seen.patients() == ["p"]
    assert list(tmp_path.iterdir()) == []
    with index.opened(tmp_path, KEY) as seen:
        seen.put("a", "1", header("p"))
    before = (tmp_path / index.FILE).read_bytes()
    with index.opened(tmp_path, KEY, dry=True) as seen:
        assert seen.seen("a", "1")
        seen.put("b", "1", header("q"))
    assert (tmp_path / index.FILE).read_bytes() == before


def test_an_interrupted_run_keeps_what_it_read(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), index.opened(tmp_path, KEY) as seen:
        seen.put("a", "1", header("p"))
        raise KeyboardInterrupt
    with index.opened(tmp_path, KEY) as seen:
        assert seen.seen("a", "1")


def test_places_are_not_on_disk_in_clear(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        seen.put(PLACE, "1", header("p"))
        for file in tmp_path.iterdir():
            assert b"DOE" not in file.read_bytes() and b"12345" not in file.read_bytes()
    assert (tmp_path / index.FILE).stat().st_mode & 0o777 == 0o600


def test_places_with_odd_bytes_come_back(tmp_path: Path) -> None:
    odd = b"\xff\xfeIM\n".decode("utf-8", "surrogateescape")
    with index.opened(tmp_path, KEY) as seen:
        seen.put(odd, "1", header("p"))
        assert [row.locator for _, rows in seen.series("p") for row in rows] == [odd]


def test_a_row_moved_to_another_place_is_noticed(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        seen.put("a", "1", header("p", instance="1"))
        seen.put("b", "1", header("p", instance="2"))
    db = sqlite3.connect(tmp_path / index.FILE)
    (first, second) = [row[0] for row in db.execute("SELECT locator FROM object ORDER BY instance")]
    db.execute("UPDATE object SET locator = ? WHERE instance = '1'", (second,))
    db.commit()
    db.close()
    assert first != second
    with index.opened(tmp_path, KEY) as seen, pytest.raises(DataError, match="altered"):
        list(seen.series("p"))


def test_a_file_that_is_no_index_is_told(tmp_path: Path) -> None:
    (tmp_path / index.FILE).write_bytes(b"something else, longer than a header of SQLite" * 40)
    with pytest.raises(DataError, match="cannot be used"), index.opened(tmp_path, KEY):
        pass


def test_a_new_wrapping_key_knows_what_the_old_one_knew(tmp_path: Path) -> None:
    with index.opened(tmp_path, KEY) as seen:
        seen.put("a", "1", header("p", instance="1"))
        seen.put("b", "1", header("p", instance="2"))
    for _ in range(2):  # a crash repeats it
        index.rekey(tmp_path, KEY, OTHER, {"b": "moved"})
    with index.opened(tmp_path, OTHER) as seen:
        assert seen.seen("a", "1") and seen.seen("moved", "1") and seen.count() == 2
        assert [row.locator for _, rows in seen.series("p") for row in rows] == ["a", "moved"]
    with index.opened(tmp_path, KEY) as seen:
        assert not seen.seen("a", "1")
    with pytest.raises(DataError, match="neither"):
        index.rekey(tmp_path, KEY, b"x" * 32, {})
    index.rekey(tmp_path / "nothing", KEY, OTHER, {})
