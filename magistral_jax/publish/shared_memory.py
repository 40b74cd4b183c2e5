"""Weights for other processes of the same host: each version is written once into memory that all of them map.

The memory has no name (`memfd`): its descriptor is handed over with the manifest, and the kernel frees it when the last
process that has it is gone, however that ends. A version lies in a segment of its own that is written only while nobody
reads it, so that a reader is never waited for: with R readers there are at most R + 2 segments, and mostly two.
"""

import errno
import mmap
import os
import threading
from typing import Any

import numpy as np

from magistral_jax.publish.host_bytes import read_params, write_params
from magistral_jax.publish.manifest import Manifest, lay_out, num_bytes
from magistral_jax.publish.plane import Delivery, Order, Published
from magistral_jax.records import MagistralError


class Segment:
    """Shared memory for one version. `num_readers` counts those that were handed it and have not given it back."""

    def __init__(self, size: int) -> None:
        self.size, self.num_readers = size, 0
        self.descriptor = os.memfd_create("magistral-weights", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.descriptor, 0, max(size, 1))  # now, since later a full memory would be a SIGBUS
            self.memory = np.frombuffer(mmap.mmap(self.descriptor, max(size, 1)), np.uint8)
        except OSError:
            os.close(self.descriptor)
            raise

    def close(self) -> None:
        """Give the memory back, once the readers are done with it as well."""
        os.close(self.descriptor)
        del self.memory


class SharedWeights:
    """The trainer's side: writes versions, one at a time, and knows who reads which.

    Raises:
      MagistralError: The system has no anonymous shared memory.
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise MagistralError("Weights for other processes need Linux, for shared memory without a name.")
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._newest: Published | None = None

    @property
    def num_segments(self) -> int:
        """Segments that exist."""
        return len(self._segments)

    def write(self, params: Any, version: int) -> None:
        """Put a version in place; returns when its bytes are there, whatever the readers do.

        Raises:
          MagistralError: There is no memory for it.
        """
        leaves = lay_out(params)
        segment = self._free_segment(num_bytes(leaves))
        written = write_params(segment.memory, params, leaves)
        with self._lock:
            self._newest = Published(Manifest(version, written), segment)

    def hold(self) -> Published:
        """The newest version, which stays as it is until it is released."""
        with self._lock:
            if self._newest is None:
                raise ValueError("no weights yet: `write` comes before `hold`")
            self._newest.content.num_readers += 1
            return self._newest

    def order(self, published: Published) -> Order:
        """The memory itself."""
        return Order(descriptor=published.content.descriptor)

    def release(self, published: Published, *, was_taken: bool = True) -> None:
        """Say that a reader is done."""
        with self._lock:
            published.content.num_readers -= 1

    def close(self) -> None:
        """Free everything; nothing is written or held afterwards."""
        with self._lock:
            for segment in self._segments:
                segment.close()
            self._segments, self._newest = [], None

    def _free_segment(self, size: int) -> Segment:
        with self._lock:
            newest = self._newest.content if self._newest else None
            for segment in self._segments:
                if segment is not newest and segment.num_readers == 0 and segment.size >= size:
                    return segment
            try:
                segment = Segment(size)
            except OSError as error:
                if error.errno not in (errno.ENOMEM, errno.ENOSPC, errno.EMFILE):
                    raise
                reason = f"{error.strerror} ({len(self._segments)} such segments exist)"
                raise MagistralError(f"No shared memory for {size / 1e9:.2f} GB of weights: {reason}.") from error
            self._segments.append(segment)
            return segment


class SharedMemoryReader:
    """A generator's side: takes what its model has, and nothing else.

    Args:
      wanted: Tree of `jax.ShapeDtypeStruct`: the generator's own parameters, and where they go.
    """

    def __init__(self, wanted: Any) -> None:
        self._wanted = wanted

    def receive(self, delivery: Delivery) -> Any:
        """Parameters on the device, in memory of their own; see `plane.Receiver`."""
        assert delivery.descriptor is not None
        try:
            size = os.fstat(delivery.descriptor).st_size
            mapping = mmap.mmap(delivery.descriptor, size, access=mmap.ACCESS_READ)
        finally:
            os.close(delivery.descriptor)
        return read_params(np.frombuffer(mapping, np.uint8), delivery.manifest, self._wanted)
