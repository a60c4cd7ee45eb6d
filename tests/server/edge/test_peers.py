"""The edge and the clients that ship with it understand each other: the researcher's and the site's."""

import io
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.server.edge.conftest import Live, submission

from fedscan import people as researcher
from fedscan_client import connection, door
from fedscan_client.connection import Connection
from fedscan_client.door import DoorError
from fedscan_core import node_key, order, policy
from fedscan_server import tracking
from fedscan_server.coordinator import people, sites
from fedscan_server.tracking import Progress


def test_the_researchers_client(live: Live) -> None:
    live.site("north")
    invited, key = people.invite(live.c, "ada", "researcher", 1), Ed25519PrivateKey.generate()
    with researcher.connect(invited.address, invited.ca) as http:
        assert researcher.hello(http).coordinator == invited.coordinator
        login = researcher.login(http, invited.token, order.public_text(key))
        with pytest.raises(researcher.CoordinatorError):
            researcher.login(http, invited.token, order.public_text(key))
    sent = submission(key)
    asked = order.from_text(sent["order"])
    with researcher.connect(invited.address, invited.ca, login.token) as http:
        assert [site.name for site in researcher.sites(http)] == ["north"]
        assert researcher.submit(http, asked, sent["run"], b"") == asked.run_id
        assert [run.run_id for run in researcher.runs(http)] == [asked.run_id]
        assert researcher.run(http, asked.run_id).toml == sent["run"]
        tracking.add_progress(live.c.runs / asked.run_id, Progress("round", 1, 9, 1, 1))
        number, lines, state = researcher.progress(http, asked.run_id, 0)
        assert (number, lines[0]["phase"], state) == (1, "round", "waiting")
        researcher.stop(http, asked.run_id)
        tracking.set_state(live.c.runs / asked.run_id, "stopped")
        researcher.resume(http, asked.run_id)
        assert researcher.archive(http, asked.run_id, io.BytesIO()) > 1000


def test_the_sites_client(live: Live, tmp_path: Path) -> None:
    invited, folder = sites.invite(live.c, "north", 1), tmp_path / "site"
    key = node_key.create(folder / connection.NODE_KEY)
    (folder / "coordinator-ca.pem").write_text(invited.ca)
    found = Connection(invited.address, invited.coordinator, folder / "coordinator-ca.pem", "north")
    public = policy.public(policy.Policy(max_epsilon=8.0, max_delta=1e-5), "north", 100, (8.0, 1e-5))
    assert door.hello(found)["coordinator"] == invited.coordinator
    told = door.enrol(found, invited.token, "north", node_key.public_text(key), public)
    connection.save(
        folder, Connection(found.address, found.coordinator, found.ca, "north", "2026-01-01T00:00:00+00:00")
    )
    assert door.about(folder)["node_id"] == told["node_id"]
    door.publish_policy(folder, {**public, "patients_declared": 90})
    door.put_anchor(folder, "ab" * 32)
    assert [one["anchor"] for one in door.anchors(folder)] == ["ab" * 32]
    assert door.about(folder)["policy"]["patients_declared"] == 90
    door.retire(folder)
    with pytest.raises(DoorError) as caught:
        door.about(folder)
    assert (caught.value.kind, caught.value.status) == ("refused", 403)
