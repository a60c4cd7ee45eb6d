"""What a person sees: plain lines, the final tables, and NO PRIVACY on every line of a run without."""

import io
import logging
import math

import pytest
from rich.console import Console

from fedscan import view
from fedscan_core import config_file
from fedscan_server.app import Progress

RUN = config_file.parse({"name": "seen"})
OPEN = config_file.parse({"name": "seen", "privacy": {"enabled": False}})
METRICS = {"auroc": {"value": 0.9123, "status": "simulation_only", "split": "test"}}
SEEN = {"value": 0.88, "low": 0.79, "high": 0.951, "status": "private"}
UNSEEN = {"value": None, "status": "withheld", "reason": "not clear of the noise"}
PRIVATE = {
    "split": "test",
    "sites": 4,
    "threshold": 0.7,
    "confidence": 0.95,
    "cells": [
        {"attribute": "all", "group": "all", "patients": 1234.4, "patients_noise_sd": 21.7}
        | dict.fromkeys(("auroc", "sensitivity", "specificity", "ece"), SEEN),
        {"attribute": "sex", "group": "F", "patients": -3.1, "patients_noise_sd": 21.7}
        | dict.fromkeys(("auroc", "sensitivity", "specificity", "ece"), UNSEEN),
    ],
}
STEPS = [
    Progress("prepare", 0, 4, 0, 2),
    Progress("prepare", 0, 4, 2, 2),
    Progress("declare", 0, 4, 1, 2),
    Progress("declare", 0, 4, 2, 2),
    *(Progress("round", n, 4, done, 2, 0.5 * n, 0.6 * n) for n in (1, 2, 3) for done in (1, 2)),
    Progress("round", 4, 4, 2, 2, 2.0, 2.4, METRICS, ("north: the update is not finite",)),
    Progress("done", 4, 4, 2, 2, 2.0, 2.4, METRICS),
]


def lines(run, steps=STEPS, **console):
    out = io.StringIO()
    with view.View(run, Console(file=out, width=200, **console)) as shown:
        for step in steps:
            shown(step)
            if shown._live:
                shown._live.refresh()  # by itself it draws eight times a second
    return out.getvalue()


def test_plain_lines_say_round_sites_epsilon_and_metrics():
    text = lines(RUN).splitlines()
    assert "images of 2 of 2 sites read" in text
    last = next(line for line in text if line.startswith("round 4/4"))
    for part in ("sites 2/2", "epsilon spent per site 2.00 to 2.40 of 8", "0.912", "simulation only", "not finite"):
        assert part in last
    assert text[-1] == "done"


def test_rounds_that_say_nothing_new_are_rationed():
    fast = [Progress("round", n, 1000, 2, 2, 0.1, 0.1) for n in range(1, 1000)]
    assert len(lines(RUN, fast).splitlines()) < 10


def test_a_run_without_privacy_says_so_on_every_line():
    steps = [
        Progress(s.phase, s.round, s.rounds, s.sites_done, s.sites, math.inf, math.inf, s.metrics, s.notes)
        for s in STEPS
    ]
    text = lines(OPEN, steps).splitlines()
    assert text
    assert all(view.NO_PRIVACY in line for line in text)


def test_the_reason_for_a_slow_engine_is_shown_while_a_run_is():
    shown = io.StringIO()
    console = Console(file=shown, width=60)
    log = logging.getLogger("fedscan.engine")
    with view.View(RUN, console):
        log.warning("patients are computed one by one, which takes several times as long: %s", "dropout")
    log.warning("not shown")
    text = shown.getvalue()
    assert text.count("engine: patients are computed one by one") == 1 and text.endswith("dropout\n")


def test_the_live_view_shows_the_same_and_clears_itself():
    text = lines(RUN, force_terminal=True)
    for part in ("reading images", "round", "sites 2/2 of round 4", "0.912"):
        assert part in text


@pytest.mark.parametrize("private", [True, False])
def test_the_summary_names_every_site_and_what_the_figures_are(private):
    site = {
        "name": "north",
        "patients_declared": 84,
        "epsilon": 7.99 if private else None,
        "delta": 1e-5,
        "noise_multiplier": 4.65,
        "sampling_rate": 1.0,
        "unit": "patient",
    }
    summary = {
        "run": "seen",
        "rounds": 4,
        "rounds_void": 1,
        "model": "scatter",
        "parameters": 13888,
        "privacy_enabled": private,
        "sites": [site],
        "metrics": {
            **METRICS,
            "auroc_per_site": {"north": {"value": 0.9}, "south": {"value": 0.7}},
            **({"auroc_private": {"value": 0.88}, "private_evaluation": PRIVATE} if private else {}),
        },
    }
    out = io.StringIO()
    view.show_summary(summary, "runs/seen", Console(file=out, width=80))
    text = out.getvalue()
    for part in ("north", "south (never trains)", "0.912", "simulation only", "1 rounds had too few"):
        assert part in text
    for part in (
        "noisy histograms of 4 sites' test patients",
        *("sex F", "1234", "+/- 22", "0.88", "0.79-0.95", "withheld", "not clear of the noise", "at a score of 0.7"),
    ):
        assert (part in text) == private, part
    assert "…" not in text  # it fits a terminal of 80 columns
    assert ("7.990" in text) == private
    assert (view.NO_PRIVACY in text) != private


def test_many_sites_are_shortened():
    site = {"patients_declared": 1, "epsilon": 1.0, "delta": 1e-5, "noise_multiplier": 1.0, "sampling_rate": 1.0}
    summary = {
        "run": "many",
        "rounds": 1,
        "rounds_void": 0,
        "model": "scatter",
        "parameters": 1,
        "privacy_enabled": True,
        "sites": [{**site, "name": f"site-{n}", "unit": "patient"} for n in range(512)],
        "metrics": {},
    }
    out = io.StringIO()
    view.show_summary(summary, "runs/seen", Console(file=out, width=120))
    assert "501 more" in out.getvalue()
    assert len(out.getvalue().splitlines()) < 25
