import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedscan_core import config, config_file
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError

WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAME = st.from_regex(config.NAME_PATTERN.replace("$", r"\Z"))
RULES = st.lists(NAME, unique=True, max_size=3).flatmap(
    lambda names: st.tuples(*(st.fixed_dictionaries({"name": st.just(n), "members": st.lists(WORD)}) for n in names))
)


@st.composite
def trees(draw):
    """RUN.toml as a person would have typed it: some keys of every kind of value."""
    positive = st.floats(1e-6, 50)
    privacy = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "delta": st.just("auto") | st.floats(1e-12, 9e-3),
                "clip": st.just("auto") | positive,
                "enabled": st.booleans(),
                "max_images_per_patient": st.integers(1, 4096),
            },
        )
    )
    privacy |= draw(st.sampled_from([{}, {"target_epsilon": 1.5}, {"noise_multiplier": 0.7}]))
    return {
        "name": draw(NAME),
        "task": {
            "labels": draw(st.lists(WORD, min_size=2, max_size=4, unique=True)),
            "image_size": draw(st.integers(16, 4096) | st.lists(st.integers(16, 4096), min_size=2, max_size=2)),
        },
        "privacy": privacy,
        "train": {
            "rounds": draw(st.integers(1, 100_000)),
            "learning_rate": draw(positive),
            "patients_per_step": draw(st.just("all") | st.integers(1, 10**6)),
        },
        "data": {"dir": draw(WORD), "sites": [dict(rule) for rule in draw(RULES)]},
    }


@given(trees())
def test_toml_there_and_back_is_the_same_run(tree):
    run = config_file.parse(tree)
    again = config_file.parse(tomllib.loads(config.to_toml(run)))
    assert again == run and config.sha256(again) == config.sha256(run)
    for section, values in tree.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if key not in ("sites", "image_size", "labels"):
                assert getattr(getattr(run, section), key) == value


@given(trees())
def test_sites_hear_all_but_where_pretend_data_lie(tree):
    run = config_file.parse(tree)
    text = config.for_sites(run)
    assert set(json.loads(text)) == set(RunConfig.model_fields) - {"data", "simulation", "federation"}
    there = config.from_server(text)
    assert there.model_dump(exclude={"data", "simulation", "federation"}) == run.model_dump(
        exclude={"data", "simulation", "federation"}
    )
    assert there.data == config.Data() and config.for_sites(there) == text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"name": "x", "code": "import os"}', '{"train": {"rounds": 0}}', '{"name": "../x"}']
)
def test_a_site_refuses_another_configuration(text):
    with pytest.raises(ConfigError, match="does not fit") as caught:
        config.from_server(text)
    assert "import" not in str(caught.value) and caught.value.remedy


def test_the_fingerprint_is_of_the_resolved_run_and_of_every_key():
    plain = config.sha256(RunConfig())
    assert plain == config.sha256(config_file.parse({"train": {"rounds": 100}, "name": "run"}))
    changes = ["name=b", "train.rounds=31", "privacy.delta=1e-6", 'task.labels=["1","0"]', "simulation.alpha=0.6"]
    others = {config.sha256(config_file.parse(_tree(change))) for change in changes}
    assert len(others | {plain}) == len(changes) + 1


def _tree(change):
    tree: dict[str, object] = {}
    config_file._override(tree, change)
    return tree


