"""The CPU kernel: any shape against the reference, what it must not read, and a machine that cannot compile it."""

import concurrent.futures
import pathlib
import stat
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.policy import paged_attention as readers
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.native_attention import build, why_no_native_pages
from magistral_jax.policy.pages import LayerPages, PageReader
from magistral_jax.records import MagistralError

attend = jax.jit(readers.paged_attention, static_argnames="window")
MODEL = ModelConfig(vocab_size=9, d_model=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, d_ff=8)


def read(
    name: Any, q: Any, pages: Any, table: Any, positions: Any, is_live: Any, window: int | None = None
) -> np.ndarray:
    with_reader = LayerPages(*pages, reader=PageReader(name))
    return np.asarray(attend(q, with_reader, table, positions, is_live, window=window), np.float32)


def problem(seed: int, rows: int, tokens: int, lengths: list[int], shape: tuple[int, int, int, int]) -> Any:
    """Rows whose last `tokens` tokens ask, each over a context of its own length; pages lie in no order."""
    kv_heads, group, page, size = shape
    rng = np.random.default_rng(seed)
    width = -(-max(lengths) // page)
    pages = [jnp.asarray(rng.normal(size=(rows * width + 1, kv_heads, page, size)), jnp.float32) for _ in range(2)]
    table = jnp.asarray(rng.permutation(rows * width + 1)[: rows * width].reshape(rows, width), jnp.int32)
    positions = jnp.asarray(lengths, jnp.int32)[:, None] - tokens + jnp.arange(tokens)[None]
    q = jnp.asarray(rng.normal(size=(rows, tokens, kv_heads * group, size)), jnp.float32)
    return q, pages, table, jnp.maximum(positions, 0), positions >= 0


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.data())
def test_any_shape_equals_the_reference(data: st.DataObject):
    draw = lambda *values: data.draw(st.sampled_from(values))
    shape = (draw(1, 2, 3), draw(1, 2, 4, 7), draw(1, 4, 16, 24, 32, 100), draw(16, 32, 48, 64, 128))
    rows, tokens, window = draw(1, 3), draw(1, 2, 5, 33, 70), draw(None, 1, 9, 70)
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=rows, max_size=rows))
    q, pages, table, positions, is_live = problem(data.draw(st.integers(0, 9)), rows, tokens, lengths, shape)
    native, oracle = (read(n, q, pages, table, positions, is_live, window) for n in ("native", "reference"))
    np.testing.assert_allclose(native[is_live], oracle[is_live], rtol=1e-4, atol=1e-5)
    assert (native[~np.asarray(is_live)] == 0).all()


@pytest.mark.parametrize("tokens", [1, 40])
def test_bfloat16_pages_are_widened_exactly(tokens: int):
    q, pages, table, positions, is_live = problem(1, 2, tokens, [90, 47], (2, 2, 16, 32))
    rounded = [leaf.astype(jnp.bfloat16) for leaf in pages]
    narrow = read("native", q, rounded, table, positions, is_live)
    wide = read("native", q, [leaf.astype(jnp.float32) for leaf in rounded], table, positions, is_live)
    np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("tokens", [1, 40])
def test_scores_of_any_size_give_a_softmax(tokens: int):
    # Thousands of nats apart: the largest wins, and nothing overflows; then all alike over a long row: the mean.
    q, pages, table, positions, is_live = problem(2, 1, tokens, [3000], (1, 2, 16, 32))
    sharp = read("native", 1000 * q, pages, table, positions, is_live)
    np.testing.assert_allclose(
        sharp, read("reference", 1000 * q, pages, table, positions, is_live), rtol=1e-3, atol=1e-3
    )
    flat = read("native", 0 * q, pages, table, positions, is_live)
    values = pages[1][table[0], 0].reshape(-1, 32)
    np.testing.assert_allclose(flat[0, -1, 0], np.asarray(values[:3000]).mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_row_is_what_it_is_alone_to_the_last_bit(tokens: int):
    q, pages, table, positions, is_live = problem(3, 4, tokens, [120, 41, 64, 90], (2, 2, 16, 32))
    together = read("native", q, pages, table, positions, is_live)
    for row in range(4):
        alone = read(
            "native", *(x[row : row + 1] if i != 1 else x for i, x in enumerate((q, pages, table, positions, is_live)))
        )
        np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("tokens", [1, 40])
def test_nan_is_passed_on_where_it_is_read_and_nowhere_else(tokens: int):
    q, pages, table, positions, is_live = problem(4, 2, tokens, [70, 70], (1, 2, 16, 32))
    last = int(table[0, 4])  # holds tokens 64 to 69; what lies behind them was left by somebody else
    stale = [leaf.at[last, :, 6:].set(jnp.nan) for leaf in pages]
    np.testing.assert_array_equal(
        read("native", q, stale, table, positions, is_live), read("native", q, pages, table, positions, is_live)
    )
    broken = [pages[0].at[last, :, 5].set(jnp.nan), pages[1]]
    result = read("native", q, broken, table, positions, is_live)
    assert np.isnan(result[0, -1]).all()
    assert np.isfinite(result[1]).all()


def test_two_threads_at_a_time_get_what_each_gets_alone():
    problems = [problem(seed, 8, 1, [200] * 8, (4, 2, 16, 32)) for seed in range(2)]
    alone = [read("native", *some) for some in problems]
    again = lambda some: [read("native", *some) for _ in range(50)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for expected, results in zip(alone, pool.map(again, problems), strict=True):
            assert all((result == expected).all() for result in results)


# --- machines that cannot ---------------------------------------------------------------------------------------------


def test_a_library_is_built_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build("c++")
    made = path.stat().st_mtime_ns
    assert build("c++") == path
    assert path.stat().st_mtime_ns == made
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing is left of the building


def test_a_compiler_that_is_missing_or_too_old_is_named_in_a_sentence(tmp_path: pathlib.Path):
    with pytest.raises(MagistralError, match=r"there is no C\+\+ compiler `no-such-compiler` .*apt install g\+\+"):
        build("no-such-compiler")
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho 'error: unknown option -std=c++20' >&2\nexit 1\n")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(MagistralError, match=r"does not compile it \(C\+\+20 is needed\): error: unknown option"):
        build(str(old))


def test_auto_does_without_where_it_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "why_no_native_pages", lambda *_: "there is no C++ compiler `c++`")
    assert readers.choose_reader("auto", MODEL, kv_dtype="float32").implementation == "xla"
    with pytest.raises(
        MagistralError, match=r"`generation.attention` is `native`, but there is no C\+\+ compiler `c\+\+`\.$"
    ):
        readers.choose_reader("native", MODEL, kv_dtype="float32")


@pytest.mark.parametrize(
    ("platform", "head_dim", "kv_dtype", "words"),
    [
        ("cpu", 64, "bfloat16", ""),
        ("gpu", 64, "bfloat16", "the engine runs on gpu"),
        ("cpu", 24, "float32", "the model's have 24"),
        ("cpu", 64, "int8", "`generation.kv_dtype` is `int8`"),
    ],
)
def test_where_it_works(platform: str, head_dim: int, kv_dtype: str, words: str):
    obstacle = why_no_native_pages(platform, head_dim, kv_dtype)
    assert words in obstacle
    assert bool(words) == bool(obstacle)
