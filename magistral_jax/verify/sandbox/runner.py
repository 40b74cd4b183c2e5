"""The trusted process inside a box: runs one program after another for the host, each in a confined child.

It starts from `python -c` with the standard library and this folder alone, evaluates nothing of what it is given, has
one thread, and ends with the host.
"""

import contextlib
import functools
import gc
import os
import signal
import sys
from typing import Any

from magistral_jax.verify.sandbox import kernel, landlock, limits, python_program
from magistral_jax.verify.sandbox.elf import image_bytes
from magistral_jax.verify.sandbox.execution import Cause, Limits, Mechanism
from magistral_jax.verify.sandbox.family import Family
from magistral_jax.verify.sandbox.launch import SOURCE, Launcher, Program, execute
from magistral_jax.verify.sandbox.private_memory import PrivateBuffer, receive_file
from magistral_jax.verify.sandbox.protocol import Channel, ChannelClosed
from magistral_jax.verify.sandbox.settings import RunnerSettings
from magistral_jax.verify.sandbox.watch import STDERR_ROOM, Ending, Errors, Output, room_for, watch


def main() -> None:
    """Serve the host on descriptor 0. The arguments: this module's folder, the settings."""
    settings = RunnerSettings.decode(sys.argv[2])
    if settings.python and limits.raise_stack():
        os.execv(sys.executable, sys.orig_argv)  # room for the stack is set apart when a process begins
    gc.disable()
    channel = _take_channel()
    # A host that dies closes the socket, unless a fork of it holds it still. So its death does it here; nothing is
    # raised, as the end of a program's family must not be broken off.
    signal.signal(signal.SIGTERM, lambda *_: kernel.shut_down(channel.descriptor))
    if settings.mechanism is not Mechanism.BUBBLEWRAP:  # there the namespace dies as a whole
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != settings.host_pid:
            return
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    if settings.python:
        python_program.preload()
    with contextlib.suppress(ChannelClosed):
        Runner(settings, channel).serve()


def _take_channel() -> Channel:
    """Move the socket away from descriptor 0, where programs expect their input."""
    channel = Channel(os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return channel


class Runner:
    """One box's state: the host's socket, the loaded Python program, memory for what programs write."""

    def __init__(self, settings: RunnerSettings, channel: Channel) -> None:
        self._settings = settings
        self._channel = channel
        self._buffer = PrivateBuffer()
        self._launcher = Launcher(settings)
        self._source: int | None = None
        self._family = Family(settings.mechanism)
        if settings.mechanism is Mechanism.LANDLOCK:
            landlock.restrict(readable=settings.readable, writable=settings.writable)

    def serve(self) -> None:
        """Answer requests until the host closes the socket.

        Raises:
          ChannelClosed: It has.
        """
        self._channel.send({})  # ready
        while True:
            request, size = self._channel.receive_header()
            payload = receive_file(self._channel, size, self._buffer)
            if request["do"] == "load":
                if self._source is not None:
                    os.close(self._source)
                self._source = payload
                continue
            try:
                self._answer(request, payload)
            except OSError as error:  # no process, no memory, no descriptor: the host's trouble, not the program's
                self._channel.send({"error": str(error)})
            finally:
                os.close(payload)

    def _answer(self, request: dict[str, Any], stdin: int) -> None:
        program = self._program(request)
        failure, ending = self._run(program, stdin)
        if failure:
            self._channel.send({"error": failure})
            return
        cause = ending.cause
        has_crashed = ending.exit_code < 0 and not program.is_python
        if has_crashed and image_bytes(request["argv"][0]) > program.limits.memory_mib * limits.MIB:
            cause = Cause.IMAGE
        header = {
            "cause": cause.value,
            "exit_code": ending.exit_code,
            "cpu_seconds": ending.cpu_seconds,
            "wall_seconds": ending.wall_seconds,
            "peak_mib": ending.peak_mib,
            "stdout_bytes": len(ending.stdout),
        }
        self._channel.send(header, ending.stdout, ending.stderr)

    def _program(self, request: dict[str, Any]) -> Program:
        bounds = Limits(**request["limits"])
        if request["do"] == "python":
            if self._source is None:
                raise OSError("no Python program is loaded")
            return Program(bounds, "/", functools.partial(python_program.run, SOURCE), is_python=True)
        begin = functools.partial(execute, request["argv"], request["environment"])
        return Program(bounds, request["cwd"], begin, is_python=False)

    def _run(self, program: Program, stdin: int) -> tuple[str, Ending]:
        """What failed before the program began, if anything, and its ending."""
        bounds = program.limits
        room = self._buffer.room(room_for(bounds))
        pipes = [os.pipe() for _ in range(3)]
        (out, _), (err, _), (failure, _) = pipes
        try:
            try:
                source = [self._source] if program.is_python and self._source is not None else []
                pid = self._launcher.fork(program, [stdin, *(end for _, end in pipes), *source])
            finally:
                for _, end in pipes:
                    os.close(end)
            output = Output(out, room[:-STDERR_ROOM], bounds.output_bytes)
            errors = Errors(err, room[-STDERR_ROOM:], keep_start=bounds.may_fork)
            ending = watch(pid, output, errors, bounds, self._channel.descriptor, self._family)
            return os.read(failure, 4096).decode(errors="replace"), ending
        finally:
            for end, _ in pipes:
                os.close(end)
