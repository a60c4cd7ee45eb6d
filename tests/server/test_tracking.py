import json
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fedscan_core.errors import FolderError
from fedscan_server import tracking


def test_a_new_or_empty_folder_is_taken(tmp_path):
    tracking.create(tmp_path / "a" / "b")
    tracking.create(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("name", ["notes.txt", tracking.RUN])
def test_a_folder_that_holds_something_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FolderError, match="is not empty") as caught:
        tracking.create(tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert ("--resume" in caught.value.remedy) == (name == tracking.RUN) and "--out" in caught.value.remedy


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_instead_of_a_folder(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FolderError, match="is a file") as caught:
        tracking.create(tmp_path / "file" / below)
    assert caught.value.remedy


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(FolderError, match="cannot be written"):
        tracking.create(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(FolderError, match="cannot be made") as caught:
        tracking.create(tmp_path / ("x" * 300))
    assert caught.value.remedy


def test_rounds_come_back_in_order(tmp_path):
    assert tracking.read_rounds(tmp_path) == []
    rounds = [{"round": n, "dropped": ["é: \u2028 said"], "epsilon": 0.1 * n} for n in (1, 2, 3)]
    for record in rounds:
        tracking.add_round(tmp_path, record)
    assert tracking.read_rounds(tmp_path) == rounds
    assert tracking.keep_rounds(tmp_path, 2) == rounds[:2] == tracking.read_rounds(tmp_path)
    assert tracking.keep_rounds(tmp_path, 9) == rounds[:2]


@settings(max_examples=25)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_torn_last_round_is_dropped_and_the_next_one_follows(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("run")
    for number in (1, 2):
        tracking.add_round(folder, {"round": number, "sites": 3})
    path = folder / tracking.ROUNDS
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + int(cut * (len(whole) - first - 1))])
    assert tracking.read_rounds(folder) == [{"round": 1, "sites": 3}]
    tracking.keep_rounds(folder, 1)
    tracking.add_round(folder, {"round": 2, "sites": 4})
    assert [r["sites"] for r in tracking.read_rounds(folder)] == [3, 4]


def test_what_is_written_is_json_for_everybody(tmp_path):
    """Python's json writes Infinity and NaN, which no other reader takes."""
    value = {"epsilon": math.inf, "inner": [{"a": (math.nan, 1.5, "é", None, True)}]}
    plain = {"epsilon": None, "inner": [{"a": [None, 1.5, "é", None, True]}]}
    tracking.write_summary(tmp_path, value)
    tracking.add_round(tmp_path, value)
    for name in (tracking.SUMMARY, tracking.ROUNDS):

        def refuse(constant, name=name):
            raise AssertionError(f"{constant} in {name}")

        assert json.loads((tmp_path / name).read_text(), parse_constant=refuse) == plain


def test_the_summary_comes_back_or_is_named(tmp_path):
    with pytest.raises(FolderError, match=r"summary\.json") as caught:
        tracking.read_summary(tmp_path)
    assert caught.value.remedy
    tracking.write_summary(tmp_path, {"rounds": 3})
    assert tracking.read_summary(tmp_path) == {"rounds": 3}


def test_the_model_says_what_it_is(tmp_path):
    tracking.write_model(tmp_path, {"w": np.arange(3, dtype=np.float32)}, {"run": "demo", "labels": "a|b"})
    with safe_open(tmp_path / tracking.MODEL, framework="numpy") as file:
        assert file.metadata() == {"run": "demo", "labels": "a|b"}
        assert file.get_tensor("w").tolist() == [0, 1, 2]


def test_versions_name_what_computed_the_run():
    found = tracking.versions()
    assert found["python"][0] == "3" and {"fedscan", "torch", "flwr", "dp-accounting"} <= found.keys()
