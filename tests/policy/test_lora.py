"""Adapters: nothing changes at first, gradients are those of the merged matrices, merging computes the same."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.lora import attach, init_adapters, merge
from magistral_jax.policy.transformer import forward, init_params

MODEL = ModelConfig(
    vocab_size=17, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12, qkv_bias=True
)
POLICY = PolicyConfig(lora_rank=3, lora_alpha=6.0)
PARAMS = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 7)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(7), (2, 7))


@jax.jit
def run(params: Any):
    return forward(params, MODEL, TOKENS, POSITIONS, jnp.ones_like(TOKENS))[0]


def trained(policy: PolicyConfig = POLICY, seed: int = 1):
    """Adapters as after some training: B is not zero."""
    adapters = init_adapters(PARAMS, policy, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), adapters)


def test_at_first_the_output_is_exactly_that_of_the_base():
    adapters = init_adapters(PARAMS, POLICY, jax.random.key(1))
    np.testing.assert_array_equal(run(attach(PARAMS, adapters, POLICY)), run(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, merge(PARAMS, adapters, POLICY), PARAMS)
    assert float(jnp.abs(adapters["adapters"]["attn"]["q"]["lora_a"]).max()) > 0  # else nothing would ever be learnt


@pytest.mark.parametrize(
    ("targets", "modules"), [("attention", "qkvo"), ("mlp", ("gate", "up", "down")), ("all", None)]
)
def test_merged_parameters_compute_what_adapters_do(targets: Any, modules: Any):
    policy = dataclasses.replace(POLICY, lora_targets=targets)
    adapters = trained(policy)
    found = {name for part in adapters["adapters"].values() for name in part}
    assert found == set(modules or ("q", "k", "v", "o", "gate", "up", "down"))
    merged = merge(PARAMS, adapters, policy)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    adapted = run(attach(PARAMS, adapters, policy))
    np.testing.assert_allclose(run(merged), adapted, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(adapted - run(PARAMS)).max()) > 0.1
    for name in ("embed", "head", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, merged[name], PARAMS[name])


def test_the_change_is_alpha_over_rank_times_the_product():
    # Rank 3, alpha 6: twice A B. A bug of alpha alone would give six times, of 1 / rank a third.
    adapters = trained()
    a, b = (np.asarray(adapters["adapters"]["attn"]["o"][name], np.float64) for name in ("lora_a", "lora_b"))
    before, after = (np.asarray(p["layers"]["attn"]["o"]["kernel"]) for p in (PARAMS, merge(PARAMS, adapters, POLICY)))
    for layer in range(2):
        np.testing.assert_allclose((after - before)[layer].reshape(8, 8), 2 * a[layer] @ b[layer], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_finite_differences_and_of_the_merged_matrices():
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(2, 7, 8)), jnp.float32)
    loss = lambda adapters: jnp.sum(weight * run(attach(PARAMS, adapters, POLICY)))
    check_grads(jax.jit(loss), (trained(),), order=1, modes=["rev"], atol=0.2, rtol=2e-2, eps=1e-3)
    merged = lambda adapters: jnp.sum(weight * run(merge(PARAMS, adapters, POLICY)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    jax.tree.map(close, jax.jit(jax.grad(loss))(trained()), jax.jit(jax.grad(merged))(trained()))


def test_merging_into_bfloat16_parameters_does_not_lose_the_change():
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    adapters = jax.tree.map(lambda x: x * 1e-2, trained())
    change = merge(stored, adapters, POLICY)["layers"]["mlp"]["up"]["kernel"] - stored["layers"]["mlp"]["up"][
        "kernel"
    ].astype(jnp.float32)
    exact = merge(PARAMS, adapters, POLICY)["layers"]["mlp"]["up"]["kernel"] - PARAMS["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(change, exact, atol=1e-6)
    assert 0 < float(jnp.abs(exact).max()) < 1e-3  # smaller than half a bfloat16 step of the kernel's largest entries


def test_without_adapters_everything_is_trained():
    assert attach({}, PARAMS, PolicyConfig()) == PARAMS
