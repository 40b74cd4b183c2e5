"""Frames over a socket."""

import os
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.verify.sandbox.protocol import Channel, ChannelClosed

HEADERS = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()))


@pytest.fixture
def ends():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def receive(channel, deadline):
    header, size = channel.receive_header(deadline)
    payload = bytearray(size)
    channel.receive_into(memoryview(payload), deadline)
    return header, bytes(payload)


@settings(max_examples=50, deadline=None)
@given(frames=st.lists(st.tuples(HEADERS, st.lists(st.binary(max_size=200), max_size=3)), min_size=1, max_size=5))
def test_frames_arrive_as_they_were_sent(frames):
    left, right = socket.socketpair()
    with left, right:
        sender, receiver = Channel(left.fileno()), Channel(right.fileno())
        for header, parts in frames:
            sender.send(header, *parts)
        for header, parts in frames:
            assert receive(receiver, time.monotonic() + 10) == (header, b"".join(parts))


def test_a_frame_larger_than_the_sockets_memory(ends):
    left, right = ends
    data = os.urandom(5 * 2**20)
    sender = threading.Thread(target=Channel(left.fileno()).send, args=({"a": 1}, data, data))
    sender.start()
    assert receive(Channel(right.fileno()), time.monotonic() + 60) == ({"a": 1}, data + data)
    sender.join()


def test_the_end_of_the_other_side_is_noticed(ends):
    left, right = ends
    channel = Channel(left.fileno())
    right.sendall(b"\x05")  # the start of a frame
    right.close()
    with pytest.raises(ChannelClosed):
        channel.receive_header(time.monotonic() + 10)
    with pytest.raises(ChannelClosed):
        channel.send({}, bytes(2**20))


def test_nobody_waits_beyond_the_deadline(ends):
    channel = Channel(ends[0].fileno())
    with pytest.raises(TimeoutError):
        channel.receive_header(time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        channel.send({}, bytes(2**24), deadline=time.monotonic() + 0.05)


def test_what_is_no_frame_is_refused_before_memory_is_taken(ends):
    ends[1].sendall(b"\xff" * 12)
    with pytest.raises(ChannelClosed, match="none of ours"):
        Channel(ends[0].fileno()).receive_header(time.monotonic() + 10)