def test_one_of_epsilon_and_noise():
    assert RunConfig().privacy.target_epsilon == 8.0
    given_noise = config_file.parse({"privacy": {"noise_multiplier": 1.0}}).privacy
    assert given_noise.target_epsilon is None and given_noise.noise_multiplier == 1.0
    with pytest.raises(ConfigError, match="target_epsilon and noise_multiplier: give one"):
        config_file.parse({"privacy": {"noise_multiplier": 1.0, "target_epsilon": 8.0}})
    with pytest.raises(ConfigError):  # a server cannot say both to a site either
        config.from_server('{"privacy": {"noise_multiplier": 1.0, "target_epsilon": 8.0}}')


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("name=../x", "name"),
        ("name=a/b", "name"),
        ('name="a\\n"', "name"),
        ("name=.hidden", "name"),
        (f"name={'a' * 65}", "name"),
        ('task.labels=["a"]', "task.labels"),
        ('task.labels=["a","a"]', "labels must differ"),
        ("task.image_size=15", "task.image_size"),
        ("task.image_size=[64,64,64]", "3-D images"),
        ("task.image_size=true", "task.image_size"),
        ("task.channels=2", "task.channels"),
        ("model.name=resnet19", "did you mean 'resnet18'"),
        ("model.name=unet2d", "unet models segment"),
        ("privacy.delta=0.01", "privacy.delta"),
        ("privacy.delta=0", "privacy.delta"),
        ("privacy.delta=nan", "privacy.delta"),
        ("privacy.clip=0", "privacy.clip"),
        ("privacy.clip=inf", "privacy.clip"),
        ("privacy.clip=1e-7", "privacy.clip"),
        ("privacy.clip=1e7", "privacy.clip"),
        ("privacy.target_epsilon=inf", "privacy.target_epsilon"),
        ("privacy.target_epsilon=0.009", "below 0.01"),
        ("privacy.noise_multiplier=101", "above 100"),
        ("privacy.noise_multiplier=0", "privacy.noise_multiplier"),
        ("train.patients_per_step=0", "train.patients_per_step"),
        ("train.patients_per_step=some", "train.patients_per_step"),
        ("train.augmentation=flip", "scatter computes fixed features"),
        ("train.multiplicity=2", "train.multiplicity"),
        ("train.momentum=1", "train.momentum"),
        ("aggregation.min_sites=0", "aggregation.min_sites"),
        ("evaluation.bins=9", "evaluation.bins"),
        ("evaluation.bins=21", "evaluation.bins"),
        ("evaluation.bins=15", "threshold 0.5 is not an edge of 15 bins; the next ones are 0.4667 and 0.5333"),
        ("evaluation.threshold=0.33", "not an edge of 10 bins; the next ones are 0.3 and 0.4"),
        ("evaluation.threshold=0.01", "the next ones are 0.1 and 0.2"),
        ("evaluation.threshold=0.99", "the next ones are 0.9"),
        ("evaluation.threshold=1.0", "evaluation.threshold"),
        ('evaluation.groups=["eyes"]', "evaluation.groups"),
        ('evaluation.groups=["sex","sex"]', "each attribute once"),
        ("evaluation.age_edges=[65,40]", "ages must rise"),
        ("evaluation.age_edges=[0,40]", "between 1 and 90"),
        ("evaluation.age_edges=[]", "evaluation.age_edges"),
    ],
)
def test_values_out_of_range_are_refused_by_name(change, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as caught:
        config_file.parse(_tree(change))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("tree", "word"),
    [
        ({"data": {"sites": [{"name": "a"}, {"name": "a"}]}}, "two sites have the same name"),
        ({"data": {"sites": [{"name": "a", "role": "evaluate"}]}}, "at least one must train"),
        ({"data": {"sites": [{"name": "a/b"}]}}, "data.sites.0.name"),
    ],
)
def test_what_does_not_go_together(tree, word):
    with pytest.raises(ConfigError, match=word):
        config_file.parse(tree)


@pytest.mark.parametrize(("bins", "threshold"), [(10, 0.5), (10, 0.7), (20, 0.15), (12, 0.25), (18, 0.5)])
def test_a_threshold_on_an_edge_is_taken(bins, threshold):
    run = config_file.parse({"evaluation": {"bins": bins, "threshold": threshold}})
    assert run.evaluation.private and run.evaluation.threshold == threshold
    assert config.from_server(config.for_sites(run)).evaluation == run.evaluation


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().train.rounds = 5  # type: ignore[misc]
