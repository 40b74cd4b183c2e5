"""Watching a program from outside: its output drained as it comes, its time measured, its end made sure of."""

import contextlib
import dataclasses
import os
import select
import time

from magistral_jax.verify.sandbox.execution import Cause, Limits
from magistral_jax.verify.sandbox.family import Family
from magistral_jax.verify.sandbox.protocol import ChannelClosed

STDERR_ROOM = 2**16
_STDERR_KEPT = 2048
_STDERR_LIMIT = 16 * 2**20  # read and thrown away at the runner's cost, so it has an end as well
_CHUNK = 2**18
_MIN_WAIT = 0.01  # seconds between two looks at the CPU time of a program that is about to exceed it


@dataclasses.dataclass(frozen=True)
class Ending:
    """What was seen of a program's run. The views are into memory of the runner."""

    cause: Cause
    exit_code: int
    cpu_seconds: float
    wall_seconds: float
    peak_mib: float
    stdout: memoryview
    stderr: memoryview


class Output:
    """Standard output: all of it, up to a limit."""

    def __init__(self, descriptor: int, room: memoryview, limit: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._room = room
        self._limit = limit
        self._total = 0

    @property
    def is_over(self) -> bool:
        """True where the program wrote more than it may."""
        return self._total > self._limit

    def read(self) -> bool:
        """Take the next bytes. False at the end; raises `BlockingIOError` where none are there yet."""
        count = os.readv(self.descriptor, [self._room[self._total : self._total + _CHUNK]])
        self._total += count
        return count > 0

    def kept(self) -> memoryview:
        """What is handed on."""
        return self._room[: min(self._total, self._limit)]


class Errors(Output):
    """Standard error: its end, which says why a program died, or its start, which is what a compiler found first."""

    def __init__(self, descriptor: int, room: memoryview, *, keep_start: bool) -> None:
        super().__init__(descriptor, room, _STDERR_LIMIT)
        self._keep_start = keep_start
        self._filled = 0

    def read(self) -> bool:
        """As for `Output`."""
        if self._filled == len(self._room):
            if not self._keep_start:
                self._room[:_STDERR_KEPT] = self._room[-_STDERR_KEPT:]
            self._filled = _STDERR_KEPT
        count = os.readv(self.descriptor, [self._room[self._filled :]])
        self._filled += count
        self._total += count
        return count > 0

    def kept(self) -> memoryview:
        """At most 2 KiB."""
        start = 0 if self._keep_start else max(0, self._filled - _STDERR_KEPT)
        return self._room[start : min(start + _STDERR_KEPT, self._filled)]


def room_for(limits: Limits) -> int:
    """Bytes of memory that `watch` needs for what a program writes."""
    return limits.output_bytes + _CHUNK + STDERR_ROOM


def watch(pid: int, out: Output, err: Output, limits: Limits, host: int, family: Family) -> Ending:
    """Wait for a program's end, and bring it about where a limit is exceeded. Nothing of it is left afterwards.

    Args:
      pid: The program, a child of this process.
      out: Its standard output.
      err: Its standard error.
      limits: Of the program.
      host: Descriptor of the socket to the host, which may go away meanwhile.
      family: Ends it.

    Raises:
      ChannelClosed: The host is gone.
    """
    start = time.monotonic()
    try:
        cause = _wait(pid, out, err, limits, start, host)
    finally:
        ended = family.end(pid)
    for output in (out, err):
        with contextlib.suppress(BlockingIOError):
            while not output.is_over and output.read():
                pass
        if output.is_over and cause is Cause.EXITED:
            cause = Cause.OUTPUT
    status, usage = ended[pid]
    return Ending(
        cause=cause,
        exit_code=os.waitstatus_to_exitcode(status),
        cpu_seconds=sum(use.ru_utime + use.ru_stime for _, use in ended.values()),
        wall_seconds=time.monotonic() - start,
        peak_mib=usage.ru_maxrss / 1024,
        stdout=out.kept(),
        stderr=err.kept(),
    )


def _wait(pid: int, out: Output, err: Output, limits: Limits, start: float, host: int) -> Cause:
    """Drain the outputs until the program ends or has to. Closed outputs are no end: it may go on without."""
    clock = (~pid << 3) | 2  # the kernel's name of another process's CPU clock
    alive = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(alive, select.POLLIN)
        poller.register(host, 0)  # only to hear of its end
        outputs = {output.descriptor: output for output in (out, err)}
        for descriptor in outputs:
            poller.register(descriptor, select.POLLIN)
        while True:
            wall = start + limits.wall_seconds - time.monotonic()
            cpu = limits.cpu_seconds - time.clock_gettime(clock)
            if cpu < 0 or wall < 0:
                return Cause.CPU if cpu < 0 else Cause.WALL
            ready = {descriptor for descriptor, _ in poller.poll(max(min(cpu, wall), _MIN_WAIT) * 1000)}
            if host in ready:
                raise ChannelClosed("the host is gone")
            for descriptor in ready & outputs.keys():
                if not outputs[descriptor].read():
                    poller.unregister(descriptor)
                if outputs[descriptor].is_over:
                    return Cause.OUTPUT
            if alive in ready:
                return Cause.EXITED
    finally:
        os.close(alive)
