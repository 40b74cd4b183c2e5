"""Weights as bytes of host memory: out of arrays, with a checksum for each leaf, and back into arrays.

The checksum is XXH3 (64 bits, package xxhash): it guards against mistakes, not against malice, and keeps up with the
copy, where CRC-32 takes five times as long.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jaxtyping import UInt8

from magistral_jax.publish.manifest import Leaf, Manifest, WeightsRefusedError, check_layout, lay_out

_CHUNK = 2**18  # bytes copied and summed up while they are in the cache
_MAX_THREADS = 8  # that copy and sum up at one time


def write_params(memory: UInt8[np.ndarray, " N"], params: Any, leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """Put all arrays of a tree in their places; the leaves with their checksums."""
    arrays = jax.tree.leaves(params)
    for array in arrays:
        array.copy_to_host_async()
    with _threads() as threads:
        return tuple(threads.map(lambda array, leaf: _write_leaf(memory, leaf, array), arrays, leaves))


def read_params(memory: UInt8[np.ndarray, " N"], manifest: Manifest, wanted: Any) -> Any:
    """Arrays with memory of their own, where `wanted` has them.

    Args:
      memory: Holds what the manifest says.
      manifest: What was written.
      wanted: Tree of `jax.ShapeDtypeStruct`; its shardings say where to.

    Raises:
      WeightsRefusedError: Another layout than the model's, too little memory, or bytes that do not have their checksum.
    """
    leaves = lay_out(wanted)
    check_layout(manifest, leaves)
    if len(memory) < manifest.num_bytes:
        raise WeightsRefusedError(
            f"weights of version {manifest.version}: {len(memory)} bytes came, expected {manifest.num_bytes}"
        )
    check_bytes(memory, manifest, leaves)
    structs, structure = jax.tree.flatten(wanted)
    arrays = [_load(memory, leaf, struct.sharding) for leaf, struct in zip(leaves, structs, strict=True)]
    return jax.block_until_ready(jax.tree.unflatten(structure, arrays))


def check_bytes(memory: UInt8[np.ndarray, " N"], manifest: Manifest, expected: Sequence[Leaf]) -> None:
    """Compare checksums.

    Raises:
      WeightsRefusedError: Names the first leaf whose bytes are not those that were written.
    """
    sent = {leaf.path: leaf.checksum for leaf in manifest.leaves}
    with _threads() as threads:
        checksums = threads.map(lambda leaf: xxhash.xxh3_64_intdigest(_bytes_of(memory, leaf).data), expected)
    for leaf, checksum in zip(expected, checksums, strict=True):
        if checksum != sent[leaf.path]:
            raise WeightsRefusedError(
                f"weights of version {manifest.version}: the bytes of leaf {leaf.path} have checksum {checksum:#018x}, "
                f"the trainer wrote {sent[leaf.path]:#018x}"
            )


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))))


def _bytes_of(memory: UInt8[np.ndarray, " N"], leaf: Leaf) -> UInt8[np.ndarray, " M"]:
    return memory[leaf.offset : leaf.offset + leaf.num_bytes]


def _write_leaf(memory: UInt8[np.ndarray, " N"], leaf: Leaf, array: jax.Array) -> Leaf:
    source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # on a CPU device a view, no copy
    target, checksum = _bytes_of(memory, leaf), xxhash.xxh3_64()
    for start in range(0, len(source), _CHUNK):
        chunk = source[start : start + _CHUNK]
        target[start : start + _CHUNK] = chunk
        checksum.update(chunk.data)
    return dataclasses.replace(leaf, checksum=checksum.intdigest())


def _load(memory: UInt8[np.ndarray, " N"], leaf: Leaf, sharding: Any) -> jax.Array:
    values = _bytes_of(memory, leaf).view(jnp.dtype(leaf.dtype)).reshape(leaf.shape)
    # `device_put` to a CPU hands the very memory on, even with `may_alias=False`; the next version would overwrite it.
    if sharding is not None:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.array(values[index]))
    return jnp.array(values, copy=True) if jax.default_backend() == "cpu" else jax.device_put(values)
