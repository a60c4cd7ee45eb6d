"""Nothing leaves but exactly the arrays allowed, and what left is written down."""

import math

import numpy as np
import pytest

from fedscan_client.gate import egress
from fedscan_core import auditlog
from fedscan_core.errors import PrivacyError, RecordDamaged
from fedscan_core.wire import fingerprint

ALLOWED = {"head.weight": ((2, 3), "<f4"), "head.bias": ((2,), "<f4")}


def update(**changes):
    arrays = {"head.weight": np.ones((2, 3), "<f4"), "head.bias": np.ones(2, "<f4")}
    arrays.update({name.replace("_", "."): value for name, value in changes.items()})
    return {name: array for name, array in arrays.items() if array is not None}


def test_what_is_allowed_passes():
    egress.check(update(), ALLOWED)
    egress.check({}, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"head_bias": None},
        {"count": np.float32(3)},
        {"count": np.ones(1, "<f4")},
        {"head_bias": np.ones((2, 1), "<f4")},
        {"head_bias": np.ones(3, "<f4")},
        {"head_bias": np.ones(2, "<f8")},  # twice the bits of what was noised
        {"head_bias": np.ones(2, ">f4")},
        {"head_bias": np.ones(2, "<i4")},
    ],
    ids=["missing", "extra scalar", "extra", "shape", "length", "float64", "big endian", "int"],
)
def test_another_name_shape_or_type_is_refused(changes):
    with pytest.raises(PrivacyError, match="names, shapes and types"):
        egress.check(update(**changes), ALLOWED)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    arrays = update()
    arrays["head.weight"][1, 2] = value
    with pytest.raises(PrivacyError, match="finite"):
        egress.check(arrays, ALLOWED)


def test_the_record_says_what_left_and_chains(tmp_path):
    first = egress.record(tmp_path, run_id="a", round_=1, what="update", arrays=update())
    second = egress.record(tmp_path, run_id="a", round_=2, what="update", arrays=update(head_bias=np.zeros(2, "<f4")))
    assert first == fingerprint(update()) != second
    path = tmp_path / egress.RECORD
    assert auditlog.read(path) == [
        {"run_id": "a", "round": 1, "what": "update", "bytes": 32, "sha256": first},
        {"run_id": "a", "round": 2, "what": "update", "bytes": 32, "sha256": second},
    ]
    path.write_text(path.read_text().replace('"bytes":32', '"bytes":33', 1))
    with pytest.raises(RecordDamaged):
        auditlog.read(path)
