"""Attention over packed rows: by hand, against loops, its masks, grouped heads; and each implementation alike."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from magistral_jax.policy import attention, tpu_attention
from magistral_jax.policy.attention import choose_attention, packed_rows, segment_attention, segment_mask
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.streamed_attention import streamed_attention
from magistral_jax.records import MagistralError

ROWS, TOKENS, HEADS, KV_HEADS, SIZE = 2, 9, 4, 2, 6
attend = jax.jit(segment_attention)


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
    return packed_rows(positions, jnp.ones((rows, tokens), jnp.int32), window)


def loop_attention(q: Any, k: Any, v: Any, mask: Any):
    """Plain loop in float64; query head h reads KV head h // (heads per KV head)."""
    q, k, v, mask = (*(np.asarray(x, np.float64) for x in (q, k, v)), np.asarray(mask))
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
    rows = packed_rows(*packed(lengths), None if seed % 2 else 2)
    np.testing.assert_allclose(attend(q, k, v, rows), loop_attention(q, k, v, rows.mask), rtol=1e-4, atol=1e-5)


def test_long_rows_go_in_blocks_and_equal_the_loop():
    q, k, v = example(7, rows=1, tokens=290)  # three blocks, the last one short
    rows = packed_rows(*packed([100, 150, 40], tokens=290))
    np.testing.assert_allclose(attend(q, k, v, rows), loop_attention(q, k, v, rows.mask), rtol=1e-4, atol=1e-5)


