"""A number that two holders of the same weights agree on, and of different weights do not."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def fingerprint(params: Any) -> int:
    """Checksum over the bits of every leaf and their places, as an unsigned 32-bit integer.

    Sums modulo 2³² of each word scrambled together with its place: cheap on any device, and sensitive to swapped
    elements, layers and leaves. Not cryptographic: it guards against mistakes, not against malice.
    """
    return int(_fingerprint(params))


@jax.jit
def _fingerprint(params: Any) -> UInt32[Array, ""]:
    total = jnp.uint32(2166136261)
    for leaf in jax.tree.leaves(params):
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        words = words.reshape(-1).astype(jnp.uint32)
        places = jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
        total = total * jnp.uint32(16777619) + jnp.sum(_scramble(words + places), dtype=jnp.uint32)
    return total


def _scramble(x: UInt32[Array, " N"]) -> UInt32[Array, " N"]:
    # MurmurHash3's finaliser. A product with the place would not do: layers lie powers of two apart, and the high bits
    # of a word times such a distance are lost (a layer of zeros and one of ones could trade places).
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
