"""The decoder: causal, packed = alone, every configuration, pages = rows, one declaration of names and axes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array

from magistral_jax.policy.config import ModelConfig, RopeScaling
from magistral_jax.policy.pages import LayerPages, PagedCache
from magistral_jax.policy.transformer import (
    forward,
    head_kernel,
    init_params,
    layer_list,
    logical_axes,
    logits,
    unstack,
)

BASE = ModelConfig(vocab_size=17, d_model=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=12)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16)
VARIANTS = {
    "base": {},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "tied": {"tie_embeddings": True},
    "window": {"sliding_window": 3},
    "rope_scaling": {"rope_scaling": SCALING},
    "theta": {"rope_theta": 50.0},
}
LENGTH = 10
run = jax.jit(forward, static_argnums=1, static_argnames=("dtype", "remat"))
init = jax.jit(init_params, static_argnums=0)
near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config_of(variant: str):
    return dataclasses.replace(BASE, **VARIANTS[variant])


@functools.cache
def params_of(variant: str = "base"):
    """Random weights; norms and biases too, so that a missing one shows."""
    params = init(config_of(variant), jax.random.key(0))
    rng = np.random.default_rng(1)
    is_vector = lambda path: path[-1].key in ("scale", "bias")
    spread = lambda path, leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) * 0.5
    return jax.tree_util.tree_map_with_path(lambda p, x: spread(p, x) if is_vector(p) else x, params)


def tokens_of(rows: int = 2, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, BASE.vocab_size, (rows, LENGTH)), jnp.int32)


def row_ids(rows: int = 2):
    """Positions and segment ids of rows that hold one sequence each."""
    return jnp.tile(jnp.arange(LENGTH)[None], (rows, 1)), jnp.ones((rows, LENGTH), jnp.int32)


def hidden_of(variant: str = "base", tokens: Array | None = None, params: Any = None, **kwargs: Any):
    tokens = tokens_of() if tokens is None else tokens
    return run(params_of(variant) if params is None else params, config_of(variant), tokens, *row_ids(), **kwargs)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_is_read_by_itself_and_later_tokens_only(variant: str):
    tokens = tokens_of()
    changed = tokens.at[0, 6].set((tokens[0, 6] + 1) % BASE.vocab_size)
    difference = np.abs(np.asarray(hidden_of(variant, changed) - hidden_of(variant, tokens))).max(axis=-1)
    assert not difference[0, :6].any()
    assert not difference[1].any()
    assert (difference[0, 6:9] > 1e-4).all()


def test_a_window_limits_how_far_information_travels():
    # Each of 2 layers carries it 2 tokens on: token 0 reaches token 4 and no further.
    tokens = tokens_of()
    changed = tokens.at[:, 0].set((tokens[:, 0] + 1) % BASE.vocab_size)
    difference = np.abs(np.asarray(hidden_of("window", changed) - hidden_of("window", tokens))).max(axis=(0, 2))
    assert np.flatnonzero(difference).tolist() == [0, 1, 2, 3, 4]


def test_every_configuration_computes_something_else():
    results = {variant: np.asarray(hidden_of(variant)) for variant in VARIANTS if variant != "tied"}
    for variant, hidden in results.items():
        assert np.isfinite(hidden).all()
        if variant != "base":
            assert np.abs(hidden - results["base"]).max() > 1e-3, variant


def test_biases_of_zero_are_no_biases():
    params = params_of("qkv_bias")
    silent = jax.tree_util.tree_map_with_path(lambda p, x: jnp.zeros_like(x) if p[-1].key == "bias" else x, params)
    attn = params["layers"]["attn"]
    without = {name: {key: x for key, x in part.items() if key != "bias"} for name, part in attn.items()}
    plain = params | {"layers": params["layers"] | {"attn": without}}
    near(hidden_of("qkv_bias", params=silent), hidden_of("base", params=plain))
    assert np.abs(np.asarray(hidden_of("qkv_bias") - hidden_of("base", params=plain))).max() > 1e-2


def test_tied_models_have_no_head_and_score_with_the_embedding():
    params, config = params_of("tied"), config_of("tied")
    assert "head" not in params
    hidden = hidden_of("tied")
    expected = np.einsum("btd,vd->btv", hidden, params["embed"]["embedding"])
    near(logits(params, config, hidden), expected)
    assert head_kernel(params_of(), BASE) is params_of()["head"]["kernel"]


def test_packed_sequences_give_the_hidden_states_of_each_alone():
    tokens = tokens_of(1)
    lengths = (3, 5)  # and 2 tokens of padding
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2, 0, 0]])
    packed = run(params_of(), BASE, tokens, positions, segments)[0]
    start = 0
    for length in lengths:
        alone = run(
            params_of(),
            BASE,
            tokens[:, start : start + length],
            jnp.arange(length)[None],
            jnp.ones((1, length), jnp.int32),
        )[0]
        near(packed[:, start : start + length], alone)
        start += length
    # What the bugs would give: reading across segments.
    across = run(params_of(), BASE, tokens, positions, jnp.minimum(segments, 1))[0]
    assert np.abs(np.asarray(across - packed))[:, 3:8].max() > 1e-2
    # Padding is whatever it is, and reaches nobody.
    garbage = tokens.at[:, 8:].set(5)
    near(
        run(params_of(), BASE, garbage, positions + 7 * (segments == 0).astype(jnp.int32), segments)[0][:, :8],
        packed[:, :8],
    )
    assert np.isfinite(packed).all()


def test_rows_do_not_see_each_other():
    tokens = tokens_of()
    both = hidden_of(tokens=tokens)
    near(hidden_of(tokens=tokens[::-1])[::-1], both)


def test_later_layers_are_applied_in_order():
    params = params_of()
    swapped = params | {"layers": jax.tree.map(lambda leaf: leaf[::-1], params["layers"])}
    assert np.abs(np.asarray(hidden_of(params=swapped) - hidden_of())).max() > 1e-3


def cache_of(config: ModelConfig, dtype: Any = jnp.float32):
    shape = (8, config.num_kv_heads, 4, config.head_dim)
    layers = tuple(LayerPages(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
    return PagedCache(layers, jnp.asarray([[5, 2, 7], [1, 3, 6]]))


@pytest.mark.parametrize("variant", ["base", "qk_norm", "window"])
def test_prefill_and_decode_give_the_hidden_states_of_training(variant: str):
    config, tokens = config_of(variant), tokens_of()
    positions, segments = row_ids()
    params, cache, pieces = unstack(params_of(variant), config), cache_of(config), []
    for start, end in [(0, 6), *((t, t + 1) for t in range(6, LENGTH))]:
        at = slice(start, end)
        hidden, cache = run(params, config, tokens[:, at], positions[:, at], segments[:, at], cache)
        pieces.append(hidden)
    near(jnp.concatenate(pieces, axis=1), hidden_of(variant, tokens))


def test_tokens_that_are_not_live_leave_the_cache_alone():
    config = config_of("base")
    positions, segments = row_ids()
    segments = segments.at[1].set(0)
    _, cache = run(unstack(params_of(), config), config, tokens_of(), positions, segments, cache_of(config))
    for pages in cache.layers:
        owned = np.abs(np.asarray(pages.keys)).max(axis=(1, 2, 3)) > 0
        assert np.flatnonzero(owned).tolist() == [2, 5, 7]  # the pages of row 0


def test_stacked_and_single_layers_are_the_same_parameters():
    params = params_of()
    single = layer_list(params, BASE)
    assert len(single) == 2
    jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, np.stack(b)), params["layers"], *single)
    again = unstack(unstack(params, BASE), BASE)
    jax.tree.map(np.testing.assert_array_equal, again, unstack(params, BASE))


def test_logits_are_float32_whatever_the_precision():
    hidden = hidden_of(dtype=jnp.dtype("bfloat16"))
    assert hidden.dtype == jnp.bfloat16
    scores = logits(params_of(), BASE, hidden)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, logits(params_of(), BASE, hidden_of()), atol=0.15)


@pytest.mark.parametrize("variant", ["base", "qkv_bias", "qk_norm", "tied"])
def test_one_declaration_gives_an_axis_name_to_every_dimension(variant: str):
    params, axes = params_of(variant), logical_axes(config_of(variant))
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=is_spec)
    sizes = {"vocab": 17, "embed": 8, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp": 12}

    def check(leaf: Array, spec: PartitionSpec):
        assert len(spec) == leaf.ndim
        assert all(name is None or sizes[name] == size for name, size in zip(spec, leaf.shape, strict=True))

    jax.tree.map(check, params, axes)


def test_initial_parameters_depend_on_the_key_and_differ_between_layers():
    first = init(BASE, jax.random.key(0))
    again, other = init(BASE, jax.random.key(0)), init(BASE, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernel = lambda params: np.asarray(params["layers"]["mlp"]["gate"]["kernel"])
    assert not np.array_equal(kernel(first), kernel(other))
    assert not np.array_equal(kernel(first)[0], kernel(first)[1])
    assert {str(x.dtype) for x in jax.tree.leaves(first)} == {"float32"}


def test_an_initial_policy_is_near_uniform():
    params = init(BASE, jax.random.key(0))
    scores = jax.nn.log_softmax(logits(params, BASE, hidden_of(params=params)))
    entropy = -float(jnp.sum(jnp.exp(scores) * scores, axis=-1).mean())
    assert np.log(BASE.vocab_size) - 0.7 < entropy < np.log(BASE.vocab_size)


def test_other_tokens_and_weights_are_not_traced_again():
    hidden_of()
    tokens, params = tokens_of(seed=3), jax.tree.map(lambda leaf: leaf + 1, params_of())
    ids = row_ids()
    with jax.no_tracing():
        run(params, BASE, tokens, *ids)