def test_grouped_heads_equal_repeated_key_value_heads():
    q, k, v = example(1)
    repeat = lambda x: jnp.repeat(x, HEADS // KV_HEADS, axis=2)
    np.testing.assert_allclose(attend(q, k, v, causal()), attend(q, repeat(k), repeat(v), causal()), rtol=1e-5)
    tile = lambda x: jnp.tile(x, (1, 1, HEADS // KV_HEADS, 1))  # the order that a bug would give
    assert np.abs(np.asarray(attend(q, k, v, causal()) - attend(q, tile(k), tile(v), causal()))).max() > 0.1


def test_packed_sequences_are_read_as_if_alone():
    q, k, v = example(2, rows=1)
    mixed = attend(q, k, v, packed_rows(*packed([4, 5])))
    for start, end in ((0, 4), (4, 9)):
        alone = segment_attention(*(x[:, start:end] for x in (q, k, v)), rows=causal(1, end - start))
        np.testing.assert_allclose(mixed[:, start:end], alone, rtol=1e-5, atol=1e-6)
    across = attend(q, k, v, causal(1))  # the bug: one causal mask over the row
    assert np.abs(np.asarray(across - mixed))[:, 4:].max() > 0.1


def test_no_gradient_flows_to_other_segments_or_from_later_tokens():
    q, k, v = example(3, rows=1)
    rows = packed_rows(*packed([4, 5]))
    of_token_5 = lambda k, v: attend(q, k, v, rows)[0, 5].sum()  # the second token of the second sequence
    for gradient in jax.grad(of_token_5, argnums=(0, 1))(k, v):
        is_read = np.abs(np.asarray(gradient)).max(axis=(0, 2, 3)) > 0
        assert np.flatnonzero(is_read).tolist() == [4, 5]


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x[:, :4] for x in example(4, rows=1))
    rows = causal(1, 4)
    run = jax.jit(lambda q, k, v: jnp.sin(segment_attention(q, k, v, rows)).sum())
    check_grads(run, (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_large_scores_are_finite():
    q, k, v = example(5)
    assert np.isfinite(attend(1e4 * q, 1e4 * k, v, causal())).all()


def test_bfloat16_keeps_its_type_and_softmax_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in example(6))
    result = attend(q, k, v, causal())
    assert result.dtype == jnp.bfloat16
    expected = loop_attention(*(np.asarray(x, np.float32) for x in (q, k, v)), mask=causal().mask)
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, atol=0.03)


# --- other implementations -------------------------------------------------------------------------------------------


def expect_reference(run: Any, lengths: Sequence[int], tokens: int, window: int | None):
    """Values on real tokens, and gradients of them, are those of the reference."""
    q, k, v = example(12, rows=1, tokens=tokens)
    positions, segments = packed(lengths, tokens)
    rows = packed_rows(positions, segments, window, "reference")
    weight = np.where(segments > 0, 1.0, 0.0)[..., None, None] * np.random.default_rng(0).normal(size=q.shape)

    def mixed_and_gradients(run: Any) -> Any:
        def loss(*qkv: Any) -> Any:
            mixed = run(*qkv)
            return (mixed * jnp.asarray(weight, jnp.float32)).sum(), mixed

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    gradients, mixed = mixed_and_gradients(lambda q, k, v: run(q, k, v, positions, segments, window))
    expected_gradients, expected = mixed_and_gradients(lambda q, k, v: segment_attention(q, k, v, rows))
    count = sum(lengths)
    np.testing.assert_allclose(mixed[:, :count], expected[:, :count], rtol=1e-4, atol=2e-5)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("lengths", "window"), [((23, 50, 7), None), ((80,), 9)])
def test_a_stream_of_blocks_is_the_reference(
    monkeypatch: pytest.MonkeyPatch, lengths: Sequence[int], window: int | None
):
    monkeypatch.setattr("magistral_jax.policy.streamed_attention._BLOCK", 16)
    expect_reference(streamed_attention, lengths, 88, window)  # six blocks; padding within and behind the row


def test_long_rows_are_streamed_and_hold_no_square(monkeypatch: pytest.MonkeyPatch):
    def temporary_bytes(tokens: int) -> int:
        shape = lambda heads: jax.ShapeDtypeStruct((1, tokens, heads, SIZE), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

        def loss(q: Any, k: Any, v: Any, positions: Any, segments: Any) -> Any:
            return jnp.sin(segment_attention(q, k, v, packed_rows(positions, segments))).sum()

        compiled = (
            jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape(HEADS), shape(2), shape(2), ids, ids).compile()
        )
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # Bug: one array of [T, T], a byte an entry, is 1.6 GB at 40,960 tokens; twice the row is four times of it.
    assert temporary_bytes(40_960) < 2.2 * temporary_bytes(20_480) < 150e6
    # Short rows go in dense blocks, which are faster there.
    monkeypatch.setattr(attention, "streamed_attention", None)
    attend(*example(13), causal())


@pytest.mark.parametrize("window", [None, 9])
def test_splash_is_the_reference(window: int | None):
    run = lambda q, k, v, positions, segments, window: tpu_attention.splash_attention(
        q, k, v, segments, window, interpret=True
    )
    expect_reference(run, (23, 100, 7), 140, window)  # padded to two blocks of 128


def test_splash_is_lowered_for_tpus():
    rows = dataclasses.replace(causal(), implementation="splash")
    run = jax.jit(jax.grad(lambda q, k, v: segment_attention(q, k, v, rows).sum()))
    text = run.trace(*example(14)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2  # forward and backward


@pytest.mark.parametrize(("tokens", "window"), [(8, None), (9, 3)])
def test_cudnn_is_told_what_the_reference_knows(monkeypatch: pytest.MonkeyPatch, tokens: int, window: int | None):
    # cuDNN is not here: the same call goes to XLA. What the two make of the arguments is documented to be the same.
    here, asked = jax.nn.dot_product_attention, []

    def stand_in(q: Any, *args: Any, implementation: str, **settings: Any) -> Any:
        asked.append((implementation, q.shape[1] % 2))
        return here(q, *args, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    run = lambda q, k, v, positions, segments, window: segment_attention(
        q, k, v, packed_rows(positions, segments, window, "cudnn")
    )
    expect_reference(run, (3, 4), tokens, window)
    assert set(asked) == {("cudnn", 0)}  # an even number of tokens


MODEL = ModelConfig(vocab_size=9, d_model=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=64, d_ff=8)


@pytest.mark.parametrize(
    ("platform", "dtype", "chosen"),
    [
        ("cpu", "float32", "blocked"),
        ("gpu", "float32", "blocked"),
        ("gpu", "bfloat16", "cudnn"),
        ("tpu", "float32", "splash"),
    ],
)
def test_auto_takes_what_the_platform_has(platform: str, dtype: str, chosen: str):
    assert choose_attention("auto", MODEL, dtype=dtype, platform=platform) == chosen
    for choice in ("reference", "blocked"):
        assert choose_attention(choice, MODEL, dtype=dtype, platform=platform) == choice


@pytest.mark.parametrize(
    ("choice", "model", "dtype", "platform", "words"),
    [
        ("splash", MODEL, "float32", "gpu", "`policy.attention` is `splash`, but the trainer runs on gpu"),
        ("cudnn", MODEL, "bfloat16", "cpu", "`policy.attention` is `cudnn`, but the trainer runs on cpu"),
        ("cudnn", MODEL, "float32", "gpu", "`policy.dtype` is `float32`"),
        ("cudnn", dataclasses.replace(MODEL, head_dim=12), "bfloat16", "gpu", "not 12"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(choice: str, model: Any, dtype: str, platform: str, words: str):
    with pytest.raises(MagistralError, match=words):
        choose_attention(choice, model, dtype=dtype, platform=platform)
