"""The process that verifier workers are forked from: all is loaded and warm, so a fork takes milliseconds.

It is a fresh interpreter, never a fork of the trainer, has one thread, and evaluates nothing after its warm-up.
It says READY, or REFUSED and a sentence for the user. Then commands come as datagrams over a socket:
  b"f NUMBER KIND SLOT", with a file descriptor: fork a worker of a kind that serves that socket;
  b"k NUMBER": kill that worker and collect it.
When the socket closes, because the parent closed it or died, it kills its workers and exits.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import sys

from magistral_jax.records import MagistralError
from magistral_jax.verify.config import CodeConfig, RewardConfig
from magistral_jax.verify.reward_function import RewardFunction, load_function
from magistral_jax.verify.sandbox.mechanism import Mechanism
from magistral_jax.verify.worker import WorkerConfig, serve, warm_up

READY = b"ready"
REFUSED = b"refused "
MAX_DATAGRAM = 4096
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run with the number of the command socket and the `WorkerConfig` as JSON for arguments."""
    commands = socket.socket(fileno=int(sys.argv[1]))
    config = _decode_config(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent decides
    try:
        function = _load(config.reward)
    except MagistralError as error:
        commands.send(REFUSED + str(error).encode(errors="replace")[: MAX_DATAGRAM - len(REFUSED)])
        return
    warm_up(config.reward)
    gc.collect()
    gc.freeze()  # keeps the shared pages shared
    commands.send(READY)
    workers: dict[int, int] = {}
    while True:
        message, descriptors, _, _ = socket.recv_fds(commands, MAX_DATAGRAM, 1)
        if not message:
            break
        command, number, *rest = message.decode().split()
        if command == "f":
            workers[int(number)] = _fork(commands, descriptors[0], rest[0], config, function)
            os.close(descriptors[0])
        elif int(number) in workers:  # else it was one of another zygote, before this
            _kill(workers.pop(int(number)))
    for pid in workers.values():
        _kill(pid)


def _decode_config(text: str) -> WorkerConfig:
    fields = json.loads(text)
    return WorkerConfig(
        reward=RewardConfig(**fields["reward"]),
        code=CodeConfig(**fields["code"]),
        mechanism=Mechanism(fields["mechanism"]),
        memory_mib=fields["memory_mib"],
    )


def _load(config: RewardConfig) -> RewardFunction | None:
    if not config.function:
        return None
    sys.path.append(os.getcwd())  # last, so that no file there takes the place of a module of ours
    return load_function(config.function)


def _fork(
    commands: socket.socket, descriptor: int, kind: str, config: WorkerConfig, function: RewardFunction | None
) -> int:
    zygote = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        commands.close()
        # A worker that is stuck does not see its socket close, so the kernel ends it with the zygote.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == zygote:
            serve(socket.socket(fileno=descriptor), kind, config, function)
    finally:
        os._exit(0)  # whatever it was, the parent sees the socket close


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
