"""`python -m fedscan_server.edge STATE`: the coordinator's edge in the foreground; `fedscan server start` starts it."""

import argparse
import asyncio
import contextlib
import os
import resource
import signal
import ssl
import sys
from pathlib import Path

from fedscan_core.errors import FedscanError
from fedscan_server.coordinator import state
from fedscan_server.coordinator.state import Coordinator
from fedscan_server.edge import fleet, serve, watchdog
from fedscan_server.edge.app import App
from fedscan_server.edge.context import Edge
from fedscan_server.edge.requestlog import RequestLog

_CERTIFICATE_SECONDS = 60.0


def main(argv: list[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT; exit code 2 if the state folder or the port cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m fedscan_server.edge", description=__doc__)
    parser.add_argument("state", type=Path, help="the coordinator's state folder")
    folder = parser.parse_args(argv).state
    os.umask(0o077)
    with contextlib.suppress(ValueError, OSError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 3 * serve.MOST_CONNECTIONS)), hard))
    try:
        return asyncio.run(_run(state.load(folder)))
    except FedscanError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (OSError, ssl.SSLError) as error:
        print(f"The edge cannot start: {error}.", file=sys.stderr)
        return 2


async def _run(c: Coordinator) -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    edge = Edge(c, fleet.client(c.superlink_port), RequestLog(c.logs))
    server = serve.server(App(edge), c)
    extra = [asyncio.create_task(watchdog.run(edge)), asyncio.create_task(_renewed(server, c))]
    try:
        await server.serve()
    except SystemExit:  # uvicorn's way to say that the port is taken
        raise OSError(f"{c.bind[0]}:{c.bind[1]} cannot be listened on") from None
    finally:
        for task in extra:
            task.cancel()
        await asyncio.gather(*extra, return_exceptions=True)
        await edge.link.aclose()
        edge.log.close()
    return 0


async def _renewed(server: serve.Server, c: Coordinator) -> None:
    """Takes a renewed certificate up without a restart: connections that are open keep the old one."""
    context, known = server.config.ssl, c.certificate.stat().st_mtime_ns
    while context is not None:
        await asyncio.sleep(_CERTIFICATE_SECONDS)
        try:
            now = c.certificate.stat().st_mtime_ns
            if now != known:
                context.load_cert_chain(c.certificate, c.private_key)
                known = now
        except (OSError, ssl.SSLError) as error:  # half replaced: the next look finds both
            print(f"the renewed certificate cannot be used yet: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
