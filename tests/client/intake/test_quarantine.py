"""What waits and what was decided: survives crashes, covers what a person saw and nothing else, holds no identifier."""

import json
import os
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.audit import log
from fedscan_client.intake import quarantine, quarantine_file
from fedscan_client.intake.quarantine import Found
from fedscan_client.intake.records import REASONS, REVIEW, Rectangle
from fedscan_client.intake.traits import Traits, traits
from fedscan_core.errors import DataError, FolderError

KEY, OTHER = b"k" * 32, b"o" * 32
US = Traits("Ultrasound Image Storage", "US", "Philips", "0a1b2c3d", 60, 80, 5)
BAR = (Rectangle(0, 0, 10, 80),)
DAY = date(2026, 1, 15)


def found(instance="i1", **changes):
    return replace(Found("kind", "p1", "s1", instance, f"/pacs/Canary^Carla/{instance}.dcm", "d", US), **changes)


def filled(folder, *more):
    quarantine.put(folder, KEY, [found("i1"), found("i2"), *more], today=DAY)
    return next(it.id for it in quarantine.items(folder) if (it.series, it.reason, it.rows) == ("s1", "kind", 60))


def decide(folder, id, verdict="released", rectangles=(), **words):
    return quarantine.decide(
        folder, KEY, id, verdict, **{"by": "A. Meier", "why": "no text", **words}, rectangles=rectangles
    )


def ask(folder, instance="i1", series="s1", digest="d"):
    known = quarantine.states(folder, series).get(instance)
    return None if known is None else known.let_in(digest)


def test_instances_of_a_series_with_one_reason_and_size_are_one_item(tmp_path):
    assert quarantine.items(tmp_path) == [] and ask(tmp_path) is None
    filled(
        tmp_path, found("i3", series="s2"), found("i4", reason="image_type"), found("i5", traits=replace(US, rows=9))
    )
    listed = quarantine.items(tmp_path)
    assert sorted(it.instances for it in listed) == [1, 1, 1, 2] and len({it.id for it in listed}) == 4
    (item,) = (it for it in listed if it.instances == 2)
    assert (item.sop_class, item.manufacturer, item.frames, item.first_seen) == (
        US.sop_class,
        "Philips",
        5,
        "2026-01-15",
    )
    assert item.state == "waiting" and item.releasable and set(item.id) <= set("abcdefghjkmnpqrstuvwxyz23456789")
    assert quarantine.items(tmp_path, reason="image_type")[0].reason == "image_type"
    assert [it.locator for it in quarantine.held(tmp_path, KEY, item.id[:5])] == [
        "/pacs/Canary^Carla/i1.dcm",
        "/pacs/Canary^Carla/i2.dcm",
    ]


def test_putting_again_changes_nothing(tmp_path):
    id = filled(tmp_path)
    decide(tmp_path, id)
    before = quarantine.items(tmp_path)
    assert quarantine.put(tmp_path, KEY, [found("i1"), found("i2")], today=date(2027, 1, 1)) == 0
    assert quarantine.items(tmp_path) == before and ask(tmp_path) == ()
    quarantine.put(tmp_path, KEY, [found("i1", locator="/elsewhere")])  # the same content, in another place
    assert quarantine.held(tmp_path, KEY, id)[0].locator == "/elsewhere" and ask(tmp_path) == ()


def test_a_decision_covers_what_was_there_and_its_content(tmp_path):
    id = filled(tmp_path)
    assert ask(tmp_path) is None
    assert decide(tmp_path, id, "blackout", BAR).state == "blackout"
    assert ask(tmp_path) == ask(tmp_path, "i2") == BAR
    assert ask(tmp_path, "i3") is None and ask(tmp_path, series="s2") is None and ask(tmp_path, digest="e") is None
    quarantine.put(tmp_path, KEY, [found("i3")])  # comes later
    item = quarantine.get(tmp_path, id)
    assert (item.state, item.waiting, item.instances, item.decision) == ("waiting", 1, 3, "blackout")
    assert ask(tmp_path, "i3") is None and ask(tmp_path) == BAR
    quarantine.put(tmp_path, KEY, [found("i1", digest="e")])  # changes
    assert ask(tmp_path, digest="e") is None and ask(tmp_path) is None and ask(tmp_path, "i2") == BAR
    decide(tmp_path, id)  # again, for all
    assert ask(tmp_path, "i3") == ask(tmp_path, digest="e") == ()
    assert decide(tmp_path, id, "rejected").state == "rejected" and ask(tmp_path, "i2") is None
    assert quarantine.items(tmp_path, state="waiting") == []


