"""bfloat16 parameters and moments: rounding is right on average, small updates arrive, nothing else changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.optimizer import apply_gradients, make_optimizer
from magistral_jax.train.precision import stochastic_round, stored_in

BFLOAT16 = jnp.dtype("bfloat16")


def tree(seed: int, dtype: Any = jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)
    return {"q": {"kernel": draw(8, 6), "bias": draw(6)}, "norm": {"scale": draw(8)}}


def run(config: OptimizerConfig, params: Any, num_updates: int, gradient: Any = None):
    """Parameters and state after updates, by the same gradient or by random ones."""
    optimizer = make_optimizer(config, num_updates)
    update = jax.jit(lambda p, s, g: apply_gradients(optimizer, p, s, g)[:2])
    state = optimizer.init(params)
    for step in range(num_updates):
        params, state = update(params, state, tree(step + 1) if gradient is None else gradient)
    return params, state


@pytest.mark.parametrize("value", [1.001, -0.7311, 3e-39, 1e38])
def test_rounding_is_right_on_average_and_to_a_neighbour(value: float):
    # The noise is uniform in 65,536 steps, so the mean of n roundings has a deviation of at most half a gap / √n.
    x = jnp.full((200_000,), value, jnp.float32)
    rounded = np.asarray(stochastic_round(x, jax.random.key(0)), np.float64)
    neighbours = np.unique(rounded)
    assert len(neighbours) == 2
    assert neighbours[0] < value < neighbours[1]
    gap = neighbours[1] - neighbours[0]
    assert abs(rounded.mean() - float(np.float32(value))) < 5 * gap / 2 / np.sqrt(x.size)


def test_what_is_a_bfloat16_already_or_no_number_stays():
    x = jnp.asarray([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    rounded = np.asarray(stochastic_round(x, jax.random.key(1)), np.float32)
    np.testing.assert_array_equal(rounded, np.asarray(x))
    assert np.signbit(rounded[1])
    # A NaN whose bits are all ones would wrap around to a zero.
    every_bit = jax.lax.bitcast_convert_type(jnp.full((64,), 0x7FFFFFFF, jnp.uint32), jnp.float32)
    assert np.isnan(np.asarray(stochastic_round(every_bit, jax.random.key(2)), np.float32)).all()


def test_small_updates_are_not_lost():
    # 200 updates of 1e-4 on ones: 0.98 in float32. To the nearest bfloat16 (the next below 1 is 0.9961) each is lost.
    params = {"q": {"kernel": jnp.ones((64, 64), BFLOAT16)}}
    gradient = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), params)
    config = OptimizerConfig(learning_rate=1e-4, clip_norm=0.0, param_dtype="bfloat16", moment_dtype="bfloat16")
    params, state = run(config, params, 200, gradient)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, state)) if leaf.ndim} == {BFLOAT16}
    mean = float(params["q"]["kernel"].astype(jnp.float32).mean())
    assert mean == pytest.approx(0.98, abs=5e-4)
    plain, _ = run(OptimizerConfig(learning_rate=1e-4, clip_norm=0.0), {"q": {"kernel": jnp.ones((64, 64), BFLOAT16)}},
                   200, gradient)  # fmt: skip
    assert float(plain["q"]["kernel"].astype(jnp.float32).mean()) == 1.0  # what this rules out


def test_bfloat16_moments_follow_those_in_float32():
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1)
    start = tree(0)
    exact, _ = run(config, start, 12)
    stored, state = run(OptimizerConfig(learning_rate=0.01, weight_decay=0.1, moment_dtype="bfloat16"), start, 12)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {"bfloat16"}
    # Each update is about 0.01 and a moment is off by at most 2^-8 of itself.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=12 * 0.01 * 2**-6), stored, exact)


def test_a_wrapped_optimizer_in_float32_is_the_optimizer_itself():
    inner = optax.adam(0.01)
    outer = stored_in(inner, jnp.dtype("float32"))
    alone, _, _ = jax.jit(lambda p, g: apply_gradients(outer, p, outer.init(p), g))(tree(0), tree(1))
    expected, _, _ = jax.jit(lambda p, g: apply_gradients(inner, p, inner.init(p), g))(tree(0), tree(1))
    jax.tree.map(np.testing.assert_array_equal, alone, expected)


def test_updates_round_anew_and_the_same_way_on_any_mesh():
    config = OptimizerConfig(learning_rate=1e-3, param_dtype="bfloat16", moment_dtype="bfloat16", clip_norm=0.0)
    single, state = run(config, tree(0, BFLOAT16), 2)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
    split = {
        "q": {"kernel": PartitionSpec("fsdp"), "bias": PartitionSpec()},
        "norm": {"scale": PartitionSpec("fsdp")},
    }
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    sharded, sharded_state = run(config, jax.tree.map(place, tree(0, BFLOAT16), split), 2)
    jax.tree.map(np.testing.assert_array_equal, sharded, single)
    jax.tree.map(np.testing.assert_array_equal, sharded_state, state)

    # The same change twice does not round the same way twice.
    optimizer = stored_in(optax.sgd(1.0), BFLOAT16)
    params = {"q": {"kernel": jnp.ones((32, 32), BFLOAT16)}}
    gradient = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, jnp.float32), params)
    update = jax.jit(lambda state: apply_gradients(optimizer, params, state, gradient)[:2])
    first, state = update(optimizer.init(params))
    again, _ = update(state)
    values = lambda params: np.asarray(params["q"]["kernel"], np.float32)
    assert not np.array_equal(values(first), values(again))
