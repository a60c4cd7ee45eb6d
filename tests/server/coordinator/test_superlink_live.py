"""Flower's own SuperLink, started as the coordinator starts it, on loopback: what it refuses, who is let in."""

import base64
import time

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedscan_core import node_key
from fedscan_core.errors import ConfigError
from fedscan_server.coordinator import control, sites

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(120)]


def post(c, path, content=b"", **headers):
    headers = {"content-type": "application/protobuf", **{k.replace("_", "-"): v for k, v in headers.items()}}
    with httpx.Client(trust_env=False, verify=False) as client:
        return client.post(f"http://{c.superlink}{path}", content=content, headers=headers)


def node_of(c, name) -> int:
    site = sites.by_name(c, name)
    assert site
    return site.node_id


CONTROL = ["start-run", "stop-run", "list-runs", "stream-logs", "register-node", "unregister-node", "list-nodes"]


@pytest.mark.parametrize("call", CONTROL)
def test_the_control_api_is_ours_alone(live, call):
    path = f"/v1/control/{call}"
    for shown in ({}, {"authorization": "Bearer " + "0" * 64}, {"authorization": "Bearer é".encode()}):
        assert post(live, path, **shown).status_code == 401
    assert post(live, path, authorization=f"Bearer {live.control_secret}").status_code != 401


def test_no_login_gives_a_token(live):
    for call in ("get-login-details", "get-auth-tokens", "refresh-auth-tokens"):
        answer = post(live, f"/v1/control/{call}")
        assert answer.is_error or answer.content == b""


def test_tasks_are_not_handed_out_without_the_secret(live):
    assert post(live, "/v1/runtime/acquire-task").status_code == 401


def test_a_node_cannot_register_itself(live):
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import sign_message

    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    moment = now().isoformat()
    signed = {
        "flwr_public_key": base64.b64encode(pem).decode(),
        "flwr_signature": base64.b64encode(sign_message(key, moment.encode())).decode(),
        TIMESTAMP_HEADER: moment,
    }
    before = {node.node_id for node in control._nodes(live)}
    register = RegisterNodeFleetRequest(public_key=pem).SerializeToString()
    activate = ActivateNodeRequest(public_key=pem, heartbeat_interval=30.0).SerializeToString()
    post(live, "/v1/fleet/register-node", register, **signed)  # answered with 200 or not: nothing may come of it
    assert {node.node_id for node in control._nodes(live)} == before
    assert post(live, "/v1/fleet/activate-node", activate, **signed).is_error
    assert post(live, "/v1/fleet/activate-node", activate).status_code == 401


def test_nodes_become_those_of_the_registry(live, site_key):
    keys = {name: site_key() for name in ("a", "b")}
    for name, key in keys.items():
        sites.redeem(live, sites.invite(live, name, 1).token, key, {})
    control.reconcile(live)
    assert set(sites.node_names(live).values()) == {"a", "b"}
    a, b = (node_of(live, name) for name in ("a", "b"))
    assert control.register_node(live, keys["a"], "a") == a  # the same again
    sites.revoke(live, "a")
    control.reconcile(live)
    assert {int(node.node_id) for node in control._nodes(live) if node.status != "unregistered"} == {b}
    with pytest.raises(ConfigError, match="refused"):
        control.register_node(live, keys["a"], "a")
    stray = control.register_node(live, site_key(), "stray")
    control.reconcile(live)
    assert stray not in {int(node.node_id) for node in control._nodes(live) if node.status != "unregistered"}
    assert node_of(live, "b") == b
    control.unregister_node(live, stray)  # gone already: fine
    assert control.online_nodes(live) == set()


def test_two_processes_may_register_a_node_at_once(live, site_key, monkeypatch):
    """The edge at enrolment, and the SuperLink's own look: whoever comes second finds the first one's node."""
    key = site_key()
    first = control.register_node(live, key, "x")
    looks = iter([None, first])  # the first look came too early
    monkeypatch.setattr(control, "_registered", lambda c, pem: next(looks))
    assert control.register_node(live, key, "x") == first


def test_a_run_is_started_looked_at_and_stopped(live):
    run = control.start_run(live, "a-run")
    assert control.run_status(live, run) == control.RunStatus("pending")
    assert run in control.active_runs(live)
    assert control.stop_run(live, run)
    status = control.run_status(live, run)
    assert (status.status, status.sub_status, status.over) == ("finished", "stopped", True)
    assert not control.stop_run(live, run)
    assert run not in control.active_runs(live)
    assert control.run_status(live, 12345).over and control.run_status(live, 12345).status == "unknown"
    assert not control.stop_run(live, 12345)


def test_its_files_are_private(live):
    paths = [path for path in live.folder.rglob("*") if path.is_file()]
    assert live.flower_database in paths
    assert not [path for path in paths if path.stat().st_mode & 0o077]


def test_it_listens_on_loopback_only(live):
    with open("/proc/net/tcp") as table:
        rows = [line.split()[1] for line in table.readlines()[1:] if line.split()[3] == "0A"]
    assert [row for row in rows if row.endswith(f":{live.superlink_port:04X}")] == [
        f"0100007F:{live.superlink_port:04X}"
    ]


def test_secrets_do_not_reach_its_log(live):
    text = (live.logs / "superlink.log").read_text()
    assert live.control_secret not in text and live.superexec_secret.read_text() not in text


def test_a_stock_supernode_connects_and_a_revoked_one_is_out(coordinator, tmp_path, processes):
    """Through TLS with our certificate; the issue wants a revocation to take effect within one round."""
    running, supernode, wait_for = processes
    key = node_key.create(tmp_path / "node.key")
    sites.redeem(coordinator, sites.invite(coordinator, "a", 1).token, node_key.public_text(key), {})
    with running(coordinator):
        wait_for(lambda: sites.node_names(coordinator))
        with supernode(coordinator, tmp_path / "node.key", tmp_path) as (process, log):
            wait_for(lambda: control.online_nodes(coordinator) or process.poll() is not None)
            assert control.online_nodes(coordinator) == {node_of(coordinator, "a")}, log.read_text()
            sites.revoke(coordinator, "a")
            start = time.monotonic()
            wait_for(lambda: process.poll() is not None)
            assert time.monotonic() - start < 15
            assert control.online_nodes(coordinator) == set()


def test_a_lost_state_db_and_a_sigkill_are_survived(coordinator, site_key, processes):
    running, _, wait_for = processes
    sites.redeem(coordinator, sites.invite(coordinator, "a", 1).token, site_key(), {})
    with running(coordinator, ("superlink",)) as (process,):
        wait_for(lambda: sites.node_names(coordinator))
        first = sites.node_names(coordinator)
        process.kill()
        process.wait()
    with running(coordinator, ("superlink",)):
        control.reconcile(coordinator)
        assert sites.node_names(coordinator) == first
    for path in coordinator.flower_database.parent.glob("state.db*"):
        path.unlink()
    with running(coordinator, ("superlink",)):
        wait_for(lambda: sites.node_names(coordinator) and sites.node_names(coordinator) != first)
        assert set(sites.node_names(coordinator).values()) == {"a"}
