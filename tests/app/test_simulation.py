"""Whole federations on this machine: what they leave, what they spend, and how they go on after a stop."""

import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedscan
from fedscan_client import app as client_app
from fedscan_client import cohort
from fedscan_client import site as sites
from fedscan_client.dp import ledger
from fedscan_core import config_file
from fedscan_core.errors import ConfigError, DataError, FolderError, MissingExtra, RunFailed
from fedscan_core.wire import Reply
from fedscan_server.app import Progress

SHARED = Path(__file__).resolve().parents[2].parent / "shared/data"
needs_images = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared folder of public images is not here")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"

SUMMARY_KEYS = {
    "run",
    "config_sha256",
    "versions",
    "rounds",
    "model",
    "parameters",
    "seconds",
    "bytes_up",
    "bytes_down",
}
SITE_KEYS = {"name", "patients_declared", "epsilon", "delta", "noise_multiplier", "sampling_rate", "steps"}


def model_of(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_run_leaves_a_whole_folder(run_for, table, tmp_path):
    run = run_for(privacy={"target_epsilon": 3.0}, evaluation={"private": True, "every": 2})
    steps: list[Progress] = []
    summary = fedscan.simulate(run, data=table, out=tmp_path / "run", watch=steps.append)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= {"run.toml", "rounds.jsonl", "summary.json", "model.safetensors", "checkpoints", "log.txt", "sites"}
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert SUMMARY_KEYS | {"sites", "metrics"} <= summary.keys()
    assert [site["name"] for site in summary["sites"]] == ["phantom_1", "phantom_2", "phantom_3"]
    for site in summary["sites"]:
        assert site.keys() >= SITE_KEYS
        assert 2.9 < site["epsilon"] <= 3.0  # training and evaluation together
        assert (site["unit"], site["adjacency"]) == ("patient", "add_or_remove_one")
        assert site["epsilon_replace_one"] > 2 * site["epsilon"]  # everybody in every step: sensitivity 2
        booked = ledger.summary(sites.load(tmp_path / "run/sites" / site["name"]).book)
        assert booked["reserved"]["epsilon"] == site["epsilon"]
        (only,) = booked["runs"].values()
        assert {n: row["state"] for n, row in only["rounds"].items()} == dict.fromkeys((1, 2, 3, 0), "settled")
    pooled = summary["metrics"]["auroc"]
    assert 0 <= pooled["value"] <= 1
    assert pooled["status"] == "simulation_only"
    assert summary["metrics"]["auroc_private"]["status"] in ("private", "withheld")
    assert steps[0].phase == "prepare"
    assert steps[-1].phase == "done"
    rounds = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in rounds] == [1, 2, 3]
    assert ["metrics" in record for record in rounds] == [False, True, True]
    resolved = config_file.load(tmp_path / "run/run.toml")
    assert resolved.privacy == run.privacy
    assert resolved.data.dir == str(table)


def test_evaluation_only_sites_are_measured_and_spend_nothing(run_for, table, tmp_path):
    rules = [{"name": "a", "members": ["phantom_1", "phantom_2"]}, {"name": "phantom_3", "role": "evaluate"}]
    summary = fedscan.simulate(run_for(data={"sites": rules}), data=table, out=tmp_path / "run")
    assert [site["name"] for site in summary["sites"]] == ["a"]
    assert summary["metrics"]["auroc_per_site"].keys() == {"a", "phantom_3"}
    assert not (tmp_path / "run/sites/phantom_3/ledger.sqlite").exists()


def test_an_undefined_auroc_is_withheld_not_invented(run_for, table, edit, tmp_path):
    edit(lambda row: row if (row["site"], row["split"], row["label"]) != ("phantom_2", "test", "0") else None)
    metrics = fedscan.simulate(run_for(), data=table, out=tmp_path / "run")["metrics"]
    assert "phantom_2" in metrics["auroc_withheld"]
    assert metrics["auroc_per_site"].keys() == {"phantom_1", "phantom_3"} - set(metrics["auroc_withheld"]) != set()


