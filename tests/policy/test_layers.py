"""Layers: norms and rotary positions by hand, their laws, and what each declares."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from magistral_jax.policy.config import ModelConfig, RopeScaling
from magistral_jax.policy.layers import DecoderLayer, project, rms_norm, rope, rope_frequencies, rotation

MODEL = ModelConfig(
    vocab_size=11, d_model=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=12, rope_theta=100.0
)
rotate = jax.jit(lambda x, positions, frequencies: rope(x, rotation(positions, frequencies)))


def draw(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_rms_norm_golden():
    # RMS of (3, 4) is √12.5 = 3.535534: (0.848528, 1.131371), times the scale (1, 10).
    # Bugs: dividing by the norm 5 gives (0.6, 8); subtracting the mean first gives (−1, 10).
    result = rms_norm(jnp.asarray([[3.0, 4.0]]), jnp.asarray([1.0, 10.0]), 0.0)
    np.testing.assert_allclose(result, [[0.848528, 11.31371]], rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_rms_norm_equals_loop(seed: int):
    x, scale = draw(seed, 3, 5), draw(seed + 1, 5)
    expected = [
        [value / np.sqrt(sum(float(u) ** 2 for u in row) / 5 + 1e-5) * s for value, s in zip(row, scale, strict=True)]
        for row in np.asarray(x, np.float64)
    ]
    np.testing.assert_allclose(rms_norm(x, scale, 1e-5), expected, rtol=1e-4, atol=1e-6)


def test_rms_norm_does_not_see_the_scale_of_its_input_and_keeps_zero_finite():
    x = draw(0, 2, 6)
    ones = jnp.ones(6)
    np.testing.assert_allclose(rms_norm(100 * x, ones, 0.0), rms_norm(x, ones, 0.0), rtol=1e-5)
    assert not rms_norm(0 * x, ones, 1e-5).any()


def test_rms_norm_of_bfloat16_sums_in_float32():
    # In bfloat16 a running sum of ones stalls at 256: the norm would come out as 2.
    x = jnp.ones((1, 1024), jnp.bfloat16)
    result = rms_norm(x, jnp.ones(1024, jnp.bfloat16), 0.0)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(result, np.float32), 1.0)


def test_rms_norm_gradients_are_those_of_finite_differences():
    run = jax.jit(lambda x, s: jnp.sin(rms_norm(x, s, 1e-5)).sum())
    check_grads(run, (draw(1, 2, 4), draw(2, 4)), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_rope_golden():
    # Size 4, base 10000: angles 1 and 0.01 at position 1. The halves pair up: (1, 3) turns by 1, (2, 4) by 0.01:
    #   1·cos 1 − 3·sin 1 = −1.984111, 3·cos 1 + 1·sin 1 = 2.462378; 2·cos 0.01 − 4·sin 0.01 = 1.959901, 4.019799.
    # Bug: neighbours paired (the other layout) gives 1·cos 1 − 2·sin 1 = −1.142640 first.
    config = dataclasses.replace(MODEL, rope_theta=10_000.0)
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    result = rotate(x, jnp.ones((1, 1), jnp.int32), rope_frequencies(config))
    np.testing.assert_allclose(result.reshape(-1), [-1.984111, 1.959901, 2.462378, 4.019799], rtol=1e-5)


def test_rope_at_position_0_is_the_identity_and_elsewhere_keeps_lengths():
    x, frequencies = draw(3, 1, 5, 2, 4), rope_frequencies(MODEL)
    zeros = jnp.zeros((1, 5), jnp.int32)
    np.testing.assert_array_equal(rotate(x, zeros, frequencies), x)
    turned = rotate(x, zeros + 1000, frequencies)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    assert np.abs(np.asarray(turned - x)).max() > 0.1


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 200), second=st.integers(0, 200), shift=st.integers(0, 500))
def test_scores_depend_on_relative_positions_only(first: int, second: int, shift: int):
    q, k, frequencies = draw(4, 1, 1, 1, 4), draw(5, 1, 1, 1, 4), rope_frequencies(MODEL)
    at = lambda position: jnp.full((1, 1), position, jnp.int32)
    score = lambda a, b: float(jnp.sum(rotate(q, at(a), frequencies) * rotate(k, at(b), frequencies)))
    # float32 angles up to 700 radians are good to 6e-5
    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=2e-3)


def test_positions_do_matter():
    q, k, frequencies = draw(4, 1, 1, 1, 4), draw(5, 1, 1, 1, 4), rope_frequencies(MODEL)
    at = lambda position: jnp.full((1, 1), position, jnp.int32)
    scores = [float(jnp.sum(rotate(q, at(t), frequencies) * k)) for t in range(4)]
    assert np.ptp(scores) > 0.1


def test_rope_angles_of_bfloat16_are_float32():
    # Position 1001 is 1000 in bfloat16, a whole radian off.
    x, frequencies = draw(6, 1, 1, 1, 4), rope_frequencies(MODEL)
    at = jnp.full((1, 1), 1001, jnp.int32)
    narrow = np.asarray(rotate(x.astype(jnp.bfloat16), at, frequencies), np.float32)
    np.testing.assert_allclose(narrow, rotate(x, at, frequencies), atol=0.03)


def test_llama3_scaling_golden():
    # Frequencies 1, 0.1, 0.01, 0.001 have wavelengths 6.28, 62.8, 628, 6283. With 100 original positions and factors
    # 1 and 4: 100/6.28 = 15.9 > 4 is kept; 100/628 and below < 1 are divided by 8; 100/62.8 = 1.591549 blends:
    # (1.591549 − 1)/3 = 0.197183 kept, so (0.802817/8 + 0.197183) · 0.1 = 0.0297535.
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=100)
    config = dataclasses.replace(MODEL, head_dim=8, rope_theta=10_000.0, rope_scaling=scaling)
    np.testing.assert_allclose(rope_frequencies(config), [1, 0.0297535, 0.00125, 0.000125], rtol=1e-5)


def test_project_is_a_matrix_product_for_each_token():
    x, kernel = draw(7, 2, 3, 4), draw(8, 4, 5)
    np.testing.assert_allclose(project(x, kernel), np.einsum("btm,mn->btn", x, kernel), rtol=1e-4, atol=1e-5)


@functools.cache
def init(config: ModelConfig):
    x, turn = jnp.zeros((1, 1, config.d_model)), rotation(jnp.zeros((1, 1), jnp.int32), rope_frequencies(config))
    run = jax.jit(lambda key: DecoderLayer(config).init(key, x, turn, lambda q, k, v: (q, None))["params"])
    return nn.meta.unbox(run(jax.random.key(0)))


def test_attention_gets_rotated_queries_and_keys_and_plain_values():
    weights, x = init(MODEL), draw(9, 1, 3, 8)
    positions = jnp.asarray([[0, 4, 9]])
    frequencies = rope_frequencies(MODEL)
    turn = rotation(positions, frequencies)
    # What `attend` makes of its cache comes back: here the queries, keys and values themselves.
    attend = lambda q, k, v: (q, {"q": q, "k": k, "v": v})
    seen = jax.jit(lambda weights, x: DecoderLayer(MODEL).apply({"params": weights}, x, turn, attend)[1])(weights, x)
    normed = rms_norm(x, weights["attn_norm"]["scale"], MODEL.norm_eps)
    heads = lambda name: jnp.asarray(np.einsum("btd,dne->btne", normed, weights["attn"][name]["kernel"]))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    near(seen["q"], rotate(heads("q"), positions, frequencies))
    near(seen["k"], rotate(heads("k"), positions, frequencies))
    near(seen["v"], heads("v"))


def test_both_branches_add_to_the_residual_stream():
    weights, x = init(MODEL), draw(10, 1, 3, 8)
    turn = rotation(jnp.arange(3)[None], rope_frequencies(MODEL))
    keep = lambda q, k, v: (q, None)
    run = jax.jit(lambda weights: DecoderLayer(MODEL).apply({"params": weights}, x, turn, keep)[0])
    silent = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    attn_off = weights | {"attn": weights["attn"] | {"o": silent(weights["attn"]["o"])}}
    mlp_off = {"mlp": weights["mlp"] | {"down": silent(weights["mlp"]["down"])}}
    np.testing.assert_array_equal(run(attn_off | mlp_off), x)
    # The feed-forward by itself: down(silu(gate(n)) · up(n)) of the normed stream.
    normed = np.asarray(rms_norm(x, weights["mlp_norm"]["scale"], MODEL.norm_eps), np.float64)
    gate, up, down = (np.asarray(weights["mlp"][n]["kernel"], np.float64) for n in ("gate", "up", "down"))
    inner = normed @ gate
    expected = np.asarray(x, np.float64) + (inner / (1 + np.exp(-inner)) * (normed @ up)) @ down
    np.testing.assert_allclose(run(attn_off), expected, rtol=1e-4, atol=1e-5)


def test_optional_parameters_exist_where_configured_and_only_there():
    plain = init(MODEL)["attn"]
    assert set(plain) == {"q", "k", "v", "o"}
    assert set(plain["q"]) == {"kernel"}
    biased = init(dataclasses.replace(MODEL, qkv_bias=True))["attn"]
    assert all(set(biased[name]) == {"kernel", "bias"} for name in "qkv")
    assert set(biased["o"]) == {"kernel"}
    assert set(init(dataclasses.replace(MODEL, qk_norm=True))["attn"]) == {"q", "k", "v", "o", "q_norm", "k_norm"}


def test_initial_scale_keeps_the_residual_stream_of_deep_models_in_bounds():
    config = dataclasses.replace(MODEL, d_model=64, d_ff=128, num_heads=8, head_dim=8, num_layers=8)
    weights = init(config)
    std = lambda leaf: float(jnp.std(leaf))
    assert std(weights["attn"]["q"]["kernel"]) == pytest.approx(64**-0.5, rel=0.1)
    assert std(weights["attn"]["o"]["kernel"]) == pytest.approx(64**-0.5 / 4, rel=0.1)  # √(2 · 8 layers) = 4
    assert std(weights["mlp"]["down"]["kernel"]) == pytest.approx(128**-0.5 / 4, rel=0.1)
