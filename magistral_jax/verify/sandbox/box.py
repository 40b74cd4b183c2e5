"""A box: one trusted runner inside one mechanism, which runs untrusted programs one after another.

Nothing in a box is writable but the folders that its maker names, nothing of one program is left for the next (no
process, no memory), and what a program should have written is never sent in. So one box serves for many programs.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_jax.verify.sandbox.execution import Cause, Execution, Limits, Mechanism, Status, judge
from magistral_jax.verify.sandbox.protocol import Channel, ChannelClosed
from magistral_jax.verify.sandbox.start import ENVIRONMENT, runner_command
from magistral_jax.verify.sandbox.users import claimed_user

DEFAULT_LIMITS = Limits()
_START_SECONDS = 60.0
_GRACE_SECONDS = 30.0  # for the runner to answer, beyond a program's wall limit
_EXIT_SECONDS = 5.0


class BoxError(RuntimeError):
    """The box failed, which says nothing about the program. Who gets it closes the box and makes a new one."""


class Box:
    """Runs untrusted programs. A context manager; not for several threads at a time.

    It dies with the thread that made it, so that nothing is left running when a process is killed.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        *,
        readable: Mapping[str, str] | None = None,
        writable: Mapping[str, str] | None = None,
        python: bool = False,
    ) -> None:
        """Start the runner.

        Args:
          mechanism: What confines.
          readable: Path inside the box to folder on the host: what programs can read and execute. Where programs
            become another user, others must be able to read it.
          writable: The same for what they can write; such a folder is handed over to that user.
          python: Be ready for `run_python`.

        Raises:
          BoxError: The mechanism does not work here, or the runner did not start.
          MagistralError: That user cannot get to a folder.
        """
        self._folders = {**(readable or {}), **(writable or {})}
        self._is_mapped = mechanism is Mechanism.BUBBLEWRAP
        self._stack = contextlib.ExitStack()
        self._errors = os.memfd_create("errors")  # a file has room for all that is written, and needs no reader
        self._stack.callback(os.close, self._errors)
        ours, theirs = socket.socketpair()
        self._socket = self._stack.enter_context(ours)
        self._channel = Channel(ours.fileno())
        try:
            claim = contextlib.nullcontext() if mechanism is Mechanism.UNSAFE else claimed_user()
            self.uid = self._stack.enter_context(claim)  # the user that programs become; None is ours
            with theirs:
                self._process = subprocess.Popen(
                    runner_command(
                        mechanism, uid=self.uid, readable=readable or {}, writable=writable or {}, python=python
                    ),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    env=ENVIRONMENT,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C goes to the host, which decides
                )
        except BaseException as error:
            self._stack.close()
            if isinstance(error, OSError):
                raise BoxError(str(error)) from error
            raise
        self._stack.callback(self._end_process)
        try:
            self._receive(time.monotonic() + _START_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the runner and all that runs in the box."""
        self._stack.close()

    def path(self, inside: str) -> str:
        """What a program has to open for a path inside the box: where there are no namespaces, the host's path."""
        if self._is_mapped:
            return inside
        for folder in sorted(self._folders, key=len, reverse=True):
            if inside == folder or inside.startswith(folder + "/"):
                return self._folders[folder] + inside.removeprefix(folder)
        return inside

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        limits: Limits = DEFAULT_LIMITS,
        cwd: str = "/",
        environment: Mapping[str, str] | None = None,
    ) -> Execution:
        """Run a program.

        Args:
          argv: Path of the program, as `path` gives it, and its arguments.
          stdin: Standard input.
          limits: Resources.
          cwd: Folder to start in, as `path` gives it.
          environment: Variables beside those that every program gets.

        Raises:
          BoxError: The program could not be run, or was killed by nobody here (as the system does when memory is out).
        """
        request = {
            "do": "run",
            "argv": list(argv),
            "environment": {**ENVIRONMENT, **(environment or {})},
            "cwd": cwd,
        }
        return self._execute(request, stdin, limits)

    def load_python(self, source: bytes) -> None:
        """Take a Python program for the next calls of `run_python`. It is compiled in there, so nothing fails here."""
        deadline = time.monotonic() + _GRACE_SECONDS
        self._send({"do": "load"}, source, deadline)

    def run_python(self, *, stdin: bytes = b"", limits: Limits = DEFAULT_LIMITS) -> Execution:
        """Run the Python program that was loaded, as `python solution.py` would; raises as `run`."""
        return self._execute({"do": "python"}, stdin, limits)

    def _execute(self, request: dict[str, Any], stdin: bytes, limits: Limits) -> Execution:
        deadline = time.monotonic() + limits.wall_seconds + _GRACE_SECONDS
        self._send({**request, "limits": dataclasses.asdict(limits)}, stdin, deadline)
        reply, payload = self._receive(deadline)
        if "error" in reply:
            raise BoxError(f"the program did not begin: {reply['error']}")
        size = reply["stdout_bytes"]
        execution = Execution(
            status=Status.OK,
            exit_code=reply["exit_code"],
            stdout=bytes(payload[:size]),
            stderr=bytes(payload[size:]),
            cpu_seconds=reply["cpu_seconds"],
            wall_seconds=reply["wall_seconds"],
            peak_mib=reply["peak_mib"],
        )
        status = judge(Cause(reply["cause"]), limits, execution)
        if status is Status.RUNTIME_ERROR and execution.exit_code == -signal.SIGKILL:
            # No program can do this to itself, and the runner did not.
            raise BoxError("the program was killed from outside; the machine may be out of memory")
        return dataclasses.replace(execution, status=status)

    def _send(self, header: dict[str, Any], payload: bytes, deadline: float) -> None:
        try:
            self._channel.send(header, payload, deadline=deadline)
        except (ChannelClosed, TimeoutError) as error:
            raise self._failure(error) from error

    def _receive(self, deadline: float) -> tuple[dict[str, Any], memoryview]:
        try:
            header, size = self._channel.receive_header(deadline)
            payload = memoryview(bytearray(size))
            self._channel.receive_into(payload, deadline)
        except (ChannelClosed, TimeoutError) as error:
            raise self._failure(error) from error
        return header, payload

    def _failure(self, error: Exception) -> BoxError:
        """What went wrong, in the words of the runner or of bubblewrap, if they left any."""
        text = os.pread(self._errors, 2**20, 0)
        lines = text.decode(errors="replace").strip().splitlines()
        return BoxError(lines[-1] if lines else f"the runner is gone: {error}")

    def _end_process(self) -> None:
        """The runner ends its programs when the socket closes, so this waits for that before it kills."""
        self._socket.close()
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
