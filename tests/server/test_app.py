"""The round loop against pretend sites that answer well, badly, or with lies."""

import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp
from safetensors.numpy import load_file

from fedscan.grid import InlineGrid
from fedscan_core import config, wire
from fedscan_core.accounting import epsilon, epsilon_so_far, plan_for, replace_one
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError, FolderError, RunFailed
from fedscan_core.order import Order
from fedscan_core.wire import Reply
from fedscan_server import checkpoint, evaluate, tracking
from fedscan_server.app import Job, Progress, initial_model, run_rounds

SIZES = (120, 60, 30)
NAMES = ("ash", "birch", "cedar")


def run_config(rounds=4, **sections):
    """A small real network; sigma is given, so that no plan needs calibrating."""
    privacy = sections.pop("privacy", {"noise_multiplier": 1.0})
    # The rate is that of sites whose updates are as long as those of `update_of` and `constant`.
    train = {"rounds": rounds, "learning_rate": 1e4, "tail_average": 0.0} | sections.pop("train", {})
    rule = {"strategy": "fedavg", "min_sites": 2} | sections.pop("aggregation", {})
    tree = {"name": "demo", "task": {"labels": ["0", "1"], "image_size": 32}, "aggregation": rule}
    return RunConfig.model_validate({**tree, "privacy": privacy, "train": train, **sections})


def update_of(site, request):
    """A site's update: any numbers fixed by the site, the round and the model it was sent."""
    assert request.model is not None
    seed = int(wire.fingerprint(request.model)[:8], 16)
    rng = np.random.default_rng([site, request.round, seed])
    return {name: rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in request.model.items()}


class Sites:
    """Three pretend sites. `answer(site, kind, request, good reply)` may return another reply, or raise."""

    def __init__(self, answer=lambda site, kind, request, good: good):
        self.asked: list[tuple[str, int, int]] = []
        self.sent: list[wire.Request] = []
        app = ClientApp()
        for kind, register in (("query", app.query), ("train", app.train), ("evaluate", app.evaluate)):
            self._register(register(), kind, answer)
        self.grid = InlineGrid(app, len(SIZES))

    def _register(self, decorate, kind, answer):
        def handle(message: Message, context: Context) -> Message:
            site = int(context.node_config["partition-id"])
            request = wire.read_request(message.content)
            self.asked.append((kind, request.round, site))
            self.sent.append(request)
            reply = answer(site, kind, request, good_reply(site, kind, request))
            return Message(reply if not isinstance(reply, Reply) else wire.reply_record(reply), reply_to=message)

        decorate(handle)


