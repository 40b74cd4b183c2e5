"""KV pages of a model's layers: how keys and values lie in memory, in which precision, and how they get there.

A pool carries its `PageReader` as part of its structure, so whoever holds the pages can read them
(`policy.paged_attention`) and no other function has to pass the choice on.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Num

from magistral_jax.pytrees import pytree_dataclass, static_field

Implementation = Literal["reference", "xla", "native", "tpu"]
"""Ways of reading pages; `policy.paged_attention` has one function for each."""


@dataclasses.dataclass(frozen=True)
class PageReader:
    """How the pages of one engine are read."""

    implementation: Implementation = "xla"
    mesh: Mesh | None = None
    """Devices of the engine, with the axis `tensor` over which KV heads are split; None is one device."""
    tokens_per_step: int = 64
    """Keys that `xla` reads in one step of its online softmax, rounded to whole pages. Few of them stay in the cache of
    a CPU; many of them are few kernels to launch on an accelerator."""


ONE_DEVICE = PageReader()


@pytree_dataclass
class LayerPages:
    """KV pages of one layer. Head-major: the keys of one head in one page are contiguous.

    Where keys and values have 8 bits, each token of each head has a scale by which they are multiplied when read.
    """

    keys: Num[Array, "P K C E"]
    values: Num[Array, "P K C E"]
    key_scale: Float[Array, "P K C"] | None = None
    value_scale: Float[Array, "P K C"] | None = None
    reader: PageReader = static_field(ONE_DEVICE)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.keys.shape[0]


@pytree_dataclass
class InterleavedPages:
    """KV pages of one layer as the TPU kernel wants them: token-major, key and value of a head side by side."""

    pairs: Float[Array, "P C K2 E"]
    reader: PageReader = static_field(PageReader("tpu"))

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.pairs.shape[0]


Pages = LayerPages | InterleavedPages


@pytree_dataclass
class PagedCache:
    """The page pool of every layer and, for each row of the call, the pages that it owns or shares, in order."""

    layers: tuple[Pages, ...]
    page_table: Int[Array, "B W"]


def init_pages(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, *, dtype: jnp.dtype, reader: PageReader
) -> Pages:
    """The empty pool of one layer, on the devices that it will stay on."""
    mesh = reader.mesh

    def zeros(shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return jnp.zeros(shape, dtype, device=None if mesh is None else NamedSharding(mesh, head_spec(reader)))

    if reader.implementation == "tpu":
        return InterleavedPages(zeros((num_pages, page_size, 2 * num_kv_heads, head_dim), dtype), reader)
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    scale = lambda: zeros(shape[:-1], jnp.dtype("float32")) if dtype.itemsize == 1 else None
    return LayerPages(zeros(shape, dtype), zeros(shape, dtype), scale(), scale(), reader)


def head_spec(reader: PageReader) -> P:
    """How every array of a pool is split: by heads, over `tensor`."""
    return P(None, None, "tensor") if reader.implementation == "tpu" else P(None, "tensor")


def write_pages(
    pages: Pages,
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    page_table: Int[Array, "B W"],
    positions: Int[Array, "B T"],
    is_live: Bool[Array, "B T"],
) -> Pages:
    """Store keys and values at their positions; tokens that are not live are not written anywhere."""
    mesh = pages.reader.mesh
    if mesh is None:
        return _write(pages, k, v, page_table, positions, is_live)
    by_head, heads = head_spec(pages.reader), P(None, None, "tensor")
    specs = (by_head, heads, heads, P(), P(), P())
    write = jax.shard_map(_write, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)
    return write(pages, k, v, page_table, positions, is_live)


def _write(pages: Pages, k: Array, v: Array, page_table: Array, positions: Array, is_live: Array) -> Pages:
    interleaved = isinstance(pages, InterleavedPages)
    page_size = pages.pairs.shape[1] if interleaved else pages.keys.shape[2]
    page = jnp.take_along_axis(page_table, positions // page_size, axis=1, mode="clip")
    page = jnp.where(is_live, page, pages.num_pages)  # out of range, and dropped
    offset = positions % page_size
    if interleaved:
        pairs = jnp.stack([k, v], axis=3).reshape(*k.shape[:2], -1, k.shape[3]).astype(pages.pairs.dtype)
        return InterleavedPages(pages.pairs.at[page, offset].set(pairs, mode="drop"), pages.reader)

    at = (page[:, :, None], jnp.arange(k.shape[2])[None, None, :], offset[:, :, None])
    put = lambda old, new: old.at[at].set(new.astype(old.dtype), mode="drop")
    if pages.key_scale is None or pages.value_scale is None:
        return dataclasses.replace(pages, keys=put(pages.keys, k), values=put(pages.values, v))
    (k, key_scale), (v, value_scale) = quantize(k, pages.keys.dtype), quantize(v, pages.values.dtype)
    return LayerPages(
        keys=put(pages.keys, k),
        values=put(pages.values, v),
        key_scale=put(pages.key_scale, key_scale),
        value_scale=put(pages.value_scale, value_scale),
        reader=pages.reader,
    )


def quantize(x: Float[Array, "B T K E"], dtype: jnp.dtype) -> tuple[Num[Array, "B T K E"], Float[Array, "B T K"]]:
    """Values of 8 bits, and the scale of each token and head: x ≈ values · scale, the largest one exactly in range."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    limit = float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / limit
    scaled = x / jnp.where(scale == 0, 1.0, scale)[..., None]
    return (jnp.round(scaled) if is_integer else scaled).astype(dtype), scale