def test_without_privacy_the_same_seed_gives_the_same_model(run_for, table, tmp_path):
    run = run_for(privacy={"enabled": False}, train={"rounds": 4, "local_steps": 2, "patients_per_step": 8})
    for name in ("a", "b"):
        summary = fedscan.simulate(run, data=table, out=tmp_path / name)
    assert same(model_of(tmp_path / "a"), model_of(tmp_path / "b"))
    assert summary["privacy_enabled"] is False
    assert summary["sites"][0]["epsilon"] is None  # unbounded, and JSON has no infinity
    other = run_for(privacy={"enabled": False}, train={**run.train.model_dump(), "seed": 1})
    fedscan.simulate(other, data=table, out=tmp_path / "c")
    assert not same(model_of(tmp_path / "a"), model_of(tmp_path / "c"))


def test_with_privacy_no_two_runs_are_the_same(run_for, table, tmp_path):
    for name in ("a", "b"):
        fedscan.simulate(run_for(), data=table, out=tmp_path / name)
    assert not same(model_of(tmp_path / "a"), model_of(tmp_path / "b"))


def stopped_after(round_):
    """(stop, watch): sets stop once this round is done."""
    stop = threading.Event()

    def watch(step):
        if step.phase == "round" and step.round == round_ and step.sites_done == step.sites:
            stop.set()

    return stop, watch


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_a_stopped_run_goes_on_to_the_same_model(run_for, table, tmp_path, strategy):
    run = run_for(
        privacy={"enabled": False},
        aggregation={"strategy": strategy, "server_learning_rate": 0.1},
        train={"rounds": 5, "tail_average": 0.5},
    )
    fedscan.simulate(run, data=table, out=tmp_path / "whole")
    stop, watch = stopped_after(2)
    with pytest.raises(RunFailed, match="--resume") as caught:
        fedscan.simulate(run, data=table, out=tmp_path / "cut", watch=watch, stop=stop)
    assert caught.value.exit_code == 1
    summary = fedscan.resume(tmp_path / "cut")
    assert summary["rounds"] == 5
    assert same(model_of(tmp_path / "whole"), model_of(tmp_path / "cut"))
    assert fedscan.resume(tmp_path / "cut") == summary  # finished: nothing happens any more


def test_what_was_spent_before_a_stop_stays_spent(run_for, table, tmp_path):
    stop, watch = stopped_after(1)
    with pytest.raises(RunFailed):
        fedscan.simulate(run_for(), data=table, out=tmp_path / "run", watch=watch, stop=stop)
    book = sites.load(tmp_path / "run/sites/phantom_1").book
    before = ledger.summary(book)
    summary = fedscan.resume(tmp_path / "run")
    booked = ledger.summary(book)
    assert booked["reserved"] == before["reserved"] and booked["rows"] > before["rows"]
    assert booked["reserved"]["epsilon"] == summary["sites"][0]["epsilon"]
    assert [sorted(run["rounds"]) for run in booked["runs"].values()] == [[0, 1, 2, 3]]  # 0: the evaluation


def test_resume_refuses_what_is_no_run_or_another_one(run_for, table, tmp_path):
    with pytest.raises(FolderError, match=r"simulation\.json"):
        fedscan.resume(tmp_path)
    stop, watch = stopped_after(1)
    with pytest.raises(RunFailed):
        fedscan.simulate(run_for(), data=table, out=tmp_path / "run", watch=watch, stop=stop)
    path = tmp_path / "run/run.toml"
    path.write_text(path.read_text().replace("learning_rate = 1.0", "learning_rate = 2.0", 1))
    with pytest.raises(FolderError, match="something else"):
        fedscan.resume(tmp_path / "run")


def test_two_processes_never_work_on_one_folder(run_for, table, tmp_path):
    def watch(step):
        if step.phase == "round":
            with pytest.raises(FolderError, match="Another process"):
                fedscan.resume(tmp_path / "run")

    fedscan.simulate(run_for(), data=table, out=tmp_path / "run", watch=watch)


