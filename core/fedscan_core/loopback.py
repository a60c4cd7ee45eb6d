"""Who listens on a port of this machine: another account must not stand in for one of our own processes.

Flower speaks plain HTTP on 127.0.0.1. While its process is away, any account may listen on the same port; whatever is
sent there, a site's update or a secret, would be that account's.
"""

import os
from pathlib import Path

_LISTENS = "0A"  # TCP_LISTEN, include/net/tcp_states.h; the kernel lists such sockets first
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def foreign(port: int) -> bool:
    """Whether a process of another account (but root) listens on this TCP port, on any address of this machine.

    False where nobody listens, and where there is no /proc/net (not Linux).
    """
    for table in _TABLES:
        try:
            with table.open(encoding="ascii") as lines:
                next(lines, None)  # the heading
                for line in lines:
                    _, local, _, state, _, _, _, uid, *_ = line.split()
                    if state != _LISTENS:
                        break
                    if int(local.rpartition(":")[2], 16) == port and int(uid) not in (0, os.geteuid()):
                        return True
        except (OSError, ValueError):
            continue
    return False
