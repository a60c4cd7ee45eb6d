"""The ServerApp that a bundle names: a real coordinator's folder, pretend hospitals behind the grid."""

import dataclasses
import json
import logging
import re

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, RecordDict
from safetensors.numpy import load, load_file, save_file

from fedscan_core import config, files, node_key, order
from fedscan_core.errors import ConfigError
from fedscan_core.order import Order
from fedscan_core.wire import Reply
from fedscan_server import app as loop
from fedscan_server import checkpoint, deployed, tracking
from fedscan_server.coordinator import service, sites, vault

RUN = "demo-0123456789ab"


@pytest.fixture
def coordinator(memory_path, pretend, monkeypatch):
    """A coordinator at which three sites are enrolled, under the node ids of `Network`."""
    monkeypatch.setattr(deployed, "POLL", 0.01)
    c = service.init(memory_path / "state", "Test centre", "localhost:8443", "127.0.0.1:8443", 18999)
    for number, name in enumerate(pretend.sizes):
        key = node_key.public_text(ec.generate_private_key(ec.SECP384R1()))
        sites.redeem(c, sites.invite(c, name, 1.0).token, key, {})
        sites.set_node(c, name, 2**63 + number)
    return c


def launch(c, run, name=RUN, **fields):
    """What the edge does: the run folder with run.toml and order.json."""
    folder = c.runs / name
    folder.mkdir(mode=0o700)
    files.write_atomic(folder / tracking.RUN, config.to_toml(run).encode())
    asked = Order(name, config.for_sites(run), "ada", "2026-01-01T00:00:00+00:00", "2199-01-01T00:00:00+00:00")
    asked = dataclasses.replace(asked, **fields)
    files.write_atomic(folder / "order.json", order.to_text(asked).encode())
    return folder


def state(folder):
    found = tracking.read_state(folder)
    return found["state"], found["reason"]


def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_run_from_the_bundles_one_key_to_its_end(coordinator, pretend, monkeypatch):
    run, net = pretend.run_config(), pretend.Network()
    folder = launch(coordinator, run)
    monkeypatch.setenv("FEDSCAN_COORDINATOR", str(coordinator.folder))
    context = Context(1, 1, {}, RecordDict(), {"fedscan-run": RUN})
    deployed.app(net, context)
    assert state(folder) == ("finished", "")
    assert (
        tracking.read_summary(folder)["run_id"] == RUN and [r["sites"] for r in tracking.read_rounds(folder)] == [3] * 3
    )
    steps = [tracking.progress_of(line) for line in tracking.read_progress(folder)]
    assert list(dict.fromkeys(step.phase for step in steps)) == ["declare", "round", "done"]
    assert steps[-1].epsilon_high > 0 and steps[-1].sites == 3
    for number, name in enumerate(pretend.sizes):
        kept = sites.anchors(coordinator, name)
        assert [(a["run_id"], a["round"]) for a in kept] == [(RUN, n) for n in range(4)], number
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.rglob("*") if path.is_file())
    deployed.app(pretend.Network(), context)  # a finished run is left alone
    assert len(tracking.read_progress(folder)) == len(steps)


def test_only_the_sites_the_run_names_are_asked(coordinator, pretend):
    run = pretend.run_config()
    run = run.model_copy(update={"federation": run.federation.model_copy(update={"sites": ("ash", "cedar")})})
    net = pretend.Network()
    folder = launch(coordinator, run)
    deployed.run(net, coordinator, RUN)
    assert state(folder)[0] == "finished" and {site for _, _, site in net.asked} == {"ash", "cedar"}


def test_a_revoked_site_is_out_within_one_round(coordinator, pretend):
    def answer(site, kind, request, good):
        if request.round == 1 and site == "cedar":
            sites.revoke(coordinator, "birch")
        return good

    net = pretend.Network(answer)
    folder = launch(coordinator, pretend.run_config())
    deployed.run(net, coordinator, RUN)
    assert [r["sites"] for r in tracking.read_rounds(folder)] == [3, 2, 2] and state(folder)[0] == "finished"


