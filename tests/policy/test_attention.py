"""Attention: by hand, against loops, its masks, grouped heads, and pages against rows."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from magistral_jax.policy.attention import (
    LayerPages,
    paged_attention,
    segment_attention,
    segment_mask,
    write_pages,
)

ROWS, TOKENS, HEADS, KV_HEADS, SIZE = 2, 9, 4, 2, 6
PAGE, NUM_PAGES, WIDTH = 4, 10, 4
attend = jax.jit(segment_attention)
read = jax.jit(paged_attention, static_argnames="window")
write = jax.jit(write_pages)


def example(seed: int = 0, rows: int = ROWS, tokens: int = TOKENS) -> Any:
    """Queries, keys and values."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, tokens, n, SIZE) for n in (HEADS, KV_HEADS, KV_HEADS))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def packed(lengths: Sequence[int], tokens: int = TOKENS):
    """Positions and segment ids of one row."""
    positions, segments = np.zeros((1, tokens), np.int32), np.zeros((1, tokens), np.int32)
    start = 0
    for segment, length in enumerate(lengths, start=1):
        positions[0, start : start + length] = np.arange(length)
        segments[0, start : start + length] = segment
        start += length
    return jnp.asarray(positions), jnp.asarray(segments)


def causal(rows: int = ROWS, tokens: int = TOKENS, window: int | None = None):
    positions = jnp.tile(jnp.arange(tokens)[None], (rows, 1))
    return segment_mask(positions, jnp.ones((rows, tokens), jnp.int32), window)


