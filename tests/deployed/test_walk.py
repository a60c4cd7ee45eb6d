"""What a newcomer does, from invitation to model, with a person who decides at one of the sites."""

import json
import re
import tomllib

import pytest
from lab import wait_for
from safetensors.numpy import load_file

QUORUM_OF_TWO = "\n[aggregation]\nmin_sites = 2\n"


def pending(lab, name, run_id):
    runs = {run["run_id"]: run["state"] for run in lab.json("agent", "runs", lab.site(name), "--json")["runs"]}
    return runs.get(run_id) == "pending"


def released(lab, name, run_id):
    """The site's own record of what left in a run."""
    folder = lab.site(name) / "audit"
    records = [json.loads(line) for path in sorted(folder.glob("log-*.jsonl")) for line in path.open()]
    return [record for record in records if record.get("event") == "release" and record.get("run_id") == run_id]


def test_three_hospitals_one_of_which_decides_by_hand_train_a_model(federation):
    lab = federation.lab
    run = lab.write_run("walk", rounds=2)
    seen = lab.fedscan("launch", run, "--dry-run")
    assert all(name in seen for name in ("north", "south", "west"))
    run_id = lab.launch(run)
    wait_for(lambda: pending(lab, "west", run_id), 90, "the run waits at west")
    told = lab.fedscan("agent", "show", lab.site("west"), run_id)
    assert "Does the federation work?" in told and "ada" in told
    assert lab.state_of(run_id)["state"] == "waiting" and not lab.rounds(run_id)
    lab.fedscan("agent", "approve", lab.site("west"), run_id, "--by", "Dr Who", "--yes")
    assert lab.await_end(run_id)["state"] == "finished", lab.logs()[-3000:]
    assert [(line["sites"], line["void"]) for line in lab.rounds(run_id)] == [(3, False), (3, False)]
    out = lab.root / "fetched"
    lab.fedscan("fetch", run_id, "--out", out)
    assert all(array.size for array in load_file(out / "model.safetensors").values())
    fetched = tomllib.loads((out / "run.toml").read_text())
    assert fetched["name"] == "walk" and fetched["train"]["rounds"] == 2
    summary = json.loads((out / "summary.json").read_text())
    assert [site["name"] for site in summary["sites"]] == ["north", "south", "west"]
    assert summary["metrics"]["auroc_private"]["sites"] == 3
    assert not {"checkpoints", "order.json"} & {path.name for path in out.iterdir()}
    for name in ("north", "south", "west"):
        lab.fedscan("agent", "audit", "verify", lab.site(name))
        assert len(released(lab, name, run_id)) == 3  # two updates and a histogram
        shown = json.dumps(lab.json("agent", "audit", "show", lab.site(name), "--released", "--json"))
        assert run_id in shown


def test_a_run_that_is_revoked_goes_on_without_the_site(federation):
    lab = federation.lab
    run_id = lab.launch(lab.write_run("revoked", rounds=8, private=False, more=QUORUM_OF_TWO))
    wait_for(lambda: pending(lab, "west", run_id), 90, "the run waits at west")
    lab.fedscan("agent", "approve", lab.site("west"), run_id, "--by", "Dr Who", "--yes")
    wait_for(lambda: len(lab.rounds(run_id)) >= 2, 90, "two rounds")
    lab.fedscan("agent", "revoke", lab.site("west"), run_id, "--by", "Dr Who", "--yes", "--reason", "new advice")
    left = len(released(lab, "west", run_id))
    assert lab.await_end(run_id)["state"] == "finished"
    assert len(released(lab, "west", run_id)) == left
    rounds = lab.rounds(run_id)
    assert rounds[0]["sites"] == 3 and rounds[-1]["sites"] == 2
    assert any(note.startswith("west") for note in rounds[-1]["dropped"])


def test_a_run_that_is_refused_by_hand_starts_without_the_site(federation):
    lab = federation.lab
    run_id = lab.launch(lab.write_run("refused", rounds=1, private=False, more=QUORUM_OF_TWO))
    wait_for(lambda: pending(lab, "west", run_id), 90, "the run waits at west")
    lab.fedscan("agent", "refuse", lab.site("west"), run_id, "--by", "Dr Who", "--yes", "--reason", "not this time")
    assert lab.await_end(run_id)["state"] == "finished"
    assert lab.rounds(run_id)[0]["sites"] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("privacy.enabled=false", "privacy enabled"),
        ("privacy.unit=image", "patients"),
        ("privacy.noise_multiplier=0.05", "floor"),
        ("privacy.engine=opacus", "any weights"),
    ],
)
def test_the_doors_for_research_are_shut(federation, change, words):
    lab = federation.lab
    told = lab.fedscan("launch", lab.write_run("door"), "--set", change, "--yes", code=2)
    assert words in re.sub(r"\s+", " ", told)


def test_what_a_stranger_reaches_is_little(federation):
    import httpx

    lab = federation.lab
    ca = str(lab.state / "pki" / "ca.crt")
    import ssl

    with httpx.Client(base_url=f"https://127.0.0.1:{lab.port}", verify=ssl.create_default_context(cafile=ca)) as http:
        assert http.get("/fedscan/v1/hello").status_code == 200
        for path in ("/", "/docs", "/openapi.json", "/health", "/v1/control/list-runs", "/v1/runtime/acquire-task"):
            for method in ("GET", "POST"):
                assert http.request(method, path).status_code in (404, 405), path
        for path in ("/fedscan/v1/sites", "/fedscan/v1/runs", "/fedscan/v1/site"):
            assert http.get(path).status_code == 401
        assert http.post("/v1/fleet/pull-messages", content=b"").status_code in (400, 401, 403)


def test_nobody_else_can_read_what_lies_at_the_coordinator_and_the_sites(federation):
    lab = federation.lab
    roots = [lab.state, *(lab.site(name) for name in ("north", "south", "west"))]
    open_ = [p for root in roots for p in [root, *root.rglob("*")] if not p.is_symlink() and p.stat().st_mode & 0o077]
    # A site's folder is IT's to place: what is secret in it is closed by itself.
    secret = [p for p in open_ if lab.state in p.parents or p.name in ("key", "node.key", "ledger.sqlite", "secret")]
    assert not secret
    lab.fedscan("server", "check", "--state", lab.state)