@pytest.mark.parametrize("reason", sorted(set(REASONS) - set(REVIEW)))
@pytest.mark.parametrize("verdict", ["released", "blackout"])
def test_nobody_lets_in_any_other_reason(tmp_path, reason, verdict):
    quarantine.put(tmp_path, KEY, [found(reason=reason)])
    id = quarantine.items(tmp_path)[0].id
    with pytest.raises(DataError, match="cannot be let in by anybody"):
        decide(tmp_path, id, verdict, BAR if verdict == "blackout" else ())
    assert log.read(tmp_path) == [] and not quarantine.items(tmp_path)[0].releasable
    # Even a row that was written by hand does not.
    with quarantine_file.writing(tmp_path) as db:
        db.execute("INSERT INTO decisions VALUES (1, 'released', '[]', 'x', '', x'')")
        db.execute("UPDATE instances SET decision = 1")
    assert ask(tmp_path) is None


def test_a_released_instance_that_turns_out_damaged_waits_again(tmp_path):
    decide(tmp_path, filled(tmp_path))
    quarantine.put(tmp_path, KEY, [found("i1", reason="pixels_undecodable")])
    assert ask(tmp_path) is None and ask(tmp_path, "i2") == ()


@pytest.mark.parametrize(
    ("verdict", "rectangles", "words", "said"),
    [
        ("released", BAR, {}, "Rectangles belong"),
        ("rejected", BAR, {}, "Rectangles belong"),
        ("blackout", (), {}, "Rectangles belong"),
        ("blackout", (Rectangle(0, 0, 61, 80),), {}, "is not inside 60 rows x 80"),
        ("released", (), {"by": " "}, "needs a name"),
        ("released", (), {"why": ""}, "needs a name"),
    ],
)
def test_a_decision_that_makes_no_sense_is_none(tmp_path, verdict, rectangles, words, said):
    id = filled(tmp_path)
    with pytest.raises(DataError, match=said):
        decide(tmp_path, id, verdict, rectangles, **words)
    assert quarantine.get(tmp_path, id).decision == "" and log.read(tmp_path) == []


def test_ids_are_found_by_their_first_letters_only_if_one_has_them(tmp_path):
    quarantine.put(tmp_path, KEY, [found(str(n), series=str(n)) for n in range(60)])
    ids = [it.id for it in quarantine.items(tmp_path)]
    assert quarantine.get(tmp_path, f" {ids[0].upper()} ").id == ids[0]
    shared = next(id[0] for id in ids if sum(other[0] == id[0] for other in ids) > 1)
    for wrong, said in ((shared, "Several"), ("", "no item"), ("0000", "no item"), ("%", "no item")):
        with pytest.raises(DataError, match=said):
            quarantine.get(tmp_path, wrong)


def test_the_log_says_who_did_what_to_how_many_and_to_nobody(tmp_path):
    id = filled(tmp_path)
    decide(tmp_path, id, "blackout", BAR, why="as Carla Canary asked")
    _, line = log.read(tmp_path)
    assert line.pop("utc").startswith("20")
    assert line == {
        "event": "quarantine",
        "decision": "blackout",
        "by": "A. Meier",
        "item": id,
        "reason": "kind",
        "instances": 2,
        "rectangles": [[0, 0, 10, 80]],
    }
    assert quarantine.why(tmp_path, KEY, id) == "as Carla Canary asked"


