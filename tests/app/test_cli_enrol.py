"""`fedscan agent enrol`, `check`, `retire`: what hospital IT types, and what it reads."""

import json

import pytest

from fedscan import cli
from fedscan_client.check import checklist
from fedscan_client.check.finding import Finding


@pytest.fixture
def fake(fake_coordinator, tmp_path):
    with fake_coordinator["coordinator"](tmp_path / "centre") as it:
        yield it


@pytest.fixture
def agent(capsys):
    def typed(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["agent", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return stop.value.code, out, err

    return typed


def test_every_command_teaches(agent):
    for name in ("enrol", "check", "retire"):
        code, out, _ = agent(name, "--help")
        assert code == 0 and len(out.splitlines()) >= 15 and max(map(len, out.splitlines())) <= 122


def test_three_commands_of_a_hospital(agent, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invitation = fake.invitation(tmp_path / "INVITE.toml")
    code, out, _ = agent("enrol", invitation)
    assert code == 0
    for words in ("is enrolled with centre", "FILL IN", "SHA256:", "telephone", "anna = "):
        assert words in out
    assert "fedscan agent check north" in out and "declared patients 0" in out
    assert json.loads(agent("enrol", invitation, "--json")[1])["known"]["site"] == "north"
    code, out, _ = agent("check", "north")
    assert (
        code == 1 and "✓  coordinator" in out and "✗  declared size" in out and "-> " in out and "to put right" in out
    )
    code, out, _ = agent("check", "north", "--for-it")
    assert code == 0 and "outbound only" in out and str(fake.address.rpartition(":")[2]) in out
    code, out, _ = agent("retire", "north")
    assert code == 0 and "Nothing was done" in out and (tmp_path / "north/key").exists()
    code, out, _ = agent("retire", "north", "--yes")
    assert code == 0 and "retired" in out and not (tmp_path / "north/key").exists()
    code, out, _ = agent("check", "north")
    assert code == 1 and "retired" in out


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("skip", 0), ("warn", 0), ("fail", 1)])
def test_exit_code_and_json(agent, tmp_path, monkeypatch, state, code):
    one = Finding("cohort", state, "3 patients [of] it", "do this" if state in ("warn", "fail") else "", True)
    monkeypatch.setattr(checklist, "findings", lambda folder: iter([one]))
    got, out, err = agent("check", tmp_path, "--json")
    assert (got, err) == (code, "")
    told = json.loads(out)
    assert told["ok"] is (code == 0) and told["findings"][0]["local"] is True and told["findings"][0]["state"] == state
    got, out, _ = agent("check", tmp_path)
    assert got == code and "3 patients [of] it" in out and "not for a message to anybody outside" in out


def test_what_is_wrong_is_said_with_what_to_do(agent, tmp_path):
    code, _, err = agent("check", tmp_path / "none")
    assert code == 2 and "no folder" in err
    code, _, err = agent("enrol", tmp_path / "none.toml")
    assert code == 2 and "cannot be read" in err
    code, _, err = agent("check", tmp_path, "--for-it")
    assert code == 2 and "fedscan agent enrol" in err
    code, _, err = agent("retire", tmp_path, "--yes")
    assert code == 2 and "site.toml" in err
