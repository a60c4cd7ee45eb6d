"""What a run would meet at the hospitals: refusals and prices by public policies, the order, the page in 80 columns."""

import dataclasses
import io
import json
import math
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load, save_file

from fedscan import launch, launch_page, people
from fedscan.profiles import Profile
from fedscan_core import accounting, config, order, policy
from fedscan_core.errors import ConfigError
from fedscan_core.policy import Policy
from fedscan_server import app as server_app

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
ADA = Profile("trial", "https://trial.example:9443", "Trial", "", "ada", "researcher", "secret")
KEY = Ed25519PrivateKey.generate()


def site(name, patients=500, *, online=True, left=(9.0, 1e-4), **values):
    told = policy.public(Policy(**{"max_epsilon": 20.0, "max_delta": 1e-4} | values), name, patients, left)
    return people.Site(name, online, "2026-05-01T10:11:12+00:00", json.loads(json.dumps(told)))


SITES = [site("north"), site("south", 340, approval="auto-within-policy"), site("west", 90, online=False)]


def prospects(run, sites=SITES, role="researcher"):
    clean, _ = launch.deployed(run)
    return launch.look(clean, launch.make_order(clean, ADA, KEY, NOW), sites, role, NOW)


def page(found, width=80):
    out = io.StringIO()
    launch_page.show(found, ADA, Console(file=out, width=width))
    return out.getvalue()


def test_everybody_willing_is_priced_by_their_own_size(run_for):
    run = run_for(privacy={"noise_multiplier": 1.0}, train={"patients_per_step": 30, "rounds": 2})
    found = prospects(run)
    assert not found.faults and len(found.willing) == 3
    assert [site.plan for site in found.sites] == [accounting.plan_for(run, n) for n in (500, 340, 90)]
    assert [site.approval for site in found.sites] == ["manual", "auto-within-policy", "manual"]


@pytest.mark.parametrize(
    ("values", "sections", "words"),
    [
        ({"max_epsilon": 1.0}, {}, "this site allows 1"),
        ({"left": (0.5, 1e-4)}, {}, "this site allows 0.5"),
        ({"max_rounds": 2}, {}, "3 rounds, this site allows 2"),
        ({"models": ("cnn",)}, {}, "models are cnn, not 'scatter'"),
        ({"purposes": ("screening",)}, {"study": {"purpose": "triage"}}, "purposes are screening"),
        ({"ethics_approval": "EC-1"}, {}, "study.ethics_approval = 'EC-1'"),
        ({"valid_until": date(2026, 5, 3)}, {}, "ended on 2026-05-03"),
        ({}, {"privacy": {"enabled": False}}, "only with privacy enabled"),
    ],
)
def test_who_would_refuse_and_why(run_for, values, sections, words):
    found = prospects(run_for(**{"privacy": {"target_epsilon": 2.0}} | sections), [*SITES, site("east", **values)])
    east = next(site for site in found.sites if site.name == "east")
    assert words in east.refusal
    assert east not in found.willing


def test_a_site_that_names_launchers_wants_their_key(run_for):
    stranger = order.public_text(Ed25519PrivateKey.generate())
    sites = [
        site("knows", launchers={"ada": order.public_text(KEY)}),
        site("another-key", launchers={"ada": stranger}),
        site("another", launchers={"bob": order.public_text(KEY)}),
    ]
    why = {site.name: site.refusal for site in prospects(run_for(), sites).sites}
    assert why["knows"] is None
    assert "not signed with the key" in why["another-key"]
    assert "only bob may launch" in why["another"]


def test_a_site_whose_policy_or_size_is_no_use_refuses_for_itself_only(run_for):
    none = people.Site("east", True, "", {"patients_declared": 3})
    found = prospects(run_for(), [*SITES, none, site("tiny", 0)])
    why = {site.name: site.refusal for site in found.sites}
    assert "its policy" in why["east"] and "0 patients" in why["tiny"]
    assert len(found.willing) == 3
    assert "east" in page(found) and "tiny" in page(found)


def test_too_few_sites_or_a_viewer_do_not_start(run_for):
    assert "2 of 2 sites would take part; aggregation.min_sites asks for 3" in prospects(run_for(), SITES[:2]).faults
    assert "viewers do not launch" in prospects(run_for(), role="viewer").faults[0]
    assert "It would not start" in page(prospects(run_for(), []))


def test_only_the_sites_named_are_asked(run_for):
    run = run_for(federation={"sites": ["south", "north", "south"]}, aggregation={"min_sites": 2})
    assert [site.name for site in prospects(run).sites] == ["south", "north"]
    with pytest.raises(ConfigError, match=r"'nort' is enrolled here\. Did you mean 'north'"):
        prospects(run_for(federation={"sites": ["nort"]}))


def test_bytes_are_those_of_the_model_and_of_what_is_trained(run_for):
    whole = prospects(run_for())
    shape, _ = server_app.initial_model(whole.run)
    assert whole.bytes_down == whole.bytes_up == sum(array.nbytes for array in shape.values())
    head = prospects(run_for(model={"name": "cnn", "trainable": "head"}, train={"learning_rate": 0.1}))
    assert 0 < head.bytes_up < head.bytes_down


