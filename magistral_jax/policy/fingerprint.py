"""A number that two holders of the same weights agree on, and of different weights do not."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def fingerprint(params: Any) -> int:
    """Checksum over the bits of every leaf and their places, as an unsigned 32-bit integer.

    Sums modulo 2³² of each word scrambled together with its place: cheap on any device, and sensitive to swapped
    elements, layers and leaves. Not cryptographic: it guards against mistakes, not against malice.

    Arrays that are split over devices of this process are summed up part by part, without a collective: beside another
    thread's programs on the same devices, two collectives could come in another order on each and wait for each other.
    """
    leaves = jax.tree.leaves(params)
    if any(_is_split(leaf) for leaf in leaves):
        sums = [_part_sums(leaf) for leaf in leaves]  # all are under way before the first is waited for
        return functools.reduce(lambda total, parts: (total * _PRIME + sum(map(int, parts))) % 2**32, sums, _BASIS)
    return int(_fingerprint(leaves))


_BASIS, _PRIME = 2166136261, 16777619  # of FNV-1: how the sums of leaves are put together


@jax.jit
def _fingerprint(leaves: list[Array]) -> UInt32[Array, ""]:
    total = jnp.uint32(_BASIS)
    for leaf in leaves:
        places = jnp.arange(leaf.size, dtype=jnp.uint32)
        total = total * jnp.uint32(_PRIME) + _sum(leaf, places)
    return total


def _is_split(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1 and leaf.is_fully_addressable


def _part_sums(leaf: Array) -> list[UInt32[Array, ""]]:
    """The sum of each part of an array, on the device that holds it; of copies, one counts."""
    strides = np.cumprod([1, *leaf.shape[:0:-1]])[: leaf.ndim][::-1]  # of an element's place, in row-major order
    sums = []
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            first = sum((part.start or 0) * int(step) for part, step in zip(shard.index, strides, strict=True))
            sums.append(_part_sum(shard.data, np.uint32(first % 2**32), strides.astype(np.uint32)))
    return sums


@jax.jit
def _part_sum(part: Array, first: UInt32[Array, ""], strides: UInt32[Array, " A"]) -> UInt32[Array, ""]:
    places = first
    for axis in range(part.ndim):
        places = places + jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) * strides[axis]
    return _sum(part, jnp.broadcast_to(places, part.shape).reshape(-1))


def _sum(values: Array, places: UInt32[Array, " N"]) -> UInt32[Array, ""]:
    words = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{8 * values.dtype.itemsize}"))
    words = words.reshape(-1).astype(jnp.uint32)
    return jnp.sum(_scramble(words + places * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)


def _scramble(x: UInt32[Array, " N"]) -> UInt32[Array, " N"]:
    # MurmurHash3's finaliser. A product with the place would not do: layers lie powers of two apart, and the high bits
    # of a word times such a distance are lost (a layer of zeros and one of ones could trade places).
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
