"""Frames between host and runner over one socket: two sizes, a header in JSON, raw bytes.

Both ends use this module. Every read lands in memory that the caller names, so time is linear in the size, and the
runner can keep the bytes of one program out of the memory of the next.
"""

import json
import math
import os
import select
import struct
import time
from typing import Any

_SIZES = struct.Struct("<IQ")  # bytes of the header, bytes of the payload
_MAX_HEADER = 2**24


class ChannelClosed(Exception):
    """The other end is gone."""


class Channel:
    """One end of a stream socket, by its descriptor. Deadlines are in seconds of `time.monotonic`."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor

    def send(self, header: dict[str, Any], *payload: memoryview | bytes, deadline: float = math.inf) -> None:
        """Send one frame.

        Raises:
          ChannelClosed: The other end is gone.
          TimeoutError: The deadline passed before all of it was taken.
        """
        text = json.dumps(header).encode()
        self._write(_SIZES.pack(len(text), sum(map(len, payload))) + text, deadline)
        for part in payload:
            self._write(part, deadline)

    def receive_header(self, deadline: float = math.inf) -> tuple[dict[str, Any], int]:
        """The next frame's header and the size of its payload, to be read with `receive_into`; raises as `send`."""
        sizes = self._read(_SIZES.size, deadline)
        header_size, payload_size = _SIZES.unpack(sizes)
        if header_size > _MAX_HEADER:
            raise ChannelClosed(f"a header of {header_size} bytes is none of ours")
        return json.loads(self._read(header_size, deadline)), payload_size

    def receive_into(self, view: memoryview, deadline: float = math.inf) -> None:
        """Fill `view` with the next bytes of the payload; raises as `send`."""
        filled = 0
        while filled < len(view):
            try:
                count = os.readv(self.descriptor, [view[filled:]])
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except ConnectionError as error:
                raise ChannelClosed(str(error)) from error
            if count == 0:
                raise ChannelClosed("end of stream")
            filled += count

    def _read(self, size: int, deadline: float) -> bytearray:
        data = bytearray(size)
        self.receive_into(memoryview(data), deadline)
        return data

    def _write(self, data: memoryview | bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.descriptor, view) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except ConnectionError as error:
                raise ChannelClosed(str(error)) from error

    def _wait(self, events: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(self.descriptor, events)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(None if math.isinf(left) else left * 1000):
            raise TimeoutError("the other end takes too long")
