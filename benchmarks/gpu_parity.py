"""Section `parity` of `gpu.py`: each implementation of attention, and each KV type, against the reference."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_card import Card, Row, Sizes, attempt, bounded

from magistral_jax.policy.attention import RowAttention, choose_attention, packed_rows, segment_attention
from magistral_jax.policy.paged_attention import choose_reader, paged_attention
from magistral_jax.policy.pages import Implementation, PageReader, init_pages, write_pages

PORTABLE: tuple[tuple[RowAttention, str, float], ...] = (("blocked", "float32", 1e-3),)


def parity(sizes: Sizes, card: Card) -> Iterator[Row]:
    """Largest differences from the reference, in the same precision; a difference beyond the bound is a failure."""
    with jax.default_matmul_precision("highest"):
        for kv_dtype, compute, bound in (
            ("float32", "float32", 1e-3),
            ("bfloat16", "bfloat16", 5e-2),
            ("int8", "float32", 1e-3),
            ("float8_e4m3fn", "float32", 1e-3),
        ):
            reader = choose_reader("auto", sizes.model, kv_dtype=kv_dtype)
            # Where the platform's kernel is taken, the portable one is measured beside it.
            names: list[Implementation] = [reader.implementation, "xla"]
            for name in dict.fromkeys(names):
                case = f"pages, {name}, {kv_dtype}"
                yield attempt(
                    case, functools.partial(paged_parity, sizes, PageReader(name, None, 1024), kv_dtype, compute, bound)
                )
        for kind, dtype, bound in (*PORTABLE, *own_kernel(sizes, card)):
            yield attempt(f"rows, {kind}, {dtype}", functools.partial(row_parity, sizes, kind, dtype, bound))


def own_kernel(sizes: Sizes, card: Card) -> tuple[tuple[RowAttention, str, float], ...]:
    """The platform's kernel for training, where it has one."""
    name = choose_attention("auto", sizes.model, dtype="bfloat16", platform=card.platform)
    return () if name == "blocked" else ((name, "bfloat16", 5e-2),)


def paged_parity(sizes: Sizes, reader: PageReader, kv_dtype: str, compute: str, bound: float) -> Row:
    """Decode and prefill of ragged rows over a shuffled pool."""
    model, rng, rows, tokens = sizes.model, np.random.default_rng(0), 4, 8 * sizes.page_size
    table = jnp.asarray(rng.permutation(4 * rows * 8)[: rows * 8].reshape(rows, 8), jnp.int32)
    draw = lambda heads, count: jnp.asarray(rng.normal(size=(rows, count, heads, model.head_dim)), jnp.dtype(compute))
    k, v = draw(model.num_kv_heads, tokens), draw(model.num_kv_heads, tokens)
    everywhere = jnp.tile(jnp.arange(tokens)[None], (rows, 1))
    counts = (1, sizes.page_size)
    queries = [draw(model.num_heads, count) for count in counts]
    ends = jnp.asarray([[5], [17], [tokens // 2], [tokens - sizes.page_size]])

    def read(reader: PageReader) -> list[jax.Array]:
        pages = init_pages(
            4 * rows * 8,
            model.num_kv_heads,
            sizes.page_size,
            model.head_dim,
            dtype=jnp.dtype(kv_dtype),
            reader=reader,
        )
        pages = write_pages(pages, k, v, table, everywhere, jnp.ones((rows, tokens), bool))
        positions = [ends + jnp.arange(count)[None] for count in counts]
        return [
            paged_attention(q, pages, table, at, jnp.ones(at.shape, bool), None)
            for q, at in zip(queries, positions, strict=True)
        ]

    run = jax.jit(read, static_argnums=0)
    return bounded(max(map(gap, run(reader), run(PageReader("reference")))), bound)


def row_parity(sizes: Sizes, name: RowAttention, dtype: str, bound: float) -> Row:
    """Values and gradients over packed rows with padding."""
    model, rng, tokens = sizes.model, np.random.default_rng(0), sizes.row_tokens // 2
    draw = lambda heads: jnp.asarray(rng.normal(size=(1, tokens, heads, model.head_dim)), jnp.dtype(dtype))
    q, k, v = draw(model.num_heads), draw(model.num_kv_heads), draw(model.num_kv_heads)
    lengths = (tokens // 2, tokens // 3, tokens - tokens // 2 - tokens // 3 - 3, 3)
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], lengths)[None], jnp.int32)
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None], jnp.int32)
    weight = (segments > 0)[..., None, None].astype(jnp.dtype(dtype)) * draw(model.num_heads)

    def run(name: RowAttention) -> Any:
        rows = packed_rows(positions, segments, None, name)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            mixed = segment_attention(q, k, v, rows) * weight
            return mixed.astype(jnp.float32).sum(), mixed

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    return bounded(max(map(gap, jax.tree.leaves(run(name)), jax.tree.leaves(run("reference")))), bound)


def gap(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return float(np.abs(a - b).max() / np.abs(b).max())
