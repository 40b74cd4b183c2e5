"""Where the runner keeps what belongs to one program, so that the next one cannot find it.

A Python program is a fork of the runner and could search the memory that it inherits: for another completion's source,
or for the output that another completion wrote for the same test. So the bytes of programs never become Python
objects in the runner. They stay in a mapping that forks do not inherit, and in files that live in memory.
"""

import fcntl
import mmap
import os

from magistral_jax.verify.sandbox.protocol import Channel

_CHUNK = 2**18


class PrivateBuffer:
    """Memory that a fork does not inherit."""

    def __init__(self) -> None:
        self._mapping = self._map(_CHUNK)

    def room(self, size: int) -> memoryview:
        """A view of at least `size` bytes. What was there before is lost, and views handed out before are void."""
        if size > len(self._mapping):
            self._mapping = self._map(size)
        return memoryview(self._mapping)[:size]

    @staticmethod
    def _map(size: int) -> mmap.mmap:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_DONTFORK)
        return mapping


def receive_file(channel: Channel, size: int, buffer: PrivateBuffer) -> int:
    """Take a payload into a file without a name; returns its descriptor, at position 0.

    The file is sealed: a program that gets it for standard input cannot write to it, neither to fill memory nor to
    tell something to the next program.
    """
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = buffer.room(_CHUNK)
    while size:
        part = view[: min(size, _CHUNK)]
        channel.receive_into(part)
        size -= len(part)
        while part:
            part = part[os.write(descriptor, part) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor
