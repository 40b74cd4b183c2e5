"""Size of a program before it runs."""

import struct

_MAGIC_64_LITTLE = b"\x7fELF\x02\x01"
_LOAD = 1


def image_bytes(path: str) -> int:
    """Address space that a 64-bit ELF program takes for code and global variables; 0 for any other file.

    A program with global arrays beyond its memory limit is killed by the kernel in the middle of `execve`, which looks
    like a crash of its own.
    """
    with open(path, "rb") as file:
        header = file.read(64)
        if len(header) < 64 or not header.startswith(_MAGIC_64_LITTLE):
            return 0
        (offset,) = struct.unpack_from("<Q", header, 32)
        entry_size, count = struct.unpack_from("<HH", header, 54)
        file.seek(offset)
        table = file.read(entry_size * count)
    entries = [struct.unpack_from("<I36xQ", table, entry_size * index) for index in range(count)]
    return sum(size for kind, size in entries if kind == _LOAD)