def test_nothing_of_a_header_a_place_or_a_reason_is_on_disk_in_clear(tmp_path, cr_instance):
    canaries = ["Canary", "Carla", "A-1", "ACC7", "1.2.3.4", "Zebra", "/pacs"]
    ds = cr_instance(
        Modality="CANARY", Manufacturer="Canary GE Zebra", ManufacturerModelName="Zebra 9", SOPClassUID="1.2.3"
    )
    told = traits(ds, KEY)
    assert (told.modality, told.manufacturer, told.sop_class, told.rows, told.frames) == (
        "other",
        "GE",
        "unknown",
        4,
        1,
    )
    assert told.device == traits(ds, KEY).device != traits(ds, OTHER).device
    quarantine.put(tmp_path, KEY, [found("i9", traits=told)])
    decide(tmp_path, quarantine.items(tmp_path)[0].id, why="Carla Canary, seen by Zebra")
    pixel_row = ds.PixelData[:12]
    for path in (it for it in tmp_path.rglob("*") if it.is_file()):
        data = path.read_bytes()
        assert not [word for word in canaries if word.encode() in data] and pixel_row not in data, path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 or path.suffix == ".lock", path


def test_traits_of_a_damaged_header_are_what_can_be_read(cr_instance):
    ds = cr_instance(Manufacturer=None)
    ds["Rows"].VR = "UN"
    ds["Rows"].value = b"\xff"
    told = traits(ds, KEY)
    assert (told.rows, told.columns, told.modality, told.manufacturer) == (0, 6, "CR", "other")


def test_a_sealed_place_belongs_to_its_row_and_key(tmp_path):
    id = filled(tmp_path)
    with pytest.raises(DataError, match="another site key"):
        quarantine.held(tmp_path, OTHER, id)
    with quarantine_file.writing(tmp_path) as db:
        db.execute("UPDATE instances SET locator = (SELECT locator FROM instances WHERE instance = 'i2')")
    with pytest.raises(DataError, match="was changed"):
        quarantine.held(tmp_path, KEY, id)


def test_a_new_wrapping_key_seals_everything_again_or_nothing(tmp_path):
    id = filled(tmp_path)
    decide(tmp_path, id)
    quarantine.rekey(tmp_path, KEY, OTHER, {})
    assert len(quarantine.held(tmp_path, OTHER, id)) == 2 and quarantine.why(tmp_path, OTHER, id) == "no text"
    assert quarantine.get(tmp_path, id).id == id and ask(tmp_path) == ()
    with pytest.raises(DataError):
        quarantine.rekey(tmp_path, KEY, b"n" * 32, {})
    assert len(quarantine.held(tmp_path, OTHER, id)) == 2


def test_withdrawal_leaves_nothing_of_the_patient(tmp_path):
    id = filled(tmp_path, found("i7", patient="hmac-of-the-other", series="s7"))
    decide(tmp_path, id)
    assert quarantine.remove_patient(tmp_path, "") == 0
    assert quarantine.remove_patient(tmp_path, "p1") == 2 and quarantine.remove_patient(tmp_path, "p1") == 0
    assert [it.patient for it in quarantine.items(tmp_path)] == ["hmac-of-the-other"] and ask(tmp_path) is None
    with quarantine_file.reading(tmp_path) as db:
        assert db is not None and db.execute("SELECT count(*) FROM decisions").fetchone() == (0,)


def test_withdrawal_overwrites(tmp_path):
    quarantine.put(tmp_path, KEY, [found("canary-instance", patient="canary-patient"), found("i2")])
    with closing(sqlite3.connect(tmp_path / "quarantine.sqlite")) as db:  # an agent beside it: its log is not cleared
        db.execute("SELECT * FROM instances").fetchall()
        quarantine.remove_patient(tmp_path, "canary-patient")
        for path in tmp_path.glob("quarantine.sqlite*"):
            assert b"canary" not in path.read_bytes()


def test_what_is_gone_from_the_source_is_dropped_but_a_decision_stays(tmp_path):
    id = filled(tmp_path)
    decide(tmp_path, id)
    quarantine.put(tmp_path, KEY, [found("i3")])
    assert quarantine.forget(tmp_path, ["i1", "i2", "i3", "never"]) == 1
    assert quarantine.get(tmp_path, id).instances == 2 and ask(tmp_path) == ()
    assert quarantine.forget(tmp_path / "none", ["i1"]) == 0


