"""Calls into the kernel that Python has no function for."""

import ctypes
import os
from typing import Any

from magistral_jax.verify.sandbox import syscalls

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# Made once, as every child would have to make them again.
_CAPABILITY_HEADER = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version, this process
_CapabilitySets = ctypes.c_uint32 * 6  # effective, permitted and inheritable: their low words, then their high ones
_SHUT_RDWR = 2
_NUMBERS = syscalls.OWN.get(os.uname().machine)

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38


def call(name: str, *arguments: Any) -> int:
    """One of the system calls in `syscalls.OWN`, by its name.

    Raises:
      OSError: It failed, or has no number known for this machine.
    """
    if _NUMBERS is None:
        raise OSError(f"no system call numbers for this machine ({os.uname().machine}), only for {syscalls.MACHINES}")
    # A plain int would be cut to 32 bits on its way through a variadic function.
    words = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return _checked(name, _libc.syscall(ctypes.c_long(_NUMBERS[name]), *words))


def prctl(option: int, value: int) -> None:
    """Set a property of this process; raises `OSError`."""
    _checked("prctl", _libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3))


def shut_down(descriptor: int) -> None:
    """Close a socket for this process and all others that have it, and wake up who waits for it."""
    _libc.shutdown(descriptor, _SHUT_RDWR)


def set_file_user(uid: int) -> None:
    """Who this process is to files, apart from who it is to all else."""
    _libc.setfsuid(uid)
    if (now := _libc.setfsuid(-1)) != uid:  # it reports nothing; a second call, which fails, tells the current one
        raise OSError(f"setfsuid({uid}): still {now}")


def set_capabilities(capabilities: int) -> None:
    """Give up all privileges of root but these (a bit each); raises `OSError`."""
    low, high = capabilities & 0xFFFFFFFF, capabilities >> 32
    call("capset", _CAPABILITY_HEADER, _CapabilitySets(low, low, 0, high, high, 0))


def _checked(name: str, result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
