"""The edge as a process: it starts, serves, takes a new certificate up, and ends in order."""

import asyncio
import contextlib
import os
import signal
import ssl
import subprocess
import sys

import httpx
import pytest
from tests.server.edge.conftest import PREFIX, Live, until

from fedscan_server.coordinator import pki
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.edge import __main__ as program
from fedscan_server.edge import serve


def start(*argv: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fedscan_server.edge", *argv]
    return subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True)


@pytest.mark.deployed
def test_it_serves_without_flower_until_sigterm(coordinator: Coordinator) -> None:
    trust = ssl.create_default_context(cadata=coordinator.ca_pem)

    def hello() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{coordinator.address}{PREFIX}/hello", verify=trust).status_code == 200
        return False

    process = start(str(coordinator.folder))
    try:
        until(hello, 60)
        assert program.main([str(coordinator.folder)]) == 2, "the port is taken"
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in told
    finally:
        process.kill()
        process.wait()


def test_no_state_folder_is_said(capsys: pytest.CaptureFixture[str], tmp_path: os.PathLike[str]) -> None:
    assert program.main([str(tmp_path)]) == 2
    assert "no coordinator's folder" in capsys.readouterr().err


def test_a_renewed_certificate_is_taken_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_CERTIFICATE_SECONDS", 0.05)
    server = serve.server(lambda *_: None, live.c)  # type: ignore[arg-type]  # never asked
    assert server.config.ssl is not None

    def shown() -> bytes:
        """What a handshake in memory shows."""
        ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = live.trust.wrap_bio(ours, theirs, server_hostname="localhost")
        assert server.config.ssl is not None
        other = server.config.ssl.wrap_bio(theirs, ours, server_side=True)
        for _ in range(4):
            for side in (client, other):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        return client.getpeercert(True) or b""

    before = shown()

    async def renew() -> None:
        task = asyncio.create_task(program._renewed(server, live.c))
        await asyncio.sleep(0.1)
        pki.renew(live.c)
        for _ in range(100):
            await asyncio.sleep(0.05)
            if shown() != before:
                break
        task.cancel()

    asyncio.run(renew())
    assert before and shown() != before
