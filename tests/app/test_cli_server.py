"""`fedscan server` from the outside."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from fedscan.cli import _parser, main
from fedscan_core import invite as invitations
from fedscan_core import node_key
from fedscan_server.coordinator import service, sites, state


@pytest.fixture
def fedscan(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSCAN_COORDINATOR", raising=False)

    def go(*words: str):
        with pytest.raises(SystemExit) as stop:
            main(["server", *words])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return go


@pytest.fixture
def made(fedscan):
    assert fedscan("init", "--address", "localhost:8443")[0] == 0
    return fedscan


def test_a_newcomers_path(made, tmp_path):
    code, out, _ = made("invite", "hospital-a")
    invite = invitations.read(tmp_path / "hospital-a.invite.toml", "site")
    assert code == 0 and "fedscan agent enrol" in out and invite.token not in out
    assert invitations.spelled(invite.ca_fingerprint) in out and max(map(len, out.splitlines())) <= 80
    assert invitations.spelled(invite.ca_fingerprint).replace("\n  ", ":").strip() == invite.ca_fingerprint
    code, out, _ = made("person", "add", "ann")
    assert code == 0 and "fedscan login" in out
    assert invitations.read(tmp_path / "ann.invite.toml", "person").name == "ann"
    assert (tmp_path / "ann.invite.toml").stat().st_mode & 0o777 == 0o600
    code, out, _ = made("sites", "--json")
    assert json.loads(out)[0]["state"].startswith("invited until")
    key = node_key.public_text(node_key.create(tmp_path / "node.key"))
    sites.redeem(state.load(tmp_path / "coordinator"), invite.token, key, {})
    assert json.loads(made("sites", "--json")[1])[0]["fingerprint"] == node_key.fingerprint(key)
    assert "hospital-a" in made("sites")[1]


def test_the_folder_is_named_by_option_or_environment(fedscan, tmp_path, monkeypatch):
    assert fedscan("init", "--address", "localhost:8443", "--state", "here")[0] == 0
    assert fedscan("sites")[0] == 2
    monkeypatch.setenv("FEDSCAN_COORDINATOR", str(tmp_path / "here"))
    assert "No sites yet" in fedscan("sites")[1]


def test_a_second_init_changes_nothing(made, tmp_path):
    before = (tmp_path / "coordinator/pki/ca.key").read_bytes()
    code, _, err = made("init", "--address", "localhost:8443")
    assert code == 2 and "left alone" in err
    assert (tmp_path / "coordinator/pki/ca.key").read_bytes() == before


def test_an_invitation_never_replaces_another_file(made, tmp_path):
    (tmp_path / "thesis.toml").write_text("years of work")
    code, _, err = made("invite", "a", "--out", "thesis.toml")
    assert code == 2 and "left alone" in err and (tmp_path / "thesis.toml").read_text() == "years of work"
    assert made("sites", "--json")[1] == "[]\n"  # and no invitation was made
    assert made("invite", "a", "--out", "gone/a.toml")[0] == 2
    first = (made("invite", "a"), (tmp_path / "a.invite.toml").read_text())[1]
    assert made("invite", "a")[0] == 0 and (tmp_path / "a.invite.toml").read_text() != first


def test_revoking_asks(made, tmp_path, monkeypatch):
    made("invite", "a")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, _, err = made("revoke", "a")
    assert code == 2 and "--yes" in err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: "")
    assert "Nothing was changed" in made("revoke", "a")[1]
    assert len(json.loads(made("sites", "--json")[1])) == 1
    code, out, _ = made("revoke", "a", "--yes")
    assert code == 0 and "shut out" in out and json.loads(made("sites", "--json")[1]) == []
    assert made("revoke", "a", "--yes")[0] == 2


def test_people_come_and_go(made):
    assert "Nobody yet" in made("person", "list")[1]
    made("person", "add", "ann", "--role", "operator")
    assert made("person", "remove", "ann")[0] == 0
    assert made("person", "remove", "ann")[0] == 2


def test_what_does_not_run_is_said(made):
    code, out, _ = made("status", "--json")
    now = json.loads(out)
    assert code == 1 and not now["healthy"] and now["process"] is None and now["superlink"] and now["edge"]
    assert "does not run" in made("status")[1]
    assert made("stop")[:2] == (0, "it was not running\n")


def test_check_has_an_exit_code(made, tmp_path):
    code, out, _ = made("check")
    assert code == 0 and "✓" in out and "✗" not in out
    os.chmod(tmp_path / "coordinator/secrets/control", 0o644)
    code, out, _ = made("check", "--json")
    assert code == 1 and all(item["remedy"] for item in json.loads(out) if item["verdict"] == "bad")


def test_certificates(made, tmp_path):
    c = state.load(tmp_path / "coordinator")
    before = c.certificate.read_bytes()
    assert "is good until" in made("cert", "renew")[1] and c.certificate.read_bytes() != before
    assert made("cert", "install", str(c.certificate), str(c.private_key))[0] == 0
    code, _, err = made("cert", "renew")
    assert code == 2 and "cert install" in err
    assert made("init", "--state", "b", "--address", "localhost:1", "--key", str(c.private_key))[0] == 2


def test_every_command_explains_itself(capsys):
    for words in ("init", "start", "status", "stop", "invite", "revoke", "sites", "check", "cert renew", "person add"):
        with pytest.raises(SystemExit):
            _parser().parse_args(["server", *words.split(), "--help"])
        assert len(capsys.readouterr().out.splitlines()) > 6


def test_nothing_heavy_is_loaded_to_look_after_people(made):
    code = (
        "import sys; from fedscan.cli import main\ntry: main(['server', 'person', 'list'])\nexcept SystemExit: pass\n"
    )
    code += "print({'torch', 'flwr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout.endswith("set()\n"), done.stderr


@pytest.mark.deployed
def test_start_runs_until_it_is_told_to_stop(made, tmp_path):
    """All three processes, as a person starts them; a killed SuperLink comes back; SIGTERM leaves nothing."""
    pytest.importorskip("fedscan_server.edge")
    c = state.load(tmp_path / "coordinator")
    text = (c.folder / state.FILE).read_text().replace("0.0.0.0:8443", f"127.0.0.1:{service.free_port()}")
    (c.folder / state.FILE).write_text(text)
    argv = [sys.executable, "-m", "fedscan.cli", "server", "start"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout
    try:
        lines: list[str] = []
        while not lines or not lines[-1].startswith("ready"):
            lines.append(process.stdout.readline())
            assert lines[-1] and not any("ended" in line for line in lines), (c.logs / "edge.log").read_text()
        assert made("status")[0] == 0
        assert made("check")[0] == 0
        assert made("start")[0] == 2
        pids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        assert len(pids) == 3
        os.kill(int(pids[0]), signal.SIGKILL)
        while "superlink: ended" not in lines[-1]:
            lines.append(process.stdout.readline())
        while "superlink: started" not in lines[-1]:
            lines.append(process.stdout.readline())
        assert made("stop")[0] == 0
        assert process.wait(60) == 0
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid), 0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
