"""The process that verifier workers are forked from: all is loaded and warm, so a fork takes milliseconds.

It is a fresh interpreter, never a fork of the trainer, has one thread, and evaluates nothing after its warm-up.
Commands come as datagrams over a socket, a command of one byte and a worker's number:
  b"f" + number, with a file descriptor: fork a worker that serves that socket;
  b"k" + number: kill that worker and collect it.
When the socket closes, because the parent closed it or died, it kills its workers and exits.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import sys

from magistral_jax.verify.config import RewardConfig
from magistral_jax.verify.worker import serve, warm_up

READY = b"ready"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run with the number of the command socket, the reward section as JSON, and the memory limit as arguments."""
    commands = socket.socket(fileno=int(sys.argv[1]))
    config = RewardConfig(**json.loads(sys.argv[2]))
    memory_mib = int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent decides
    warm_up(config)
    gc.collect()
    gc.freeze()  # keeps the shared pages shared
    commands.send(READY)
    workers: dict[int, int] = {}
    while True:
        message, descriptors, _, _ = socket.recv_fds(commands, 64, 1)
        if not message:
            break
        number = int(message[1:])
        if message[:1] == b"f":
            workers[number] = _fork(commands, descriptors[0], config, memory_mib)
            os.close(descriptors[0])
        else:
            _kill(workers.pop(number))
    for pid in workers.values():
        _kill(pid)


def _fork(commands: socket.socket, descriptor: int, config: RewardConfig, memory_mib: int) -> int:
    zygote = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        commands.close()
        # A worker that is stuck does not see its socket close, so the kernel ends it with the zygote.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == zygote:
            serve(socket.socket(fileno=descriptor), config, memory_mib)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
    os._exit(0)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
