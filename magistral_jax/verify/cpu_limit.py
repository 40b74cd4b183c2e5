"""A limit on the CPU time of a piece of Python, from inside the process.

It stops what runs in the interpreter, not one long call of a C function: callers bound their operands as well. Who has
to be certain kills the process from outside, as the verifier pool does.
"""

import contextlib
import signal
import threading
import types
from collections.abc import Iterator

_AGAIN = 0.1  # CPU-seconds to the next attempt: the interpreter drops what is raised inside a finaliser or gc callback


class OutOfTimeError(BaseException):
    """The CPU time is used up. Not an `Exception`: libraries catch those to try something else."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` in the body once the process has used so much CPU time; in the main thread only.

    Signals reach no other thread, so there the body runs without a limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


@contextlib.contextmanager
def without_limit() -> Iterator[None]:
    """Stop the clock of an enclosing `cpu_limit`, for what is done once a process: imports."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    remaining, again = signal.setitimer(signal.ITIMER_PROF, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, remaining, again)


def _stop(_signal: int, _frame: types.FrameType | None) -> None:
    raise OutOfTimeError
