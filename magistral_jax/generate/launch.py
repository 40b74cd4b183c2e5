"""Starting the process of a generator, and saying how it ended."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

_TAIL = 65536  # bytes of a log in which last words are looked for
_SPLIT_FLAG = "--xla_force_host_platform_device_count"  # the older way to split a CPU


@runtime_checkable
class Endpoint(Protocol):
    """Where a generator runs, and the connection to it."""

    connection: socket.socket

    @property
    def name(self) -> str:
        """Who it is, for messages: the process, or the host."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether it runs on this host, on the same platform, and may read the same files."""
        ...

    def kill(self) -> None:
        """End it, or at least the connection."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait for its end, as far as that can be seen, and force it after that time."""
        ...

    def describe_end(self, reason: str | None) -> str:
        """How it ended; `reason` is why it was given up, if it was."""
        ...


class WorkerProcess:
    """A fresh interpreter that runs `generate.worker`, never a fork: this process holds jax and threads.

    Args:
      log: File to which its standard output and error are appended.
      environment: Variables beside ours.
      module: What is run; the connection's descriptor is its argument.

    Raises:
      OSError: It cannot be started.
    """

    def __init__(
        self, log: pathlib.Path, environment: Mapping[str, str], module: str = "magistral_jax.generate.worker"
    ) -> None:
        self._log = log
        self.connection, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            self._log_start = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for the trainer
            )

    @property
    def name(self) -> str:
        """Its number in the system."""
        return f"process {self.process.pid}"

    @property
    def is_local(self) -> bool:
        """Always."""
        return True

    def kill(self) -> None:
        """End it at once; the end of the connection follows, after what is still in it."""
        self.process.kill()

    def wait(self, seconds: float) -> None:
        """Wait for its end, which is forced when it does not come in time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def describe_end(self, reason: str | None) -> str:
        """How it ended: what it was killed for, or else its signal or exit code; and the last line of its output."""
        code = self.process.returncode
        ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with self._log.open("rb") as file:
            file.seek(max(self._log_start, self._log.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
        words = next((line.strip() for line in reversed(lines) if line.strip()), None)
        return (reason or ending) + (f"; its last words: {words}" if words else "")


def worker_environment(number: int, num_generators: int, devices: str, num_devices: int = 1) -> dict[str, str]:
    """What tells a generator's process which devices and how many cores are its own.

    Args:
      number: Its place among the generators.
      num_generators: How many there are: together they get as many threads as there are cores, if the user's
        environment does not say otherwise (`PJRT_NPROC`).
      devices: Ids of GPUs, separated by commas, that are dealt out in turn; "" lets it see what we see.
      num_devices: Devices of one generator; where there is nothing but a CPU, it is split into as many.
    """
    num_cores = len(os.sched_getaffinity(0))
    environment = {"PJRT_NPROC": os.environ.get("PJRT_NPROC") or str(max(num_cores // num_generators, 1))}
    if num_devices > 1 and _SPLIT_FLAG not in os.environ.get("XLA_FLAGS", ""):  # jax takes one of them, not both
        environment["JAX_NUM_CPU_DEVICES"] = str(num_devices)
    if devices:
        ids = devices.replace(" ", "").split(",")
        own = range(number * num_devices, (number + 1) * num_devices)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(ids[place % len(ids)] for place in own))
    return environment