def loop_attention(q: Any, k: Any, v: Any, mask: Any):
    """Plain loop in float64; query head h reads KV head h // (heads per KV head)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for row, t, head in np.ndindex(q.shape[:3]):
        kv_head = head // (q.shape[2] // k.shape[2])
        readable = np.flatnonzero(mask[row, t])
        scores = np.array([q[row, t, head] @ k[row, s, kv_head] for s in readable]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[row, t, head] = (weights / weights.sum()) @ v[row, readable, kv_head]
    return out


def test_mask_golden():
    # Two sequences of 2, one token of padding: nobody reads across, nobody reads ahead; padding reads only padding.
    mask = segment_mask(*packed([2, 2], tokens=5), None)
    assert mask[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_sliding_window_counts_the_token_itself():
    mask = segment_mask(*packed([5], tokens=5), 2)
    assert mask[0].astype(int).sum(axis=1).tolist() == [1, 2, 2, 2, 2]  # bug: a window behind the token gives 3
    assert mask[0, 4].astype(int).tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(segment_mask(*packed([5, 4]), 100), segment_mask(*packed([5, 4]), None))


def test_golden():
    # One head of size 1. Query 1 scores keys (0, ln 3), so weights (¼, ¾) of values (1, 5): 4. Query 0 sees only 1.
    # Bugs: without the causal mask query 0 gives 3 (zero scores, the mean); without softmax's division 16.
    q = jnp.asarray([0.0, 1.0]).reshape(1, 2, 1, 1)
    k = jnp.asarray([0.0, np.log(3.0)], jnp.float32).reshape(1, 2, 1, 1)
    v = jnp.asarray([1.0, 5.0]).reshape(1, 2, 1, 1)
    result = segment_attention(q, k, v, causal(1, 2))
    np.testing.assert_allclose(result.reshape(-1), [1.0, 4.0], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), lengths=st.sampled_from([(9,), (4, 5), (1, 3, 2), (2, 2, 2, 2)]))
def test_equals_loop(seed: int, lengths: Sequence[int]):
    q, k, v = example(seed, rows=1)
    mask = segment_mask(*packed(lengths), None if seed % 2 else 2)
    np.testing.assert_allclose(attend(q, k, v, mask), loop_attention(q, k, v, np.asarray(mask)), rtol=1e-4, atol=1e-5)


def test_long_rows_go_in_blocks_and_equal_the_loop():
    q, k, v = example(7, rows=1, tokens=290)  # three blocks, the last one short
    mask = segment_mask(*packed([100, 150, 40], tokens=290), None)
    np.testing.assert_allclose(attend(q, k, v, mask), loop_attention(q, k, v, np.asarray(mask)), rtol=1e-4, atol=1e-5)


def test_grouped_heads_equal_repeated_key_value_heads():
    q, k, v = example(1)
    repeat = lambda x: jnp.repeat(x, HEADS // KV_HEADS, axis=2)
    np.testing.assert_allclose(attend(q, k, v, causal()), attend(q, repeat(k), repeat(v), causal()), rtol=1e-5)
    tile = lambda x: jnp.tile(x, (1, 1, HEADS // KV_HEADS, 1))  # the order that a bug would give
    assert np.abs(np.asarray(attend(q, k, v, causal()) - attend(q, tile(k), tile(v), causal()))).max() > 0.1


def test_packed_sequences_are_read_as_if_alone():
    q, k, v = example(2, rows=1)
    mixed = attend(q, k, v, segment_mask(*packed([4, 5]), None))
    for start, end in ((0, 4), (4, 9)):
        alone = segment_attention(*(x[:, start:end] for x in (q, k, v)), mask=causal(1, end - start))
        np.testing.assert_allclose(mixed[:, start:end], alone, rtol=1e-5, atol=1e-6)
    across = attend(q, k, v, causal(1))  # the bug: one causal mask over the row
    assert np.abs(np.asarray(across - mixed))[:, 4:].max() > 0.1


def test_no_gradient_flows_to_other_segments_or_from_later_tokens():
    q, k, v = example(3, rows=1)
    mask = segment_mask(*packed([4, 5]), None)
    of_token_5 = lambda k, v: attend(q, k, v, mask)[0, 5].sum()  # the second token of the second sequence
    for gradient in jax.grad(of_token_5, argnums=(0, 1))(k, v):
        is_read = np.abs(np.asarray(gradient)).max(axis=(0, 2, 3)) > 0
        assert np.flatnonzero(is_read).tolist() == [4, 5]


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x[:, :4] for x in example(4, rows=1))
    mask = causal(1, 4)
    run = jax.jit(lambda q, k, v: jnp.sin(segment_attention(q, k, v, mask)).sum())
    check_grads(run, (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_large_scores_are_finite():
    q, k, v = example(5)
    assert np.isfinite(attend(1e4 * q, 1e4 * k, v, causal())).all()


def test_bfloat16_keeps_its_type_and_softmax_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in example(6))
    result = attend(q, k, v, causal())
    assert result.dtype == jnp.bfloat16
    expected = loop_attention(*(np.asarray(x, np.float32) for x in (q, k, v)), mask=np.asarray(causal()))
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, atol=0.03)


# --- pages -----------------------------------------------------------------------------------------------------------

TABLE = jnp.asarray([[7, 2, 5, 0], [1, 8, 3, 0]])  # in no order; page 0 stands where a row owns none


def pool(fill: float = 0.0):
    shape = (NUM_PAGES, KV_HEADS, PAGE, SIZE)
    return LayerPages(keys=jnp.full(shape, fill), values=jnp.full(shape, fill))


def positions_of(tokens: int = TOKENS):
    return jnp.tile(jnp.arange(tokens)[None], (ROWS, 1))


def run_paged(q: Any, k: Any, v: Any, chunks: Sequence[tuple[int, int]], window: int | None = None, fill: float = 0.0):
    """Write and read in pieces, as chunked prefill and decode do."""
    pages, out = pool(fill), []
    for start, end in chunks:
        positions = positions_of()[:, start:end]
        is_live = jnp.ones(positions.shape, bool)
        pages = write(pages, k[:, start:end], v[:, start:end], TABLE, positions, is_live)
        out.append(read(q[:, start:end], pages, TABLE, positions, is_live, window=window))
    return jnp.concatenate(out, axis=1)


DECODE = [(t, t + 1) for t in range(TOKENS)]


# What an earlier owner left in a page must not be read: fill 100 would show at once.
@pytest.mark.parametrize("fill", [0.0, 100.0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunks", [[(0, 9)], [(0, 5), (5, 9)], DECODE], ids=["prefill", "chunked", "decode"])
def test_pages_equal_rows(chunks: Sequence[tuple[int, int]], window: int | None, fill: float):
    q, k, v = example(7)
    expected = attend(q, k, v, causal(window=window))
    np.testing.assert_allclose(run_paged(q, k, v, chunks, window, fill), expected, rtol=1e-4, atol=1e-5)


def test_written_tokens_land_in_their_pages_and_dead_ones_nowhere():
    _, k, v = example(8)
    is_live = jnp.asarray([[True] * 6 + [False] * 3, [False] * 9])
    pages = write(pool(-1.0), k, v, TABLE, positions_of(), is_live)
    # Row 0: the first four tokens in page 7, tokens 4 and 5 at the start of page 2. All else is as it was.
    np.testing.assert_array_equal(pages.keys[7], k[0, :4].transpose(1, 0, 2))
    np.testing.assert_array_equal(pages.values[2, :, :2], v[0, 4:6].transpose(1, 0, 2))
    untouched = np.ones((NUM_PAGES, PAGE), bool)
    untouched[7] = False
    untouched[2, :2] = False
    assert (np.asarray(pages.keys).transpose(0, 2, 1, 3)[untouched] == -1).all()
    assert (np.asarray(pages.values).transpose(0, 2, 1, 3)[untouched] == -1).all()


def test_a_row_without_a_live_token_gives_finite_numbers_and_disturbs_nobody():
    q, k, v = example(9)
    positions = positions_of().at[1].set(0)
    is_live = jnp.asarray([[True] * TOKENS, [False] * TOKENS])
    pages = write(pool(), k, v, TABLE, positions, is_live)
    result = read(q, pages, TABLE, positions, is_live, window=None)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result[0], attend(q, k, v, causal())[0], rtol=1e-4, atol=1e-5)


def test_shared_pages_are_read_by_both_rows():
    # A common prompt: both rows hold page 7 first, and then their own pages.
    q, k, v = example(10)
    k, v = (x.at[1, :PAGE].set(x[0, :PAGE]) for x in (k, v))
    table = TABLE.at[1, 0].set(7)
    is_live = jnp.ones((ROWS, TOKENS), bool)
    pages = write(pool(), k, v, table, positions_of(), is_live)
    result = read(q, pages, table, positions_of(), is_live, window=None)
    np.testing.assert_allclose(result, attend(q, k, v, causal()), rtol=1e-4, atol=1e-5)


def test_another_table_and_other_positions_are_not_traced_again():
    q, k, v = example(11)
    is_live = jnp.ones((ROWS, 1), bool)
    first, second = (jnp.full((ROWS, 1), t) for t in (3, 4))
    step = functools.partial(read, q[:, :1], window=None)
    pages, other_table = write(pool(), k, v, TABLE, positions_of(), jnp.ones((ROWS, TOKENS), bool)), TABLE[::-1]
    step(pages=pages, page_table=TABLE, positions=first, is_live=is_live)
    with jax.no_tracing():
        step(pages=pages, page_table=other_table, positions=second, is_live=is_live)
