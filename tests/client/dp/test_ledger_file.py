"""What happens to the file: it is only added to, damage and older copies are noticed, and a crash leaves it whole."""

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedscan_client.dp import ledger_file
from fedscan_client.dp.ledger import Budget, Release, admit, answer_of, open_ledger, reserve, settle, summary
from fedscan_client.dp.ledger_file import Book
from fedscan_core import files
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import FolderError, RecordDamaged

BUDGET = Budget(8.0, 1e-4)
PLAN = SitePlan(100, 1e-5, 2.0, 0.1, 1.5, 5000, 4.0)
CONFIG: dict[str, Any] = {"config_sha": "c" * 64}
STEP = Release("poisson_gauss", 0.1, 1.5, 1.0, 10.0, 1)
ASKED: dict[str, Any] = {"plan": PLAN, **CONFIG, "input_sha": "i" * 64, "release": STEP}


def new_book(folder: Path) -> Book:
    return Book(folder / "ledger.sqlite", folder / "ledger.counter")


def rows(book: Book) -> list[dict[str, Any]]:
    with ledger_file.reading(book) as db:
        return ledger_file.find(db, "1 ORDER BY seq")


@pytest.fixture
def book(tmp_path):
    """Opened, one run admitted, one round answered, one reserved: five rows."""
    book = new_book(tmp_path / "site")
    open_ledger(book, BUDGET, 640)
    admit(book, "a", PLAN, **CONFIG)
    reserve(book, "a", 1, **ASKED)
    settle(book, "a", 1, "o" * 64)
    reserve(book, "a", 2, **ASKED)
    return book


def doors(book):
    """Everything that looks at the whole ledger, and everything that changes it."""
    return {
        "open": lambda: open_ledger(book, BUDGET, 640),
        "summary": lambda: summary(book),
        "admit": lambda: admit(book, "b", PLAN, **CONFIG),
        "reserve": lambda: reserve(book, "a", 3, **ASKED),
        "settle": lambda: settle(book, "a", 2, "o" * 64),
        "answer": lambda: answer_of(book, "a", 1),
    }


def tamper(book, statement, seq):
    """As somebody who may write the file, and first takes off what would stop them."""
    things = ("TRIGGER rows_stay", "TRIGGER rows_remain", "INDEX one_answer", "INDEX one_plan")
    with contextlib.closing(sqlite3.connect(book.ledger, isolation_level=None)) as db:
        for thing in things:
            db.execute(f"DROP {thing}")
        db.execute(statement, (seq,))


def copy_of(book, folder):
    """The files as a backup finds them."""
    folder.mkdir()
    for path in book.ledger.parent.iterdir():
        shutil.copy(path, folder)
    return folder


def put_back(book, folder, names=("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")):
    for name in names:
        (book.ledger.parent / name).unlink(missing_ok=True)
        if (folder / name).exists():
            shutil.copy(folder / name, book.ledger.parent)


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rows SET body = replace(body, '640', '64')",
        "DELETE FROM rows WHERE seq = 5",
        "DELETE FROM rows",
        "INSERT INTO rows(seq, hash, body) SELECT 7, hash, body FROM rows WHERE seq = 5",
        "INSERT INTO rows(seq, hash, body) SELECT 6, hash, body FROM rows WHERE seq = 5",
        "INSERT OR REPLACE INTO rows(seq, hash, body) SELECT 5, hash, body FROM rows WHERE seq = 5",
        "UPDATE migrations SET version = 7",
        "DELETE FROM migrations",
    ],
)
def test_the_file_itself_refuses_everything_but_a_row_that_follows(book, statement):
    before = rows(book)
    with (
        contextlib.closing(sqlite3.connect(book.ledger, isolation_level=None)) as db,
        pytest.raises(sqlite3.IntegrityError, match="only added to"),
    ):
        db.execute(statement)
    assert rows(book) == before


