"""The command that builds a box out of namespaces: no network, no processes but the box's, few files, none writable."""

import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping

_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin")
_SYSTEM_LINKS = ("/etc/ld.so.cache", "/etc/alternatives")

_AS_USER = ("--unshare-all", "--cap-drop", "ALL")
# Root needs no user namespace. It keeps what it takes to turn programs into another user and to kill them then.
_AS_ROOT = (
    *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL"),
    *("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"),
)


def command(
    inner: list[str], *, readable: Mapping[str, str], writable: Mapping[str, str], become_others: bool
) -> list[str]:
    """The command line of a box.

    There is no /proc, as programs could reach the runner through it, and no temporary folder.

    Args:
      inner: Command to run inside.
      readable: Path inside to path on the host: files and folders that can be read.
      writable: The same for what can be written.
      become_others: True where the runner turns programs into another user.

    Raises:
      FileNotFoundError: Bubblewrap is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise FileNotFoundError("bwrap is not installed")
    words = [program, *(_AS_ROOT if become_others else _AS_USER), "--die-with-parent", "--new-session"]
    for folder in _SYSTEM_FOLDERS:
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            words += ["--ro-bind", folder, folder]
    links = {path: path for path in _SYSTEM_LINKS if os.path.exists(path)}
    words += _parents([*links, *readable, *writable, os.devnull])
    words += ["--dev-bind", os.devnull, os.devnull]
    for option, binds in (("--ro-bind", links), ("--ro-bind", readable), ("--bind", writable)):
        for inside, outside in binds.items():
            words += [option, outside, inside]
    # The folders that were made on the way lie in memory and belong to the user: files in them could tell something to
    # the next program.
    return [*words, "--remount-ro", "/", "--chdir", "/", "--", *inner]


def _parents(paths: Iterable[str]) -> list[str]:
    """Folders that lead to paths; bubblewrap would make them itself, closed to the users that programs become."""
    parents = {str(parent) for path in paths for parent in pathlib.PurePosixPath(path).parents}
    outside_system = [parent for parent in sorted(parents) if not is_system_path(parent) and parent != "/"]
    return [word for parent in outside_system for word in ("--perms", "0755", "--dir", parent)]


def system_paths() -> list[str]:
    """Programs and libraries of the system, which compilers and interpreters need. No secrets are expected there."""
    return [path for path in (*_SYSTEM_FOLDERS, *_SYSTEM_LINKS) if os.path.exists(path)]


def is_system_path(path: str) -> bool:
    """True for the system folders and what lies in them."""
    return any(path == folder or path.startswith(folder + "/") for folder in _SYSTEM_FOLDERS)
