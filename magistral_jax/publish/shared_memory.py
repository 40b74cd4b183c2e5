"""Weights for other processes of the same host: each version is written once into memory that all of them map.

The memory has no name (`memfd`): its descriptor is handed over with the manifest, and the kernel frees it when the last
process that has it is gone, however that ends. A version lies in a segment of its own that is written only while nobody
reads it, so that a reader is never waited for: with R readers there are at most R + 2 segments, and mostly two.
"""

import concurrent.futures
import dataclasses
import errno
import mmap
import os
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import init_params, unstack
from magistral_jax.publish.manifest import Leaf, Manifest, WeightsRefusedError, check_layout, lay_out, num_bytes
from magistral_jax.records import MagistralError

_CHUNK = 2**18  # bytes copied and summed up while they are in the cache
_MAX_THREADS = 8  # that copy and sum up at one time


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


@dataclasses.dataclass(frozen=True)
class Published:
    """A version that lies in shared memory."""

    manifest: Manifest
    segment: Segment


class SharedWeights:
    """The trainer's side: writes versions, one at a time, and knows who reads which.

    Raises:
      MagistralError: The system has no anonymous shared memory.
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise MagistralError("`generation.where` = `process` needs Linux, for shared memory without a name.")
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
        arrays = jax.tree.leaves(params)
        for array in arrays:
            array.copy_to_host_async()
        with _threads() as threads:
            written = tuple(threads.map(lambda array, leaf: _write_leaf(segment.memory, leaf, array), arrays, leaves))
        with self._lock:
            self._newest = Published(Manifest(version, written), segment)

    def hold(self) -> Published:
        """The newest version, which stays as it is until it is released."""
        with self._lock:
            if self._newest is None:
                raise ValueError("no weights yet: `write` comes before `hold`")
            self._newest.segment.num_readers += 1
            return self._newest

    def release(self, published: Published) -> None:
        """Say that a reader is done."""
        with self._lock:
            published.segment.num_readers -= 1

    def close(self) -> None:
        """Free everything; nothing is written or held afterwards."""
        with self._lock:
            for segment in self._segments:
                segment.close()
            self._segments, self._newest = [], None

    def _free_segment(self, size: int) -> Segment:
        with self._lock:
            newest = self._newest.segment if self._newest else None
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


class WeightsReader:
    """A generator's side: knows which leaves its model has, and takes nothing else.

    Args:
      model: Shape of the model.
      dtype: Precision in which the generator computes.
    """

    def __init__(self, model: ModelConfig, dtype: jnp.dtype) -> None:
        shapes = jax.eval_shape(lambda: unstack(init_params(model, jax.random.key(0)), model))
        expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
        self._leaves, self._structure = lay_out(expected), jax.tree.structure(expected)

    def read(self, manifest: Manifest, descriptor: int) -> Any:
        """Parameters on the device, in memory of their own.

        Args:
          manifest: What was written.
          descriptor: Of the shared memory; it is closed.

        Raises:
          WeightsRefusedError: Another layout than the model's, or bytes that do not have their checksum.
        """
        try:
            check_layout(manifest, self._leaves)
            if os.fstat(descriptor).st_size < manifest.num_bytes:
                raise WeightsRefusedError(f"weights of version {manifest.version}: the shared memory is too short")
            mapping = mmap.mmap(descriptor, manifest.num_bytes, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        memory = np.frombuffer(mapping, np.uint8)
        check_bytes(manifest, memory, self._leaves)
        arrays = [_load(memory, leaf) for leaf in self._leaves]
        return jax.block_until_ready(jax.tree.unflatten(self._structure, arrays))


def check_bytes(manifest: Manifest, memory: UInt8[np.ndarray, " N"], expected: Sequence[Leaf]) -> None:
    """Compare checksums.

    Raises:
      WeightsRefusedError: Names the first leaf whose bytes are not those that were written.
    """
    sent = {leaf.path: leaf.checksum for leaf in manifest.leaves}
    with _threads() as threads:
        checksums = threads.map(lambda leaf: zlib.crc32(_bytes_of(memory, leaf).data), expected)
    for leaf, checksum in zip(expected, checksums, strict=True):
        if checksum != sent[leaf.path]:
            raise WeightsRefusedError(
                f"weights of version {manifest.version}: the bytes of leaf {leaf.path} have checksum {checksum:#010x}, "
                f"the trainer wrote {sent[leaf.path]:#010x}"
            )


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))))


def _bytes_of(memory: UInt8[np.ndarray, " N"], leaf: Leaf) -> UInt8[np.ndarray, " M"]:
    return memory[leaf.offset : leaf.offset + leaf.num_bytes]


def _write_leaf(memory: UInt8[np.ndarray, " N"], leaf: Leaf, array: jax.Array) -> Leaf:
    source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # on a CPU device a view, no copy
    target, checksum = _bytes_of(memory, leaf), 0
    for start in range(0, len(source), _CHUNK):
        chunk = source[start : start + _CHUNK]
        target[start : start + _CHUNK] = chunk
        checksum = zlib.crc32(chunk.data, checksum)
    return dataclasses.replace(leaf, checksum=checksum)


def _load(memory: UInt8[np.ndarray, " N"], leaf: Leaf) -> jax.Array:
    values = _bytes_of(memory, leaf).view(jnp.dtype(leaf.dtype)).reshape(leaf.shape)
    # `device_put` to a CPU hands the very memory on, even with `may_alias=False`; the next version would overwrite it.
    return jnp.array(values, copy=True) if jax.default_backend() == "cpu" else jax.device_put(values)
