"""File rules of the kernel that a process puts on itself: no privileges and no namespaces needed (Linux 5.13).

They stand in for the namespaces where those are not to be had, as in most containers. What they do not know (UDP,
chmod, shared memory) is for `seccomp` to refuse, and a file's existence and size stay visible.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Sequence

from magistral_jax.verify.sandbox.kernel import PR_SET_NO_NEW_PRIVS, call, prctl

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV  # the others are about what is in a folder
_NUM_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # by ABI; later ones have no more
_NET_RIGHTS = 0b11  # bind and connect, TCP; ABI 4
_SCOPES = 0b11  # abstract unix sockets and signals to processes outside; ABI 6

_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1


def abi() -> int:
    """Version of Landlock in this kernel.

    Raises:
      OSError: It has none, or it was not enabled, or a filter above this process refuses it.
    """
    return call("landlock_create_ruleset", None, 0, _VERSION_FLAG)


def is_available() -> bool:
    """True where `restrict` can be used."""
    try:
        return abi() > 0
    except OSError:
        return False


def restrict(*, readable: Sequence[str], writable: Sequence[str]) -> None:
    """Close every file to this thread and its children but those at and below the paths. For good.

    Args:
      readable: Paths to read, list and execute.
      writable: Paths to do anything with.

    Raises:
      OSError: No Landlock, or a path that is not there.
    """
    version = abi()
    rights = (1 << _NUM_FILE_RIGHTS[min(version, 5)]) - 1
    fields = [rights]
    if version >= 4:
        fields.append(_NET_RIGHTS)
    if version >= 6:
        fields.append(_SCOPES)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = call("landlock_create_ruleset", ctypes.c_char_p(attributes), len(attributes), 0)
    try:
        for path in readable:
            _allow(ruleset, path, _EXECUTE | _READ_FILE | _READ_DIR)
        for path in writable:
            _allow(ruleset, path, rights)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _ON_FILES
        rule = struct.pack("=Qi", rights, descriptor)
        call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, ctypes.c_char_p(rule), 0)
    finally:
        os.close(descriptor)
