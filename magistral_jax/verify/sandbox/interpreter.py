"""The interpreter that runners are started with, and the folders that it needs."""

import functools
import pathlib
import sys
import sysconfig
from collections.abc import Sequence


@functools.cache
def executable() -> pathlib.Path:
    """The real interpreter behind the one of this process, which may be a link in a virtual environment."""
    return pathlib.Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()


@functools.cache
def folders() -> Sequence[pathlib.Path]:
    """Where its libraries lie. Not its whole prefix, which may be a home directory."""
    prefixes = dict.fromkeys(pathlib.Path(prefix).resolve() for prefix in (sys.base_prefix, sys.base_exec_prefix))
    candidates = [prefix / name for prefix in prefixes for name in dict.fromkeys(("lib", sys.platlibdir))]
    return [folder for folder in candidates if folder.is_dir()]


def start_command() -> list[str]:
    """The words that start it with the standard library alone.

    As `-I -S` but for the environment, which holds a hash seed; where Python is a shared library, also the way to it,
    since the host's environment, which may know it, is not handed on.
    """
    is_shared = bool(sysconfig.get_config_var("Py_ENABLE_SHARED"))
    way = ["/usr/bin/env", f"LD_LIBRARY_PATH={':'.join(map(str, folders()))}"] if is_shared else []
    return [*way, str(executable()), "-P", "-s", "-S"]


def is_open_to_others(path: pathlib.Path, *, parents: bool) -> bool:
    """True where any user can read a file or a folder; with `parents`, also get to it."""
    mode = path.stat().st_mode
    wanted = 0o005 if path.is_dir() else 0o004
    is_reached = not parents or all(parent.stat().st_mode & 0o001 for parent in path.parents)
    return mode & wanted == wanted and is_reached
