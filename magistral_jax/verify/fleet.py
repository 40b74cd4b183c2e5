"""The processes of a verifier pool, without any policy: one zygote and the workers that it forks.

A `Fleet` starts the zygote as a fresh interpreter (never a fork of a process that may hold JAX and threads), and hands
out `Worker`s; the dispatcher decides what they do and when they have to go.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile

from magistral_jax.records import MagistralError
from magistral_jax.verify.config import PoolConfig, RewardConfig
from magistral_jax.verify.zygote import READY

_EXIT_SECONDS = 10.0
_CHUNK = 65536


class Worker:
    """This side of a worker: its socket and the start of a line that has not arrived in full."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number = number
        self.connection = connection
        self._partial = b""

    def send(self, line: str) -> None:
        """Send one line. Raises `OSError` where the worker is gone or does not read."""
        self.connection.sendall(line.encode("ascii"))

    def receive(self) -> list[str] | None:
        """The lines that have arrived, or None where the worker is gone. Blocks unless the socket is readable."""
        try:
            chunk = self.connection.recv(_CHUNK)
        except OSError:
            return None
        if not chunk:
            return None
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        return [line.decode("ascii") for line in lines]


class Fleet:
    """The zygote and its workers.

    Raises:
      MagistralError: The zygote does not start; the message ends with what it wrote to its standard error.
    """

    def __init__(self, reward: RewardConfig, pool: PoolConfig) -> None:
        self._reward = reward
        self._pool = pool
        self._numbers = itertools.count()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 closed in close(); a pipe would have to be drained
        self._start()

    def _start(self) -> None:
        self.commands, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [str(theirs.fileno()), json.dumps(dataclasses.asdict(self._reward)), str(self._pool.memory_mib)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "magistral_jax.verify.zygote", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=_environment(),
                pass_fds=[theirs.fileno()],
            )
        self.commands.settimeout(self._pool.start_deadline)
        try:
            is_ready = self.commands.recv(len(READY)) == READY
        except OSError:
            is_ready = False
        if not is_ready:
            self._stop()
            words = self.last_words()
            self._stderr.close()
            raise MagistralError(f"the verifier workers cannot start: {words}")

    def restart(self) -> None:
        """Start another zygote in place of one that died; its workers have died with it."""
        self._stop()
        self._start()

    def fork(self) -> Worker:
        """Start a worker. Raises `OSError` where the zygote is gone."""
        ours, theirs = socket.socketpair()
        ours.settimeout(self._pool.deadline)
        worker = Worker(next(self._numbers), ours)
        with theirs:
            try:
                socket.send_fds(self.commands, [b"f%d" % worker.number], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return worker

    def kill(self, worker: Worker) -> None:
        """Kill a worker, whatever it is doing, and forget it. Does nothing to one that is already dead."""
        worker.connection.close()
        with contextlib.suppress(OSError):  # without a zygote there is no worker
            self.commands.send(b"k%d" % worker.number)

    def last_words(self) -> str:
        """The last line that the zygote or a worker wrote to standard error."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no message")

    def close(self) -> None:
        """End all processes."""
        self._stop()
        self._stderr.close()

    def _stop(self) -> None:
        self.commands.close()  # the zygote sees it, kills its workers and exits
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    """The parent's environment and import path; one thread for linear algebra, as the zygote forks."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
