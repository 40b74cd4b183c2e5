"""Attention over long packed rows whose memory grows with T, not T²: a stream of blocks, forward and backward.

Each block of queries meets the blocks of keys from the start of its oldest segment (or window) to its own end, with an
online softmax. The backward pass computes the weights again from the saved normalizers, so a custom gradient is what
keeps the [T, T] scores from being stored. Source: FlashAttention-2 (arXiv:2307.08691), section 3.1.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30
_BLOCK = 512  # queries, and keys, of a block


class _Tokens(NamedTuple):
    """Where the tokens of a padded row stand."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def streamed_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    window: int | None,
) -> Float[Array, "B T H E"]:
    """Segment-causal attention without a [T, T] array; arguments as for `policy.attention.segment_attention`."""
    return _forward(q, k, v, positions, segment_ids, window)[0]


def _forward(q: Array, k: Array, v: Array, positions: Array, segment_ids: Array, window: int | None) -> Any:
    tokens = _pad_tokens(positions, segment_ids)
    kv_heads, size = k.shape[2:]
    grouped, k_pad, v_pad = _group(q, kv_heads), _pad(k).swapaxes(1, 2), _pad(v).swapaxes(1, 2)

    def one_block(index: Int[Array, ""]) -> tuple[Array, Array]:
        q_block = _cut(grouped, index, axis=3)

        def meet(other: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, mass, mixed = carry
            scores = _scores(q_block, _cut(k_pad, other, axis=2), tokens, index, other, window)
            new_highest = jnp.maximum(highest, scores.max(axis=-1))
            weights, decay = jnp.exp(scores - new_highest[..., None]), jnp.exp(highest - new_highest)
            product = jnp.einsum(
                "bkgqs,bkse->bkgqe",
                weights.astype(v.dtype),
                _cut(v_pad, other, axis=2),
                preferred_element_type=jnp.float32,
            )
            return new_highest, mass * decay + weights.sum(axis=-1), mixed * decay[..., None] + product

        shape = q_block.shape[:-1]
        start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, size)))
        highest, mass, mixed = jax.lax.fori_loop(_first_block(tokens, index, window), index + 1, meet, start)
        return (mixed / mass[..., None]).astype(v.dtype), highest + jnp.log(mass)

    mixed, normalizer = jax.lax.map(one_block, jnp.arange(grouped.shape[3] // _BLOCK))
    out = _ungroup(jnp.moveaxis(mixed, 0, 3), q.shape)
    return out, (q, k, v, positions, segment_ids, out, normalizer)


def _backward(window: int | None, saved: Any, gradient: Array) -> Any:
    q, k, v, positions, segment_ids, out, normalizer = saved
    tokens = _pad_tokens(positions, segment_ids)
    kv_heads, size = k.shape[2:]
    grouped, out_gradient = _group(q, kv_heads), _group(gradient.astype(v.dtype), kv_heads)
    k_pad, v_pad = _pad(k).swapaxes(1, 2), _pad(v).swapaxes(1, 2)
    # Σₛ weightₛ · (gradient · vₛ), the part of the softmax's gradient that all keys of a query share.
    shared = (_group(out, kv_heads).astype(jnp.float32) * out_gradient.astype(jnp.float32)).sum(axis=-1)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one_block(sums: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        index, log_mass = block
        q_block, g_block = _cut(grouped, index, axis=3), _cut(out_gradient, index, axis=3)
        shared_block = _cut(shared, index, axis=3)[..., None]

        def meet(other: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            q_sum, k_sum, v_sum = carry
            k_block, v_block = _cut(k_pad, other, axis=2), _cut(v_pad, other, axis=2)
            scores = _scores(q_block, k_block, tokens, index, other, window)
            weights = jnp.exp(scores - log_mass[..., None])
            to_scores = weights * (product("bkgqe,bkse->bkgqs", g_block, v_block) - shared_block) * size**-0.5
            to_scores = to_scores.astype(k.dtype)
            k_sum = _add(k_sum, product("bkgqs,bkgqe->bkse", to_scores, q_block), other)
            v_sum = _add(v_sum, product("bkgqs,bkgqe->bkse", weights.astype(v.dtype), g_block), other)
            return q_sum + product("bkgqs,bkse->bkgqe", to_scores, k_block), k_sum, v_sum

        start = (jnp.zeros(q_block.shape, jnp.float32), *sums)
        q_sum, *sums_after = jax.lax.fori_loop(_first_block(tokens, index, window), index + 1, meet, start)
        return (sums_after[0], sums_after[1]), q_sum.astype(q.dtype)

    zeros = jnp.zeros(k_pad.shape, jnp.float32)
    blocks = (jnp.arange(grouped.shape[3] // _BLOCK), normalizer)
    (k_sum, v_sum), q_sum = jax.lax.scan(one_block, (zeros, zeros), blocks)
    to_rows = lambda x, like: x.swapaxes(1, 2)[:, : like.shape[1]].astype(like.dtype)
    return _ungroup(jnp.moveaxis(q_sum, 0, 3), q.shape), to_rows(k_sum, k), to_rows(v_sum, v), None, None


streamed_attention.defvjp(_forward, _backward)


def _scores(
    q_block: Float[Array, "B K G Q E"],
    k_block: Float[Array, "B K S E"],
    tokens: _Tokens,
    index: Int[Array, ""],
    other: Int[Array, ""],
    window: int | None,
) -> Float[Array, "B K G Q S"]:
    scores = jnp.einsum("bkgqe,bkse->bkgqs", q_block, k_block, preferred_element_type=jnp.float32)
    query, key = (_Tokens(*(_cut(x, at, axis=1) for x in tokens)) for at in (index, other))
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    readable: Bool[Array, "B Q S"] = (query.segment_ids[:, :, None] == key.segment_ids[:, None, :]) & (distance >= 0)
    if window is not None:
        readable &= distance < window
    return jnp.where(readable[:, None, None], scores * q_block.shape[-1] ** -0.5, _MASKED)


def _first_block(tokens: _Tokens, index: Int[Array, ""], window: int | None) -> Int[Array, ""]:
    """The first block with a key that a query of block `index` may read."""
    positions = _cut(tokens.positions, index, axis=1)
    reach = positions if window is None else jnp.minimum(positions, window - 1)
    columns = index * _BLOCK + jnp.arange(_BLOCK)[None]
    return jnp.maximum(jnp.min(columns - reach), 0) // _BLOCK


def _cut(x: Array, index: Int[Array, ""], axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * _BLOCK, _BLOCK, axis)


def _add(total: Float[Array, "B K T E"], part: Float[Array, "B K S E"], index: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(total, _cut(total, index, axis=2) + part, index * _BLOCK, axis=2)


def _pad(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK), *((0, 0),) * (x.ndim - 2)))


def _pad_tokens(positions: Array, segment_ids: Array) -> _Tokens:
    return _Tokens(_pad(positions), _pad(segment_ids))


def _group(x: Float[Array, "B T H E"], kv_heads: int) -> Float[Array, "B K G T_pad E"]:
    x = _pad(x)
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _ungroup(x: Float[Array, "B K G N Q E"], shape: tuple[int, ...]) -> Float[Array, "B T H E"]:
    rows, tokens, heads, size = shape
    return x.reshape(*x.shape[:3], -1, size).transpose(0, 3, 1, 2, 4).reshape(rows, -1, heads, size)[:, :tokens]
