"""The letter: plain, self-contained, escaped, and about nobody else."""

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client import letter
from fedscan_client.consent import WHY
from fedscan_client.intake.records import PatientId

RUN = {"run_id": "cxr-1", "model": "scatter", "since": "2026-01-02", "epsilon": 1.0, "delta": 1e-5}
TOLD: dict[str, Any] = {
    "site": "north",
    "patient": "ab" * 16,
    "day": "2026-01-15",
    "images": 3,
    "held": [{"study": "cd" * 16, "modality": "CR", "label": "ill", "split": "", "images": 3}],
    "consent": {
        "permit": True,
        "reason": "permit",
        "words": "",
        "basis": "register of 2026-01-10",
        "given": "2025-06-01",
        "until": None,
        "by_guardian": False,
    },
    "withdrawals": [],
    "runs": [RUN],
    "in_all": {"epsilon": 1.0, "delta": 1e-5},
}
WHO = PatientId("0815", "NORTH")


def text(html: str) -> str:
    """What is read, without tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.S)).split())


def test_the_whole_story():
    html = letter.write(TOLD, WHO, "Research office\n+49 30 1")
    words = text(html)
    for expected in (
        "Patient number 0815 (issued by NORTH)",
        "We hold 3 images of you",
        "You agreed on 1 June 2025. No end was set.",
        "cxr-1 scatter 2 January 2026 1.00 74 in 100",
        "right at most 74 times in 100",
        "not trained again without you",
        "Research office +49 30 1",
    ):
        assert expected in words
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">') and "@page { size: A4" in html


@pytest.mark.parametrize("reason", [*WHY, "no_register"])
def test_every_reason_has_its_words(reason):
    permit = reason in ("permit", "cleared", "no_objection")
    consent = TOLD["consent"] | {"reason": reason, "permit": permit}
    words = text(letter.write(TOLD | {"consent": consent}, WHO, ""))
    assert ("Your images are not used. " in words) != permit
    assert permit or letter._WHY[reason] in words
    assert ("on this basis: register of 2026-01-10" in words) == (reason == "no_objection")


def test_guardians_withdrawals_and_runs_without_privacy():
    guardian = TOLD["consent"] | {"by_guardian": True, "until": "2028-05-06", "given": None}
    words = text(letter.write(TOLD | {"consent": guardian}, WHO, ""))
    assert "other person agreed for you. This holds up to and including 6 May 2028. It ends in any case" in words
    gone = {"held": [], "images": 0, "withdrawals": [{"day": "2026-01-14", "destroyed": None}]}
    gone["consent"] = {"permit": False, "reason": "withdrawn_here"}
    words = text(letter.write(TOLD | gone, WHO, ""))
    assert "You withdrew on 14 January 2026." in words and "You take part in no training since." in words
    assert "We hold no images of you for research, and no key to any." in words and "may withdraw" not in words
    bare = {"runs": [RUN | {"epsilon": None}], "in_all": {"epsilon": None, "delta": None}}
    assert "none no protection" in text(letter.write(TOLD | bare, WHO, ""))
    assert "weak promise" in text(letter.write(TOLD | {"in_all": {"epsilon": 6.0, "delta": 0.0}}, WHO, ""))
    unused = text(letter.write(TOLD | {"runs": [], "in_all": {"epsilon": 0.0, "delta": 0.0}}, WHO, ""))
    assert "have not been used in any training" in unused and "coin" not in unused


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(html: str) -> Tags:
    found = Tags()
    found.feed(html)
    assert not found.open
    return found


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "</style><b>", "&lt;", "'x'"]
)
def test_hostile_values_are_only_text(hostile):
    plain = tags(letter.write(TOLD, WHO, "x"))
    told = TOLD | {
        "site": hostile,
        "patient": hostile,
        "held": [TOLD["held"][0] | {"study": hostile, "modality": hostile, "label": hostile}],
        "consent": TOLD["consent"] | {"basis": hostile},
        "runs": [RUN | {"run_id": hostile, "model": hostile}],
    }
    html = letter.write(told, PatientId(hostile, hostile), hostile)
    assert tags(html).tags == plain.tags and tags(html).attributes == plain.attributes
    objected = told | {"consent": told["consent"] | {"reason": "no_objection"}}
    assert "script" not in tags(letter.write(objected, WHO, "")).tags
    assert not {"script", "img", "a", "link", "iframe"} & set(plain.tags)
    assert not re.search(r"https?:|url\(|@import|src=", letter.write(TOLD, WHO, "x"))


@settings(max_examples=60)
@given(st.floats(0, 1000), st.sampled_from([0.0, 1e-9, 1e-5, 0.1, 1.0]))
def test_guesses_never_say_too_little(epsilon, delta):
    """Against the best test of two biased coins: (e^eps + delta) / (1 + e^eps), as the bound is attained."""
    bound = 100 * (0.5 + math.tanh(epsilon / 2) / 2 + (delta / (1 + math.exp(epsilon)) if epsilon < 700 else 0))
    assert min(bound, 100) - 1e-6 <= letter.guesses(epsilon, delta) <= min(100.0, bound + 1)


def test_guesses_at_known_values():
    assert [letter.guesses(e, 0.0) for e in (0.0, 1.0, 3.0, 8.0, 100.0)] == [50, 74, 96, 100.0, 100]
    assert letter.guesses(5.0, 0.0) == 99.4
