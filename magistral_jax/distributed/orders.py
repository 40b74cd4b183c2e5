"""Orders from process 0 to the others: what to run next, over a connection of their own.

A collective must be entered by every process, and cannot be waited for with patience: process 0 may spend an hour on
completions between two steps. So the others wait here, on a socket. It also tells at once when a process has died;
those that are left then wait in a collective for ever, hence end by themselves, with one sentence.

    order = 4 bytes, length of the header | 8 bytes, length of the arrays | header (JSON) | arrays (safetensors)
"""

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

_LENGTHS = struct.Struct("!IQ")
_ADDRESS_BYTES = 256
_GRACE_SECONDS = 20.0  # for a process to end by itself once the connection is closed

Order = tuple[str, dict[str, Any], dict[str, np.ndarray]]


class Leader:
    """Process 0's side: `send` goes to every other process. A context manager; its end is their end."""

    def __init__(self, sockets: Mapping[int, socket.socket], *, end: Callable[[str], None]) -> None:
        self._sockets, self._end = dict(sockets), end
        self._lock = threading.Lock()
        self._is_over = False
        for process, connection in self._sockets.items():
            threading.Thread(target=self._watch, args=(process, connection), daemon=True).start()

    def __enter__(self) -> "Leader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._is_over = True
        self.send("stop", {"reason": "" if error is None else str(error) or type(error).__name__})
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def send(self, order: str, header: Mapping[str, Any] | None = None, **arrays: Any) -> None:
        """Have all others do `order`; what it means is theirs to know."""
        if not self._sockets:
            return
        message = _pack(order, header or {}, {name: np.asarray(array) for name, array in arrays.items()})
        with self._lock:
            for connection in self._sockets.values():
                with contextlib.suppress(OSError):  # a dead process is the watcher's to report
                    connection.sendall(message)

    def _watch(self, process: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.recv(1)  # nothing is ever said: it returns when the connection ends
        if not self._is_over:
            self._end(
                f"process {process} of the trainer has died; its last words are in its own output. The latest "
                "checkpoint is whole: start all processes again with --resume."
            )


class Follower:
    """The side of every other process."""

    def __init__(self, connection: socket.socket, *, end: Callable[[str], None]) -> None:
        self._connection, self._end = connection, end
        self._inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._is_over = False
        threading.Thread(target=self._read, daemon=True).start()

    def orders(self) -> Iterator[Order]:
        """(order, header, arrays), one after the other, up to `stop`, which is the last."""
        while True:
            order = self._inbox.get()
            self._is_over = order[0] == "stop"
            yield order
            if self._is_over:
                return

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                header_size, size = _LENGTHS.unpack(_receive(self._connection, _LENGTHS.size))
                header = json.loads(_receive(self._connection, header_size))
                arrays = safetensors.numpy.load(_receive(self._connection, size))
                self._inbox.put((header.pop("order"), header, arrays))
        deadline = time.monotonic() + _GRACE_SECONDS
        while not self._is_over and time.monotonic() < deadline and not self._inbox.empty():
            time.sleep(0.05)
        if not self._is_over:
            self._end("process 0 of the trainer has ended, and this one with it.")


def connect(host: str, *, seconds: float) -> Leader | Follower:
    """Connect the processes of `jax.distributed`: a `Leader` in process 0, a `Follower` elsewhere. All must call it.

    Args:
      host: Name or address under which the others reach process 0; empty is what it calls itself.
      seconds: Longest wait for a process.

    Raises:
      TimeoutError: A process did not come within `seconds`.
    """
    num_followers = jax.process_count() - 1
    if not num_followers:
        return Leader({}, end=end_now)
    if jax.process_index() == 0:
        token = secrets.token_hex(16)
        with socket.create_server(("", 0), backlog=num_followers) as server:
            server.settimeout(seconds)
            _share(f"{host or socket.gethostname()} {server.getsockname()[1]} {token}")
            return Leader(dict(_accept(server, token, num_followers, seconds)), end=end_now)
    host, port, token = _share("").split()
    connection = socket.create_connection((host, int(port)), timeout=seconds)
    connection.settimeout(None)
    _keep_alive(connection)
    connection.sendall(token.encode() + struct.pack("!I", jax.process_index()))
    return Follower(connection, end=end_now)


def end_now(sentence: str) -> None:
    """Say why and end this process: its other threads wait for one that is gone, and could not be ended in order."""
    sys.stderr.write(f"error: {sentence}\n")
    sys.stderr.flush()
    os._exit(2)


def _accept(server: socket.socket, token: str, count: int, seconds: float) -> Iterator[tuple[int, socket.socket]]:
    """Connections that know the token, which only the processes of this run have been told."""
    while count:
        connection, _ = server.accept()
        connection.settimeout(seconds)
        with contextlib.suppress(OSError, EOFError):
            if hmac.compare_digest(_receive(connection, len(token)), token.encode()):
                process = struct.unpack("!I", _receive(connection, 4))[0]
                connection.settimeout(None)
                _keep_alive(connection)
                yield process, connection
                count -= 1
                continue
        connection.close()


def _share(text: str) -> str:
    """Process 0's text, in every process."""
    padded = np.frombuffer(text.encode().ljust(_ADDRESS_BYTES), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode().strip()


def _keep_alive(connection: socket.socket) -> None:
    """Notice within a minute or two that a host has gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _pack(order: str, header: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    head, body = json.dumps({"order": order, **header}).encode(), safetensors.numpy.save(arrays)
    return _LENGTHS.pack(len(head), len(body)) + head + body


def _receive(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return bytes(buffer)
