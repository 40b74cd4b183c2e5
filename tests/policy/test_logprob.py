"""Chunked log-probs: against all logits at once, whatever the chunk; their gradients; their memory; sharding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.logprob import token_logprob

MODEL = ModelConfig(vocab_size=19, d_model=6, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=8)
TIED = ModelConfig(**{**vars(MODEL), "tie_embeddings": True})
ROWS, LENGTH = 3, 10
score = jax.jit(token_logprob, static_argnums=1, static_argnames=("temperature", "chunk"))


def example(seed: int = 0, rows: int = ROWS, length: int = LENGTH, model: ModelConfig = MODEL):
    """(params, hidden, tokens)."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"embed": {"embedding": draw(model.vocab_size, model.d_model)}}
    params["head"] = {"kernel": draw(model.d_model, model.vocab_size)}
    tokens = jnp.asarray(rng.integers(0, model.vocab_size, (rows, length)), jnp.int32)
    return params, draw(rows, length, model.d_model), tokens


def loop_logprob(kernel: Any, hidden: Any, tokens: Any, temperature: float):
    """Plain loop in float64; column 0 stays 0."""
    kernel, hidden = np.asarray(kernel, np.float64), np.asarray(hidden, np.float64)
    logprob, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for row in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            logit = hidden[row, t - 1] @ kernel / temperature
            probability = np.exp(logit - logit.max())
            probability /= probability.sum()
            logprob[row, t] = np.log(probability[tokens[row, t]])
            entropy[row, t] = -(probability * np.log(probability)).sum()
    return logprob, entropy


def test_golden():
    # One row [a, b] over 2 tokens, hidden [1], logits (0, ln 3): p = (1/4, 3/4). The second token is 1: ln 3/4.
    # Entropy ¼ ln 4 + ¾ ln 4/3 = 0.562335. Bug: scoring token t by its own hidden state gives ln 1/4 for token 0.
    model = ModelConfig(vocab_size=2, d_model=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, d_ff=1)
    params = {"head": {"kernel": jnp.log(jnp.asarray([[1.0, 3.0]]))}}
    logprob, entropy = token_logprob(params, model, jnp.ones((1, 2, 1)), jnp.asarray([[0, 1]]))
    assert float(logprob[0, 1]) == pytest.approx(np.log(0.75), abs=1e-6)
    assert float(entropy[0, 1]) == pytest.approx(0.562335, abs=1e-6)