def test_no_quarantine_is_no_error_and_no_file(tmp_path):
    assert quarantine.remove_patient(tmp_path, "p") == 0
    quarantine.rekey(tmp_path, KEY, OTHER, {})
    with pytest.raises(DataError, match="no item"):
        quarantine.get(tmp_path, "abcd")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_newer_file_says_so(tmp_path):
    filled(tmp_path)
    with sqlite3.connect(tmp_path / "quarantine.sqlite") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(FolderError, match="newer version"):
        quarantine.items(tmp_path)
    (tmp_path / "quarantine.sqlite-wal").unlink(missing_ok=True)
    (tmp_path / "quarantine.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(FolderError, match="cannot be used"):
        quarantine.items(tmp_path)


CRASH = """
import os, sys
from pathlib import Path
from fedscan_client.intake import quarantine
from fedscan_client.audit import log
folder, when, id = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
append = log.append
def dies(*args, **fields):
    if when == "before":
        os._exit(9)
    append(*args, **fields)
    os._exit(9)
log.append = dies
quarantine.decide(folder, b"k" * 32, id, "released", by="A", why="b")
"""


@pytest.mark.parametrize(("when", "lines"), [("before", 0), ("after", 1)])
def test_a_crash_leaves_a_line_without_a_decision_never_the_reverse(tmp_path, when, lines):
    id = filled(tmp_path)
    done = subprocess.run([sys.executable, "-c", CRASH, tmp_path, when, id], env=os.environ, check=False)
    assert done.returncode == 9
    assert len(logged(tmp_path)) == lines
    assert ask(tmp_path) is None and quarantine.get(tmp_path, id).state == "waiting"
    decide(tmp_path, id)
    assert ask(tmp_path) == () and len(logged(tmp_path)) == lines + 1


def logged(folder):
    return [row for row in log.read(folder) if row["event"] == "quarantine"]


def test_a_put_that_fails_half_way_leaves_nothing(tmp_path):
    def half():
        yield found("i1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quarantine.put(tmp_path, KEY, half())
    assert quarantine.items(tmp_path) == []


STEP = st.one_of(
    st.tuples(
        st.just("put"),
        st.sampled_from("abc"),
        st.sampled_from(["kind", "burned_in", "geometry"]),
        st.sampled_from("de"),
    ),
    st.tuples(st.just("decide"), st.integers(0, 3), st.sampled_from(["released", "blackout", "rejected"])),
    st.tuples(st.just("forget"), st.sampled_from("abc")),
)


@settings(max_examples=12)
@given(st.lists(STEP, max_size=9))
def test_against_a_plain_model(tmp_path_factory, steps):
    """The reference: a dict of what a person last said about an instance as it is now."""
    folder = tmp_path_factory.mktemp("site")
    model: dict[str, tuple[str, str, str | None]] = {}
    for step in steps:
        if step[0] == "put":
            _, name, reason, digest = step
            quarantine.put(folder, KEY, [found(name, reason=reason, digest=digest)])
            if model.get(name, ("", ""))[:2] != (reason, digest):
                model[name] = (reason, digest, None)
        elif step[0] == "forget":
            quarantine.forget(folder, [step[1]])
            if step[1] in model and model[step[1]][2] is None:
                del model[step[1]]
        elif listed := quarantine.items(folder):
            item, verdict = listed[step[1] % len(listed)], step[2]
            try:
                decide(folder, item.id, verdict, BAR if verdict == "blackout" else ())
            except DataError:
                assert item.reason == "geometry" and verdict != "rejected"
                continue
            for name, (reason, digest, _) in list(model.items()):
                if reason == item.reason:
                    model[name] = (reason, digest, verdict)
    for name in "abc":
        for digest in "de":
            same = name in model and model[name][1] == digest
            wanted = {"released": (), "blackout": BAR}.get(model[name][2] or "") if same else None
            assert ask(folder, name, digest=digest) == wanted
    assert json.dumps([it.state for it in quarantine.items(folder)])
