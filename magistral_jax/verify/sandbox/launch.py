"""From the runner's fork to the program's first instruction: a child confines itself, then becomes the program."""

import dataclasses
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from magistral_jax.verify.sandbox import kernel, limits, privileges, seccomp
from magistral_jax.verify.sandbox.execution import Limits, Mechanism
from magistral_jax.verify.sandbox.settings import RunnerSettings

FAILURE = 3
"""Descriptor of a child for what fails before the program begins. A program never gets it."""
SOURCE = 4
"""Descriptor of a child for the source of a Python program."""
_MAX_DESCRIPTORS = 256  # more than a runner ever has open


@dataclasses.dataclass(frozen=True)
class Program:
    """What a child is to become."""

    limits: Limits
    cwd: str
    begin: Callable[[], NoReturn]
    """Called once the child is confined."""
    is_python: bool


def execute(argv: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Become another program. It inherits that SIGPIPE and SIGXFSZ are ignored, so it sees errors in their place."""
    os.execve(argv[0], argv, environment)


class Launcher:
    """Forks children that confine themselves. Holds the filters, which take a while to assemble."""

    def __init__(self, settings: RunnerSettings) -> None:
        self._settings = settings
        self._filters: dict[bool, bytes] = {}
        if settings.mechanism is not Mechanism.UNSAFE:
            machine = os.uname().machine
            self._filters = {
                False: seccomp.assemble(seccomp.Profile.PROGRAM, machine),
                True: seccomp.assemble(seccomp.Profile.COMPILER, machine),
            }

    def fork(self, program: Program, streams: Sequence[int]) -> int:
        """Start a program.

        Args:
          program: What the child becomes.
          streams: Descriptors for its standard input, output and error, for failures, and for a Python program's
            source. All above 3, where the socket to the host is.

        Returns:
          Its process.
        """
        runner = os.getpid()
        if pid := os.fork():
            return pid
        try:
            # After this nothing else is open, the socket to the host least of all.
            for target, source in enumerate(streams):
                os.dup2(source, target, inheritable=target != FAILURE)
            os.closerange(len(streams), _MAX_DESCRIPTORS)
            self._confine(program, runner)
            program.begin()
        except BaseException as error:
            os.write(FAILURE, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(127)

    def _confine(self, program: Program, runner: int) -> None:
        settings = self._settings
        os.setsid()
        limits.apply(program.limits, settings.num_processes)
        if settings.mechanism is not Mechanism.UNSAFE:
            privileges.drop(settings.uid, keep_file_user=settings.keep_file_user and program.is_python)
        # A change of user takes this mark off, so it comes after. Without it a program would outlive a killed runner.
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != runner:
            os._exit(127)
        os.chdir(program.cwd)  # only now: root without its privileges cannot enter another user's folder
        if self._filters:
            seccomp.install(self._filters[program.limits.may_fork])