def test_refusals_end_the_run_with_their_reasons(coordinator, pretend):
    net = pretend.Network(lambda site, kind, request, good: Reply(site, "refused", "its policy says no"))
    folder = launch(coordinator, pretend.run_config())
    deployed.run(net, coordinator, RUN)
    how, why = state(folder)
    assert how == "failed" and "ash: its policy says no; birch: its policy says no" in why


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"valid_until": "2026-02-01T00:00:00+00:00"}, "no longer valid"),
        ({"run_id": "demo-ffffffffffff"}, "another run's"),
        ({"config": "{}"}, "another run's"),
    ],
)
def test_an_order_that_does_not_fit_asks_nobody(coordinator, pretend, fields, word):
    net = pretend.Network()
    folder = launch(coordinator, pretend.run_config(), **fields)
    deployed.run(net, coordinator, RUN)
    how, why = state(folder)
    assert how == "failed" and word in why and net.asked == []


@pytest.mark.parametrize("run_id", ["demo-none", "../../etc", ".", "", "a/b"])
def test_there_is_no_such_run(coordinator, pretend, run_id):
    with pytest.raises(ConfigError, match="no such run"):
        deployed.run(pretend.Network(), coordinator, run_id)


def test_a_stopped_run_and_its_resume(coordinator, pretend, memory_path):
    whole = launch(coordinator, pretend.run_config(), "demo-aaaaaaaaaaaa")
    deployed.run(pretend.Network(), coordinator, whole.name)
    folder = launch(coordinator, pretend.run_config())

    def answer(site, kind, request, good):
        if request.round == 2:
            tracking.ask_to_stop(folder)
        return good

    net = pretend.Network(answer)
    net.slow = {"cedar": 0.1}
    deployed.run(net, coordinator, RUN)
    assert state(folder) == ("stopped", "The run was stopped.")
    deployed.run(pretend.Network(), coordinator, RUN)  # nobody asked for that
    assert state(folder)[0] == "stopped"
    tracking.forget_stop(folder)
    tracking.set_state(folder, "waiting")
    deployed.run(pretend.Network(), coordinator, RUN)
    assert state(folder)[0] == "finished"
    assert same(load_file(folder / tracking.MODEL), load_file(whole / tracking.MODEL))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError("Carla Canary")])
def test_where_the_program_breaks_off_the_run_waits_and_its_text_stays_in_the_log(
    coordinator, pretend, monkeypatch, caplog, capfd, error
):
    real = checkpoint.write

    def full(folder, state_, *rest):
        if state_.round == 2:
            raise error
        real(folder, state_, *rest)

    monkeypatch.setattr(checkpoint, "write", full)
    folder = launch(coordinator, pretend.run_config())
    deployed.run(pretend.Network(), coordinator, RUN)
    assert state(folder) == ("waiting", deployed.BROKE_OFF)
    log = folder / tracking.LOG
    assert str(error.args[-1]) in log.read_text() and "Traceback" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    shown = "".join(capfd.readouterr()) + json.dumps(tracking.read_progress(folder)) + json.dumps(state(folder))
    assert "Traceback" not in shown and str(error.args[-1]) not in shown
    monkeypatch.undo()
    deployed.run(pretend.Network(), coordinator, RUN)
    assert state(folder)[0] == "finished" and [r["round"] for r in tracking.read_rounds(folder)] == [1, 2, 3]


def test_a_registry_that_cannot_be_read_is_no_fault_of_the_run(coordinator, pretend):
    folder = launch(coordinator, pretend.run_config())
    aside = coordinator.database.with_name("aside")
    coordinator.database.rename(aside)
    deployed.run(pretend.Network(), coordinator, RUN)
    assert state(folder) == ("waiting", deployed.BROKE_OFF)
    aside.rename(coordinator.database)
    deployed.run(pretend.Network(), coordinator, RUN)
    assert state(folder)[0] == "finished"


def test_damaged_checkpoints_end_the_run_and_no_path_of_the_server_is_told(coordinator, pretend):
    folder = launch(coordinator, pretend.run_config())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "round-000001.safetensors").write_bytes(b"damaged")
    deployed.run(pretend.Network(), coordinator, RUN)
    how, why = state(folder)
    assert how == "failed" and "None of the checkpoints" in why and str(coordinator.folder) not in why


