"""Who takes part in a deployed run: people who approve, refuse, or never look."""

import dataclasses
import json
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from fedscan_core import config
from fedscan_core.errors import ConfigError, FolderError, RunFailed
from fedscan_core.order import Order
from fedscan_core.wire import Reply
from fedscan_server.rounds import Mail
from fedscan_server.rounds_declare import PARTICIPANTS, declare
from fedscan_server.tracking import Progress


class Hospitals:
    """What the people at each site say: site -> "pending", "refused", "failed", "unknown", or else yes."""

    def __init__(self, **says):
        self.says = says

    def __call__(self, site, kind, request, good):
        says = self.says.get(site, "yes")
        if says == "refused":
            return Reply(site, "refused", f"no, says {site}")
        if says == "unknown":
            return Reply("unknown", "failed")
        return good if says == "yes" else Reply(site, says)


def ask(pretend, memory_path, says, seen=None, net=None, job=None, **run):
    net = net or pretend.Network(says)
    run = pretend.run_config(**run)
    more = {"watch": (seen if seen is not None else []).append, **(job or {})}
    return net, declare(Mail(net, net.job(run, memory_path, **more)), 0)


def test_everybody_says_yes(pretend, memory_path):
    net, (nodes, plans) = ask(pretend, memory_path, Hospitals())
    assert list(plans) == list(pretend.sizes) and dict(nodes()) == net.registry
    assert [plan.patients_declared for plan in plans.values()] == [120, 60, 30]
    net.move("ash")
    net.registry[77] = "dogwood"  # enrolled after the start
    assert dict(nodes()) == {node: name for node, name in net.registry.items() if name != "dogwood"}


def test_a_site_that_waits_for_a_person_is_asked_until_it_decides(pretend, memory_path):
    says, seen = Hospitals(birch="pending"), list[Progress]()
    threading.Timer(0.5, lambda: says.says.update(birch="yes")).start()
    net, (_, plans) = ask(pretend, memory_path, says, seen)
    assert list(plans) == list(pretend.sizes) and net.asked.count(("query", 0, "birch")) > 2
    assert net.asked.count(("query", 0, "ash")) == 1  # who has decided is left in peace
    assert ("birch: waits for approval there",) in [progress.notes for progress in seen]
    assert [(p.sites_done, p.sites, p.phase) for p in seen][-1] == (3, 3, "declare") and len(seen) < 6


def test_when_the_approval_time_is_over_the_run_starts_with_those_who_said_yes(pretend, memory_path):
    began = time.monotonic()
    _, (_, plans) = ask(pretend, memory_path, Hospitals(birch="pending"), approval=0.6)
    assert list(plans) == ["ash", "cedar"] and 0.5 < time.monotonic() - began < 5


def test_when_the_approval_time_is_over_without_a_quorum_nothing_starts(pretend, memory_path):
    says = Hospitals(birch="pending", ash="pending")
    with pytest.raises(ConfigError, match=r"1 of 3 .* 2 needed.*ash: waits for approval there; birch: waits"):
        ask(pretend, memory_path, says, approval=0.4)
    assert not (memory_path / PARTICIPANTS).exists()


def test_the_approval_time_counts_from_the_orders_issue(pretend, memory_path):
    net, run = pretend.Network(Hospitals(birch="pending")), pretend.run_config(approval=30.0, seconds=1.0)
    net.slow = {"ash": 0.2, "cedar": 0.2}
    issued = (datetime.now(UTC) - timedelta(seconds=200)).isoformat(timespec="seconds")
    order = dataclasses.replace(Order("demo-1", config.for_sites(run)), issued=issued)
    began = time.monotonic()
    _, plans = declare(Mail(net, dataclasses.replace(net.job(run, memory_path), order=order)), 0)
    assert list(plans) == ["ash", "cedar"] and time.monotonic() - began < 15  # but who is there has time to answer


@pytest.mark.parametrize(
    "says", [{"ash": "refused", "birch": "refused"}, dict.fromkeys(["ash", "birch", "cedar"], "refused")]
)
def test_it_ends_at_once_where_no_quorum_can_come_any_more(pretend, memory_path, says):
    began = time.monotonic()
    with pytest.raises(ConfigError, match="ash: no, says ash; birch: no, says birch") as caught:
        ask(pretend, memory_path, Hospitals(**says))
    assert time.monotonic() - began < 5 and caught.value.remedy