HOW = {
    "edit": "UPDATE rows SET body = replace(body, 'a', 'b') WHERE seq = ?",
    "hash": "UPDATE rows SET hash = 'x' WHERE seq = ?",
    "remove": "DELETE FROM rows WHERE seq = ?",
    "no row": "UPDATE rows SET body = '7' WHERE seq = ?",
    "another row": "UPDATE rows SET (hash, body) = (SELECT hash, body FROM rows AS r WHERE r.seq = rows.seq % 5 + 1)"
    " WHERE seq = ?",
}


@pytest.mark.parametrize("seq", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("how", HOW)
def test_damage_anywhere_is_found_by_whoever_looks_at_all(book, seq, how):
    with contextlib.closing(sqlite3.connect(book.ledger, isolation_level=None)) as db:
        for name in ("rows_stay", "rows_remain"):  # somebody who takes off what would stop them
            db.execute(f"DROP TRIGGER {name}")
        with contextlib.suppress(sqlite3.DatabaseError):  # an index cannot be made of this: change it without
            db.execute("DROP INDEX one_answer")
            db.execute("DROP INDEX one_plan")
            db.execute("DROP INDEX by_run")
            db.execute("DROP INDEX by_state")
        db.execute(HOW[how], (seq,))
    for name in ("open", "summary"):
        with pytest.raises(RecordDamaged):
            doors(book)[name]()


@pytest.mark.parametrize("how", ["edit", "hash", "no row"])
def test_a_reservation_notices_damage_to_the_rows_it_rests_on(book, how):
    """The plan it belongs to, its own round, and the last row, which it extends; not the whole chain."""
    keep = copy_of(book, book.ledger.parent.parent / "keep")
    for seq in (2, 5):
        put_back(book, keep)
        tamper(book, HOW[how], seq)
        with pytest.raises(RecordDamaged):
            doors(book)["reserve"]()


@pytest.mark.parametrize("content", [b"", b"no database", os.urandom(9000)])
def test_a_file_that_is_no_ledger_is_refused_by_every_door(book, content):
    for suffix in ("-wal", "-shm"):
        book.ledger.with_name(book.ledger.name + suffix).unlink(missing_ok=True)
    book.ledger.write_bytes(content)
    for door in doors(book).values():
        with pytest.raises(RecordDamaged):
            door()


# ------------------------------------------------------------------------------------------------------- older copies


@pytest.mark.parametrize("when", ["opened", "admitted", "reserved"])
def test_an_older_copy_is_refused_by_every_door_and_the_newest_taken_again(tmp_path, when):
    book = new_book(tmp_path / "site")
    open_ledger(book, BUDGET, 640)
    if when != "opened":
        admit(book, "a", PLAN, **CONFIG)
    if when == "reserved":
        reserve(book, "a", 1, **ASKED)
    old = copy_of(book, tmp_path / "old")
    if when == "opened":
        admit(book, "a", PLAN, **CONFIG)
    reserve(book, "a", 2, **ASKED)
    new = copy_of(book, tmp_path / "new")
    put_back(book, old)
    for door in doors(book).values():
        with pytest.raises(RecordDamaged, match="older copy"):
            door()
    put_back(book, new)
    assert reserve(book, "a", 2, **ASKED) == "burned"


def test_a_copy_that_went_another_way_is_refused(book, tmp_path):
    """As long as the newest, or longer: a restored copy that somebody used meanwhile with a counter of its own."""
    old = copy_of(book, tmp_path / "old")
    other = ledger_file.Book(old / "ledger.sqlite", old / "ledger.counter")
    settle(book, "a", 2, "o" * 64)
    settle(other, "a", 2, "p" * 64)
    reserve(other, "a", 3, **ASKED)
    put_back(book, old)
    for door in doors(book).values():
        with pytest.raises(RecordDamaged, match="older copy, or another ledger"):
            door()


def test_a_ledger_that_is_gone_is_not_begun_anew(book):
    for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"):
        (book.ledger.parent / name).unlink(missing_ok=True)
    for door in doors(book).values():
        with pytest.raises(RecordDamaged, match="is gone"):
            door()
    assert not book.ledger.exists()


def test_a_counter_that_is_gone_is_asked_for_and_can_be_written_by_hand(book):
    content = book.counter.read_text()
    book.counter.unlink()
    for door in doors(book).values():
        with pytest.raises(RecordDamaged, match="is missing") as caught:
            door()
    assert caught.value.remedy.endswith(content.strip())
    book.counter.write_text("half a lin")
    with pytest.raises(RecordDamaged, match="cannot be read"):
        doors(book)["reserve"]()
    book.counter.write_text(caught.value.remedy[caught.value.remedy.index("{") :])
    assert doors(book)["reserve"]() == "new"


def test_the_counter_may_lie_on_another_disk(tmp_path):
    book = ledger_file.Book(tmp_path / "site" / "ledger.sqlite", tmp_path / "elsewhere" / "north.counter")
    open_ledger(book, BUDGET, 640)
    shutil.copytree(tmp_path / "site", tmp_path / "backup")
    admit(book, "a", PLAN, **CONFIG)
    shutil.rmtree(tmp_path / "site")
    shutil.copytree(tmp_path / "backup", tmp_path / "site")  # the whole folder: a counter in it would agree
    with pytest.raises(RecordDamaged, match="older copy"):
        open_ledger(book, BUDGET, 640)


def test_the_ledger_is_committed_before_the_counter_says_so(book, monkeypatch):
    """A crash in between is harmless: the ledger is ahead, and goes on."""

    class Crash(BaseException):
        pass

    def crash(path, data):
        assert path == book.counter
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(files, "write_atomic", crash)
        reserve(book, "a", 3, **ASKED)
    assert rows(book)[-1]["state"] == "reserved" and '"seq": 5' in book.counter.read_text()
    assert reserve(book, "a", 3, **ASKED) == "burned" and '"seq": 6' in book.counter.read_text()
    assert reserve(book, "a", 4, **ASKED) == "new"


def test_a_disk_that_loses_the_end_of_what_it_was_given_is_noticed(book, tmp_path):
    """The write-ahead log cut anywhere: all is there, or the ledger is refused; never a shorter one that goes on."""
    if os.fork() == 0:  # dies without closing anything: what SQLite would tidy up stays as it is
        with contextlib.suppress(BaseException):
            kept = ledger_file._connect(book.ledger, "rw")  # while one is open, nothing is moved out of the log
            kept.execute("SELECT 1 FROM rows").fetchone()
            for round_ in range(3, 6):
                reserve(book, "a", round_, **ASKED)
        os._exit(0)
    os.wait()
    log = book.ledger.with_name("ledger.sqlite-wal")
    whole = copy_of(book, tmp_path / "whole")
    size = log.stat().st_size
    assert size > 4096
    refused = 0
    for cut in sorted({*range(0, size, 1031), size - 1, size - 24, 32, 56, 56 + 4096}):
        put_back(book, whole)
        (book.ledger.parent / "ledger.sqlite-shm").unlink(missing_ok=True)
        os.truncate(log, cut)
        with pytest.raises(RecordDamaged, match="older copy"):
            reserve(book, "a", 7, **ASKED)
        refused += 1
    assert refused > 5
    put_back(book, whole)
    assert reserve(book, "a", 7, **ASKED) == "new" and len(rows(book)) == 9


# ---------------------------------------------------------------------------------------------------- durable, private


@pytest.mark.parametrize("call", ["open", "admit", "reserve", "settle"])
def test_every_row_is_committed_in_full_synchronous_mode_before_the_call_returns(tmp_path, monkeypatch, call):
    book, seen = new_book(tmp_path), []
    real = files.write_atomic

    def write_atomic(path, data):  # the counter: the last thing done; another connection sees what is committed
        with contextlib.closing(sqlite3.connect(book.ledger)) as db:
            seen.append(db.execute("SELECT state FROM rows ORDER BY seq DESC LIMIT 1").fetchone()[0])
            seen.append(db.execute("PRAGMA journal_mode").fetchone()[0])
        real(path, data)

    connect, modes = ledger_file._connect, []

    def connected(path, mode):
        db = connect(path, mode)
        db.set_trace_callback(
            lambda sql: modes.append(db.execute("PRAGMA synchronous").fetchone()[0]) if sql == "COMMIT" else None
        )
        return db

    monkeypatch.setattr(files, "write_atomic", write_atomic)
    monkeypatch.setattr(ledger_file, "_connect", connected)
    steps = {
        "open": (lambda: open_ledger(book, BUDGET, 640), "opened"),
        "admit": (lambda: admit(book, "a", PLAN, **CONFIG), "admitted"),
        "reserve": (lambda: reserve(book, "a", 1, **ASKED), "reserved"),
        "settle": (lambda: settle(book, "a", 1, "o" * 64), "settled"),
    }
    for name, (step, _) in steps.items():
        seen.clear()
        step()
        if name == call:
            break
    assert seen == [steps[call][1], "wal"] and set(modes) == {2}  # 2 = FULL
    assert f'"seq": {len(rows(book))}' in book.counter.read_text()


def test_the_ledger_is_for_its_owner_only(book):
    for path in book.ledger.parent.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_reservation_costs_the_same_in_a_long_ledger(tmp_path):
    """Steps of SQLite's machine, which no other process disturbs: a scan of 2,000 rows would take many thousands."""
    book = new_book(tmp_path)
    open_ledger(book, BUDGET, 640)
    admit(book, "a", PLAN, **CONFIG)
    long = {**ASKED, "plan": PLAN}

    def machine_steps(round_):
        count, connect = [0], ledger_file._connect

        def counting(path, mode):
            db = connect(path, mode)
            db.set_progress_handler(lambda: count.__setitem__(0, count[0] + 1), 1)
            return db

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger_file, "_connect", counting)
            reserve(book, "a", round_, **long)
        return count[0]

    first = machine_steps(1)
    with ledger_file.writing(book) as db:
        last = ledger_file.find(db, "seq = 3")[0]
        for round_ in range(2, 2000):
            ledger_file.append(db, {**last, "round": round_})
    assert machine_steps(2001) < 1.5 * first


