"""Which system calls a confined process may make: an allow-list in the kernel's filter language, without a library.

This is the layer that both boxes share and that stands where the others have holes: RLIMIT_NPROC does not bind root,
Landlock knows no UDP, no chmod and no shared memory, and namespaces leave io_uring, bpf and keyrings within reach. A
call that is not on the list fails with ENOSYS, as on an older kernel, so that libraries take their older way.
"""

import ctypes
import dataclasses
import enum
import errno
import fcntl
import os
import struct
from collections.abc import Iterable

from magistral_jax.verify.sandbox import syscalls
from magistral_jax.verify.sandbox.kernel import PR_SET_NO_NEW_PRIVS, call, prctl

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000  # x86_64 numbers with this bit are a second table, which the list says nothing about

# Offsets in struct seccomp_data; arguments are 64 bits, little-endian on both machines.
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_ALL_BITS = 0xFFFFFFFF
_OWN_PID = 0x5E1F1D00  # stands for the pid of the process until the filter is installed
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1

_CLONE_THREAD = 0x10000
_CLONE_ESCAPES = 0x7E020000 | 0x2000 | 0x8000  # new namespaces, CLONE_PTRACE, CLONE_PARENT
_RLIMIT_CPU = 0
_OPEN_MODE = os.O_ACCMODE | os.O_TRUNC
# Terminal queries, FIONREAD, FIONBIO, close-on-exec. Not: whom a signal goes to, input faked into a terminal.
_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# Not: F_SETOWN and F_SETSIG, by which the kernel sends a signal of choice to a process of choice.
_FCNTLS = (
    fcntl.F_DUPFD,
    fcntl.F_DUPFD_CLOEXEC,
    fcntl.F_GETFD,
    fcntl.F_SETFD,
    fcntl.F_GETFL,
    fcntl.F_SETFL,
    fcntl.F_GETLK,
    fcntl.F_SETLK,
    fcntl.F_SETLKW,
    1032,  # F_GETPIPE_SZ
)


class Profile(enum.Enum):
    """Who is confined."""

    PROGRAM = "program"  # one process with threads
    COMPILER = "compiler"  # a family of processes that write files
    GRADER = "grader"  # an interpreter at work: opens files to read only, starts nothing, keeps its socket


@dataclasses.dataclass(frozen=True)
class _Test:
    """True where an argument, masked, is one of the values (or is none of them)."""

    argument: int
    values: tuple[int, ...]
    mask: int = _ALL_BITS
    is_one: bool = True
    is_upper: bool = False  # the argument's upper 32 bits


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A call that is allowed where all tests hold, and fails with an error where one does not."""

    tests: tuple[_Test, ...]
    error: int


_NEVER = (_Test(0, ()),)


def _open_rule(flags: int, profile: Profile) -> _Rule:
    if profile is Profile.GRADER:
        return _Rule((_Test(flags, (os.O_RDONLY,), _OPEN_MODE | os.O_CREAT),), errno.EACCES)
    # Truncation of a file that is opened for reading: Landlock sees a read until ABI 3.
    read_and_truncate = (os.O_TRUNC, os.O_TRUNC | os.O_ACCMODE)
    return _Rule((_Test(flags, read_and_truncate, _OPEN_MODE, is_one=False),), errno.EACCES)


def _rules(profile: Profile) -> dict[str, _Rule]:
    thread = _Test(0, (_CLONE_THREAD,), _CLONE_THREAD)
    no_escape = _Test(0, (0,), _CLONE_ESCAPES)
    rules = {
        "open": _open_rule(1, profile),
        "openat": _open_rule(2, profile),
        "ioctl": _Rule((_Test(1, _IOCTLS),), errno.ENOTTY),
        "fcntl": _Rule((_Test(1, _FCNTLS),), errno.EINVAL),
        # Its own limits only, and not the one on CPU time, which would look like a kill from outside.
        "prlimit64": _Rule((_Test(0, (0,)), _Test(1, (_RLIMIT_CPU,), is_one=False)), errno.EPERM),
        # abort() and raise(); without SIGKILL, so that a process that died of it was killed by someone else.
        "tgkill": _Rule((_Test(0, (_OWN_PID,)), _Test(2, (9,), is_one=False)), errno.EPERM),
        "kill": _Rule(_NEVER, errno.EPERM),
        "tkill": _Rule(_NEVER, errno.EPERM),
        "clone": _Rule((thread, no_escape), errno.EAGAIN),
        "fork": _Rule(_NEVER, errno.EAGAIN),
        "vfork": _Rule(_NEVER, errno.EAGAIN),
    }
    if profile is Profile.COMPILER:
        rules |= {"clone": _Rule((no_escape,), errno.EPERM), "fork": _Rule((), 0), "vfork": _Rule((), 0)}
    if profile is Profile.GRADER:
        no_address = (_Test(4, (0,)), _Test(4, (0,), is_upper=True))
        rules |= {"sendto": _Rule(no_address, errno.EPERM), "recvfrom": _Rule((), 0)}
    else:
        rules["execve"] = _Rule((), 0)
    return rules


def assemble(profile: Profile, machine: str) -> bytes:
    """The filter of a profile for a machine, as `struct sock_filter[]`; `install` puts the process's own pid in.

    Raises:
      OSError: There is no list for such a machine.
    """
    if machine not in _AUDIT_ARCH:
        raise OSError(f"no list of system calls for this machine ({machine}), only for {syscalls.MACHINES}")
    numbers = syscalls.HARMLESS[machine] | syscalls.FAMILY[machine] | syscalls.CONDITIONAL[machine]
    code = [(_LOAD, 0, 0, _ARCH), (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _NUMBER), (_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    rules = _rules(profile)
    allowed = {**syscalls.HARMLESS[machine], **(syscalls.FAMILY[machine] if profile is Profile.COMPILER else {})}
    for first, last in _ranges(number for name, number in allowed.items() if name not in rules):
        code += [(_JUMP_GREATER_EQUAL, 0, 2, first), (_JUMP_GREATER, 1, 0, last), (_RETURN, 0, 0, _ALLOW)]
    for name, rule in rules.items():
        if name in numbers:
            block = _block(rule)
            code += [(_JUMP_EQUAL, 0, len(block), numbers[name]), *block]
    code.append((_RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as ranges. The kernel tries a filter on all calls when it is installed, so a short one saves time."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _block(rule: _Rule) -> list[tuple[int, int, int, int]]:
    """Instructions that return in any case, so that they may spoil the accumulator."""
    fail = (_RETURN, 0, 0, _ERRNO | rule.error)
    block = []
    for test in rule.tests:
        block.append((_LOAD, 0, 0, _ARGUMENTS + 8 * test.argument + 4 * test.is_upper))
        if test.mask != _ALL_BITS:
            block.append((_AND, 0, 0, test.mask))
        for left, value in zip(range(len(test.values) - 1, -1, -1), test.values, strict=True):
            block.append((_JUMP_EQUAL, left + 1, 0, value) if test.is_one else (_JUMP_EQUAL, left, not left, value))
        block.append(fail)
    return [*block, (_RETURN, 0, 0, _ALLOW)]


class _Program(ctypes.Structure):
    """The kernel's struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(code: bytes) -> None:
    """Confine this process, with all of its threads, for good.

    Args:
      code: What `assemble` made.

    Raises:
      OSError: The kernel refuses.
    """
    code = code.replace(struct.pack("<I", _OWN_PID), struct.pack("<I", os.getpid()))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    program = _Program(len(code) // 8, code)
    call("seccomp", _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(program))
