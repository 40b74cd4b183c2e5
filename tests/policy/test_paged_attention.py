"""KV pages: what is written where, and every implementation of reading them against attention over whole rows."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

from magistral_jax.policy import tpu_attention
from magistral_jax.policy.attention import packed_rows, segment_attention
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.paged_attention import choose_reader, paged_attention
from magistral_jax.policy.pages import InterleavedPages, LayerPages, PageReader, init_pages, quantize, write_pages
from magistral_jax.policy.sharding import make_generator_mesh
from magistral_jax.records import MagistralError

ROWS, TOKENS, HEADS, KV_HEADS, SIZE = 2, 9, 4, 2, 16
PAGE, NUM_PAGES = 4, 10
TABLE = jnp.asarray([[7, 2, 5, 0], [1, 8, 3, 0]])  # in no order; page 0 stands where a row owns none
read = jax.jit(paged_attention, static_argnames="window")
write = jax.jit(write_pages)
IMPLEMENTATIONS = ["reference", "xla", "native", "tpu"]
KERNEL = ragged.ragged_paged_attention


@pytest.fixture(autouse=True)
def reference_of_the_tpu_kernel(monkeypatch: pytest.MonkeyPatch):
    """jax's own reference of its kernel, which runs anywhere but cannot be traced with lengths as values."""

    def on_host(q: Any, pages: Any, lengths: Any, table: Any, starts: Any, count: Any, **settings: Any) -> Any:
        run = lambda *args: np.asarray(ragged.ref_ragged_paged_attention(*args, **settings))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jnp.asarray(run(q, pages, lengths, table, starts, count))

    monkeypatch.setattr(ragged, "ragged_paged_attention", on_host)


