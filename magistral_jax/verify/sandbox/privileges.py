"""Giving up privileges, for good."""

import os

from magistral_jax.verify.sandbox import kernel

_CAP_SETUID = 1 << 7


def drop(uid: int | None, *, keep_file_user: bool) -> None:
    """Become another user, where `uid` names one, and give up every capability in any case.

    Root needs this: the kernel binds neither its number of processes nor what it reads to limits.

    Args:
      uid: User and group to become; None stays who it is.
      keep_file_user: Stay who it is in the eyes of files. For an interpreter in a folder that others cannot enter, as
        below root's home; which files are in reach is then for namespaces or Landlock alone to say.

    Raises:
      OSError: The kernel refuses.
    """
    if uid is not None:
        file_user = os.geteuid()
        kernel.prctl(kernel.PR_SET_KEEPCAPS, int(keep_file_user))
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        if keep_file_user:
            kernel.set_capabilities(_CAP_SETUID)
            kernel.set_file_user(file_user)
    kernel.set_capabilities(0)


def can_become(uid: int) -> bool:
    """True where this process is root and the user exists: a user namespace may know few users."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map", encoding="ascii") as ranges:
        return any(int(first) <= uid < int(first) + int(count) for first, _, count in map(str.split, ranges))
