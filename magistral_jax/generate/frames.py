"""Messages between the trainer's process and a generator's: a header in JSON, then arrays as they lie in memory.

    lengths of header and body | header: kind, fields, type and shape of each array | bytes of the arrays

Numbers that must arrive exactly (token ids, log-probs, versions) travel as arrays, never as text. A frame may carry one
file descriptor, over a Unix socket, or be followed by a payload: many bytes, which the receiver reads into memory of
its own. Nothing here knows what the messages mean.
"""

import dataclasses
import json
import math
import os
import select
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

_LENGTHS = struct.Struct("<IQ")
_MAX_HEADER, _MAX_BODY = 2**26, 2**32
_RECEIVE_SIZE = 2**18
_TCP_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4),  # seconds of silence before the kernel asks
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),  # milliseconds until what was sent is acknowledged
)


class ProtocolError(Exception):
    """The peer sent something that is no frame of ours."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One message."""

    kind: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Sequence[np.ndarray] = ()
    descriptor: int | None = None  # received ones belong to the receiver, who closes them
    payload: Any = None  # a buffer, to be sent
    payload_size: int = 0  # of a received one: bytes to be read next, with `read_payload`


class Channel:
    """Frames over a connected stream socket. Any thread may send; one thread receives.

    Over TCP a peer whose host is gone is noticed within ten seconds, be there something to send or not.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            for level, option, value in _TCP_OPTIONS:
                connection.setsockopt(level, option, value)
        self._connection = connection
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._received = bytearray()
        self._descriptors: list[int] = []

    def send(self, frame: Frame) -> None:
        """Send a frame, waiting until the peer takes it. Raises `OSError` where the peer is gone."""
        arrays = [np.ascontiguousarray(array) for array in frame.arrays]
        header = {
            "kind": frame.kind,
            "fields": frame.fields,
            "arrays": [[array.dtype.str, array.shape] for array in arrays],
            "has_descriptor": frame.descriptor is not None,
            "payload": 0 if frame.payload is None else len(frame.payload),
        }
        head = json.dumps(header).encode()
        body = b"".join(array.tobytes() for array in arrays)
        message = memoryview(_LENGTHS.pack(len(head), len(body)) + head + body)
        with self._sending:
            if frame.descriptor is not None:
                message = message[socket.send_fds(self._connection, [message], [frame.descriptor]) :]
            self._connection.sendall(message)
            if frame.payload is not None:
                self._connection.sendall(frame.payload)

    def receive(self, timeout: float | None = None) -> Frame | None:
        """The next frame, or None where the peer is gone. A payload is to be read before.

        Raises:
          TimeoutError: Nothing came for `timeout` seconds; what came before is kept.
          ProtocolError: What came is no frame.
        """
        while (frame := self._take_frame()) is None:
            if not self._poll.poll(None if timeout is None else 1000 * timeout):
                raise TimeoutError
            try:
                # Always with room for a descriptor: one that comes with bytes that are read otherwise is lost.
                data, descriptors, _, _ = socket.recv_fds(self._connection, _RECEIVE_SIZE, 1)
            except (ConnectionError, TimeoutError):  # TimeoutError: the kernel's, not ours
                return None
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)  # `recv_fds` takes no heed of MSG_CMSG_CLOEXEC
            self._descriptors += descriptors
            if not data:
                return None
            self._received += data
        return frame

    def read_payload(self, buffer: memoryview) -> None:
        """Fill a buffer with the payload of the last frame.

        Raises:
          OSError: The peer is gone before all of it came.
        """
        start = min(len(buffer), len(self._received))  # came along with the frame
        buffer[:start] = self._received[:start]
        del self._received[:start]
        while start < len(buffer):
            count = self._connection.recv_into(buffer[start:])
            if not count:
                raise ConnectionResetError("the peer is gone in the middle of a payload")
            start += count

    def close(self) -> None:
        """End the connection; the peer notices."""
        self._connection.close()

    def _take_frame(self) -> Frame | None:
        if len(self._received) < _LENGTHS.size:
            return None
        head_size, body_size = _LENGTHS.unpack_from(self._received)
        if head_size > _MAX_HEADER or body_size > _MAX_BODY:
            raise ProtocolError(f"a frame of {head_size} + {body_size} bytes")
        body_start = _LENGTHS.size + head_size
        end = body_start + body_size
        if len(self._received) < end:
            return None
        message = bytes(self._received[:end])
        del self._received[:end]
        return self._parse(message[_LENGTHS.size : body_start], message[body_start:])

    def _parse(self, head: bytes, body: bytes) -> Frame:
        try:
            header = json.loads(head)
            arrays, offset = [], 0
            for dtype, shape in header["arrays"]:
                array = np.frombuffer(body, dtype, math.prod(shape), offset).reshape(shape)
                arrays.append(array.copy())  # aligned, writable, and without the rest of the message
                offset += array.nbytes
            descriptor = self._descriptors.pop(0) if header["has_descriptor"] else None
            return Frame(header["kind"], header["fields"], arrays, descriptor, payload_size=header.get("payload", 0))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ProtocolError(f"a frame that cannot be read: {error!r}") from error
