"""What the agent tells the coordinator by itself: the site's public policy and its audit log's anchor, once an hour.

Both are public: the policy is what a hospital wants researchers to know, the anchor a keyed digest.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from fedscan_client import budget, door
from fedscan_client import site as sites
from fedscan_client.audit import log
from fedscan_core.errors import FedscanError

EVERY_SECONDS, FIRST_RETRY, LAST_RETRY = 3600.0, 15.0, 600.0

Say = Callable[[str, str], None]


def publish(folder: Path) -> None:
    """Publishes policy and anchor as they are now.

    Raises:
        FedscanError: the coordinator could not be asked or said no, or the site's own files cannot be used.
    """
    door.publish_policy(folder, budget.public_policy(sites.load(folder)))
    anchor = log.anchor(folder)
    door.put_anchor(folder, anchor)
    log.append(folder, "anchor", anchor=anchor)


def keep_published(folder: Path, stop: threading.Event, say: Say) -> None:
    """Publishes now and every hour until `stop` is set; after a failure again in 15 s, doubled up to 10 minutes."""
    pause = FIRST_RETRY
    while not stop.is_set():
        try:
            publish(folder)
        except FedscanError as error:
            say("policy", f"not published: {error}")
            wait, pause = pause, min(2 * pause, LAST_RETRY)
        except Exception as error:  # the node goes on without; the words may name files, and stay here
            say("policy", f"not published: {type(error).__name__}: {error}")
            wait, pause = pause, min(2 * pause, LAST_RETRY)
        else:
            say("policy", "published, with the audit log's anchor")
            wait, pause = EVERY_SECONDS, FIRST_RETRY
        stop.wait(wait)
