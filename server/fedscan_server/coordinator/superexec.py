"""Flower's SuperExec as we run it: it takes no work from another account that listens in the SuperLink's place.

The SuperLink's port on loopback is free while that process restarts. Whoever took it then could hand over a bundle of
their own, which would run as the coordinator's user. Tasks are asked for only while nobody else listens there.

    python -m fedscan_server.coordinator.superexec HOST:PORT ...      further arguments as `flower-superexec`
"""

import importlib
import sys
from typing import Any

from fedscan_core import loopback


def guard(client_class: Any, port: int) -> None:
    """Makes a client of the Runtime API ask for no task while another account listens on the port."""
    stock = client_class.AcquireTask

    def acquire(self: Any, request: Any) -> Any:
        if loopback.foreign(port):
            from flwr.proto.runtime_pb2 import AcquireTaskResponse

            print(f"superexec: another account listens on port {port}", file=sys.stderr, flush=True)
            return AcquireTaskResponse()  # no task: it asks again a second later
        return stock(self, request)

    client_class.AcquireTask = acquire


def main() -> None:
    """Runs SuperExec until it is told to stop."""
    address = sys.argv[1]
    from flwr.supercore.runtime import RuntimeHttpClient

    guard(RuntimeHttpClient, int(address.rpartition(":")[2]))
    sys.argv[:] = ["flower-superexec", "--insecure", "--runtime-api-address", address, *sys.argv[2:]]
    command = importlib.import_module("flwr.supercore.cli.flower_superexec")
    command.flower_superexec()


if __name__ == "__main__":
    main()
