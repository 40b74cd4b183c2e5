"""Orders over real sockets: what is sent arrives, an end is noticed at once, and strangers are not let in."""

import queue
import socket
import threading

import numpy as np
import pytest

from magistral_jax.distributed.config import DistributedConfig
from magistral_jax.distributed.orders import Follower, Leader
from magistral_jax.distributed.start import start
from magistral_jax.records import MagistralError

SOON = 30.0  # seconds


class Pair:
    """A leader and one follower, and what each said when it ended."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.leader_end, self.follower_end = queue.Queue(), queue.Queue()
        self.leader = Leader({1: self.near}, end=self.leader_end.put)
        self.follower = Follower(self.far, end=self.follower_end.put)


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.near.close()
    pair.far.close()


def test_orders_arrive_whole_and_in_order_and_the_last_is_stop(pair: Pair):
    tokens = np.arange(200_000, dtype=np.int32).reshape(2, 10, -1)
    mask = tokens % 3 == 0
    got = []
    reader = threading.Thread(target=lambda: got.extend(pair.follower.orders()))
    reader.start()
    with pair.leader:
        pair.leader.send("step", tokens=tokens, loss_mask=mask)
        pair.leader.send("publish")
        pair.leader.send("save", {"step": 3, "schedule": {"ready": [1, 2]}}, groups=np.zeros(0, np.uint8))
    reader.join(SOON)
    assert [order for order, _, _ in got] == ["step", "publish", "save", "stop"]
    np.testing.assert_array_equal(got[0][2]["tokens"], tokens)
    np.testing.assert_array_equal(got[0][2]["loss_mask"], mask)
    assert got[2][1] == {"step": 3, "schedule": {"ready": [1, 2]}}
    assert got[3][1] == {"reason": ""}
    pair.far.close()
    assert pair.leader_end.empty()  # an end that was ordered is no death
    assert pair.follower_end.empty()


def test_the_leaders_failure_is_told(pair: Pair):
    with pytest.raises(MagistralError), pair.leader:
        raise MagistralError("The disk is full.")
    *_, (order, header, _) = pair.follower.orders()
    assert (order, header["reason"]) == ("stop", "The disk is full.")


def test_a_dead_follower_ends_the_leader_with_a_sentence(pair: Pair):
    pair.far.shutdown(socket.SHUT_RDWR)
    sentence = pair.leader_end.get(timeout=SOON)
    assert "process 1 of the trainer has died" in sentence
    assert "--resume" in sentence


def test_a_dead_leader_ends_the_follower_with_a_sentence(pair: Pair):
    pair.near.shutdown(socket.SHUT_RDWR)
    assert "process 0 of the trainer has ended" in pair.follower_end.get(timeout=SOON)


def test_a_trainer_of_one_process_sends_nothing():
    with Leader({}, end=pytest.fail) as leader:
        leader.send("step", tokens=np.zeros(3))


def test_a_process_id_that_cannot_be_is_refused():
    with pytest.raises(MagistralError, match=r"`distributed.process_id` is 2; it must be less than .* \(2\)"):
        start(DistributedConfig("localhost:1", num_processes=2, process_id=2))
