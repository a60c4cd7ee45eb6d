"""Two agents on one ledger: the second is refused, and only as long as the first one lives."""

import subprocess
import sys
import time
from typing import Any

import pytest

from fedscan_client.dp import ledger_lock
from fedscan_client.dp.ledger import Budget, Release, admit, answer_of, open_ledger, reserve, settle, summary
from fedscan_client.dp.ledger_file import Book
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import FolderError

PLAN = SitePlan(100, 1e-5, 2.0, 0.1, 1.5, 30, 4.0)
STEP = Release("poisson_gauss", 0.1, 1.5, 1.0, 10.0, 1)
ASKED: dict[str, Any] = {"plan": PLAN, "config_sha": "c", "input_sha": "i", "release": STEP}


@pytest.fixture
def book(tmp_path):
    """One run admitted, one round reserved: three rows."""
    book = Book(tmp_path / "ledger.sqlite", tmp_path / "ledger.counter")
    open_ledger(book, Budget(8.0, 1e-4), 640)
    admit(book, "a", PLAN, "c")
    reserve(book, "a", 1, **ASKED)
    return book


HOLDER = """
import sys, time
from pathlib import Path
from fedscan_client.dp import ledger_lock
ledger_lock.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_agent_is_refused_until_the_first_is_gone_however_it_ends(book, monkeypatch):
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(book.ledger)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        doors = (
            lambda: open_ledger(book, Budget(8.0, 1e-4), 640),
            lambda: admit(book, "b", PLAN, "c"),
            lambda: reserve(book, "a", 2, **ASKED),
            lambda: settle(book, "a", 1, "o"),
            lambda: answer_of(book, "a", 1),
        )
        for door in doors:
            with pytest.raises(FolderError, match=f"process {first.pid}"):
                door()
        monkeypatch.setattr(ledger_lock, "_PATIENCE", 0.05)
        with pytest.raises(FolderError, match="Another agent"):
            ledger_lock.hold(book.ledger)
        assert summary(book)["rows"] == 3  # looking is free
    finally:
        first.kill()
        first.wait()
    assert reserve(book, "a", 3, **ASKED) == "new"


def borrows_elsewhere(book):
    """The exit code of another process that borrows the ledger."""
    code = "import sys\nfrom pathlib import Path\nfrom fedscan_client.dp import ledger_lock\n"
    code += "with ledger_lock.borrow(Path(sys.argv[1])): pass"
    return subprocess.run([sys.executable, "-c", code, str(book.ledger)], stderr=subprocess.DEVNULL).returncode


def test_whoever_holds_it_goes_on_working_and_waits_for_a_borrower(book):
    script = "import time\nfrom pathlib import Path\nfrom fedscan_client.dp import ledger_lock\n" + (
        f"with ledger_lock.borrow(Path({str(book.ledger)!r})):\n    print('at work', flush=True); time.sleep(0.3)"
    )
    borrower = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert borrower.stdout is not None and borrower.stdout.readline() == "at work\n"
    began = time.monotonic()
    ledger_lock.hold(book.ledger)
    assert time.monotonic() - began > 0.1 and borrower.wait() == 0
    try:
        ledger_lock.hold(book.ledger)  # of the same process: nothing happens
        assert reserve(book, "a", 3, **ASKED) == "new"
        assert borrows_elsewhere(book) != 0
    finally:
        ledger_lock.release()
    assert borrows_elsewhere(book) == 0  # free for others, and named to nobody
    assert book.ledger.with_suffix(".lock").read_bytes() == b""