def example(seed: int = 0) -> Any:
    """Queries, keys and values."""
    rng = np.random.default_rng(seed)
    shapes = ((ROWS, TOKENS, n, SIZE) for n in (HEADS, KV_HEADS, KV_HEADS))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def pool(fill: float = 0.0, implementation: Any = "xla", dtype: str = "float32", page: int = PAGE, mesh: Any = None):
    """Pages in which an earlier owner has left something."""
    reader = PageReader(implementation, mesh)
    pages = init_pages(4 * NUM_PAGES // page, KV_HEADS, page, SIZE, dtype=jnp.dtype(dtype), reader=reader)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(fill).astype(leaf.dtype), pages)


def positions_of(tokens: int = TOKENS):
    return jnp.tile(jnp.arange(tokens)[None], (ROWS, 1))


def run_paged(q: Any, k: Any, v: Any, chunks: Sequence[tuple[int, int]], pages: Any, window: int | None = None) -> Any:
    """Write and read in pieces, as chunked prefill and decode do."""
    attend = paged_attention if isinstance(pages, InterleavedPages) else read  # its stand-in cannot be traced
    out = []
    for start, end in chunks:
        positions = positions_of()[:, start:end]
        is_live = jnp.ones(positions.shape, bool)
        pages = write(pages, k[:, start:end], v[:, start:end], TABLE, positions, is_live)
        out.append(attend(q[:, start:end], pages, TABLE, positions, is_live, window=window))
    return jnp.concatenate(out, axis=1)


def over_rows(q: Any, k: Any, v: Any, window: int | None = None) -> Any:
    """Attention over whole rows, no pages."""
    return segment_attention(q, k, v, packed_rows(positions_of(), jnp.ones((ROWS, TOKENS), jnp.int32), window))


DECODE = [(0, 7), (7, 8), (8, 9)]


# What an earlier owner left in a page must not be read: fill 100 would show at once.
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunks", [[(0, 9)], [(0, 5), (5, 9)], DECODE], ids=["prefill", "chunked", "decode"])
def test_pages_equal_rows(chunks: Sequence[tuple[int, int]], window: int | None, implementation: str):
    q, k, v = example(7)
    result = run_paged(q, k, v, chunks, pool(100.0, implementation), window)
    np.testing.assert_allclose(result, over_rows(q, k, v, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("page", [1, 2, 8])
def test_the_size_of_a_page_does_not_matter(page: int, implementation: str):
    q, k, v = example(6)
    table = jnp.asarray(np.random.default_rng(0).permutation(40 // page)[: 2 * (16 // page)].reshape(2, -1), jnp.int32)
    pages, is_live = pool(100.0, implementation, page=page), jnp.ones((ROWS, TOKENS), bool)
    pages = write_pages(pages, k, v, table, positions_of(), is_live)
    result = paged_attention(q, pages, table, positions_of(), is_live, None)
    np.testing.assert_allclose(result, over_rows(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ragged_rows_read_up_to_their_own_positions(implementation: str):
    q, k, v = example(5)
    pages = write(pool(100.0, implementation), k, v, TABLE, positions_of(), jnp.ones((ROWS, TOKENS), bool))
    positions, is_live = jnp.asarray([[8], [2]]), jnp.ones((ROWS, 1), bool)
    now = jnp.stack([q[0, 8:9], q[1, 2:3]])
    result = paged_attention(now, pages, TABLE, positions, is_live, None)
    whole = over_rows(q, k, v)
    np.testing.assert_allclose(result[:, 0], jnp.stack([whole[0, 8], whole[1, 2]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_without_a_live_token_gives_finite_numbers_and_disturbs_nobody(implementation: str):
    q, k, v = example(9)
    positions = positions_of().at[1].set(0)
    is_live = jnp.asarray([[True] * TOKENS, [False] * TOKENS])
    pages = write(pool(0.0, implementation), k, v, TABLE, positions, is_live)
    result = paged_attention(q, pages, TABLE, positions, is_live, None)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result[0], over_rows(q, k, v)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_pages_are_read_by_both_rows(implementation: str):
    # A common prompt: both rows hold page 7 first, and then their own pages.
    q, k, v = example(10)
    k, v = (x.at[1, :PAGE].set(x[0, :PAGE]) for x in (k, v))
    table = TABLE.at[1, 0].set(7)
    is_live = jnp.ones((ROWS, TOKENS), bool)
    pages = write(pool(0.0, implementation), k, v, table, positions_of(), is_live)
    result = paged_attention(q, pages, table, positions_of(), is_live, None)
    np.testing.assert_allclose(result, over_rows(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_pages_and_queries(implementation: str):
    q, k, v = (x.astype(jnp.bfloat16) for x in example(4))
    result = run_paged(q, k, v, [(0, 9)], pool(0.0, implementation, "bfloat16"))
    assert result.dtype == jnp.bfloat16
    expected = over_rows(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, atol=0.03)


# Largest difference from unrounded pages, with values of a standard normal; what was seen is about a third of it.
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.03), ("int8", 0.06), ("float8_e4m3fn", 0.25)])
def test_rounded_pages_are_read_alike_and_near_to_the_truth(dtype: str, bound: float):
    q, k, v = example(3)
    oracle, xla = (run_paged(q, k, v, [(0, 5), (5, 9)], pool(0.0, name, dtype)) for name in ("reference", "xla"))
    # The same rounded keys and values, so the two agree far better than either with the truth.
    np.testing.assert_allclose(xla, oracle, atol=0.03 if dtype == "bfloat16" else 1e-5)
    gap = np.abs(np.asarray(xla) - np.asarray(over_rows(q, k, v))).max()
    assert 1e-4 < gap < bound


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.51 / 127), ("float8_e4m3fn", 1.01 / 16)])
def test_quantize_keeps_the_largest_value_and_rounds_the_others(dtype: str, error: float):
    x = example(2)[1].at[0, 0, 0].set(0.0)
    values, scale = quantize(x, jnp.dtype(dtype))
    back = np.asarray(values, np.float32) * np.asarray(scale)[..., None]
    largest = np.abs(np.asarray(x)).max(axis=-1, keepdims=True)
    # int8 has steps of the largest value / 127; float8 has four bits of significand: half a step is value / 16.
    size = largest if dtype == "int8" else np.abs(np.asarray(x)) + largest / 448
    assert (np.abs(back - np.asarray(x)) <= error * size + 1e-7).all()
    at_largest = np.abs(np.asarray(x)) == largest
    np.testing.assert_allclose(back[at_largest], np.asarray(x)[at_largest], rtol=1e-6)
    assert (back[0, 0, 0] == 0).all()  # all zeros have no scale: bug, 0 / 0


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_written_tokens_land_in_their_pages_and_dead_ones_nowhere(implementation: str):
    _, k, v = example(8)
    is_live = jnp.asarray([[True] * 6 + [False] * 3, [False] * 9])
    pages = write(pool(-1.0, implementation), k, v, TABLE, positions_of(), is_live)
    if isinstance(pages, InterleavedPages):
        keys, values = (pages.pairs[:, :, side::2].swapaxes(1, 2) for side in (0, 1))
        pages = LayerPages(keys, values)
    # Row 0: the first four tokens in page 7, tokens 4 and 5 at the start of page 2. All else is as it was.
    np.testing.assert_array_equal(pages.keys[7], k[0, :4].transpose(1, 0, 2))
    np.testing.assert_array_equal(pages.values[2, :, :2], v[0, 4:6].transpose(1, 0, 2))
    untouched = np.ones((NUM_PAGES, PAGE), bool)
    untouched[7] = False
    untouched[2, :2] = False
    assert (np.asarray(pages.keys).transpose(0, 2, 1, 3)[untouched] == -1).all()
    assert (np.asarray(pages.values).transpose(0, 2, 1, 3)[untouched] == -1).all()


@pytest.mark.parametrize(("name", "dtype"), [("xla", "float32"), ("xla", "int8"), ("native", "float32")])
def test_heads_split_over_devices_give_the_same(name: Any, dtype: str):
    q, k, v = example(1)
    alone = run_paged(q, k, v, [(0, 5), (5, 9)], pool(0.0, name, dtype))
    mesh = make_generator_mesh(2, num_taken=0)
    pages = init_pages(NUM_PAGES, KV_HEADS, PAGE, SIZE, dtype=jnp.dtype(dtype), reader=PageReader(name, mesh))
    assert isinstance(pages, LayerPages)
    assert {shard.data.shape[1] for shard in pages.keys.addressable_shards} == {1}  # one KV head on a device
    np.testing.assert_allclose(run_paged(q, k, v, [(0, 5), (5, 9)], pages), alone, rtol=1e-6)


def test_interleaved_pages_are_split_in_pairs():
    _, k, v = example(1)
    mesh = make_generator_mesh(2, num_taken=0)
    reader = PageReader("tpu", mesh)
    pages = init_pages(NUM_PAGES, KV_HEADS, PAGE, SIZE, dtype=jnp.dtype("float32"), reader=reader)
    pages = write(pages, k, v, TABLE, positions_of(), jnp.ones((ROWS, TOKENS), bool))
    assert isinstance(pages, InterleavedPages)
    for head, shard in enumerate(sorted(pages.pairs.addressable_shards, key=lambda shard: shard.index[2].start)):
        np.testing.assert_array_equal(shard.data[7, :, 0], k[0, :4, head])
        np.testing.assert_array_equal(shard.data[7, :, 1], v[0, :4, head])


def test_another_table_and_other_positions_are_not_traced_again():
    q, k, v = example(11)
    is_live = jnp.ones((ROWS, 1), bool)
    first, second = (jnp.full((ROWS, 1), t) for t in (3, 4))
    step = functools.partial(read, q[:, :1], window=None)
    pages, other_table = write(pool(), k, v, TABLE, positions_of(), jnp.ones((ROWS, TOKENS), bool)), TABLE[::-1]
    step(pages=pages, page_table=TABLE, positions=first, is_live=is_live)
    with jax.no_tracing():
        step(pages=pages, page_table=other_table, positions=second, is_live=is_live)


@pytest.mark.parametrize("implementation", ["xla", "native"])
def test_a_window_skips_the_pages_before_it(implementation: Any):
    # Pages before the window hold NaN: whoever reads them, masked or not, passes it on through the values.
    q, k, v = (jnp.asarray(np.random.default_rng(0).normal(size=(1, 300, 1, 16)), jnp.float32) for _ in range(3))
    table, is_live = jnp.arange(20)[None], jnp.ones((1, 300), bool)
    pages = init_pages(20, 1, 16, 16, dtype=jnp.dtype("float32"), reader=PageReader(implementation))
    positions = jnp.arange(300)[None]
    pages = write_pages(pages, k, v, table, positions, is_live)
    assert isinstance(pages, LayerPages)
    pages = dataclasses.replace(pages, values=pages.values.at[:8].set(jnp.nan))
    result = paged_attention(q[:, -1:], pages, table, positions[:, -1:], is_live[:, -1:], 20)
    expected = segment_attention(q, k, v, packed_rows(positions, is_live.astype(jnp.int32), 20))[:, -1:]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


# --- which one -------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(vocab_size=9, d_model=8, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=128, d_ff=8)


def test_auto_takes_the_fastest_that_works_and_other_choices_are_kept():
    assert choose_reader("auto", MODEL, kv_dtype="float32").implementation == "native"
    assert choose_reader("auto", MODEL, kv_dtype="int8").implementation == "xla"
    assert choose_reader("auto", dataclasses.replace(MODEL, head_dim=24), kv_dtype="float32").implementation == "xla"
    assert choose_reader("xla", MODEL, kv_dtype="float32").implementation == "xla"
    assert choose_reader("reference", MODEL, kv_dtype="int8").implementation == "reference"


@pytest.mark.parametrize(
    ("platform", "head_dim", "kv_heads", "kv_dtype", "words"),
    [
        ("tpu", 128, 4, "bfloat16", ""),
        ("gpu", 128, 4, "bfloat16", "the engine runs on gpu"),
        ("tpu", 64, 4, "bfloat16", "the model's have 64"),
        ("tpu", 128, 4, "int8", "`generation.kv_dtype` is `int8`"),
        ("tpu", 128, 3, "float32", "cannot tile 3 KV heads"),
    ],
)
def test_the_tpu_kernel_is_taken_where_it_works(platform: str, head_dim: int, kv_heads: int, kv_dtype: str, words: str):
    obstacle = tpu_attention.why_no_tpu_pages(platform, head_dim, kv_heads, kv_dtype)
    assert words in obstacle
    assert bool(words) == bool(obstacle)


@pytest.mark.parametrize("kv_heads", [1, 3, 4])
def test_the_kernel_itself_takes_our_arguments(kv_heads: int):
    # Traced, not run: its checks of shapes and types are met wherever `why_no_tpu_pages` finds nothing.
    obstacle = tpu_attention.why_no_tpu_pages("tpu", 128, kv_heads, "bfloat16")
    kernel = functools.partial(KERNEL, num_kv_pages_per_block=2, num_queries_per_block=4)
    shape = lambda *sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype)
    args = (
        shape(2, 4, 4 * kv_heads, 128, dtype=jnp.bfloat16),
        shape(10, 16, 2 * kv_heads, 128, dtype=jnp.bfloat16),
        shape(2, 3, dtype=jnp.int32),
        shape(2, 4, dtype=jnp.int32),
        shape(2, 4, dtype=bool),
    )
    run = functools.partial(tpu_attention.tpu_paged_attention, window=7, kernel=kernel)
    if obstacle:
        with pytest.raises(ValueError, match="fully tiled"):
            jax.eval_shape(run, *args)
    else:
        assert jax.eval_shape(run, *args).shape == args[0].shape


def test_a_choice_that_cannot_work_is_refused_in_a_sentence():
    with pytest.raises(MagistralError, match=r"`generation.attention` is `tpu`, but the engine runs on cpu"):
        choose_reader("tpu", MODEL, kv_dtype="float32")
    with pytest.raises(
        MagistralError, match=r"`generation.attention` is `native`, but .* `generation.kv_dtype` is `int8`"
    ):
        choose_reader("native", MODEL, kv_dtype="int8")
    mesh = make_generator_mesh(8, num_taken=0)
    with pytest.raises(MagistralError, match=r"`generation.tensor` is 8, which does not divide .* 4 KV heads"):
        choose_reader("auto", MODEL, kv_dtype="float32", mesh=mesh)
