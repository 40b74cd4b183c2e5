"""A handful of attacks on a box before it is trusted: a kernel, a container or a security module may differ from ours.

Each attack is a Python program that prints ESCAPED where it reached its aim. The first program is none: it must work.
"""

import contextlib
import pathlib
import socket
import tempfile
from collections.abc import Iterator

from magistral_jax.verify.sandbox.box import Box, BoxError
from magistral_jax.verify.sandbox.execution import Limits, Mechanism, Status

LIMITS = Limits(cpu_seconds=2.0, wall_seconds=30.0, memory_mib=300)
_ESCAPED = b"ESCAPED"

# In every attack: `secret` is a file of the host, `folder` one that anybody may write to, `tcp` and `unix` are
# listening. What raises has failed.
ATTACKS = {
    "read a file of the host": "open(secret).read(); escaped()",
    "make a file": "any(map(can_make, (folder, '/', '/dev', '/tmp', '/dev/shm', '/run', '.'))) and escaped()",
    "change a file's mode on the host": "os.chmod(secret, 0o777); escaped()",
    "see the host's processes": "os.listdir('/proc'); escaped()",
    "connect to a TCP port of the host": "socket.create_connection(tcp, timeout=1); escaped()",
    "connect to a unix socket of the host": "socket.socket(socket.AF_UNIX).connect(unix); escaped()",
    "start a process": "os.fork() or os._exit(0); escaped()",
    "send its parent a signal": "os.kill(os.getppid(), 0); escaped()",
    "trace its parent": "libc.ptrace(0x4206, os.getppid(), 0, 0) == 0 and escaped()",
    "take 400 MB of memory": "bytearray(400 * 2**20); escaped()",
    "take memory in a file without a name": "os.memfd_create('x'); escaped()",
    "take shared memory": "libc.shmget(0, 1 << 20, 0o1600) >= 0 and escaped()",
    "become another user": "libc.setfsuid(12345); libc.setfsuid(12345) == 12345 and escaped()",
    "make a user namespace": "libc.unshare(0x10000000) == 0 and escaped()",
}
_PREAMBLE = """
import ctypes, os, socket
libc = ctypes.CDLL(None)
secret, folder, tcp, unix = {secret!r}, {folder!r}, {tcp!r}, {unix!r}
def can_make(folder):
    try:
        open(folder + "/sandbox-self-test", "w")
        os.unlink(folder + "/sandbox-self-test")
        return True
    except OSError:
        return False
def escaped():
    os.write(1, b"ESCAPED")
"""


def self_test(mechanism: Mechanism) -> None:
    """Attack a box of a mechanism.

    Raises:
      BoxError: The box does not work, or an attack does; the message names it.
    """
    with _targets() as preamble, Box(mechanism, python=True) as box:
        box.load_python(b"print(int(input()) + 1)")
        execution = box.run_python(stdin=b"41\n", limits=LIMITS)
        if execution.status is not Status.OK or execution.stdout != b"42\n":
            raise BoxError(f"self-test: a harmless program ended with {execution}")
        for name, attack in ATTACKS.items():
            box.load_python((preamble + attack).encode())
            if _ESCAPED in box.run_python(limits=LIMITS).stdout:
                raise BoxError(f"self-test: a program in the box could {name}")


@contextlib.contextmanager
def _targets() -> Iterator[str]:
    """What the attacks aim at, as the head of their source."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        pathlib.Path(folder).chmod(0o777)
        secret = pathlib.Path(folder, "secret")
        secret.write_text("secret\n", encoding="ascii")
        unix.bind("")  # an abstract name of the kernel's choice
        unix.listen()
        yield _PREAMBLE.format(secret=str(secret), folder=folder, tcp=tcp.getsockname(), unix=unix.getsockname())
