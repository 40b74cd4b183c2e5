"""Limits of the kernel on one process. The first layer, and the only one in the mechanism `unsafe`."""

import math
import resource

from magistral_jax.verify.sandbox.execution import Limits

MIB = 2**20


def apply(limits: Limits, num_processes: int) -> None:
    """Put limits on this process and what it becomes; none can be raised again.

    Args:
      limits: Of the program.
      num_processes: Processes and threads that the user of this process may have, all of its programs together.

    Raises:
      OSError: The kernel refuses.
    """
    for kind, value in {
        # Soft and hard limit at once, so that the kernel kills at the first overrun: SIGXCPU could be ignored. The
        # runner kills at the exact limit; this stands behind it.
        resource.RLIMIT_CPU: math.ceil(limits.cpu_seconds) + 1,
        resource.RLIMIT_FSIZE: limits.file_bytes,  # of files in memory too
        resource.RLIMIT_NOFILE: 256 if limits.may_fork else 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: num_processes,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_AS: limits.memory_mib * MIB,
    }.items():
        _, hard = resource.getrlimit(kind)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit))
    raise_stack()


def raise_stack() -> bool:
    """Let the stack grow as far as the address space allows. True where it could not before.

    A finite limit would also be the size of every thread's stack, so that a large one leaves no room for threads.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    return soft != hard
