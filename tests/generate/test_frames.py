"""Frames over a socket: exact, whole or not at all, with descriptors, and clear about an end or about garbage."""

import os
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from magistral_jax.generate.frames import Channel, Frame, ProtocolError

Pair = tuple[Channel, Channel]


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A bare socket, and the channel at its other end."""
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    yield ours, channel
    ours.close()
    channel.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    channels = Channel(ours), Channel(theirs)
    yield channels
    for channel in channels:
        channel.close()


def receive(channel: Channel) -> Frame:
    frame = channel.receive(timeout=60.0)
    assert frame is not None
    return frame


def test_what_arrives_is_what_was_sent(pair: Pair):
    arrays = [
        np.array([-(2**31), 0, 2**31 - 1], np.int32),
        np.array([np.nan, -0.0, np.inf, 1e-45, -0.1], np.float32),
        np.zeros((0,), np.int32),
        np.arange(12, dtype=np.uint32).reshape(3, 4)[:, ::2],  # not contiguous
    ]
    fields = {"text": "ä → \n", "number": 0.1 + 0.2, "nested": {"list": [1, None, True]}}
    pair[0].send(Frame("kind", fields, arrays))
    frame = receive(pair[1])
    assert (frame.kind, frame.fields, frame.descriptor) == ("kind", fields, None)
    for found, sent in zip(frame.arrays, arrays, strict=True):
        assert (found.dtype, found.shape, found.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())
        assert found.flags.writeable


def test_frames_keep_their_order_and_borders(pair: Pair):
    for number in range(50):
        pair[0].send(Frame(str(number), {}, [np.full(number, number, np.int32)]))
    for number in range(50):
        frame = receive(pair[1])
        assert frame.kind == str(number)
        np.testing.assert_array_equal(frame.arrays[0], np.full(number, number, np.int32))


def test_threads_may_send_at_one_time_and_frames_may_be_larger_than_any_buffer(pair: Pair):
    size = 500_000
    senders = [
        threading.Thread(target=pair[0].send, args=(Frame(str(n), {}, [np.full(size, n, np.int32)]),)) for n in range(4)
    ]
    for sender in senders:
        sender.start()
    frames = [receive(pair[1]) for _ in senders]
    for sender in senders:
        sender.join()
    assert {frame.kind for frame in frames} == {"0", "1", "2", "3"}
    for frame in frames:
        np.testing.assert_array_equal(frame.arrays[0], np.full(size, int(frame.kind), np.int32))


def test_descriptors_go_with_their_frames(pair: Pair):
    files = [os.memfd_create(name) for name in "ab"]
    for file, text in zip(files, (b"first", b"second"), strict=True):
        os.write(file, text)
    pair[0].send(Frame("none"))
    pair[0].send(Frame("a", {}, [np.zeros(200_000, np.int8)], files[0]))
    pair[0].send(Frame("none"))
    pair[0].send(Frame("b", descriptor=files[1]))
    for file in files:
        os.close(file)  # what was sent is on its way
    frames = [receive(pair[1]) for _ in range(4)]
    assert [frame.kind for frame in frames] == ["none", "a", "none", "b"]
    assert [frame.descriptor is None for frame in frames] == [True, False, True, False]
    for frame, text in ((frames[1], b"first"), (frames[3], b"second")):
        assert frame.descriptor is not None
        assert os.pread(frame.descriptor, 100, 0) == text
        assert not os.get_inheritable(frame.descriptor)
        os.close(frame.descriptor)


def test_waiting_has_an_end_and_loses_nothing(raw: tuple[socket.socket, Channel]):
    ours, channel = raw
    head = b'{"kind": "x", "fields": {}, "arrays": [], "has_descriptor": false}'
    message = struct.pack("<IQ", len(head), 0) + head
    ours.sendall(message[:30])
    with pytest.raises(TimeoutError):
        channel.receive(timeout=0.01)
    ours.sendall(message[30:])
    assert receive(channel) == Frame("x", {}, [])


@pytest.mark.parametrize("sent", [b"", b"\x05\x00"])
def test_the_end_of_the_peer_is_none(raw: tuple[socket.socket, Channel], sent: bytes):
    ours, channel = raw
    ours.sendall(sent)
    ours.close()
    assert channel.receive() is None  # part of a frame is no frame


def test_sending_to_nobody_is_an_error(pair: Pair):
    pair[1].close()
    with pytest.raises(OSError, match="Broken pipe"):
        pair[0].send(Frame("x"))


@pytest.mark.parametrize(
    ("head", "body_size"),
    [
        (b"not json at all", 0),
        (b'{"kind": "x"}', 0),
        (b"[]", 0),
        (b'{"kind": "x", "fields": {}, "arrays": [["<i4", [3]]], "has_descriptor": false}', 8),
        (b'{"kind": "x", "fields": {}, "arrays": [["junk", [1]]], "has_descriptor": false}', 8),
        (b'{"kind": "x", "fields": {}, "arrays": [], "has_descriptor": true}', 0),
    ],
)
def test_garbage_is_refused(raw: tuple[socket.socket, Channel], head: bytes, body_size: int):
    raw[0].sendall(struct.pack("<IQ", len(head), body_size) + head + bytes(body_size))
    with pytest.raises(ProtocolError, match="a frame that cannot be read"):
        raw[1].receive(timeout=60.0)


def test_a_frame_of_absurd_size_is_refused(raw: tuple[socket.socket, Channel]):
    raw[0].sendall(struct.pack("<IQ", 10, 2**60))
    with pytest.raises(ProtocolError, match="a frame of 10 "):
        raw[1].receive(timeout=60.0)
