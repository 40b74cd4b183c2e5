"""Attention of queries to KV pages, for prefill and decode: one function, several implementations.

  reference  gathers all pages and takes a plain softmax in float32: the oracle of the tests, any platform
  xla        online softmax over the pages in use, portable
  native     our kernel for CPUs, in C++ (`policy.native_attention`)
  tpu        the ragged paged attention kernel that jax ships (`policy.tpu_attention`)

A kernel of our own for GPUs (Pallas, Mosaic) would be a further branch of `_attend`, with the pages laid out as it
likes by a branch of `pages.init_pages`; see docs/kernels.md.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.native_attention import native_paged_attention, why_no_native_pages
from magistral_jax.policy.pages import InterleavedPages, LayerPages, PageReader, Pages, head_spec
from magistral_jax.policy.tpu_attention import tpu_paged_attention, why_no_tpu_pages
from magistral_jax.records import MagistralError

_MASKED = -1e30  # finite, so that a row without any key gives numbers and not NaN
_CPU_STEP, _STEP = 64, 1024  # tokens, on CPUs and on accelerators; see `PageReader`


def choose_reader(choice: str, model: ModelConfig, *, kv_dtype: str, mesh: Mesh | None = None) -> PageReader:
    """The implementation that `choice` stands for on these devices.

    Args:
      choice: "reference", "xla", "native", "tpu", or "auto", which takes the fastest that works.
      model: Shape of the model.
      kv_dtype: Precision of the pages.
      mesh: Devices of the engine; None is the default one.

    Raises:
      MagistralError: The choice cannot work here.
    """
    num_shards = 1 if mesh is None else mesh.shape["tensor"]
    if model.num_kv_heads % num_shards or model.num_heads % num_shards:
        raise MagistralError(
            f"`generation.tensor` is {num_shards}, which does not divide the {model.num_heads} query and "
            f"{model.num_kv_heads} KV heads of the model."
        )
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    obstacles = {
        "tpu": lambda: why_no_tpu_pages(platform, model.head_dim, model.num_kv_heads // num_shards, kv_dtype),
        "native": lambda: why_no_native_pages(platform, model.head_dim, kv_dtype),
    }
    if choice in obstacles and (obstacle := obstacles[choice]()):
        raise MagistralError(f"`generation.attention` is `{choice}`, but {obstacle}.")
    if choice == "auto":
        choice = next((name for name, find in obstacles.items() if not find()), "xla")
    return PageReader(choice, mesh, _CPU_STEP if platform == "cpu" else _STEP)  # pyright: ignore[reportArgumentType]


def paged_attention(
    q: Float[Array, "B T H E"],
    pages: Pages,
    page_table: Int[Array, "B W"],
    positions: Int[Array, "B T"],
    is_live: Bool[Array, "B T"],
    window: int | None,
) -> Float[Array, "B T H E"]:
    """Attention of queries to the pages of their row, up to their own position.

    Args:
      q: Queries; those of a row are consecutive tokens.
      pages: The pool of a layer, which says by which implementation it is read, and on which mesh.
      page_table: Pages of each row, in order; what lies behind the last one in use is not read.
      positions: Of the queries in their sequences.
      is_live: False on padding and in rows that are not in use: their results are finite and mean nothing.
      window: A token reads this many tokens, itself included; None is all.

    Returns:
      Mixed values, in the type of `q`.
    """

    def attend(q: Array, pages: Pages, page_table: Array, positions: Array, is_live: Array) -> Array:
        return _attend(q, pages, page_table, positions, is_live, window)

    mesh = pages.reader.mesh
    if mesh is not None:
        heads = P(None, None, "tensor")
        specs = (heads, head_spec(pages.reader), P(), P(), P())
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(q, pages, page_table, positions, is_live)


def _attend(q: Array, pages: Pages, page_table: Array, positions: Array, is_live: Array, window: int | None) -> Array:
    if isinstance(pages, InterleavedPages):
        return tpu_paged_attention(q, pages.pairs, page_table, positions, is_live, window)
    if pages.reader.implementation == "reference":
        return _reference(q, pages, page_table, positions, window)
    if pages.reader.implementation == "native":
        return native_paged_attention(q, pages.keys, pages.values, page_table, positions, is_live, window)
    return _online_softmax(q, pages, page_table, positions, is_live, window)


def _reference(
    q: Array, pages: LayerPages, page_table: Int[Array, "B W"], positions: Array, window: int | None
) -> Array:
    rows, tokens, heads, size = q.shape
    kv_heads = pages.keys.shape[1]

    def gather(values: Array, scale: Array | None) -> Float[Array, "B K S E"]:
        wide = values[page_table].astype(jnp.float32)  # [B, W, K, C, E]
        wide = wide if scale is None else wide * scale[page_table][..., None]
        return wide.transpose(0, 2, 1, 3, 4).reshape(rows, kv_heads, -1, size)

    k, v = gather(pages.keys, pages.key_scale), gather(pages.values, pages.value_scale)
    q_wide = q.astype(jnp.float32).reshape(rows, tokens, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkge,bkse->bkgts", q_wide, k) * size**-0.5
    readable = _readable(positions[:, None, None, :, None], jnp.arange(k.shape[2]).reshape(1, 1, 1, 1, -1), window)
    weights = jax.nn.softmax(jnp.where(readable, scores, _MASKED), axis=-1)
    return jnp.einsum("bkgts,bkse->btkge", weights, v).reshape(q.shape).astype(q.dtype)


def _online_softmax(
    q: Array,
    pages: LayerPages,
    page_table: Int[Array, "B W"],
    positions: Int[Array, "B T"],
    is_live: Bool[Array, "B T"],
    window: int | None,
) -> Array:
    """A few pages at a time, from the first that a live row may read to the longest row's last.

    What a call costs grows with the tokens in use, not with the size of the table, and nothing of size [B, W·C] is
    built.
    """
    _, kv_heads, page_size, size = pages.keys.shape
    rows, tokens, heads, _ = q.shape
    group = heads // kv_heads
    step_pages = min(page_table.shape[1], max(1, pages.reader.tokens_per_step // page_size))
    step_tokens = step_pages * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % step_pages)))  # whole steps
    head = jnp.arange(kv_heads)[None, :, None]
    # Keys of 8 bits are widened to the type of the queries, exactly; others are met by the queries in their own.
    dtype = pages.keys.dtype if pages.key_scale is None else q.dtype
    grouped = q.reshape(rows, tokens, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, kv_heads, group * tokens, size).astype(dtype)
    query_position = jnp.tile(positions, (1, group))[:, None, :, None]

    def read(step: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, mass, mixed = carry
        table = jax.lax.dynamic_slice_in_dim(page_table, step * step_pages, step_pages, axis=1)[:, None, :]
        gather = lambda pool: pool.at[table, head].get(mode="clip")
        k, v = (
            gather(pool).reshape(rows, kv_heads, step_tokens, size).astype(dtype) for pool in (pages.keys, pages.values)
        )
        scores = jnp.einsum("bkqe,bkse->bkqs", grouped, k, preferred_element_type=jnp.float32) * size**-0.5
        if pages.key_scale is not None:
            scores *= gather(pages.key_scale).reshape(rows, kv_heads, 1, step_tokens)
        key_position = (step * step_tokens + jnp.arange(step_tokens))[None, None, None, :]
        scores = jnp.where(_readable(query_position, key_position, window), scores, _MASKED)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.exp(scores - new_highest[..., None])
        decay = jnp.exp(highest - new_highest)
        mass = mass * decay + weights.sum(axis=-1)
        if pages.value_scale is not None:
            weights *= gather(pages.value_scale).reshape(rows, kv_heads, 1, step_tokens)
        mixed = mixed * decay[..., None] + jnp.einsum(
            "bkqs,bkse->bkqe", weights.astype(dtype), v, preferred_element_type=jnp.float32
        )
        return new_highest, mass, mixed

    shape = (rows, kv_heads, group * tokens)
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, size)))
    first, last = _step_range(positions, is_live, window, step_tokens)
    _, mass, mixed = jax.lax.fori_loop(first, last, read, start)
    mixed = (mixed / mass[..., None]).astype(q.dtype)
    mixed = mixed.reshape(rows, kv_heads, group, tokens, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(q.shape)


def _step_range(
    positions: Int[Array, "B T"], is_live: Bool[Array, "B T"], window: int | None, step_tokens: int
) -> tuple[Int[Array, ""] | int, Int[Array, ""]]:
    last = jnp.max(jnp.where(is_live, positions, 0)) // step_tokens + 1
    if window is None:
        return 0, last
    oldest = jnp.min(jnp.where(is_live, positions, jnp.iinfo(positions.dtype).max)) - window + 1
    return jnp.minimum(jnp.maximum(oldest, 0) // step_tokens, last - 1), last


def _readable(query_position: Array, key_position: Array, window: int | None) -> Bool[Array, "..."]:
    distance = query_position - key_position
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)
