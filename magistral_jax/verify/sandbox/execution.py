"""Mechanisms, limits of a confined program and what became of it. Only the standard library: the runner loads it."""

import dataclasses
import enum
import signal


class Mechanism(enum.Enum):
    """What confines a program."""

    BUBBLEWRAP = "bubblewrap"  # namespaces around the runner, then seccomp and limits
    LANDLOCK = "landlock"  # file rules of the kernel in the place of the namespaces, then seccomp and limits
    UNSAFE = "unsafe"  # limits alone: for tests, and for code that is trusted


@dataclasses.dataclass(frozen=True)
class Limits:
    """Resources of one program."""

    cpu_seconds: float = 4.0
    """CPU time, summed over the program's threads."""
    wall_seconds: float = 10.0
    memory_mib: int = 300
    """Address space, which the stack is a part of: no other limit keeps a deep recursion from going on."""
    output_bytes: int = 16 * 2**20
    """Standard output that is read; a program that writes more is killed."""
    file_bytes: int = 0
    """Largest file that may be written; 0 where nothing is writable anyway."""
    may_fork: bool = False
    """True for the compiler, which is a family of processes and writes files."""


class Status(enum.Enum):
    """How a program ended."""

    OK = "ok"
    RUNTIME_ERROR = "runtime_error"  # exit code other than 0, or a signal of its own making
    TIMEOUT = "timeout"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"


@dataclasses.dataclass(frozen=True)
class Execution:
    """One program's run."""

    status: Status
    exit_code: int
    """Exit code, or minus the number of the signal that ended it."""
    stdout: bytes
    stderr: bytes
    """The last 2 KiB (of the compiler: the first)."""
    cpu_seconds: float
    wall_seconds: float
    peak_mib: float


class Cause(enum.Enum):
    """Why a program's run was over, as the runner saw it."""

    EXITED = "exited"
    CPU = "cpu"
    WALL = "wall"
    OUTPUT = "output"
    IMAGE = "image"  # its code and global arrays alone are larger than its memory limit, so it never began


def judge(cause: Cause, limits: Limits, result: Execution) -> Status:
    """The status of a run. The memory limit cannot be observed, only guessed at from how a program died."""
    if cause is Cause.OUTPUT:
        return Status.OUTPUT_LIMIT
    if cause in (Cause.CPU, Cause.WALL) or result.cpu_seconds > limits.cpu_seconds:
        return Status.TIMEOUT
    if cause is Cause.IMAGE:
        return Status.MEMORY_LIMIT
    if result.exit_code == 0:
        return Status.OK
    was_large = result.peak_mib >= 0.8 * limits.memory_mib
    ran_out = b"std::bad_alloc" in result.stderr and result.exit_code == -signal.SIGABRT
    ran_out |= result.stderr.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError")
    return Status.MEMORY_LIMIT if was_large or ran_out else Status.RUNTIME_ERROR