def test_a_run_that_another_process_works_on_is_left_alone(coordinator, pretend):
    folder, net = launch(coordinator, pretend.run_config()), pretend.Network()
    tracking.set_state(folder, "running")
    with tracking.locked(folder):
        deployed.run(net, coordinator, RUN)
    assert state(folder)[0] == "running" and net.asked == []


def test_start_weights_lie_in_the_run_folder(coordinator, pretend):
    run = pretend.run_config(rounds=1, model={"init": "init.safetensors"})
    start = {n: a + 1 for n, a in loop.initial_model(pretend.run_config())[0].items()}
    seen = []

    def answer(site, kind, request, good):
        seen.append(request.model)
        return good

    folder = launch(coordinator, run)
    deployed.run(pretend.Network(answer), coordinator, RUN)
    assert state(folder)[0] == "failed" and "init.safetensors cannot be read" in state(folder)[1]
    save_file(start, folder / "init.safetensors")
    tracking.set_state(folder, "waiting")
    deployed.run(pretend.Network(answer), coordinator, RUN)
    assert state(folder)[0] == "finished" and same(seen[-1], start)


def test_models_are_encrypted_at_rest_where_the_coordinator_asks(coordinator, pretend, monkeypatch, memory_path):
    plain = launch(coordinator, pretend.run_config(), "demo-aaaaaaaaaaaa")
    deployed.run(pretend.Network(), coordinator, plain.name)
    monkeypatch.setenv("FEDSCAN_VAULT_KEY", "07" * 32)
    folder = launch(coordinator, pretend.run_config())
    deployed.run(pretend.Network(), coordinator, RUN)
    assert state(folder)[0] == "finished"
    sealed = [folder / tracking.MODEL, folder / tracking.SUMMARY, *(folder / "checkpoints").iterdir()]
    assert len(sealed) == 4 and all(vault.is_sealed(path) for path in sealed)
    assert same(load(vault.read(folder / tracking.MODEL)), load_file(plain / tracking.MODEL))
    for path in (folder / "checkpoints").iterdir():  # as a resume without its key finds it
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    (folder / tracking.SUMMARY).unlink()
    tracking.set_state(folder, "waiting")
    deployed.run(pretend.Network(), coordinator, RUN)
    assert state(folder)[0] == "failed"


def test_what_it_logs_goes_nowhere_else(coordinator, pretend, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fedscan"), "propagate", True)  # whatever commands ran in this process
    before = [list(logging.getLogger(name).handlers) for name in ("flwr", "fedscan")]
    launch(coordinator, pretend.run_config(rounds=1))
    deployed.run(pretend.Network(), coordinator, RUN)
    assert [logging.getLogger(name).handlers for name in ("flwr", "fedscan")] == before
    assert logging.getLogger("fedscan").propagate


def test_an_order_signed_by_its_launcher_reaches_the_sites_as_it_is(coordinator, pretend):
    run, key, seen = pretend.run_config(rounds=1), Ed25519PrivateKey.generate(), []
    folder = launch(coordinator, run)
    asked = order.sign(order.from_text((folder / "order.json").read_text()), key)
    files.write_atomic(folder / "order.json", order.to_text(asked).encode())

    def answer(site, kind, request, good):
        seen.append(request.order)
        return good

    deployed.run(pretend.Network(answer), coordinator, RUN)
    long = re.fullmatch("failed: .*more than 180 days.*", ": ".join(state(folder)))
    assert long and seen == []  # an order that lives longer than orders may
    asked = order.sign(dataclasses.replace(asked, issued=_today(), valid_until=_today(days=30)), key)
    files.write_atomic(folder / "order.json", order.to_text(asked).encode())
    tracking.set_state(folder, "waiting")
    deployed.run(pretend.Network(answer), coordinator, RUN)
    assert state(folder)[0] == "finished" and set(seen) == {asked}
    assert order.signed_by(seen[0], order.public_text(key))


def _today(days=0):
    from datetime import UTC, datetime, timedelta

    return (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds")