def good_reply(site, kind, request):
    run = config.from_server(request.config)
    if kind == "query":
        return Reply(NAMES[site], "ok", plan=plan_for(run, SIZES[site]))
    if kind == "train":
        return Reply(NAMES[site], "ok", update=update_of(site, request))
    counts = np.full((1, 1, 2, run.evaluation.bins), 5.0)
    counts[0, 0, 1, run.evaluation.bins // 2 :] += 50
    return Reply(NAMES[site], "ok", histogram=counts)


def go(folder, run, sites=None, **job):
    sites = sites or Sites()
    run_rounds(sites.grid, Job(run, Order("demo-1", config.for_sites(run)), folder, **job))
    return load_file(folder / tracking.MODEL), tracking.read_summary(folder), tracking.read_rounds(folder)


def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def models_sent(sites):
    """The model that went out in each round, from round 1."""
    return list({request.round: request.model for request in sites.sent if request.round}.values())


def test_every_round_moves_the_model_by_the_mean_update_weighted_by_declared_size(tmp_path):
    run, sites = run_config(rounds=3), Sites()
    final, _, _ = go(tmp_path, run, sites)
    models = [*models_sent(sites), final]
    start, trainable = initial_model(run)
    assert same(models[0], start) and trainable == set(start)
    for round_, (before, after) in enumerate(itertools.pairwise(models), start=1):
        updates = [update_of(site, wire.Request(Order("r", "{}"), round_, before)) for site in range(3)]
        for name in before:
            mean = sum(size / 210 * u[name].astype(np.float64) for size, u in zip(SIZES, updates, strict=True))
            np.testing.assert_allclose(after[name], before[name] + mean, rtol=1e-6, atol=1e-7)


def constant(value, void=()):
    """Sites whose updates are value(site) everywhere, and that fail in the rounds of `void`."""

    def answer(site, kind, request, good):
        if kind != "train":
            return good
        update = {name: np.full_like(array, value(site)) for name, array in good.update.items()}
        return Reply(NAMES[site], "failed") if request.round in void else dataclasses.replace(good, update=update)

    return Sites(answer)


@pytest.mark.parametrize(("weights", "mean"), [("uniform", 2.0), ("declared", (120 + 2 * 60 + 3 * 30) / 210)])
def test_uniform_weights_are_equal_weights(tmp_path, weights, mean):
    run = run_config(rounds=1, aggregation={"weights": weights})
    final, _, _ = go(tmp_path, run, constant(lambda site: site + 1))
    for name, array in initial_model(run)[0].items():
        np.testing.assert_allclose(final[name] - array, mean, rtol=1e-5)


@pytest.mark.parametrize(("void", "steps"), [((), 1 + 1.5 + 1.75), ((2,), 1 + 1.5)])
def test_the_servers_momentum_lives_from_round_to_round(tmp_path, void, steps):
    run = run_config(rounds=3, aggregation={"strategy": "fedavgm", "momentum": 0.5})
    final, _, _ = go(tmp_path, run, constant(lambda site: 1, void))
    for name, array in initial_model(run)[0].items():
        np.testing.assert_allclose(final[name] - array, steps, rtol=1e-6)


def test_the_live_view_shows_what_is_spent_and_not_what_will_be(tmp_path):
    run, seen = run_config(rounds=2), list[Progress]()
    go(tmp_path, run, watch=seen.append)
    shown = [(p.sites_done, p.epsilon_low, p.epsilon_high) for p in seen if p.phase == "round"]
    spent = [[epsilon_so_far(plan_for(run, size), n) for size in SIZES] for n in range(3)]
    low, high = [min(values) for values in spent], [max(values) for values in spent]
    expected = []
    for n in (1, 2):  # a round is spent as soon as it begins: sites draw their noise before they answer
        expected += [(done, low[n], high[n]) for done in (1, 2, 3)]
    assert shown == expected


def test_the_summary_and_the_rounds(tmp_path):
    run = run_config(rounds=3, evaluation={"private": True, "every": 2})
    judged = []

    def judge(model):
        judged.append(model)
        return {"auroc": 0.75}

    final, summary, rounds = go(tmp_path, run, judge=judge)
    assert summary.keys() >= {"run", "run_id", "config_sha256", "versions", "rounds", "model", "parameters"}
    assert summary["seconds"] >= 0 and summary["versions"] == tracking.versions()
    for index, site in zip(range(3), summary["sites"], strict=True):
        plan = plan_for(run, SIZES[index])
        replaced = replace_one(plan.events(), plan.delta)
        assert site == {"name": NAMES[index], **dataclasses.asdict(plan), "epsilon_replace_one": replaced}
        assert site["unit"] == "patient" and site["adjacency"] == "add_or_remove_one" and site["steps"] == 3
        assert site["epsilon"] == epsilon(plan.events(), site["delta"])
    size = sum(array.nbytes for array in final.values())
    assert summary["parameters"] == size // 4 and summary["model"] == "scatter" and summary["run"] == "demo"
    assert summary["bytes_up"] == summary["bytes_down"] == size * 3 * 3
    assert summary["config_sha256"] == config.sha256(run) and summary["rounds"] == 3 and summary["rounds_void"] == 0
    assert summary["metrics"]["auroc"] == 0.75 and summary["metrics"]["auroc_private"]["sites"] == 3
    assert [("metrics" in record) for record in rounds] == [False, True, True] and len(judged) == 2
    assert same(judged[-1], final)
    assert [record["round"] for record in rounds] == [1, 2, 3]
    spent = [record["epsilon_spent_max"] for record in rounds]
    assert spent == [epsilon_so_far(plan_for(run, 120), n) for n in (1, 2, 3)] and spent == sorted(spent)


def test_sites_are_asked_once_a_round_for_the_plan_the_updates_and_the_evaluation(tmp_path):
    sites = Sites()
    go(tmp_path, run_config(rounds=2, evaluation={"private": True}), sites)
    expected = [("query", 0), ("train", 1), ("train", 2), ("evaluate", 0)]
    assert sites.asked == [(*what, site) for what in expected for site in range(3)]
    assert {request.run_id for request in sites.sent} == {"demo-1"}
    assert all("simulation" not in json.loads(request.config) for request in sites.sent)


def test_no_private_evaluation_is_asked_for_where_the_run_has_none(tmp_path):
    for number, sections in enumerate(({"evaluation": {"private": False}}, {"privacy": {"enabled": False}})):
        sites = Sites()
        _, summary, _ = go(tmp_path / str(number), run_config(rounds=1, **sections), sites)
        assert "evaluate" not in {kind for kind, _, _ in sites.asked} and summary["metrics"] == {}


def nan_update(good):
    name = sorted(good.update)[0]
    return dataclasses.replace(good, update=good.update | {name: np.full_like(good.update[name], np.nan)})


def crash(good):
    raise ValueError("Carla Canary")


def no_array(good):
    record = wire.reply_record(good)
    record.array_records["update"]["safetensors"] = Array("uint8", (8,), "safetensors", b"no array")
    return record


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (nan_update, "not finite"),
        (lambda good: dataclasses.replace(good, update=None), "other parameters"),
        (lambda good: dataclasses.replace(good, site="ash"), "answered as ash"),
        (lambda good: Reply("birch", "failed"), "failed"),
        (crash, "did not answer"),
        (no_array, "holds no safetensors file"),
    ],
)
def test_a_bad_answer_is_dropped_and_recorded_and_the_run_goes_on(tmp_path, bad, word):
    def answer(site, kind, request, good):
        return bad(good) if (site, kind, request.round) == (1, "train", 2) else good

    sites = Sites(answer)
    final, summary, rounds = go(tmp_path, run_config(rounds=3), sites)
    assert [record["sites"] for record in rounds] == [3, 2, 3] and summary["rounds_void"] == 0
    assert [len(record["dropped"]) for record in rounds] == [0, 1, 0]
    assert rounds[1]["dropped"][0].startswith("birch: ") and word in rounds[1]["dropped"][0]
    assert "Carla" not in json.dumps(rounds)
    assert all(np.isfinite(array).all() for array in final.values())
    _, before, after = models_sent(sites)
    u0, u2 = (update_of(site, wire.Request(Order("r", "{}"), 2, before)) for site in (0, 2))
    for name in before:  # the mean of the other two, by their sizes
        mean = (120 * u0[name].astype(np.float64) + 30 * u2[name]) / 150
        np.testing.assert_allclose(after[name], before[name] + mean, rtol=1e-5, atol=1e-7)


