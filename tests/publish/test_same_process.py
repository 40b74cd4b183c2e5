"""Publishing inside one process: what the generator holds survives the trainer's next update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.policy.transformer import forward, init_params, unstack
from magistral_jax.publish.same_process import make_publish
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import init_state, make_train_step, sft_objective

MODEL = ModelConfig(vocab_size=13, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=8)


def make_params(seed: int = 0, model: ModelConfig = MODEL):
    return jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed))


def host(tree: Any):
    return jax.tree.map(np.array, tree)  # a copy, not a view of the device's memory


def make_batch():
    ids = np.arange(4, dtype=np.int32)
    zeros = np.zeros(4, np.float32)
    return collate([TrainingSequence(ids, ids, zeros, 1.0, ids)], row_tokens=8, rows_per_microbatch=1)


def test_published_weights_survive_an_update_that_donates_the_trainers():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), 2)
    step = make_train_step(MODEL, PolicyConfig(), sft_objective, optimizer)
    publish = make_publish(MODEL, jnp.dtype("float32"))
    state = init_state(make_params(), optimizer)
    published = publish(state.params)
    before = host(published)
    donated = state.params
    state, _ = step(state, make_batch(), None)
    assert donated["embed"]["embedding"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, host(published), before)
    # The trainer has moved on, so the test would notice if both looked at the same memory.
    assert fingerprint(publish(state.params)) != fingerprint(published)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_no_leaf_is_handed_on_unchanged(num_layers: int):
    # With one layer, unstacking is a reshape, and the other leaves are not computed on at all.
    model = dataclasses.replace(MODEL, num_layers=num_layers)
    params = make_params(model=model)
    published = make_publish(model, jnp.dtype("float32"))(params)
    before = host(published)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    overwrite(params)
    jax.tree.map(np.testing.assert_array_equal, host(published), before)


def test_published_arrays_share_no_memory_with_the_trainers():
    params = make_params()
    published = make_publish(MODEL, jnp.dtype("float32"))(params)
    pointers = lambda tree: {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}
    assert not pointers(params) & pointers(published)


def test_values_and_layers_arrive_in_order():
    params = make_params()
    published = make_publish(MODEL, jnp.dtype("float32"))(params)
    assert isinstance(published["layers"], tuple)
    for i, layer in enumerate(published["layers"]):
        stacked = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        jax.tree.map(np.testing.assert_array_equal, layer, stacked)
    jax.tree.map(np.testing.assert_array_equal, published["embed"], params["embed"])
    jax.tree.map(np.testing.assert_array_equal, published["head"], params["head"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cast_to_the_generators_precision(dtype: str):
    params = make_params()
    published = make_publish(MODEL, jnp.dtype(dtype))(params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(published)} == {dtype}
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), unstack(params, MODEL))
    jax.tree.map(np.testing.assert_array_equal, published, expected)
    assert str(params["embed"]["embedding"].dtype) == "float32"  # the trainer's own stay as they are


def test_from_a_sharded_trainer_whole_weights_land_on_the_generators_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = make_params()
    expected = host(unstack(params, MODEL))  # before the donation below, which takes device 0's share of `params` along
    last_axis = lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1), "data" if leaf.shape[-1] % 8 == 0 else None)
    sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, last_axis(leaf))), params)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    published = make_publish(MODEL, jnp.dtype("float32"), mesh)(sharded)
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(published)} == {mesh.devices.flat[0]}
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(published))
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(sharded)
    jax.tree.map(np.testing.assert_array_equal, published, expected)


def test_receipt_is_equal_on_both_sides_and_differs_after_an_update():
    publish = make_publish(MODEL, jnp.dtype("bfloat16"))
    sent = publish(make_params())
    held = jax.device_put(host(sent), jax.devices()[1])  # as another holder has them
    assert fingerprint(held) == fingerprint(sent)
    assert fingerprint(publish(make_params(1))) != fingerprint(sent)


def test_the_second_publish_does_not_trace_again():
    publish = make_publish(MODEL, jnp.dtype("float32"))
    first, second = make_params(0), make_params(1)
    publish(first)
    with jax.no_tracing():
        publish(second)


def test_the_generator_computes_what_the_trainer_computes():
    params = make_params()
    published = make_publish(MODEL, jnp.dtype("float32"))(params)
    tokens = jnp.asarray([[1, 2, 3, 4]])
    run = lambda layers: forward(
        params | {"layers": layers}, MODEL, tokens, jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32)
    )[0]
    restacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *published["layers"])
    np.testing.assert_array_equal(run(restacked), run(params["layers"]))
