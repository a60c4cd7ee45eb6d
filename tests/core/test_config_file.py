import tomllib

import pytest
from pydantic import BaseModel

from fedscan_core import config_file
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError


def write(folder, text):
    path = folder / "RUN.toml"
    path.write_text(text)
    return path


def test_the_sample_is_a_run(tmp_path):
    run = config_file.load(write(tmp_path, config_file.SAMPLE))
    assert run.task.labels == ("normal", "pneumonia") and run.task.image_size == (64, 64)
    assert (run.train.rounds, run.train.patients_per_step, run.data.dir) == (100, "all", "my-images")


@pytest.mark.parametrize(
    ("tree", "suggestion"),
    [
        ({"train": {"round": 3}}, "unknown key 'train.round', did you mean 'train.rounds'?"),
        ({"train": {"learningrate": 3}}, "'train.learning_rate'?"),
        ({"privcy": {}}, "unknown key 'privcy', did you mean 'privacy'?"),
        ({"rounds": 3}, "unknown key 'rounds', did you mean 'train.rounds'?"),
        ({"train": {"target_epsilon": 3}}, "did you mean 'privacy.target_epsilon'?"),
        ({"data": {"sites": [{"name": "a", "memebers": []}]}}, "did you mean 'data.sites.0.members'?"),
        ({"aggregation": {"zzzzzz": 1}}, "here are: strategy, server_learning_rate"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_name(tree, suggestion):
    with pytest.raises(ConfigError) as caught:
        config_file.parse(tree)
    assert suggestion in caught.value.message and "--explain" in caught.value.remedy


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        config_file.parse({"train": {"rounds": 0, "learning_rate": "fast"}, "task": {"chanels": 1}})
    for key in ("'train.rounds'", "'train.learning_rate'", "'task.chanels'"):
        assert key in caught.value.message


def test_overrides_win_over_the_file_and_the_last_over_the_first(tmp_path):
    path = write(tmp_path, '[train]\nrounds = 5\noptimizer = "adam"\n')
    run = config_file.load(
        path,
        [
            "train.rounds=6",
            "train.rounds = 7",
            "model.name=cnn",
            'data.dir="with = sign"',
            "privacy.delta=1e-6",
            "task.labels=['a', 'b', 'c']",
            "privacy.enabled=false",
            "data.table=a#b.csv",
        ],
    )
    assert (run.train.rounds, run.train.optimizer, run.model.name) == (7, "adam", "cnn")
    assert (run.data.dir, run.data.table, run.privacy.delta) == ("with = sign", "a#b.csv", 1e-6)
    assert run.task.labels == ("a", "b", "c") and run.privacy.enabled is False


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("train.rounds", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("name.first=3", "'name' is not a section"),
        ("train.rounds.most=3", "'rounds' is not a section"),
        ("train.round=3", "did you mean 'train.rounds'"),
        ("train.rounds=many", "'train.rounds': "),
        ("train.patients_per_step=some", "'train.patients_per_step': "),
        ("privacy.clip=tight", "'privacy.clip': "),
    ],
)
def test_overrides_that_say_nothing(tmp_path, override, word):
    path = write(tmp_path, 'name = "a"\n[train]\nrounds = 5\n')
    with pytest.raises(ConfigError, match=word.replace("[", r"\[")) as caught:
        config_file.load(path, [override])
    assert caught.value.remedy
    assert ".int" not in caught.value.message and ".float" not in caught.value.message  # pydantic's, not the file's


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "no file"),
        ("folder", "is a folder"),
        (b"name = unquoted", "not valid TOML"),
        (b'name = "a"\nname = "b"', "not valid TOML"),
        (b'name = "\xff"', "not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, word):
    path = tmp_path / "RUN.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=word) as caught:
        config_file.load(path)
    assert caught.value.remedy and str(path) in caught.value.message


def leaves(section: type[BaseModel], prefix=""):
    """Every dotted key that a run can hold, read off an instance's JSON schema."""
    schema = section.model_json_schema()
    stack = [(prefix, schema)]
    while stack:
        where, node = stack.pop()
        if "items" in node and "$ref" in node["items"]:
            node = node["items"]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        if "properties" in node:
            stack.extend((f"{where}.{name}".lstrip("."), inner) for name, inner in node["properties"].items())
        else:
            yield where


def test_explain_lists_every_key_once_with_words():
    rows = list(config_file.explain())
    keys = [key for key, kind, _, _ in rows if kind]
    assert sorted(keys) == sorted(leaves(RunConfig)) and len(keys) > 40
    assert all(text and text.strip().endswith((".", ")", "?")) for _, _, _, text in rows)
    sections = [key for key, kind, _, _ in rows if not kind]
    assert sections[0] == "[task]" and "[[data.sites]]" in sections
    said = {key: (kind, default) for key, kind, default, _ in rows}
    assert said["train.rounds"] == ("integer", "100")
    assert said["privacy.target_epsilon"] == ("number", "unset")
    assert said["privacy.delta"] == ('number | "auto"', '"auto"')
    assert said["task.labels"][0] == "list of text" and said["data.sites.name"] == ("text", "required")


def test_the_defaults_that_explain_prints_are_the_defaults():
    tree: dict[str, dict[str, object]] = {}
    for key, kind, default, _ in config_file.explain():
        if kind and default not in ("unset", "required") and key.count(".") == 1:
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = tomllib.loads(f"v = {default}")["v"]
    assert config_file.parse(tree) == RunConfig()