def failing(*rounds, sites=(0, 1)):
    def answer(site, kind, request, good):
        fails = kind == "train" and request.round in rounds and site in sites
        return Reply(NAMES[site], "failed") if fails else good

    return Sites(answer)


def test_a_round_with_too_few_sites_is_void_and_changes_nothing(tmp_path):
    sites = failing(2)
    _, summary, rounds = go(tmp_path, run_config(rounds=3), sites)
    assert [record["void"] for record in rounds] == [False, True, False] and summary["rounds_void"] == 1
    first, second, third = models_sent(sites)
    assert same(second, third) and not same(first, second)
    _, _, rounds = go(tmp_path / "one", run_config(rounds=3, aggregation={"min_sites": 1}), failing(2))
    assert not any(record["void"] for record in rounds)


def test_a_void_round_counts_in_the_tail_average_with_the_model_it_left(tmp_path):
    sites, run = failing(3), run_config(rounds=4, train={"tail_average": 1.0})
    final, _, _ = go(tmp_path, run, sites)
    state = checkpoint.latest(tmp_path, config.sha256(run))
    assert state is not None and same(state.average, final)
    for name, array in final.items():
        models = [*(model[name] for model in models_sent(sites)[1:]), state.model[name]]
        np.testing.assert_allclose(array, np.mean(models, axis=0), rtol=1e-4, atol=1e-6)


def test_a_run_whose_rounds_are_all_void_failed(tmp_path):
    run = run_config(rounds=2)
    for _ in range(2):  # resuming it changes nothing
        with pytest.raises(RunFailed, match="No round had 2 usable updates") as caught:
            go(tmp_path, run, failing(1, 2))
        assert "ash: failed" in caught.value.remedy and caught.value.exit_code == 1
        assert not (tmp_path / tracking.SUMMARY).exists() and not (tmp_path / tracking.MODEL).exists()


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (lambda good: dataclasses.replace(good, plan=dataclasses.replace(good.plan, epsilon=0.1)), "costs more"),
        (lambda good: dataclasses.replace(good, plan=dataclasses.replace(good.plan, evaluation_noise=-1.0)), "range"),
        (lambda good: dataclasses.replace(good, plan=None), "could not answer"),
        (lambda good: dataclasses.replace(good, site="ash"), "answers as ash"),
        (lambda good: Reply("birch", "refused", reason="its policy asks for less"), "asks for less"),
        (crash, "did not answer"),
    ],
)
def test_a_site_that_lies_or_refuses_takes_no_part(tmp_path, bad, word):
    def answer(site, kind, request, good):
        return bad(good) if (site, kind) == (1, "query") else good

    sites, seen = Sites(answer), list[Progress]()
    _, summary, rounds = go(tmp_path, run_config(rounds=1), sites, watch=seen.append)
    assert [site["name"] for site in summary["sites"]] == ["ash", "cedar"] and rounds[0]["sites"] == 2
    assert ("train", 1, 1) not in sites.asked
    assert any(word in note for progress in seen for note in progress.notes)


def test_too_few_sites_end_the_run_before_training(tmp_path):
    def answer(site, kind, request, good):
        return Reply(NAMES[site], "refused", reason=f"no, says {NAMES[site]}") if site else good

    sites = Sites(answer)
    with pytest.raises(ConfigError, match=r"1 of 3 sites .* 2 needed.*birch: no, says birch; cedar"):
        go(tmp_path, run_config(), sites)
    assert {kind for kind, _, _ in sites.asked} == {"query"}
    assert tracking.read_rounds(tmp_path) == []


