"""What the wire carried in clear, before TLS, in all that the other tests of this folder let the agents do."""

import json

import pytest
from lab import wait_for
from planted import found
from safetensors.numpy import load_file
from wiretap import json_of, object_of, pushed, requests

SITE_DOOR = {
    "PUT /fedscan/v1/site/policy": None,  # checked field by field below
    "POST /fedscan/v1/site/anchor": {"anchor"},
    "GET /fedscan/v1/site": set(),
    "GET /fedscan/v1/site/anchors": set(),
    "POST /fedscan/v1/enrol": {"token", "site", "public_key", "policy"},
    "GET /fedscan/v1/hello": set(),
}


@pytest.fixture(scope="module")
def run_id(federation):
    """One more run with all three sites, evaluated: whatever else ran, the wire has seen a whole one."""
    lab = federation.lab
    run_id = lab.launch(lab.write_run("capture", rounds=2))
    west = lab.site("west")

    def asked():
        runs = lab.json("agent", "runs", west, "--json")["runs"]
        return any(run["run_id"] == run_id for run in runs)

    wait_for(asked, 90, "west was asked")
    lab.fedscan("agent", "approve", west, run_id, "--by", "Dr Who", "--yes")
    assert lab.await_end(run_id)["state"] == "finished", lab.logs()[-3000:]
    return run_id


def sent(federation):
    """Every request that went up so far."""
    return [request for stream in list(federation.tap.up) for request in requests(bytes(stream))]


def test_nothing_planted_is_on_the_wire(federation, run_id):
    blobs = [bytes(stream) for stream in list(federation.tap.up)]
    assert sum(map(len, blobs)) > 100_000
    for planted in federation.planted.values():
        assert not found(blobs, planted)


def test_the_search_would_have_found_it(federation):
    planted = federation.planted["north"]
    row = planted.rows[0]
    for leak in (
        planted.texts[0].encode(),
        b"x" + planted.texts[-1].encode().hex().encode(),
        row.astype("<f4").tobytes(),
        b"\0" * 7 + row.astype("u1").tobytes(),
    ):
        assert found([b"before" + leak + b"after"], planted)


def test_every_record_of_a_reply_is_one_that_the_protocol_allows(federation, run_id):
    """Objects that agents pushed, by Flower's own types: arrays of the declared shapes, one status, perhaps a plan."""
    texts = set()
    for request in sent(federation):
        if (part := object_of(request)) is not None:
            head = part[1].split(b"\0", 1)[0].decode("latin-1")
            texts.add(head.split(" ")[0])
            if head.startswith("ConfigRecord"):
                body = part[1]
                for word in (b"loss", b"accuracy", b"num-examples", b"count", b"Traceback", b"Error:", b".dcm", b"/"):
                    assert word not in body, body[:300]
    assert texts <= {"Message", "RecordDict", "ArrayRecord", "ConfigRecord", "Array", "ArrayChunk"}, texts


def test_no_runtime_of_the_work_is_told(federation, run_id):
    replies = [reply for request in sent(federation) if (reply := pushed(request)) is not None]
    assert replies
    assert all(runtime == 0 for reply in replies for runtime in reply.clientapp_runtime_list)


def test_the_site_door_hears_what_it_is_meant_to(federation, run_id):
    for request in sent(federation):
        if (told := json_of(request)) is None or not request.path.startswith(("/fedscan/v1/site", "/fedscan/v1/enrol")):
            continue
        name = f"{request.method} {request.path}"
        if name == "GET /fedscan/v1/sites":
            continue
        assert name in SITE_DOOR, name
        if SITE_DOOR[name] is not None:
            assert set(told) == SITE_DOOR[name]
        policy = told.get("policy") if name.endswith("enrol") else told if name.startswith("PUT") else None
        if policy is not None:
            assert policy["patients_declared"] in (0, 28)  # typed by a person
            assert not {"patients", "images", "cohort", "labels", "consent"} & set(policy)


def test_the_bytes_up_are_those_of_the_model(federation, run_id):
    """Over rounds: the updates that were counted are the size of the model.

    The scatter model's head is 14 kB, so that Flower's frames would show; what the wire adds is in test_faults.
    """
    lab = federation.lab
    model = load_file(lab.state / "runs" / run_id / "model.safetensors")
    update = sum(array.nbytes for array in model.values())
    lines = [json.loads(line) for line in (lab.state / "runs" / run_id / "rounds.jsonl").read_text().splitlines()]
    assert all(line["bytes_up"] <= 3 * update * 1.02 for line in lines)
