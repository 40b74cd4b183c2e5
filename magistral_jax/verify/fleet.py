"""The processes of a verifier pool, without any policy: one zygote and the workers that it forks.

A `Fleet` starts the zygote as a fresh interpreter (never a fork of a process that may hold JAX and threads), and hands
out `Worker`s; the dispatcher decides what they do and when they have to go.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import tempfile

from magistral_jax.records import MagistralError
from magistral_jax.verify.item import Message, decode_message
from magistral_jax.verify.worker import WorkerConfig
from magistral_jax.verify.zygote import MAX_DATAGRAM, READY, REFUSED

_EXIT_SECONDS = 10.0
_CHUNK = 65536
_MAX_LINE = 2**24


class Worker:
    """This side of a worker: its socket, what it has not read yet, and the start of a line that has not ended.

    Nothing here waits, so a worker that does not read or write holds nobody up.
    """

    def __init__(self, number: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.number = number
        self.connection = connection
        self._unsent = memoryview(b"")
        self._partial = b""

    @property
    def has_unsent(self) -> bool:
        """True while a task is on its way."""
        return len(self._unsent) > 0

    def send(self, frame: bytes) -> None:
        """Begin to send a task; `flush` goes on with it. Raises `OSError` where the worker is gone."""
        self._unsent = memoryview(frame)
        self.flush()

    def flush(self) -> None:
        """Send what the worker has room for. Raises `OSError` where it is gone."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]

    def receive(self) -> list[Message] | None:
        """The messages that have arrived, or None where the worker is gone.

        Raises:
          ValueError: The worker does not keep to the protocol.
        """
        try:
            chunk = self.connection.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not chunk:
            return None
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        if len(self._partial) > _MAX_LINE:
            raise ValueError("a message without end")
        return [decode_message(line) for line in lines]


class Fleet:
    """The zygote and its workers.

    Raises:
      MagistralError: The zygote does not start; the message says why in its words.
    """

    def __init__(self, config: WorkerConfig, start_deadline: float) -> None:
        self._config = config
        self._start_deadline = start_deadline
        self._numbers = itertools.count()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 closed in close(); a pipe would have to be drained
        try:
            self._start()
        except MagistralError:
            self._stderr.close()
            raise

    def _start(self) -> None:
        self.commands, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            config = {**dataclasses.asdict(self._config), "mechanism": self._config.mechanism.value}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "magistral_jax.verify.zygote", str(theirs.fileno()), json.dumps(config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=_environment(),
                pass_fds=[theirs.fileno()],
            )
        self.commands.settimeout(self._start_deadline)
        try:
            answer = self.commands.recv(MAX_DATAGRAM)
        except OSError:
            answer = b""
        if answer != READY:
            self._stop()
            if answer.startswith(REFUSED):
                raise MagistralError(answer.removeprefix(REFUSED).decode(errors="replace"))
            raise MagistralError(f"the verifier workers cannot start: {self.last_words()}")

    def restart(self) -> None:
        """Start another zygote in place of one that died; its workers have died with it."""
        self._stop()
        self._start()

    @property
    def is_alive(self) -> bool:
        """False once the zygote is gone, which is seen here before its workers follow it."""
        return not select.select([self.commands], [], [], 0)[0]  # it has no more to say, so this is its end

    def fork(self, kind: str) -> Worker:
        """Start a worker of a kind. Without a zygote it is one that is gone at once."""
        ours, theirs = socket.socketpair()
        worker = Worker(next(self._numbers), ours)
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(self.commands, [f"f {worker.number} {kind}".encode()], [theirs.fileno()])
        return worker

    def kill(self, worker: Worker) -> None:
        """Kill a worker, whatever it is doing, and forget it. Does nothing to one that is already dead."""
        worker.connection.close()
        with contextlib.suppress(OSError):  # without a zygote there is no worker
            self.commands.send(f"k {worker.number}".encode())

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