def test_a_histogram_that_does_not_fit_is_left_out(tmp_path):
    def answer(site, kind, request, good):
        bad = {0: np.full((1, 1, 2, 10), np.nan), 1: np.full((1, 1, 2, 10), "x")}
        return dataclasses.replace(good, histogram=bad[site]) if kind == "evaluate" and site in bad else good

    _, summary, _ = go(tmp_path, run_config(rounds=1, evaluation={"private": True}), Sites(answer))
    good = good_reply(2, "evaluate", wire.Request(Order("r", config.for_sites(run_config())), 0)).histogram
    assert good is not None
    assert summary["metrics"] == evaluate.private_metrics(run_config(), [good], [1.0])  # sigma is 1 in these runs
    assert summary["metrics"]["auroc_private"]["sites"] == 1


def stop_after(round_, stop):
    def watch(progress):
        if progress.phase == "round" and progress.round == round_ and progress.sites_done == 3:
            stop.set()

    return watch


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
@pytest.mark.parametrize("extra", [{"ema": 0.9}, {"tail_average": 0.75}])
def test_a_stopped_run_goes_on_to_the_very_same_model(tmp_path, strategy, extra):
    run = run_config(rounds=4, aggregation={"strategy": strategy}, train=extra)
    whole, summary, rounds = go(tmp_path / "whole", run)
    stop, torn = threading.Event(), tmp_path / "torn"
    with pytest.raises(RunFailed, match="stopped"):
        go(torn, run, stop=stop, watch=stop_after(2, stop))
    assert not (torn / tracking.SUMMARY).exists()
    assert [record["round"] for record in tracking.read_rounds(torn)] == [1, 2]
    sites = Sites()
    resumed, again, rounds_again = go(torn, run, sites)
    assert {round_ for kind, round_, _ in sites.asked if kind == "train"} == {3, 4}
    assert same(resumed, whole)
    assert [record["round"] for record in rounds_again] == [1, 2, 3, 4]
    for key in ("bytes_up", "bytes_down", "sites", "config_sha256", "rounds_void"):
        assert again[key] == summary[key]
    start, _ = initial_model(run)
    assert not same(whole, start) and len(rounds) == 4


@pytest.mark.parametrize("where", ["checkpoint", "record"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_crash_around_the_checkpoint_loses_no_round_and_counts_none_twice(tmp_path, monkeypatch, where, rounds):
    run = run_config(rounds=rounds)
    whole, _, _ = go(tmp_path / "whole", run)
    module, name = (checkpoint, "write") if where == "checkpoint" else (tracking, "add_round")
    real = getattr(module, name)

    def crash_in_the_last(folder, what, *rest):
        number = what.round if where == "checkpoint" else what["round"]
        if number == rounds:
            raise OSError("power cut")
        real(folder, what, *rest)

    monkeypatch.setattr(module, name, crash_in_the_last)
    with pytest.raises(OSError, match="power cut"):
        go(tmp_path / "torn", run)
    monkeypatch.undo()
    resumed, summary, records = go(tmp_path / "torn", run)
    assert same(resumed, whole) and [record["round"] for record in records] == list(range(1, rounds + 1))
    assert summary["bytes_up"] > 0


def test_a_finished_run_that_is_resumed_trains_no_more_and_says_the_same(tmp_path):
    run = run_config(rounds=2, evaluation={"private": True})
    model, summary, _ = go(tmp_path, run, judge=lambda model: {"auroc": 0.5})
    sites = Sites()
    again, summary_again, rounds = go(tmp_path, run, sites, judge=lambda model: {"auroc": 0.5})
    assert "train" not in {kind for kind, _, _ in sites.asked} and same(model, again) and len(rounds) == 2
    assert summary_again["metrics"] == summary["metrics"] and summary_again["seconds"] == summary["seconds"]


def test_another_runs_folder_is_refused(tmp_path):
    go(tmp_path, run_config(rounds=1))
    with pytest.raises(FolderError, match="another configuration"):
        go(tmp_path, run_config(rounds=2))


def test_a_site_whose_answer_is_lost_is_given_up(tmp_path, monkeypatch):
    sites = Sites()
    pull, lost = sites.grid.pull_messages, (1002, "train")

    def lossy(names):
        return [m for m in pull(names) if (m.metadata.src_node_id, m.metadata.message_type) != lost]

    monkeypatch.setattr(sites.grid, "pull_messages", lossy)
    _, _, rounds = go(tmp_path, run_config(rounds=1), sites, timeout=0.3)
    assert rounds[0]["sites"] == 2 and rounds[0]["dropped"] == ["cedar: did not answer in time"]
