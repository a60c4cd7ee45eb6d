"""Commands that run until somebody stops them: Ctrl-C and SIGTERM ask, a second one ends at once."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def on_signal(said: str) -> Iterator[threading.Event]:
    """Yields the event that the first Ctrl-C or SIGTERM sets; `said` is told then. The second one raises at once."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        print(f"\nfedscan: {said}; once more stops at once.", file=sys.stderr)
        stop.set()

    with handled_by(handle):
        yield stop


@contextlib.contextmanager
def handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to `handle` for as long as the block lasts."""
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