# --------------------------------------------------------------------------------------------------------- migrations


def test_an_older_file_is_brought_up_and_says_how_and_a_newer_one_refused(book, monkeypatch):
    before = rows(book)
    change = ("CREATE INDEX later ON rows(utc)",)
    with monkeypatch.context() as newer:
        newer.setattr(ledger_file, "MIGRATIONS", (*ledger_file.MIGRATIONS, change))
        assert reserve(book, "a", 3, **ASKED) == "new"
        assert rows(book)[:-1] == before
        with ledger_file.reading(book) as db:
            known = db.execute("SELECT version, program, statements FROM migrations ORDER BY version").fetchall()
        assert [row[0] for row in known] == [1, 2] and known[1][2] == change[0] and "fedscan" in known[1][1]
    for door in doors(book).values():
        with pytest.raises(RecordDamaged, match="newer version"):
            door()


def test_a_migration_that_fails_leaves_the_file_as_it_was(book, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(
            ledger_file, "MIGRATIONS", (*ledger_file.MIGRATIONS, ("CREATE INDEX later ON rows(utc)", "NO SQL"))
        )
        with pytest.raises(RecordDamaged):
            reserve(book, "a", 3, **ASKED)
    assert reserve(book, "a", 3, **ASKED) == "new"


def test_a_folder_that_cannot_be_written_is_said_plainly(book, monkeypatch):
    def full(path, mode):
        db = connect(path, mode)
        db.execute("PRAGMA max_page_count = 1")  # what a full disk looks like to SQLite
        return db

    connect = ledger_file._connect
    with monkeypatch.context() as patched, pytest.raises(FolderError, match="full"):
        patched.setattr(ledger_file, "_connect", full)
        for round_ in range(3, 40):
            reserve(book, "a", round_, **ASKED)
    assert summary(book)["rows"] >= 5
