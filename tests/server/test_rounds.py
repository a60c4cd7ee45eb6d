"""Rounds of a deployed run over a network that loses sites, delays them, and lets them lie."""

import dataclasses
import json
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedscan_core.errors import RunFailed
from fedscan_core.wire import Reply
from fedscan_server import tracking
from fedscan_server.app import run_rounds


def go(net, run, folder, **more):
    run_rounds(net, net.job(run, folder, **more))
    return load_file(folder / tracking.MODEL), tracking.read_rounds(folder)


def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def at_round(number, act):
    """A watcher that acts once that round is recorded."""

    def watch(progress):
        if progress.phase == "round" and progress.round == number and progress.sites_done == progress.sites:
            act()

    return watch


@pytest.fixture(scope="module")
def undisturbed(pretend, tmp_path_factory):
    return go(pretend.Network(), pretend.run_config(), tmp_path_factory.mktemp("whole"))[0]


def test_a_run_without_faults(pretend, tmp_path):
    net, anchors = pretend.Network(), []
    _, rounds = go(
        net, pretend.run_config(seconds=30), tmp_path, keep_anchor=lambda *what: anchors.append((what[0], what[1]))
    )
    assert [(r["sites"], r["missing"], r["late"], r["void"]) for r in rounds] == [(3, [], [], False)] * 3
    assert net.asked == [
        (k, n, s) for k, n in [("query", 0), *(("train", n) for n in (1, 2, 3))] for s in pretend.sizes
    ]
    assert anchors == [(site, round_) for round_ in range(4) for site in pretend.sizes]
    assert net.most_at_once == 1  # updates are taken one by one: memory does not grow with the sites
    assert all(25 < ttl <= 30 for ttl in net.ttl[3:])  # a stale question is not trained after its round


def test_a_site_that_is_away_is_missing_and_asked_again_in_the_next_round(pretend, tmp_path, undisturbed):
    net, run = pretend.Network(), pretend.run_config()
    _, rounds = go(
        net,
        run,
        tmp_path,
        watch=lambda p: (at_round(1, lambda: net.away.add("cedar"))(p), at_round(2, net.away.clear)(p)),
    )
    assert [(r["sites"], r["missing"]) for r in rounds] == [(3, []), (2, ["cedar"]), (3, [])]
    assert rounds[1]["dropped"] == ["cedar: could not be reached"] and rounds[1]["seconds"] < 10


def test_a_round_waits_for_sites_that_are_away_while_the_quorum_does_not_stand(pretend, tmp_path, undisturbed):
    net = pretend.Network()
    timer = threading.Timer(0.6, net.away.clear)
    run = pretend.run_config(aggregation={"min_sites": 3})

    def cut():
        net.away.update(("birch", "cedar"))
        timer.start()

    final, rounds = go(net, run, tmp_path, watch=at_round(1, cut))
    assert [(r["sites"], r["missing"]) for r in rounds] == [(3, [])] * 3 and rounds[1]["seconds"] > 0.4
    assert same(final, undisturbed)


def test_the_wait_for_a_quorum_is_bounded_and_the_round_is_void(pretend, tmp_path):
    net = pretend.Network()
    run = pretend.run_config(rounds=2, seconds=0.5, aggregation={"min_sites": 3})
    _, rounds = go(net, run, tmp_path, watch=at_round(1, lambda: net.silent.add("ash")))
    assert [(r["void"], r["missing"]) for r in rounds] == [(False, []), (True, ["ash"])]
    assert rounds[1]["dropped"] == ["ash: did not answer in time"] and 0.4 < rounds[1]["seconds"] < 5


def test_the_quorum_is_strict_and_a_run_of_void_rounds_failed(pretend, tmp_path):
    net, run = pretend.Network(), pretend.run_config(rounds=2, seconds=0.3, aggregation={"min_sites": 3})
    with pytest.raises(RunFailed, match="No round had 3 usable updates") as caught:
        go(net, run, tmp_path, watch=lambda p: net.away.add("cedar") if p.sites_done == 3 else None)
    assert "cedar: could not be reached" in caught.value.remedy
    assert not (tmp_path / tracking.MODEL).exists()


def test_a_late_answer_is_noted_and_thrown_away(pretend, tmp_path):
    net = pretend.Network()

    def hold():
        net.silent.add("birch")
        threading.Timer(0.8, net.silent.clear).start()  # in round 3

    run = pretend.run_config(rounds=4, seconds=0.5)
    net.slow = {"ash": 0.2}
    _, rounds = go(net, run, tmp_path, watch=at_round(1, hold))
    assert rounds[1]["missing"] == ["birch"] and rounds[1]["sites"] == 2
    assert "birch: round 2" in [what for r in rounds for what in r["late"]]
    assert all(r["sites"] + len(r["dropped"]) == 3 for r in rounds)  # not counted in another round


def test_a_site_that_registers_anew_keeps_its_place(pretend, tmp_path, undisturbed):
    net = pretend.Network()
    final, rounds = go(net, pretend.run_config(), tmp_path, watch=at_round(1, lambda: net.move("birch")))
    assert [r["sites"] for r in rounds] == [3, 3, 3] and same(final, undisturbed)


