"""Kills work by SIGKILL before each change that it makes on disk, one moment after the other."""

import os
import signal
from collections.abc import Callable, Iterator

_CHANGES = ("open", "write", "replace", "unlink", "mkdir", "rmdir", "ftruncate")


def at_every_write(work: Callable[[], object], most: int = 2000) -> Iterator[int]:
    """Forks a child that dies at the n-th moment, for n = 0, 1, ...; yields n after each death.

    The caller looks at what is left, and puts back what the next child needs. Ends with the first child that did all
    of `work`; raises AssertionError where that failed. After a change is before the next one: one moment for both.
    """
    for number in range(most):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _watch(number)
                work()
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0, f"the work itself failed at moment {number}"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield number
    raise AssertionError("it never ends")


def _watch(number: int) -> None:
    left = [number]

    def moment() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    for name in _CHANGES:
        setattr(os, name, _around(name, getattr(os, name), moment))


def _around(name: str, real: Callable[..., object], moment: Callable[[], None]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        reads = name == "open" and not int(args[1]) & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)  # type: ignore[call-overload]
        if not reads:
            moment()
        return real(*args, **kwargs)

    return call
