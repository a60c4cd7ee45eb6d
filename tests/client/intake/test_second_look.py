"""Letting images in takes two people where the site says so, about the very same images; keeping them out takes one."""

import json

import pytest

from fedscan import cli
from fedscan_client import keys, site, two_people
from fedscan_client.audit import log
from fedscan_client.intake import quarantine, second_look
from fedscan_client.intake.quarantine import Found
from fedscan_client.intake.records import Rectangle
from fedscan_client.intake.traits import Traits
from fedscan_core.errors import ConfigError, DataError

KEY = b"k" * 32
US = Traits("Ultrasound Image Storage", "US", "Philips", "0a1b2c3d", 60, 80, 5)
BAR, OTHER = (Rectangle(0, 0, 10, 80),), (Rectangle(0, 0, 11, 80),)
SITE = """\
name = "north"
patients_declared = 20
[source]
kind = "folder"
folder = "pacs"
[policy]
max_epsilon = 8.0
max_delta = 1e-5
two_people = ["quarantine"]
"""


def put(here, *instances, digest="d"):
    found = [Found("kind", "p1", "s1", it, f"/pacs/Canary/{it}.dcm", digest, US) for it in instances]
    quarantine.put(here.folder, KEY, found)


def decide(here, by, verdict="released", rectangles=(), why="no text of Canary"):
    (item,) = quarantine.items(here.folder)
    return second_look.decide(here, KEY, item, verdict, by=by, why=why, rectangles=rectangles)


def let_in(here):
    return {name: known.let_in("d") for name, known in quarantine.states(here.folder, "s1").items()}


@pytest.fixture
def here(tmp_path):
    """A site with two images of one series that wait."""
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / site.FILE).write_text(SITE)
    keys.put(folder, keys.Settings(), keys.SiteKey(bytes(32), KEY), "test")
    made = site.load(folder)
    put(made, "i1", "i2")
    return made


def test_two_people_let_images_in(here):
    assert decide(here, "A. Meier") is None and decide(here, "a meier") is None
    assert let_in(here) == {"i1": None, "i2": None}
    item = decide(here, "B. Schmidt", why="all frames seen")
    assert item is not None and item.by == "A. Meier and B. Schmidt" and let_in(here) == {"i1": (), "i2": ()}
    assert quarantine.why(here.folder, KEY, item.id) == "no text of Canary; all frames seen"
    assert "Canary" not in (here.folder / two_people.FILE).read_text() + json.dumps(log.read(here.folder))


def test_the_reason_of_the_first_is_sealed_while_it_waits(here):
    decide(here, "A. Meier")
    assert "Canary" not in (here.folder / two_people.FILE).read_text()


@pytest.mark.parametrize("other", ["another verdict", "other rectangles", "another instance", "another content"])
def test_they_must_mean_the_same(here, other):
    assert decide(here, "A. Meier", "blackout", BAR) is None
    if other == "another verdict":
        assert decide(here, "B. Schmidt") is None
    elif other == "other rectangles":
        assert decide(here, "B. Schmidt", "blackout", OTHER) is None
    else:
        put(here, *(["i3"] if other == "another instance" else ["i2"]), digest="d" if "instance" in other else "e")
        assert decide(here, "B. Schmidt", "blackout", BAR) is None
    assert not any(let_in(here).values())


def test_one_person_keeps_images_out_and_one_is_enough_elsewhere(here):
    item = decide(here, "A. Meier", "rejected")
    assert item is not None and item.state == "rejected"
    policy = here.policy.__class__(8.0, 1e-5)
    item = decide(here.model_copy(update={"policy": policy}), "A. Meier")
    assert item is not None and item.by == "A. Meier"


def test_what_is_no_decision_waits_for_nobody(here):
    for words, error in (
        ({"by": ""}, ConfigError),
        ({"by": "A. Meier", "why": " "}, DataError),
        ({"by": "A. Meier", "verdict": "blackout"}, DataError),
        ({"by": "A. Meier", "rectangles": BAR}, DataError),
        ({"by": "A. Meier", "verdict": "blackout", "rectangles": (Rectangle(0, 0, 61, 80),)}, DataError),
    ):
        with pytest.raises(error):
            decide(here, **words)
    quarantine.put(here.folder, KEY, [Found("not_dicom", "", "", "i9", "/pacs/x")])
    (damaged,) = quarantine.items(here.folder, reason="not_dicom")
    with pytest.raises(DataError, match="by anybody"):
        second_look.decide(here, KEY, damaged, "released", by="A. Meier", why="seen")
    assert not (here.folder / two_people.FILE).exists()


def test_a_rule_needs_two_names_too(here):
    rule = """
[[quarantine.rule]]
name = "Sono 9"
manufacturer = "Acme"
model = "Sono 9"
rows = 768
columns = 1024
blackout = [[0, 0, 60, 1024]]
approved_by = "{}"
approved_on = 2026-01-15
why = "name in the top bar"
"""
    path = here.folder / site.FILE
    path.write_text(SITE + rule.format("A. Meier"))
    with pytest.raises(ConfigError, match="rule 'Sono 9' needs approved_by"):
        site.load(here.folder)
    path.write_text(SITE + rule.format("A. Meier and B. Schmidt"))
    assert len(site.load(here.folder).quarantine.rule) == 1


def test_the_command_says_that_it_waits(here, capsys):
    (item,) = quarantine.items(here.folder)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["agent", "quarantine", "release", str(here.folder), item.id, "--why", "seen", "--yes", *words])
        assert stop.value.code == 0
        return capsys.readouterr().out

    assert "A second person must decide the same" in call("--by", "A. Meier")
    told = json.loads(call("--by", "a. meier", "--json"))
    assert (told["done"], told["waits_for_second_person"]) == (False, True)
    told = json.loads(call("--by", "B. Schmidt", "--json"))
    assert (told["done"], told["by"]) == (True, "A. Meier and B. Schmidt")