# One token, an uneven rest, the default larger than all, exactly all; smaller than the rows: one column each.
@pytest.mark.parametrize("chunk", [1, 2, 7, 12, ROWS * LENGTH, 256])
def test_any_chunk_equals_loop(chunk: int):
    params, hidden, tokens = example()
    logprob, entropy = score(params, MODEL, hidden, tokens, chunk=chunk)
    expected = loop_logprob(params["head"]["kernel"], hidden, np.asarray(tokens), 1.0)
    np.testing.assert_allclose(logprob[:, 1:], expected[0][:, 1:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy[:, 1:], expected[1][:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float):
    params, hidden, tokens = example(1)
    logprob, entropy = score(params, MODEL, hidden, tokens, temperature=temperature, chunk=7)
    expected = loop_logprob(params["head"]["kernel"], hidden, np.asarray(tokens), temperature)
    np.testing.assert_allclose(logprob[:, 1:], expected[0][:, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropy[:, 1:], expected[1][:, 1:], rtol=1e-4, atol=1e-5)


def test_tied_head_is_the_transposed_embedding():
    params, hidden, tokens = example(2)
    logprob, _ = score(params, TIED, hidden, tokens)
    expected, _ = loop_logprob(params["embed"]["embedding"].T, hidden, np.asarray(tokens), 1.0)
    np.testing.assert_allclose(logprob[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-5)


def test_probabilities_of_all_tokens_sum_to_1():
    params, hidden, tokens = example(3)
    last = [score(params, MODEL, hidden, tokens.at[:, -1].set(v))[0][:, -1] for v in range(MODEL.vocab_size)]
    np.testing.assert_allclose(np.exp(last).sum(axis=0), 1.0, rtol=1e-5)


def test_large_logits_do_not_overflow():
    params, hidden, tokens = example()
    logprob, entropy = score(params, MODEL, 1e4 * hidden, tokens)
    assert np.isfinite(logprob).all()
    assert np.isfinite(entropy).all()
    assert (np.asarray(entropy) > -1e-2).all()


def gradient(chunk: int, hidden_mask: Any = None, seed: int = 0):
    params, hidden, tokens = example(seed)
    weight = jnp.asarray(np.random.default_rng(9).normal(size=(2, ROWS, LENGTH)), jnp.float32)
    weight = weight.at[:, :, 0].set(0) if hidden_mask is None else weight * hidden_mask

    def total(kernel: Any, hidden: Any):
        logprob, entropy = score({"head": {"kernel": kernel}}, MODEL, hidden, tokens, chunk=chunk)
        return jnp.sum(weight[0] * logprob) + jnp.sum(weight[1] * entropy)

    return jax.grad(total, argnums=(0, 1))(params["head"]["kernel"], hidden)


def test_gradient_does_not_depend_on_the_chunk():
    whole = gradient(chunk=30)
    for chunk in (3, 7):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradient(chunk), whole)


def test_gradients_are_those_of_finite_differences():
    params, hidden, tokens = example(4, rows=2, length=4)

    def total(kernel: Any, hidden: Any):
        logprob, entropy = score({"head": {"kernel": kernel}}, MODEL, hidden, tokens, chunk=3)
        return logprob[:, 1:].sum() + 0.5 * entropy[:, 1:].sum()

    arguments = (params["head"]["kernel"], hidden)
    check_grads(jax.jit(total), arguments, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_gradient_is_exactly_0_outside_the_mask():
    mask = np.zeros((1, ROWS, LENGTH), np.float32)
    mask[0, 1, 4] = 1  # token 4 of row 1, which hidden state 3 predicts
    _, hidden_gradient = gradient(7, hidden_mask=jnp.asarray(mask))
    is_touched = np.abs(np.asarray(hidden_gradient)).max(axis=-1) > 0
    assert np.argwhere(is_touched).tolist() == [[1, 3]]


def test_bfloat16_hidden_states_give_float32_results():
    params, hidden, tokens = example(5)
    logprob, entropy = score(params, MODEL, hidden.astype(jnp.bfloat16), tokens)
    assert (logprob.dtype, entropy.dtype) == (jnp.float32, jnp.float32)
    expected, _ = score(params, MODEL, hidden, tokens)
    np.testing.assert_allclose(logprob[:, 1:], expected[:, 1:], atol=0.1)


def compile_gradient(chunk: int, rows: int = 1, sharding: Any = None) -> Any:
    """Value and gradient at 4096 tokens × 8192 words: all logits together are 128 MiB."""
    model = ModelConfig(**{**vars(MODEL), "vocab_size": 8192, "d_model": 8})

    def total(kernel: Any, hidden: Any, tokens: Any):
        logprob, entropy = token_logprob({"head": {"kernel": kernel}}, model, hidden, tokens, chunk=chunk)
        return logprob.sum() + entropy.sum()

    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    arguments = (
        jax.ShapeDtypeStruct((8, 8192), jnp.float32),
        shape((rows, 4096 // rows, 8), jnp.float32),
        shape((rows, 4096 // rows), jnp.int32),
    )
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arguments).compile()


def test_logits_of_all_tokens_never_exist_forward_or_backward():
    full = 4096 * 8192 * 4
    used = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    # 64 tokens at a time are a 64th of it; a generous factor of 8 for what the compiler keeps beside them.
    assert used(compile_gradient(chunk=64)) < full / 8
    assert used(compile_gradient(chunk=4096)) >= full  # what the test would catch


def test_sharded_rows_are_scored_where_they_are():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    params, hidden, tokens = example(6, rows=8)
    sharded = score(params, MODEL, jax.device_put(hidden, by_row), jax.device_put(tokens, by_row), chunk=16)
    single = score(params, MODEL, hidden, tokens, chunk=16)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), sharded, single)
    # A loop over chunks of rows would gather every row on every device and score all of them 8 times over.
    assert "all-gather" not in compile_gradient(chunk=64, rows=8, sharding=by_row).as_text()


def test_a_head_sharded_by_vocabulary_scores_where_it_is():
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    model = ModelConfig(**{**vars(MODEL), "vocab_size": 64})
    params, hidden, tokens = example(7, model=model)
    by_word = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    kernel = params["head"]["kernel"]

    def total(kernel: Any, hidden: Any):
        logprob, entropy = token_logprob({"head": {"kernel": kernel}}, model, hidden, tokens, chunk=7)
        return logprob[:, 1:].sum() + 0.5 * entropy[:, 1:].sum()

    whole = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(kernel, hidden)
    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(jax.device_put(kernel, by_word), hidden)
    sharded = compiled.compile()(jax.device_put(kernel, by_word), hidden)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), sharded, whole)
    assert sharded[1][0].sharding.is_equivalent_to(by_word, 2)
    # Sums over the words are all that travels; gathered logits would be as large as the whole batch's.
    text = compiled.compile().as_text()
    assert text is not None
    assert "all-gather" not in text


def test_32k_tokens_of_150k_words_take_less_than_a_gibibyte():
    # All logits together would be 18.3 GiB, and as much again for their gradient.
    num_tokens, words, width = 32_768, 150_000, 128
    model = ModelConfig(**{**vars(MODEL), "vocab_size": words, "d_model": width})

    def total(kernel: Any, hidden: Any, tokens: Any):
        logprob, entropy = token_logprob({"head": {"kernel": kernel}}, model, hidden, tokens, chunk=256)
        return logprob.sum() + entropy.sum()

    arguments = (
        jax.ShapeDtypeStruct((width, words), jnp.float32),
        jax.ShapeDtypeStruct((1, num_tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((1, num_tokens), jnp.int32),
    )
    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**30


def test_a_single_chunk_is_not_computed_twice():
    # Two products fewer would be a gradient that is wrong, two more the logits twice.
    count = lambda chunk: compile_gradient(chunk).as_text().count(" dot(")
    assert (count(64), count(4096)) == (4, 3)


def test_other_values_are_not_traced_again():
    first, second = example(7), example(8)
    score(first[0], MODEL, *first[1:])
    with jax.no_tracing():
        score(second[0], MODEL, *second[1:])
