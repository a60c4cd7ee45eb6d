"""`fedscan agent start|status|pause|resume|stop` as a person meets them."""

import json

import pytest

from fedscan import cli
from fedscan_client import connection as connections
from fedscan_client.connection import Connection
from fedscan_client.intake.sources.settings import Table
from fedscan_client.site import Site, save
from fedscan_core.policy import Policy


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "north"
    (folder / "pictures").mkdir(parents=True)
    source = {"source": Table(kind="table", folder=folder / "pictures")}
    allowed = Policy(max_epsilon=1.0, max_delta=1e-5, research_cohort=True)
    save(Site(name="north", patients_declared=20, source=source, policy=allowed, folder=folder))
    made = Connection("https://localhost:1", "lab", None, "north", "2026-01-01T00:00:00+00:00")
    connections.save(folder, made)
    return folder


def fedscan(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["agent", *map(str, words)])
    return stop.value.code


@pytest.mark.parametrize("command", ["start", "status", "pause", "resume", "stop"])
def test_help_teaches(command, capsys):
    assert fedscan(command, "--help") == 0
    assert f"fedscan agent {command} /srv/fedscan/site" in capsys.readouterr().out


def test_pause_and_resume(site, capsys):
    assert fedscan("pause", site) == 0 and (site / "paused").exists()
    assert fedscan("pause", site) == 0
    assert "already" in capsys.readouterr().out
    assert fedscan("status", site, "--offline") == 3
    assert "also paused" in capsys.readouterr().out
    assert fedscan("resume", site) == 0 and not (site / "paused").exists()
    assert "No agent runs" in capsys.readouterr().out


def test_status_in_json(site, capsys):
    assert fedscan("status", site, "--json", "--offline") == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["site"], told["state"], told["pid"]) == ("north", "stopped", None)


def test_stop_without_an_agent(site, capsys):
    assert fedscan("stop", site) == 0
    assert "No agent" in capsys.readouterr().out


def test_start_of_a_site_that_is_not_enrolled(site, capsys):
    (site / "connection.toml").unlink()
    assert fedscan("start", site) == 2
    assert "not enrolled" in capsys.readouterr().err


def test_start_without_its_key(site, capsys):
    assert fedscan("start", site) == 2
    assert "node.key" in capsys.readouterr().err
