"""Whether freed memory is there again without being mapped anew: by the system's count of page faults."""

import subprocess
import sys

import pytest

from fedscan_client.dp import heap

# In a process of its own: where others left holes, a block lies in them whatever is given back.
SCRIPT = """
import resource
from fedscan_client.dp import heap

BLOCK = 24 * 2**20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(BLOCK)
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

heap.keep_freed()
faults()
assert faults() < 100
heap.give_back()
assert faults() > BLOCK / 4096 / 2
assert faults() < 100
"""


@pytest.mark.skipif(heap._glibc() is None, reason="no glibc here: nothing is kept")
def test_freed_memory_is_kept_until_it_is_given_back():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.keep_freed.__wrapped__()
    heap.give_back()
