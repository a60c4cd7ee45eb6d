import dataclasses
import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st

from fedscan_core import wire
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import WireError
from fedscan_core.order import Order
from fedscan_core.wire import Reply, Request, fingerprint

PLAN = SitePlan(640, 1e-5, 7.9, 0.1, 1.1, 20, 4.5)
MODEL: wire.Arrays = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "half": np.ones(3, np.float16),
    "n": np.array([7], np.int64),
}
REQUEST = Request(Order("run-1.a_b", '{"name": "x"}'), 3, MODEL)
ARRAYS = st.dictionaries(
    st.text(max_size=4),
    st.tuples(
        st.sampled_from(["<f4", "<f8", "<i4", "|u1"]), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 255)
    ).map(lambda t: np.full(t[1], t[2], t[0])),
    max_size=3,
)


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def test_a_request_comes_back():
    back = wire.read_request(wire.request_record(REQUEST))
    assert back.model is not None and same(back.model, MODEL)
    assert dataclasses.replace(back, model=None) == dataclasses.replace(REQUEST, model=None)
    assert wire.read_request(wire.request_record(Request(Order("r", "{}"), 0))) == Request(Order("r", "{}"), 0)


@given(update=st.none() | ARRAYS, plan=st.sampled_from([None, PLAN]), histogram=st.booleans())
def test_any_reply_comes_back(update, plan, histogram):
    counts = np.linspace(-1, 1, 12).reshape(1, 2, 6) if histogram else None
    back = wire.read_reply(wire.reply_record(Reply("st-mary", "ok", "", plan, update, counts)))
    assert (back.site, back.status, back.plan) == ("st-mary", "ok", plan)
    assert (back.update is None) == (update is None) and same(back.update or {}, update or {})
    assert (back.histogram is None) == (counts is None)
    assert same({"h": back.histogram} if histogram else {}, {"h": counts} if histogram else {})


def test_views_and_foreign_memory_orders_arrive_as_values():
    odd = {"t": np.arange(6.0).reshape(2, 3).T, "s": np.arange(10.0)[::2], "f": np.asfortranarray(np.eye(3)[:2])}
    back = wire.read_request(wire.request_record(Request(Order("r", "{}"), 1, odd)))
    assert back.model is not None and all(np.array_equal(back.model[n], odd[n]) for n in odd)
    assert fingerprint(back.model) == fingerprint(odd)


@pytest.mark.parametrize("run_id", ["../x", "a/b", "", "..", ".x", "a\n", "a\0b", "x" * 65, "a\\b", "é"])
def test_a_run_id_that_could_be_a_path_is_refused(run_id):
    with pytest.raises(WireError, match="order is not one"):
        wire.read_request(wire.request_record(Request(Order(run_id, "{}"), 1)))


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("protocol", 99, "speaks protocol 99"),
        ("protocol", "1", "not of type int"),
        ("round", "3", "not of type int"),
        ("round", True, "not of type int"),
        ("round", 1.0, "not of type int"),
        ("order", b"{}", "not of type str"),
        ("code", "import os", "other fields"),
        ("order", None, "other fields"),
    ],
)
def test_a_request_with_other_fields_is_refused(field, value, word):
    record = wire.request_record(REQUEST)
    if value is None:
        del record["run"][field]
    else:
        record["run"][field] = value
    with pytest.raises(WireError, match=word):
        wire.read_request(record)


def test_more_or_other_records_are_refused():
    for read, record in (
        (wire.read_request, wire.request_record(REQUEST)),
        (wire.read_reply, wire.reply_record(Reply("a", "ok", update=MODEL))),
    ):
        record["loss"] = MetricRecord({"loss": 0.5})
        with pytest.raises(WireError, match="unknown records: loss"):
            read(record)
        del record["loss"]
        read(record)
    for key, read in (("model", wire.read_request), ("update", wire.read_reply), ("histogram", wire.read_reply)):
        record = wire.request_record(REQUEST) if key == "model" else wire.reply_record(Reply("a", "ok"))
        record[key] = ConfigRecord({"a": 1})
        with pytest.raises(WireError, match="not a record of one safetensors file"):
            read(record)
    for read in (wire.read_request, wire.read_reply):
        with pytest.raises(WireError, match="missing"):
            read(RecordDict())


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        ("status", "status", "fine"),
        ("status", "site", 3),
        ("status", "loss", 0.1),
        ("plan", "delta", "small"),
        ("plan", "steps", 2.0),
        ("plan", "patients", 3),
        ("plan", "epsilon", 8),
    ],
)
def test_a_reply_with_other_fields_is_refused(record, field, value):
    packed = wire.reply_record(Reply("a", "ok", plan=PLAN))
    packed[record][field] = value
    with pytest.raises(WireError):
        wire.read_reply(packed)


@pytest.mark.parametrize("site", ["../x", "a b", "", "<b>x</b>", "a\n"])
def test_a_reply_from_a_site_without_a_plain_name_is_refused(site):
    with pytest.raises(WireError, match="name"):
        wire.read_reply(wire.reply_record(Reply(site, "failed")))


