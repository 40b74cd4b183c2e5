"""The command line that starts a runner in a mechanism, and what has to be so on the host before."""

import os
import pathlib
from collections.abc import Mapping

from magistral_jax.records import MagistralError
from magistral_jax.verify.sandbox import bubblewrap, interpreter, runner
from magistral_jax.verify.sandbox.execution import Mechanism
from magistral_jax.verify.sandbox.settings import RunnerSettings

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # sets in the same order in every run, so the same verdict
    "MALLOC_ARENA_MAX": "1",  # else every thread takes 64 MiB of the address space
    "OPENBLAS_NUM_THREADS": "1",
}
"""Environment of the runner and of all programs. Nothing of the host's, which may hold secrets."""

_NUM_PROCESSES = 64  # of a user that is the box's own
_MORE_PROCESSES = 1024  # beside all that the machine has, of a user that others share
_RUNNER_FOLDER = pathlib.Path(runner.__file__).resolve().parent
_RUNNER_FOLDER_INSIDE = "/runner"

# The runner's modules import one another as in the package, and see nothing of the package but their folder.
_BOOTSTRAP = """
import sys, types
for name in ("magistral_jax", "magistral_jax.verify", "magistral_jax.verify.sandbox"):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = []
package.__path__ = [sys.argv[1]]
from magistral_jax.verify.sandbox.runner import main
main()
"""


def runner_command(
    mechanism: Mechanism, *, uid: int | None, readable: Mapping[str, str], writable: Mapping[str, str], python: bool
) -> list[str]:
    """The command line; `uid` is the user that programs become, the rest as for `Box`.

    Raises:
      FileNotFoundError: Bubblewrap is not installed.
      MagistralError: The user `uid` cannot get to a folder.
    """
    own_files = [interpreter.executable(), *interpreter.folders()]
    parents_count = mechanism is not Mechanism.BUBBLEWRAP  # which makes new ones
    if uid is not None:
        for folder in readable.values():
            _check_open(pathlib.Path(folder), parents_count)
        for folder in writable.values():
            _hand_over(pathlib.Path(folder), uid, parents_count)
    settings = RunnerSettings(
        mechanism=mechanism,
        python=python,
        host_pid=os.getpid(),
        uid=uid,
        keep_file_user=not all(interpreter.is_open_to_others(path, parents=parents_count) for path in own_files),
        num_processes=_NUM_PROCESSES if uid is not None else _num_threads_of_machine() + _MORE_PROCESSES,
        readable=(*bubblewrap.system_paths(), *map(str, own_files), *readable.values()),
        writable=(os.devnull, *writable.values()),
    )
    folder = _RUNNER_FOLDER_INSIDE if mechanism is Mechanism.BUBBLEWRAP else str(_RUNNER_FOLDER)
    inner = [*interpreter.start_command(), "-c", _BOOTSTRAP, folder, settings.encode()]
    if mechanism is not Mechanism.BUBBLEWRAP:
        return inner
    own = {str(path): str(path) for path in own_files if not bubblewrap.is_system_path(str(path))}
    inside = {**own, _RUNNER_FOLDER_INSIDE: str(_RUNNER_FOLDER), **readable}
    return bubblewrap.command(inner, readable=inside, writable=writable, become_others=uid is not None)


def _num_threads_of_machine() -> int:
    """Processes and threads that there are now: at least those that the limit of a shared user counts."""
    with open("/proc/loadavg", encoding="ascii") as file:
        return int(file.read().split()[3].partition("/")[2])


def _check_open(folder: pathlib.Path, parents: bool) -> None:
    if not interpreter.is_open_to_others(folder, parents=parents):
        raise MagistralError(
            f"sandbox: {folder} must be open to other users, as programs become one; a folder above it may be closed: "
            f"set TMPDIR to one that all users can enter"
        )


def _hand_over(folder: pathlib.Path, uid: int, parents: bool) -> None:
    if parents:
        _check_open(folder.parent, parents)
    os.chown(folder, uid, uid)
    folder.chmod(0o770)  # the group's as well: who keeps its file user is in it