def test_a_site_that_fails_is_asked_three_times(pretend, memory_path):
    net, (_, plans) = ask(pretend, memory_path, Hospitals(birch="failed"))
    assert list(plans) == ["ash", "cedar"] and net.asked.count(("query", 0, "birch")) == 3


@pytest.mark.parametrize("trouble", ["unknown", "failed"])
def test_a_site_that_has_trouble_for_a_moment_takes_part(pretend, memory_path, trouble):
    says = Hospitals(birch=trouble)

    def answer(site, kind, request, good):
        reply = says(site, kind, request, good)
        if site == "birch":
            says.says.clear()
        return reply

    _, (_, plans) = ask(pretend, memory_path, answer)
    assert list(plans) == list(pretend.sizes)


def test_a_site_that_is_away_is_waited_for(pretend, memory_path):
    net = pretend.Network()
    net.away.add("cedar")
    threading.Timer(0.4, net.away.clear).start()
    _, (_, plans) = ask(pretend, memory_path, None, net=net)
    assert list(plans) == list(pretend.sizes)


def test_a_site_that_lies_about_its_plan_takes_no_part(pretend, memory_path):
    def answer(site, kind, request, good):
        lie = dataclasses.replace(good.plan, epsilon=0.1)
        return dataclasses.replace(good, plan=lie) if site == "ash" else good

    seen = list[Progress]()
    _, (_, plans) = ask(pretend, memory_path, answer, seen)
    assert list(plans) == ["birch", "cedar"] and any("costs more" in note for p in seen for note in p.notes)


def test_a_site_revoked_while_it_decides_takes_no_part_and_may_be_enrolled_again(pretend, memory_path):
    for back in (False, True):
        says = Hospitals(birch="pending")
        net = pretend.Network(says)
        threading.Timer(0.2, net.forget, ["birch"]).start()
        if back:
            threading.Timer(0.3, lambda net=net, says=says: (says.says.clear(), net.move("birch"))).start()
            says.says["cedar"] = "pending"  # so that the run has not begun by then
        _, (_, plans) = ask(pretend, memory_path / str(back), says, net=net)
        assert list(plans) == (list(pretend.sizes) if back else ["ash", "cedar"])


def test_no_site_at_all(pretend, memory_path):
    net = pretend.Network()
    net.registry = {}
    with pytest.raises(ConfigError, match="0 of 0 sites take part, 2 needed"):
        ask(pretend, memory_path, None, net=net)


def test_who_takes_part_is_kept_for_a_resume_and_belongs_to_the_configuration(pretend, memory_path):
    _, (_, plans) = ask(pretend, memory_path, Hospitals())
    net, (_, again) = ask(pretend, memory_path, Hospitals(ash="refused"))
    assert again == plans and net.asked == []
    with pytest.raises(FolderError, match="another configuration"):
        ask(pretend, memory_path, Hospitals(), rounds=9)
    for damage in ("{", "[]", json.dumps({"config_sha256": "", "sites": {"ash": {"epsilon": 1}}})):
        (memory_path / PARTICIPANTS).write_text(damage)
        with pytest.raises(FolderError, match="cannot be read"):
            ask(pretend, memory_path, Hospitals())


def test_a_run_without_privacy_is_resumed_too(pretend, memory_path):
    _, (_, plans) = ask(pretend, memory_path, Hospitals(), privacy={"enabled": False})
    assert ask(pretend, memory_path, Hospitals(), privacy={"enabled": False})[1][1] == plans


def test_the_stop_file_ends_the_wait_for_approval(pretend, memory_path):
    threading.Timer(0.2, lambda: (memory_path / "stop").write_bytes(b"")).start()
    with pytest.raises(RunFailed, match="stopped"):
        ask(pretend, memory_path, Hospitals(birch="pending"))


def test_after_ten_minutes_people_are_asked_less_often(pretend, memory_path, monkeypatch):
    monkeypatch.setattr("fedscan_server.rounds_declare._QUERY_SECONDS", 0.05)
    net, _ = ask(pretend, memory_path, Hospitals(birch="pending"), approval=1.0, job={"again": 0.05})
    assert 2 <= net.asked.count(("query", 0, "birch")) <= 4  # and not twenty times