def test_a_histogram_brings_nothing_else():
    packed = wire.reply_record(Reply("a", "ok", update={"histogram": np.zeros((1, 2, 4)), "labels": np.ones(3)}))
    packed["histogram"] = packed.array_records.pop("update")
    with pytest.raises(WireError, match="other arrays"):
        wire.read_reply(packed)


def test_a_file_brings_no_array_beside_it():
    """What is beside the file would be neither checked nor counted."""
    packed = wire.reply_record(Reply("a", "ok", update=MODEL))
    packed.array_records["update"]["labels"] = Array(np.ones(3))
    with pytest.raises(WireError, match="one safetensors file"):
        wire.read_reply(packed)


def test_a_model_is_few_objects_however_many_arrays_it_has():
    """Flower sends each object by requests of its own."""
    model = {f"layer{number}.weight": np.full((3, 3), number, np.float32) for number in range(300)}
    assert len(get_all_nested_objects(wire.request_record(dataclasses.replace(REQUEST, model=model)))) == 5
    large = {"w": np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32)}
    objects = get_all_nested_objects(wire.request_record(dataclasses.replace(REQUEST, model=large)))
    assert sum(len(each.deflate()) for each in objects.values()) <= 1.001 * wire.nbytes(large)


def safetensors_file(header, body=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x93NUMPY\x01\x00",
        (2**62).to_bytes(8, "little"),
        safetensors_file({"w": tensor()}),  # no bytes
        safetensors_file({"w": tensor()}, bytes(16)),  # more bytes than it says
        safetensors_file({"w": tensor(shape=(2**40,))}, bytes(8)),
        safetensors_file({"w": tensor(shape=(2**62, 4))}, bytes(8)),
        safetensors_file({"w": tensor("object")}, bytes(8)),
        safetensors_file({"w": tensor("F8_E4M3", (8,))}, bytes(8)),  # numpy has no such type
        # The same eight bytes a thousand times: a small file that would fill the server's memory.
        safetensors_file({f"w{number}": tensor() for number in range(1000)}, bytes(8)),
    ],
)
def test_bytes_that_are_no_file_of_arrays_do_not_end_the_run(data):
    packed = wire.reply_record(Reply("a", "ok"))
    packed["update"] = ArrayRecord({"safetensors": Array("uint8", (len(data),), "safetensors", data)})
    with pytest.raises(WireError, match="holds no safetensors file"):
        wire.read_reply(packed)


def test_arrays_that_are_no_file_are_not_opened():
    """np.load would open a pickle where it may, and a zip archive always, which ended a whole run."""
    packed = wire.reply_record(Reply("a", "ok"))
    packed["update"] = ArrayRecord({"w": Array(np.ones(3))})
    with pytest.raises(WireError, match="not a record of one safetensors file"):
        wire.read_reply(packed)


def test_what_a_site_writes_steers_no_terminal_and_fills_no_log():
    told = "no\x1b[2J\nnorth: ok\u202e" + "x" * 10_000
    back = wire.read_reply(wire.reply_record(Reply("north", "refused", told)))
    assert back.reason.startswith("no [2J north: ok ") and back.reason.isprintable() and len(back.reason) < 4100
    record = wire.reply_record(Reply("north", "failed"))
    record["a\x1b[2J\n" + "b" * 10_000] = ConfigRecord({})
    with pytest.raises(WireError) as caught:
        wire.read_reply(record)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_an_order_is_no_store():
    with pytest.raises(WireError, match="order is not one"):
        wire.read_request(wire.request_record(Request(Order("run-1", "x" * 300_000), 1)))


@given(ARRAYS, ARRAYS)
def test_equal_fingerprints_mean_equal_arrays(a, b):
    assert (fingerprint(a) == fingerprint(b)) == same(a, b)
    assert fingerprint(dict(reversed(a.items()))) == fingerprint(a)


@given(place=st.integers(0, 23), bit=st.integers(0, 7))
def test_the_fingerprint_sees_every_bit(place, bit):
    raw = bytearray(MODEL["w"].tobytes())
    raw[place] ^= 1 << bit
    changed = np.frombuffer(bytes(raw), np.float32).reshape(2, 3)
    assert fingerprint(MODEL | {"w": changed}) != fingerprint(MODEL)


def test_the_fingerprint_sees_name_type_and_shape():
    w, byte = MODEL["w"], np.array([65], np.uint8)
    different = [
        {"w": w},
        {"v": w},
        {"w": w.view(np.int32)},
        {"w": w.reshape(3, 2)},
        {"w": w.reshape(6)},
        {"w": w, "x": MODEL["empty"]},
        {"w": w, "x": np.zeros((4, 0), np.float32)},
        {"s": np.array(1.0)},
        {"s": np.array([1.0])},
        # Names that spell out what the digest writes between arrays.
        {"a": byte, "b": byte},
        {"a||u1|(1,)|Ab": byte},
        {'a", "|u1", [1]]A["b': byte},
    ]
    assert len({fingerprint(arrays) for arrays in different}) == len(different)


def test_nbytes_counts_the_payload():
    assert wire.nbytes(MODEL) == 24 + 4 + 0 + 6 + 8
