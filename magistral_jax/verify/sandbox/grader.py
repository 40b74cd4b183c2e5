"""Confinement of a grader's own process: SymPy's parsers evaluate Python, and its sums may take all memory there is."""

import os
import resource
from collections.abc import Sequence

from magistral_jax.verify.sandbox import landlock, limits, privileges, seccomp
from magistral_jax.verify.sandbox.execution import Mechanism


def confine_grader(mechanism: Mechanism, *, memory_mib: int, readable: Sequence[str]) -> None:
    """Confine this process for good: call it before there are threads, and before anything untrusted is looked at.

    It keeps the files and sockets that it has open, may read from and write to them, and start threads. It can start
    no process, send no signal, open no socket, and open files below `readable` alone, to read.

    Args:
      mechanism: Of the run. `unsafe` sets limits only; otherwise Landlock is used where the kernel has it, and seccomp,
        which lets no file be opened to write, in any case.
      memory_mib: Address space in MiB.
      readable: Folders and files that may still be read, as those of modules that are still to be imported.

    Raises:
      OSError: The kernel refuses.
    """
    memory = memory_mib * limits.MIB
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK):
        resource.setrlimit(kind, (0, 0))
    if mechanism is Mechanism.UNSAFE:
        return
    code = seccomp.assemble(seccomp.Profile.GRADER, os.uname().machine)
    if mechanism is Mechanism.LANDLOCK or landlock.is_available():
        landlock.restrict(readable=[path for path in readable if os.path.exists(path)], writable=[])
    privileges.drop(None, keep_file_user=False)
    seccomp.install(code)
