"""Weights for other hosts: the bytes of a version follow its manifest on the generator's own connection.

So there is one port to open and one token to know, and what is submitted after a publish cannot overtake its weights.
Heartbeats are not held up: they go the other way. The trainer writes a version once, into the same segments as for
shared memory, however many generators then read it; that a connection is dead is found by the kernel (`frames`).
"""

from typing import Any

import numpy as np

from magistral_jax.publish.host_bytes import read_params
from magistral_jax.publish.plane import Delivery, Order, Published
from magistral_jax.publish.shared_memory import SharedWeights


class StreamedWeights(SharedWeights):
    """The trainer's side."""

    def order(self, published: Published) -> Order:
        """All bytes."""
        return Order(payload=published.content.memory.data[: published.manifest.num_bytes])


class StreamReader:
    """A generator's side.

    Args:
      wanted: Tree of `jax.ShapeDtypeStruct`: the generator's own parameters, and where they go.
    """

    def __init__(self, wanted: Any) -> None:
        self._wanted = wanted
        self._memory = np.empty(0, np.uint8)  # kept: the next version is as large

    def receive(self, delivery: Delivery) -> Any:
        """Parameters on the device, in memory of their own; see `plane.Receiver`."""
        if len(self._memory) != delivery.payload_size:
            self._memory = np.empty(delivery.payload_size, np.uint8)
        if delivery.payload_size:  # whatever it is: what follows on the connection must be found
            delivery.read_payload(self._memory.data)
        return read_params(self._memory, delivery.manifest, self._wanted)
