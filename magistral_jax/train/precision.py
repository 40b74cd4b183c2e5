"""Training in bfloat16 without losing small updates: stochastic rounding around an optimizer of optax.

A parameter of 1.0 in bfloat16 has its next neighbour at 1.0078; an update of 1e-6 rounded to the nearest is lost, every
time. Rounded up with a probability of 1e-6 / 0.0078 it is right on average, with no copy in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int, PRNGKeyArray


class StoredState(NamedTuple):
    """The inner optimizer's state in its stored precision, and the number of updates, which is the random key."""

    num_updates: Int[Array, ""]
    inner: Any


def stored_in(inner: optax.GradientTransformation, moments: jnp.dtype) -> optax.GradientTransformation:
    """`inner`, computed in float32 whatever the parameters are stored in, its moments stored as `moments`.

    Updates of bfloat16 parameters come out such that adding them gives a stochastically rounded parameter; so are
    bfloat16 moments, whose small changes would be lost as well. The random numbers depend on the number of the update
    and the place of the leaf alone, so a resumed run rounds as the uninterrupted one does, on any mesh.
    """

    def init(params: Any) -> StoredState:
        state = inner.init(_as_float(params, jnp.dtype("float32")))
        return StoredState(jnp.zeros((), jnp.int32), _as_float(state, moments))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, StoredState]:
        wide = lambda tree: _as_float(tree, jnp.dtype("float32"))
        for_params, for_moments = jax.random.split(jax.random.fold_in(jax.random.key(0), state.num_updates))
        updates, next_inner = inner.update(wide(updates), wide(state.inner), wide(params))
        rounded = _round_like(jax.tree.map(jnp.add, wide(params), updates), params, for_params)

        def settle(update: Array, param: Array, target: Array) -> Array:
            # A difference of two bfloat16 numbers: adding it back and rounding to the nearest gives just the second.
            return update if param.dtype == jnp.float32 else wide(target) - wide(param)

        updates = jax.tree.map(settle, updates, params, rounded)
        return updates, StoredState(state.num_updates + 1, _round_like(next_inner, state.inner, for_moments))

    return optax.GradientTransformation(init, update)


def stochastic_round(x: Float32[Array, "*N"], key: PRNGKeyArray) -> BFloat16[Array, "*N"]:
    """One of the two bfloat16 neighbours of each number, the nearer one the more likely; right on average.

    The upper half of a float32 is a bfloat16: random numbers are added to the lower half, which is then cut off.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))  # NaN must not carry over into the sign


def _as_float(tree: Any, dtype: jnp.dtype) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _round_like(tree: Any, like: Any, key: PRNGKeyArray) -> Any:
    """`tree` in the precisions of `like`."""
    leaves, structure = jax.tree.flatten(tree)
    rounded = [
        stochastic_round(leaf, jax.random.fold_in(key, place)) if model.dtype == jnp.bfloat16 else leaf
        for place, (leaf, model) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)
