"""`fedscan simulate` and real agents, given the same RUN.toml, agree in everything but the noise."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from lab import Lab
from safetensors.numpy import load_file

NAMES = ("hospital-1", "hospital-2", "hospital-3")
RUN = """\
name = "same"

[task]
labels = ["no finding", "opacity"]
image_size = 32

[train]
rounds = 3
seed = 7

[data]
source = "phantom"

[simulation]
sites = 3
patients = 40

[federation]
sites = ["hospital-1", "hospital-2", "hospital-3"]
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A federation of its own: sites that are gone would hold up every run that asks all that are enrolled."""
    lab = Lab(tmp_path_factory.mktemp("same"))
    try:
        lab.coordinate()
        lab.log_in()
        yield lab
    finally:
        lab.close()


@pytest.fixture(scope="module")
def same(lab):
    """The pretend hospitals of a simulation, moved out and enrolled as real ones: (run, the simulation's folder)."""
    run, simulated = lab.root / "same.toml", lab.root / "simulated"
    run.write_text(RUN)
    lab.fedscan("simulate", run, "--set", "privacy.enabled=false", "--out", simulated)
    for name in NAMES:
        shutil.copytree(simulated / "sites" / name, lab.site(name))
        settings = lab.site(name) / "site.toml"  # its register lay relative to where it was
        tree = tomllib.loads(settings.read_text())
        tree["consent"]["path"] = str(simulated / "hospitals" / name / "consent.csv")
        tree["policy"] |= {"max_epsilon": 100.0, "max_delta": 1e-3}  # made for a run without privacy, it allows none
        settings.write_text(tomli_w.dumps(tree))
        lab.enrol(name)
        lab.start_agent(name)
    lab.await_online(*NAMES)
    return run, simulated


def launched(lab, run, *more):
    """The folder of a finished run, fetched."""
    run_id = lab.launch(run, *more)
    assert lab.await_end(run_id)["state"] == "finished", lab.logs()[-3000:]
    lab.fedscan("fetch", run_id, "--out", lab.root / run_id)
    return Path(lab.root / run_id)


def public(folder):
    """What a run folder tells that noise has no part in."""
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("run", "privacy_enabled", "rounds", "rounds_void", "model", "parameters", "bytes_up", "bytes_down", "sites")
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    of_round = ("round", "sites", "dropped", "void", "epsilon_spent_min", "epsilon_spent_max", "bytes_up", "bytes_down")
    return {key: summary[key] for key in kept}, [{key: line[key] for key in of_round} for line in rounds]


def test_without_privacy_and_with_a_seed_the_models_are_identical(lab, same):
    run, simulated = same
    real = launched(lab, run, "--set", "privacy.enabled=false")
    expected, model = load_file(simulated / "model.safetensors"), load_file(real / "model.safetensors")
    assert expected.keys() == model.keys()
    assert all(np.array_equal(expected[name], model[name]) for name in model)
    assert public(real) == public(simulated)


def test_with_privacy_they_agree_in_everything_but_the_noise(lab, same):
    run, _ = same
    simulated = lab.root / "simulated-private"
    lab.fedscan("simulate", run, "--out", simulated)
    real = launched(lab, run)
    assert public(real) == public(simulated)
    expected, model = load_file(simulated / "model.safetensors"), load_file(real / "model.safetensors")
    assert {n: (a.shape, a.dtype) for n, a in model.items()} == {n: (a.shape, a.dtype) for n, a in expected.items()}
    assert any(not np.array_equal(expected[name], model[name]) for name in model)
    told, wanted = (json.loads((folder / "summary.json").read_text())["metrics"] for folder in (real, simulated))
    assert "auroc" not in told and told["auroc_private"]["sites"] == wanted["auroc_private"]["sites"] == 3