def test_minutes_are_a_lower_bound_by_polling_or_by_the_line(run_for):
    found = prospects(run_for(train={"rounds": 100}, privacy={"target_epsilon": 8.0}))
    assert found.least_minutes == pytest.approx(102 * 3 / 60)
    big = dataclasses.replace(found, bytes_down=10**9, bytes_up=10**9)
    assert big.least_minutes == pytest.approx(102 * (3 * 2e9 / 125e6) / 60)


def test_what_is_nobodys_business_is_not_sent(run_for, tmp_path):
    run = run_for(data={"dir": "/somewhere/of/mine", "table": "secret.csv"}, simulation={"patients": 99})
    clean, init = launch.deployed(run)
    told = config.to_toml(clean) + config.for_sites(clean)
    assert "of/mine" not in told and "secret.csv" not in told and init == b""
    assert clean.simulation == config.Simulation()
    assert clean.train == run.train and clean.task == run.task


def test_start_weights_go_along_as_weights_only(run_for, tmp_path):
    run = run_for()
    model, _ = server_app.initial_model(run)
    mine = {name: array + np.float32(0.5) for name, array in model.items()} | {"extra": np.zeros(3, np.float32)}
    path = tmp_path / "start.safetensors"
    save_file(mine, path, metadata={"by": "a person's name"})
    clean, init = launch.deployed(run.model_copy(update={"model": run.model.model_copy(update={"init": str(path)})}))
    assert clean.model.init == launch.INIT and str(tmp_path) not in config.for_sites(clean)
    sent = load(init)
    assert sent.keys() == model.keys()
    assert all((sent[name] == mine[name]).all() for name in model)
    assert b"a person" not in init
    found = launch.look(clean, launch.make_order(clean, ADA, KEY, NOW), SITES, "researcher", NOW)
    assert len(found.willing) == 3


def test_the_order_is_signed_by_its_launcher_and_lives_as_long_as_its_run_may(run_for):
    run = run_for(federation={"approval_hours": 24, "round_minutes": 60}, train={"rounds": 48})
    signed = launch.make_order(run, ADA, KEY, NOW)
    assert order.signed_by(signed, order.public_text(KEY)) and signed.launcher == "ada"
    assert signed.config == config.for_sites(run)
    assert datetime.fromisoformat(signed.issued) == NOW
    assert datetime.fromisoformat(signed.valid_until) == NOW + timedelta(hours=24 + 49, days=7)
    assert order.fault(signed, NOW) is None
    long = launch.make_order(run_for(train={"rounds": 100_000}), ADA, KEY, NOW)
    assert datetime.fromisoformat(long.valid_until) == NOW + order.LONGEST
    assert order.fault(long, NOW) is None
    assert launch.make_order(run, ADA, KEY, NOW).run_id != signed.run_id


@pytest.mark.parametrize("width", [80, 200])
def test_the_page_says_everything_and_fits(run_for, width):
    study = {"purpose": "triage [night]", "question": "Can it? " * 30, "ethics_approval": "EC-1", "contact": "ada"}
    run = run_for(study=study, privacy={"target_epsilon": 2.0}, train={"rounds": 100})
    sites = [*SITES, site("a-hospital-with-a-very-long-name-indeed", max_rounds=50, models=("cnn",))]
    text = page(prospects(run, sites), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip()]
    assert "…" not in text
    for part in (
        *("small", "at Trial (https://trial.example:9443)", "triage [night]", "EC-1", "study.data_use_agreement"),
        *("scatter", "100 rounds of one step", "at most epsilon 2", "delta 1e-05"),
        *("north", "500", "asks a person", "takes part", "refuses", "offline", "west was last seen 2026-05-01 10:11"),
        *("this site allows 50", "models are cnn", "in a round", "at least 5 minutes", "72 hours"),
        "3 of 4 sites would take part; 3 are needed",
    ):
        assert part in text, part


def test_a_page_for_an_old_terminal_is_drawn_with_its_characters(run_for):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    launch_page.show(prospects(run_for()), ADA, Console(file=out))
    out.flush()
    assert b"by its policy\n---" in out.buffer.getvalue()


def test_a_run_without_privacy_is_called_so(run_for):
    run = run_for(privacy={"enabled": False})
    found = prospects(run, [site(name, research_cohort=True) for name in "abc"])
    assert len(found.willing) == 3
    assert page(found).count("NO PRIVACY") == 2 and "no bound" in page(found)
    told = json.dumps(launch.as_json(found, ADA), allow_nan=False)
    assert json.loads(told)["sites"][0]["plan"]["epsilon"] is None


def test_json_says_what_the_page_says_and_no_secret(run_for):
    found = prospects(run_for(), [*SITES, site("east", max_rounds=1)])
    told = json.loads(json.dumps(launch.as_json(found, ADA)))
    assert told["would_start"] is True and told["willing"] == 3 and told["faults"] == []
    assert {one["name"]: one["refusal"] is None for one in told["sites"]}["east"] is False
    assert told["sites"][0]["plan"]["epsilon"] == pytest.approx(found.sites[0].plan.epsilon)
    assert "secret" not in json.dumps(told)


@given(st.floats(0, 9e14))
def test_sizes_are_three_digits_and_a_unit(number):
    text, unit = launch_page.size(number).split()
    assert len(text.replace(".", "")) <= 3 and "e" not in text
    scale = 1000.0 ** ("bytes", "kB", "MB", "GB", "TB").index(unit)
    assert math.isclose(float(text) * scale, number, rel_tol=0.006, abs_tol=0.51)
