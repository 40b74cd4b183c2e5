"""Messages between the trainer's process and a generator's: a header in JSON, then arrays as they lie in memory.

    lengths of header and body | header: kind, fields, type and shape of each array | bytes of the arrays

Numbers that must arrive exactly (token ids, log-probs, versions) travel as arrays, never as text. A frame may carry one
file descriptor. Nothing here knows what the messages mean.
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


class ProtocolError(Exception):
    """The peer sent something that is no frame of ours."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One message."""

    kind: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Sequence[np.ndarray] = ()
    descriptor: int | None = None  # received ones belong to the receiver, who closes them


class Channel:
    """Frames over a connected Unix stream socket. Any thread may send; one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
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
        }
        head = json.dumps(header).encode()
        body = b"".join(array.tobytes() for array in arrays)
        message = memoryview(_LENGTHS.pack(len(head), len(body)) + head + body)
        with self._sending:
            if frame.descriptor is not None:
                message = message[socket.send_fds(self._connection, [message], [frame.descriptor]) :]
            self._connection.sendall(message)

    def receive(self, timeout: float | None = None) -> Frame | None:
        """The next frame, or None where the peer is gone.

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
            except ConnectionError:
                return None
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)  # `recv_fds` takes no heed of MSG_CMSG_CLOEXEC
            self._descriptors += descriptors
            if not data:
                return None
            self._received += data
        return frame

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
            return Frame(header["kind"], header["fields"], arrays, descriptor)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ProtocolError(f"a frame that cannot be read: {error!r}") from error
