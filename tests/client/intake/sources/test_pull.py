"""The account of a pull adds up whatever the PACS does, and nothing is fetched twice."""

import threading
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.intake.sources import spool
from fedscan_client.intake.sources.pull import Archive, ArchiveError, Instance, Interrupted, Retry, pull
from fedscan_client.intake.sources.spool import Spool

KEY = b"k" * 32
# What a PACS may do with a request: as asked, break off, send only the first, send nothing, refuse them, or all of us.
DEEDS = ("sends", "breaks", "first", "nothing", "refuses", "fatal")


def make_archive(series, deeds, folder, asked, stop=None):
    """`series`: instance numbers of each; `deeds`: what happens at each fetch, in turn, and "sends" from then on."""
    left = list(deeds)

    def fetch(study, name, missing, whole, attempt, tick):
        deed = left.pop(0) if left else "sends"
        wanted = missing[:1] if deed in ("first", "breaks") else missing if deed == "sends" else []
        for each in wanted:
            asked[each.uid] += 1
            spool.put(folder, KEY, b"x", each.uid)
            tick()
        if deed == "breaks":
            raise Interrupted("gone")
        if deed == "fatal":
            raise ArchiveError("refused")
        return {each.uid for each in missing} if deed == "refuses" else set()

    return Archive(
        studies=lambda: [str(number) for number in range(len(series))],
        series=lambda study: [(f"{study}.1", "CT")],
        instances=lambda study, name: [Instance(uid) for uid in series[int(study)]],
        fetch=fetch,
    )


UIDS = st.sampled_from([f"1.{number}" for number in range(8)] + ["", "bad uid"])


@settings(max_examples=25)
@given(
    st.lists(st.lists(UIDS, max_size=5), max_size=5),
    st.lists(st.sampled_from(DEEDS), max_size=12),
    st.sets(UIDS),
    st.sets(UIDS),
)
def test_the_account_adds_up(tmp_path_factory, series, deeds, before, read):
    folder = tmp_path_factory.mktemp("spool")
    there = {uid for uid in before if uid.startswith("1.")}
    for uid in there:
        spool.put(folder, KEY, b"x", uid)
    asked, told = Counter[str](), list[tuple[int, int]]()
    archive = make_archive(series, deeds, folder, asked)
    retry = Retry(3, 0.0, threading.Event())
    try:
        report = pull(
            archive, Spool(folder, KEY), retry, known=read.__contains__, progress=lambda *now: told.append(now)
        )
    except ArchiveError:
        raise AssertionError("something was found before") from None
    assert report.found == report.retrieved + report.already_known + report.failed + report.left
    assert report.retrieved == len(list(spool.found(folder, KEY))) - len(there) == len(asked)
    assert all(times == 1 for times in asked.values())
    assert not set(asked) & (there | read)
    assert all(done <= found for done, found in told)
    if not report.problem:
        assert report.left == 0 and report.found == sum(map(len, series))
    if not deeds:
        usable = {uid for uids in series for uid in uids if uid.startswith("1.")}
        assert set(asked) == usable - there - read and not report.problem
        assert report.failed == sum(not uid.startswith("1.") for uids in series for uid in uids)
    # The next pull brings the rest, and asks for nothing a second time.
    rest = pull(
        make_archive(series, [], folder, asked),
        Spool(folder, KEY),
        retry,
        known=read.__contains__,
        progress=lambda *_: None,
    )
    assert not rest.problem and all(times == 1 for times in asked.values())
    assert set(asked) == {uid for uids in series for uid in uids if uid.startswith("1.")} - there - read


def test_studies_and_series_without_a_uid_are_counted(tmp_path):
    archive = make_archive([["1.1"]], [], tmp_path, Counter())
    archive = replace(archive, studies=lambda: ["", "0", "a b"], series=lambda study: [("", "CT"), ("0.1", "CT")])
    retry = Retry(2, 0.0, threading.Event())
    report = pull(archive, Spool(tmp_path, KEY), retry, known=lambda uid: False, progress=lambda *_: None)
    assert (report.unlisted, report.studies, report.series, report.retrieved) == (3, 1, 1, 1)


def test_a_pacs_that_is_gone_is_not_asked_series_by_series(tmp_path):
    asked = Counter[str]()
    archive = make_archive([[f"{n}.{i}" for i in range(3)] for n in range(1, 90)], [], tmp_path, asked)

    def dead(study, name, missing, whole, attempt, tick):
        asked["tries"] += 1
        raise Interrupted("gone")

    archive = Archive(archive.studies, archive.series, archive.instances, dead)
    report = pull(
        archive,
        Spool(tmp_path, KEY),
        Retry(4, 0.0, threading.Event()),
        known=lambda uid: False,
        progress=lambda *_: None,
    )
    assert asked["tries"] == 3 * 4 and report.failed == 9 and "gone" in report.problem


def test_pauses_double_and_end_with_stop(monkeypatch):
    stop, waited = threading.Event(), []

    def wait(seconds):
        waited.append(seconds)
        return len(waited) == 9

    monkeypatch.setattr(stop, "wait", wait)
    retry = Retry(20, 1.0, stop)

    def fail():
        raise Interrupted("busy")

    try:
        retry(fail)
    except Interrupted:
        assert waited == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    else:
        raise AssertionError