def test_a_revoked_site_is_asked_nothing_more(pretend, tmp_path):
    net = pretend.Network()
    _, rounds = go(net, pretend.run_config(), tmp_path, watch=at_round(1, lambda: net.forget("birch")))
    assert [r["sites"] for r in rounds] == [3, 2, 2] and rounds[1]["dropped"] == ["birch: is not enrolled any more"]
    assert [what for what in net.asked if what[2] == "birch"] == [("query", 0, "birch"), ("train", 1, "birch")]


def test_an_answer_in_another_sites_name_is_dropped_and_so_is_its_anchor(pretend, tmp_path):
    def answer(site, kind, request, good):
        return dataclasses.replace(good, site="ash") if (site, request.round) == ("birch", 2) else good

    anchors = []
    _, rounds = go(
        pretend.Network(answer), pretend.run_config(), tmp_path, keep_anchor=lambda *what: anchors.append(what[:2])
    )
    assert [r["sites"] for r in rounds] == [3, 2, 3] and rounds[1]["dropped"] == ["birch: answered as ash"]
    assert ("birch", 2) not in anchors and anchors.count(("ash", 2)) == 1


def test_a_program_that_dies_is_asked_three_times_while_the_quorum_does_not_stand(pretend, tmp_path):
    net, run = pretend.Network(), pretend.run_config(rounds=2, aggregation={"min_sites": 3})
    _, rounds = go(net, run, tmp_path, watch=at_round(1, lambda: net.crashing.add("cedar")))
    assert net.asked.count(("train", 2, "cedar")) == 3 and rounds[1]["void"] and rounds[1]["seconds"] < 10
    assert rounds[1]["dropped"] == ["cedar: the site's app did not answer"] and "died" not in json.dumps(rounds)


def test_an_update_longer_than_clip_and_steps_allow_is_dropped(pretend, tmp_path):
    def answer(site, kind, request, good):
        if (site, kind, request.round) != ("ash", "train", 1):
            return good
        return dataclasses.replace(good, update={n: np.full_like(a, 6e4) for n, a in good.update.items()})

    _, rounds = go(pretend.Network(answer), pretend.run_config(train={"learning_rate": 50.0}), tmp_path)
    assert "longer than" in rounds[0]["dropped"][0] and [r["sites"] for r in rounds] == [2, 3, 3]


@pytest.mark.parametrize("when", ["query", "train", "evaluate"])
def test_the_stop_file_ends_a_run_between_two_messages_and_it_goes_on_to_the_same_model(
    pretend, tmp_path, undisturbed, when
):
    def answer(site, kind, request, good):
        if kind == when and request.round != 1 and site == "ash":
            tracking.ask_to_stop(tmp_path)
        return good

    run, net = pretend.run_config(evaluation={"private": when == "evaluate"}), pretend.Network(answer)
    net.slow = {"birch": 0.1}
    with pytest.raises(RunFailed, match="stopped"):
        go(net, run, tmp_path)
    assert not (tmp_path / tracking.SUMMARY).exists()
    tracking.forget_stop(tmp_path)
    net = pretend.Network()
    final, rounds = go(net, run, tmp_path)
    assert [r["round"] for r in rounds] == [1, 2, 3]
    assert ("query" in {kind for kind, _, _ in net.asked}) == (when == "query")  # asked once in a run's life
    assert when == "evaluate" or same(final, undisturbed)


def test_a_resumed_run_goes_on_with_the_same_sites_and_weights_though_one_is_away(pretend, tmp_path):
    stop, net, run = threading.Event(), pretend.Network(), pretend.run_config()
    with pytest.raises(RunFailed):
        go(net, run, tmp_path, stop=stop, watch=at_round(1, stop.set))
    net.away.add("cedar")
    _, rounds = go(net, run, tmp_path)
    assert [(r["sites"], r["missing"]) for r in rounds] == [(3, []), (2, ["cedar"]), (2, ["cedar"])]
    assert [site["name"] for site in tracking.read_summary(tmp_path)["sites"]] == list(pretend.sizes)


def test_the_model_does_not_depend_on_the_order_of_the_answers(pretend, tmp_path, undisturbed):
    net = pretend.Network()
    net.slow = {"ash": 0.12, "birch": 0.06}
    final, _ = go(net, pretend.run_config(), tmp_path)
    assert [site for kind, n, site in net.asked if (kind, n) == ("train", 1)] == ["cedar", "birch", "ash"]
    assert same(final, undisturbed)


def test_the_private_evaluation_goes_on_without_a_site_that_is_away(pretend, tmp_path):
    net, run = pretend.Network(), pretend.run_config(rounds=1, evaluation={"private": True})
    go(net, run, tmp_path, watch=at_round(1, lambda: net.away.add("ash")))
    assert tracking.read_summary(tmp_path)["metrics"]["auroc_private"]["sites"] == 2


def test_refused_in_mid_run_the_run_goes_on_without_the_site(pretend, tmp_path):
    def answer(site, kind, request, good):
        revoked = site == "cedar" and request.round > 1
        return Reply(site, "refused", "the hospital revoked this run") if revoked else good

    _, rounds = go(pretend.Network(answer), pretend.run_config(), tmp_path)
    assert [r["sites"] for r in rounds] == [3, 2, 2]
    assert rounds[2]["dropped"] == ["cedar: the hospital revoked this run"]
