"""Attention over tokens: segment-causal for training and scoring, paged for prefill and decode.

Both take queries, keys and values that carry their positions already (rotary) and know nothing of parameters.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from magistral_jax.pytrees import pytree_dataclass

_MASKED = -1e30  # finite, so that a row without any key gives numbers and not NaN
_TOKENS_PER_STEP = 64  # keys read per step of the online softmax, rounded to whole pages
_QUERY_BLOCK = 128  # fewest queries that share a slice of keys in a row
_MOST_BLOCKS = 4  # slices of a row: each is compiled on its own


@pytree_dataclass
class LayerPages:
    """KV pages of one layer. Head-major: the keys of one head in one page are contiguous."""

    keys: Float[Array, "P K C E"]
    values: Float[Array, "P K C E"]


@pytree_dataclass
class PagedCache:
    """The page pool of every layer and, for each row of the call, the pages that it owns or shares, in order."""

    layers: tuple[LayerPages, ...]
    page_table: Int[Array, "B W"]


def segment_mask(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"], window: int | None
) -> Bool[Array, "B T T"]:
    """True where query t may read key s: same segment, not later, and within the sliding window."""
    distance = positions[:, :, None] - positions[:, None, :]
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def segment_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B T H E"]:
    """Softmax attention under a mask, grouped queries, scores in float32.

    Queries go in blocks, each reading the keys up to its own end, so most of the empty half of a causal score matrix is
    never computed. A key to the right of its query may thus be left out whatever the mask says: only padding has such.
    """
    tokens = q.shape[1]
    block = max(_QUERY_BLOCK, -(-tokens // _MOST_BLOCKS))
    starts = range(0, tokens, block)
    ends = [min(start + block, tokens) for start in starts]
    mixed = [
        _dense_attention(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end])
        for start, end in zip(starts, ends, strict=True)
    ]
    return jnp.concatenate(mixed, axis=1)


def _dense_attention(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    mask: Bool[Array, "B Q T"],
) -> Float[Array, "B Q H E"]:
    # The query heads of a KV head are laid side by side, so that each KV head is one matrix product.
    rows, tokens, heads, size = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = q.reshape(rows, tokens, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, group * tokens, size)
    scores = jnp.einsum("bkqe,bske->bkqs", q, k, preferred_element_type=jnp.float32) * size**-0.5
    scores = jnp.where(jnp.tile(mask, (1, group, 1))[:, None], scores, _MASKED)
    mixed = jnp.einsum("bkqs,bske->bkqe", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    mixed = mixed.reshape(rows, kv_heads, group, tokens, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, tokens, heads, size)


def write_pages(
    pages: LayerPages,
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    page_table: Int[Array, "B W"],
    positions: Int[Array, "B T"],
    is_live: Bool[Array, "B T"],
) -> LayerPages:
    """Store keys and values at their positions; tokens that are not live are not written anywhere."""
    num_pages, kv_heads, page_size, _ = pages.keys.shape
    page = jnp.take_along_axis(page_table, positions // page_size, axis=1, mode="clip")
    page = jnp.where(is_live, page, num_pages)[:, :, None]  # out of range, and dropped
    offset = (positions % page_size)[:, :, None]
    head = jnp.arange(kv_heads)[None, None, :]
    return LayerPages(
        keys=pages.keys.at[page, head, offset].set(k.astype(pages.keys.dtype), mode="drop"),
        values=pages.values.at[page, head, offset].set(v.astype(pages.values.dtype), mode="drop"),
    )


def paged_attention(
    q: Float[Array, "B T H E"],
    pages: LayerPages,
    page_table: Int[Array, "B W"],
    positions: Int[Array, "B T"],
    is_live: Bool[Array, "B T"],
    window: int | None,
) -> Float[Array, "B T H E"]:
    """Attention of queries to the pages of their row, up to their own position.

    An online softmax over a few pages at a time, whose trip count is the longest live row: what a call costs grows
    with the tokens in use, not with the size of the table, and nothing of size [B, W·C] is built.
    """
    _, kv_heads, page_size, size = pages.keys.shape
    rows, tokens, heads, _ = q.shape
    group = heads // kv_heads
    width = page_table.shape[1]
    step_pages = math.gcd(width, max(1, _TOKENS_PER_STEP // page_size))
    step_tokens = step_pages * page_size
    head = jnp.arange(kv_heads)[None, :, None]
    q = q.reshape(rows, tokens, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, group * tokens, size).astype(pages.keys.dtype)
    query_position = jnp.tile(positions, (1, group))[:, None, :, None]

    def read(step: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, mass, mixed = carry
        table = jax.lax.dynamic_slice_in_dim(page_table, step * step_pages, step_pages, axis=1)[:, None, :]
        k = pages.keys.at[table, head].get(mode="clip").reshape(rows, kv_heads, step_tokens, size)
        v = pages.values.at[table, head].get(mode="clip").reshape(rows, kv_heads, step_tokens, size)
        scores = jnp.einsum("bkqe,bkse->bkqs", q, k, preferred_element_type=jnp.float32) * size**-0.5
        distance = query_position - (step * step_tokens + jnp.arange(step_tokens))[None, None, None, :]
        readable = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = jnp.where(readable, scores, _MASKED)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.exp(scores - new_highest[..., None])
        decay = jnp.exp(highest - new_highest)
        mixed = mixed * decay[..., None] + jnp.einsum(
            "bkqs,bkse->bkqe", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return new_highest, mass * decay + weights.sum(axis=-1), mixed

    shape = (rows, kv_heads, group * tokens)
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, size)))
    num_steps = jnp.max(jnp.where(is_live, positions, 0)) // step_tokens + 1
    _, mass, mixed = jax.lax.fori_loop(0, num_steps, read, start)
    mixed = (mixed / mass[..., None]).astype(pages.values.dtype)
    mixed = mixed.reshape(rows, kv_heads, group, tokens, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, tokens, heads, size)