def test_what_is_refused_before_the_start_leaves_nothing_behind(run_for, table, edit, tmp_path):
    edit(lambda row: row if row["site"] != "phantom_2" or row["label"] == "1" else None)
    with pytest.raises(DataError, match="phantom_2"):
        fedscan.simulate(run_for(), data=table, out=tmp_path / "new/run")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        fedscan.simulate(run_for(), data=table, out=tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_in_use_is_left_alone(run_for, table, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FolderError, match="not empty"):
        fedscan.simulate(run_for(), data=table, out=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(ConfigError, match="phantoms"):
        fedscan.simulate(run_for(data={"source": "phantom"}), data=table, out=tmp_path / "run")


def test_a_full_disk_before_the_start_and_during_the_run(run_for, table, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("fedscan.federation.sites.save", full)
        with pytest.raises(FolderError, match="No space left"):
            fedscan.simulate(run_for(), data=table, out=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with monkeypatch.context() as patch:
        patch.setattr("fedscan_server.checkpoint.write", full)
        with pytest.raises(RunFailed, match=r"No space left.*--resume"):
            fedscan.simulate(run_for(), data=table, out=tmp_path / "run")
    assert fedscan.resume(tmp_path / "run")["rounds"] == 3


def test_a_failure_in_the_first_round_of_one_site_can_be_gone_on_with(run_for, table, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = run_for(data={"sites": [{"name": "phantom_1"}]})
    with monkeypatch.context() as patch:
        patch.setattr("fedscan_server.checkpoint.write", full)
        with pytest.raises(RunFailed, match="--resume"):
            fedscan.simulate(run, data=table, out=tmp_path / "run")
    assert fedscan.resume(tmp_path / "run")["rounds"] == 3


def test_a_broken_update_is_dropped_recorded_and_survived(run_for, table, tmp_path, monkeypatch):
    honest = client_app._train

    def broken(here, request):
        reply = honest(here, request)
        if here.name == "phantom_2" and request.round == 2:
            assert reply.update is not None
            bad = {name: np.full_like(array, np.nan) for name, array in reply.update.items()}
            return Reply(here.name, "ok", update=bad)
        return reply

    monkeypatch.setattr(client_app, "_train", broken)
    fedscan.simulate(run_for(), data=table, out=tmp_path / "run")
    rounds = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert [record["sites"] for record in rounds] == [3, 2, 3]
    assert "phantom_2" in rounds[1]["dropped"][0]
    assert "failed" in rounds[1]["dropped"][0]  # what is not finite does not leave the site (gate/egress.py)
    assert all(np.isfinite(array).all() for array in model_of(tmp_path / "run").values())


def test_quickstart_trains_phantom_hospitals(tmp_path):
    few = ["train.rounds=4", "simulation.patients=16", "simulation.sites=2", "task.image_size=32"]
    summary = fedscan.simulate(CONFIGS / "quickstart.toml", out=tmp_path / "run", overrides=few)
    assert [site["name"] for site in summary["sites"]] == ["hospital-1", "hospital-2"]
    released = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("*") if path.is_file())
    assert b"MRN-" not in released


@needs_images
@pytest.mark.parametrize(
    ("config", "folder", "at_least", "few"),
    [
        pytest.param("cxr_pneumonia", "cxr", 0.7, ["task.image_size=16"], marks=pytest.mark.slow),
        pytest.param("pneumonia_partitioned", "large2d", 0.7, ["task.image_size=16"], marks=pytest.mark.slow),
        pytest.param(
            "malaria",
            "large2d",
            0.0,
            ["train.rounds=1", "privacy.max_images_per_patient=2", "task.image_size=16"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_shipped_runs_train_on_real_images(config, folder, at_least, few, tmp_path):
    overrides = [*few, "train.rounds=10"] if at_least else few
    summary = fedscan.simulate(
        CONFIGS / f"{config}.toml", data=SHARED / folder, out=tmp_path / "run", overrides=overrides
    )
    assert summary["metrics"]["auroc"]["value"] > at_least
    assert all(site["epsilon"] <= 8.0 for site in summary["sites"])
    if config == "cxr_pneumonia":
        names = [site["name"] for site in summary["sites"]]
        assert names == ["bethesda", "guangzhou-1", "guangzhou-2", "guangzhou-3"]
        assert "rest" in summary["metrics"]["auroc_per_site"]


@pytest.mark.parametrize("count", [2, 8, pytest.param(64, marks=pytest.mark.slow)])
def test_many_sites(run_for, tmp_path, count):
    from fedscan.phantom import phantom_table

    phantom_table(tmp_path / "t", patients=10 * count, sites=1, seed=1, image_size=32)
    run = run_for(
        train={"rounds": 1},
        simulation={"partition": "dirichlet", "alpha": 100.0, "sites": count},
        data={"dir": str(tmp_path / "t")},
    )
    assert len(fedscan.simulate(run, out=tmp_path / "run")["sites"]) == count


@pytest.mark.slow
def test_ray_gives_the_same_model_as_one_process(run_for, table, tmp_path):
    for backend in ("inline", "ray"):
        run = run_for(
            privacy={"enabled": False},
            train={"rounds": 2, "local_steps": 2, "patients_per_step": 8},
            simulation={"backend": backend},
        )
        fedscan.simulate(run, data=table, out=tmp_path / backend)
    inline, ray = model_of(tmp_path / "inline"), model_of(tmp_path / "ray")
    assert inline.keys() == ray.keys()
    for name in inline:
        np.testing.assert_allclose(inline[name], ray[name], rtol=1e-5, atol=1e-7)


def test_ray_missing_is_said_before_anything_is_made(run_for, table, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"fedscan\[ray\]"):
        fedscan.simulate(run_for(simulation={"backend": "ray"}), data=table, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_without_the_images_is_refused_before_anything_is_spent(run_for, table, tmp_path):
    stop, watch = stopped_after(1)
    with pytest.raises(RunFailed):
        fedscan.simulate(run_for(), data=table, out=tmp_path / "run", watch=watch, stop=stop)
    book = sites.load(tmp_path / "run/sites/phantom_1").book
    before = ledger.summary(book)
    cohort.forget()
    table.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="cannot be used"):
        fedscan.resume(tmp_path / "run")
    assert ledger.summary(book) == before
    (tmp_path / "elsewhere").rename(table)
    assert fedscan.resume(tmp_path / "run")["rounds"] == 3


def test_phantoms_follow_the_seed(run_for, tmp_path):
    run = run_for(data={"source": "phantom"}, privacy={"enabled": False}, simulation={"sites": 2, "patients": 30})
    for name in ("a", "b"):
        fedscan.simulate(run, out=tmp_path / name)
    assert same(model_of(tmp_path / "a"), model_of(tmp_path / "b"))


def test_a_damaged_npz_is_named(run_for, tmp_path):
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "x.npz", images=rng.integers(0, 256, (4, 16, 16)).astype(np.uint8))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "x.npz").write_bytes(data)
    rows = "".join(f"x.npz,{n},p{n},{n % 2}\n" for n in range(4))
    (tmp_path / "metadata.csv").write_text("file,index,patient_id,label\n" + rows)
    with pytest.raises(DataError, match=r"x\.npz"):
        fedscan.simulate(run_for(), data=tmp_path, out=tmp_path / "run")


def test_start_weights_are_found_again_from_another_folder(run_for, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fedscan.simulate(run_for(), data=table, out=tmp_path / "first")
    run = run_for(model={"init": "first/model.safetensors"})
    stop, watch = stopped_after(1)
    with pytest.raises(RunFailed):
        fedscan.simulate(run, data=table, out=tmp_path / "run", watch=watch, stop=stop)
    monkeypatch.chdir("/")
    assert fedscan.resume(tmp_path / "run")["rounds"] == 3
