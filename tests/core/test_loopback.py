"""A port that another account took is noticed; one of ours, and one of nobody, is not."""

import os
import signal
import socket
import time

import pytest

from fedscan_core import loopback


def test_ours_and_nobodys_are_not_foreign():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not loopback.foreign(port)
    assert not loopback.foreign(port)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another account")
def test_another_account_s_is():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            server = socket.create_server(("127.0.0.1", 0))
            os.write(writing, f"{server.getsockname()[1]}\n".encode())
            time.sleep(20)
        finally:
            os._exit(0)
    try:
        assert loopback.foreign(int(os.read(reading, 20)))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("address", ["0100007F:1F90", "00000000:1F90", "00000000000000000000000001000000:1F90"])
def test_the_kernel_s_table(tmp_path, monkeypatch, address):
    table = tmp_path / "tcp"
    monkeypatch.setattr(loopback, "_TABLES", (tmp_path / "none", table))
    line = "   0: {} 00000000:0000 {} 00000000:00000000 00:00000000 00000000 {} 0 1 1 0 100 0 0 10 0\n"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for state, uid, told in (("0A", 1001, True), ("0A", 1000, False), ("0A", 0, False), ("01", 1001, False)):
        table.write_text("  sl  local_address\n" + line.format(address, state, uid))
        assert loopback.foreign(8080) == told and not loopback.foreign(8081)
    table.write_text("  sl\nnonsense\n")
    assert not loopback.foreign(8080)
