"""The end of a program with everything that it started, by the means that each mechanism has."""

import contextlib
import os
import resource
import signal
import threading

from magistral_jax.verify.sandbox.execution import Mechanism

Ended = dict[int, tuple[int, resource.struct_rusage]]
"""Wait status and use of resources, by process."""


class Family:
    """Knows how to find the processes that a program consists of.

    - Bubblewrap: they are all that the process namespace holds.
    - Landlock: seccomp keeps them in the group of the first one.
    - Unsafe: nothing keeps them anywhere, but orphans come to this process, which the kernel lists the children of.
    """

    def __init__(self, mechanism: Mechanism) -> None:
        self._mechanism = mechanism
        self._children = -1
        if mechanism is Mechanism.UNSAFE:
            self._children = os.open(f"/proc/self/task/{threading.get_native_id()}/children", os.O_RDONLY)

    def end(self, leader: int) -> Ended:
        """Kill and collect a child with all of its descendants; it may have ended already."""
        ended: Ended = {}
        while True:
            self._kill(leader, leader in ended)
            try:
                pid, status, usage = os.wait4(-1, 0)
            except ChildProcessError:
                return ended
            ended[pid] = (status, usage)

    def _kill(self, leader: int, is_collected: bool) -> None:
        if self._mechanism is Mechanism.BUBBLEWRAP:
            targets = [-1]
        elif self._mechanism is Mechanism.UNSAFE:
            targets = [int(pid) for pid in os.pread(self._children, 2**16, 0).split()]
        else:
            # Once collected, the number may soon be another process's. The group was killed before, as one.
            targets = [] if is_collected else [-leader, leader]
        for target in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, signal.SIGKILL)
