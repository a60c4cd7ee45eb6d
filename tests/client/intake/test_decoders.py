"""The child process: it answers, it dies, it is replaced, and it knows nothing."""

import os
import resource
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedscan_client.intake import decoders
from fedscan_client.intake.records import Refused

JOB = decoders.Job(16, 16, 1, 8, 8, 0)


def jpeg(value=77, mode="L"):
    buffer = BytesIO()
    Image.new(mode, (16, 16), value).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.fixture
def child():
    """A child of this test alone."""
    decoders.close()
    decoders.decode("pillow", jpeg(), JOB)
    assert decoders._child is not None
    yield decoders._child[1]
    decoders.close()


def test_it_decodes_and_stays(child):
    assert (decoders.decode("pillow", jpeg(), JOB) == 77).all()
    with pytest.raises(Refused, match="cannot be decoded"):
        decoders.decode("pillow", b"junk", JOB)
    with pytest.raises(Refused, match="cannot be decoded"):  # another size than was said
        decoders.decode("pillow", jpeg(), decoders.Job(8, 16, 1, 8, 8, 0))
    assert decoders.decode("pillow", jpeg(), JOB).dtype == np.uint8 and child.poll() is None


def test_a_frame_that_kills_it_is_refused_and_the_next_one_is_decoded(child):
    spoilt = bytearray(jpeg())
    spoilt[11] ^= 0x55  # the version of JFIF: gdcm calls abort() over it
    with pytest.raises(Refused, match="cannot be decoded"):
        decoders.decode("gdcm", bytes(spoilt), JOB)
    assert child.wait(5) == -6
    assert (decoders.decode("gdcm", jpeg(), JOB) == 77).all()


def test_it_is_ended_by_its_alarm(child, monkeypatch):
    """With no time left, even a good frame is not decoded: the alarm rings inside the C code as well."""
    real = decoders._HEAD
    head = type("Head", (), {"pack": staticmethod(lambda *f: real.pack(*f[:-2], 1e-4, f[-1])), "size": real.size})
    monkeypatch.setattr(decoders, "_HEAD", head)
    big = BytesIO()
    Image.new("L", (4096, 4096)).save(big, "jpeg")
    with pytest.raises(Refused, match="cannot be decoded"):
        decoders.decode("pillow", big.getvalue(), decoders.Job(4096, 4096, 1, 8, 8, 0))
    assert child.wait(5) == -14


def test_it_knows_no_secret_and_may_not_take_more_than_its_memory(child):
    os.environ["FEDSCAN_CANARY_KEY"] = "secret"
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        decoders.close()
        decoders.decode("pillow", jpeg(), JOB)
        assert decoders._child is not None
        process = Path(f"/proc/{decoders._child[1].pid}")
        assert b"CANARY" not in (process / "environ").read_bytes()
        limits = {line[:25].strip(): line[25:].split()[0] for line in (process / "limits").read_text().splitlines()}
        assert limits["Max core file size"] == "0"
        assert decoders.MEMORY < int(limits["Max address space"]) < 2 * decoders.MEMORY
    finally:
        del os.environ["FEDSCAN_CANARY_KEY"]
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


def test_it_ends_with_us(child):
    decoders.close()
    assert child.poll() is not None
    decoders.close()


def test_a_forked_process_gets_its_own(child):
    ours = child.pid
    pid = os.fork()
    if pid == 0:
        decoders.decode("pillow", jpeg(), JOB)
        theirs = decoders._child[1].pid if decoders._child else ours
        decoders.close()
        os._exit(0 if theirs != ours else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert child.poll() is None and (decoders.decode("pillow", jpeg(), JOB) == 77).all()


def test_it_does_not_cost_much(child):
    start = time.perf_counter()
    for _ in range(50):
        decoders.decode("pillow", jpeg(), JOB)
    assert time.perf_counter() - start < 2  # seconds; 0.02 where nobody else works
