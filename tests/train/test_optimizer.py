"""AdamW as configured: against a loop, clipping, schedules, what decays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.optimizer import apply_gradients, learning_rate_schedule, make_optimizer


def make_tree(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    return {
        "embed": {"embedding": draw(5, 3)},
        "layers": {"q": {"kernel": draw(3, 2, 2), "bias": draw(2, 2)}, "attn_norm": {"scale": draw(3)}},
    }


def run(config: OptimizerConfig, params: Any, gradients: Any, num_updates: int = 10):
    """Parameters after one update per gradient, and the norms that were reported."""
    optimizer = make_optimizer(config, num_updates)
    update = jax.jit(lambda p, s, g: apply_gradients(optimizer, p, s, g))
    state, norms = optimizer.init(params), []
    for gradient in gradients:
        params, state, norm = update(params, state, gradient)
        norms.append(float(norm))
    return params, norms


def loop_adamw(config: OptimizerConfig, params: Any, gradients: Any):
    """Plain AdamW with global-norm clipping at a constant step size, in float64."""
    names = ["embedding", "kernel", "bias", "scale"]
    to_list = lambda tree: [
        np.asarray(leaf, np.float64)
        for leaf in (
            tree["embed"]["embedding"],
            tree["layers"]["q"]["kernel"],
            tree["layers"]["q"]["bias"],
            tree["layers"]["attn_norm"]["scale"],
        )
    ]
    values = to_list(params)
    first, second = [np.zeros_like(v) for v in values], [np.zeros_like(v) for v in values]
    for step, tree in enumerate(gradients, start=1):
        leaves = to_list(tree)
        norm = np.sqrt(sum((g**2).sum() for g in leaves))
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for i, g in enumerate(leaves):
            first[i] = config.b1 * first[i] + (1 - config.b1) * g * scale
            second[i] = config.b2 * second[i] + (1 - config.b2) * (g * scale) ** 2
            direction = first[i] / (1 - config.b1**step)
            direction /= np.sqrt(second[i] / (1 - config.b2**step)) + config.eps
            decay = config.weight_decay if names[i] in ("embedding", "kernel") else 0.0
            values[i] = values[i] - config.learning_rate * (direction + decay * values[i])
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_equals_loop(clip_norm: float, seed: int):
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, clip_norm=clip_norm, eps=1e-4)
    params = make_tree(seed)
    # Some gradients are longer than the clip and some shorter, so that the moments show whether clipping happened.
    gradients = [make_tree(seed + 1 + i, scale) for i, scale in enumerate((3.0, 0.05, 0.5))]
    result, _ = run(config, params, gradients)
    expected = loop_adamw(config, params, gradients)
    np.testing.assert_allclose(result["embed"]["embedding"], expected["embedding"], rtol=1e-4, atol=1e-6)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(result["layers"]["q"][name], expected[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result["layers"]["attn_norm"]["scale"], expected["scale"], rtol=1e-4, atol=1e-6)


def test_golden_first_update_moves_by_the_step_size():
    # Bias-corrected moments of one gradient g are g and g²: the move is −lr·g/|g|. Without correction it would be
    # lr · 0.1/√0.05 = 0.0447.
    params = {"head": {"kernel": jnp.asarray([[1.0, 1.0]])}}
    gradient = {"head": {"kernel": jnp.asarray([[0.3, -0.4]])}}
    result, norms = run(OptimizerConfig(learning_rate=0.1), params, [gradient])
    np.testing.assert_allclose(result["head"]["kernel"], [[0.9, 1.1]], rtol=1e-5)
    assert norms == [pytest.approx(0.5)]


def test_norm_is_reported_before_clipping():
    params = {"head": {"kernel": jnp.zeros((1, 2))}}
    _, norms = run(OptimizerConfig(clip_norm=1.0), params, [{"head": {"kernel": jnp.asarray([[3.0, 4.0]])}}])
    assert norms == [pytest.approx(5.0)]


def test_clipping_keeps_the_direction_of_all_leaves_together():
    # A gradient of norm 50 and the same divided by 50 are one and the same update; leaf-wise clipping would not be.
    params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"scale": jnp.ones(1)}}
    long = {"a": {"kernel": jnp.asarray([[30.0, 0.0]])}, "b": {"scale": jnp.asarray([40.0])}}
    short = jax.tree.map(lambda g: g / 50, long)
    config = OptimizerConfig(learning_rate=0.1, eps=0.1)
    clipped, _ = run(config, params, [long])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, run(config, params, [short])[0])
    free, _ = run(OptimizerConfig(learning_rate=0.1, eps=0.1, clip_norm=0.0), params, [long])
    assert abs(float(free["b"]["scale"][0]) - float(clipped["b"]["scale"][0])) > 0.005


def test_only_matrices_decay():
    params = jax.tree.map(jnp.ones_like, make_tree(0))
    still = jax.tree.map(jnp.zeros_like, params)
    result, _ = run(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), params, [still])
    # 1 − 0.1 · 0.5 = 0.95: decoupled, and scaled by the step size.
    np.testing.assert_allclose(result["embed"]["embedding"], 0.95, rtol=1e-6)
    np.testing.assert_allclose(result["layers"]["q"]["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(result["layers"]["q"]["bias"], 1.0)
    np.testing.assert_array_equal(result["layers"]["attn_norm"]["scale"], 1.0)


def test_parameters_and_moments_stay_in_float32():
    config = OptimizerConfig(warmup_updates=2, decay="cosine", weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    params = make_tree(0)
    params, state, _ = apply_gradients(optimizer, params, optimizer.init(params), make_tree(1))
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(state)} <= {"float32", "int32"}


def rates(config: OptimizerConfig, num_updates: int, steps: Sequence[int]):
    schedule = learning_rate_schedule(config, num_updates)
    with jax.numpy_dtype_promotion("standard"):
        return [float(np.asarray(schedule(jnp.asarray(step)))) for step in steps]


def test_warm_up_rises_from_0_and_then_stays():
    config = OptimizerConfig(learning_rate=2.0, warmup_updates=4)
    np.testing.assert_allclose(rates(config, 100, [0, 1, 2, 4, 50, 1000]), [0, 0.5, 1, 2, 2, 2])


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_without_warm_up_the_first_update_is_at_full_rate(decay: Any):
    config = OptimizerConfig(learning_rate=2.0, warmup_updates=0, decay=decay)
    assert rates(config, 100, [0]) == [2.0]


def test_cosine_falls_to_0():
    # Half way between warm-up (10) and end (110) the cosine stands at one half, at three quarters (85) at 0.146447.
    config = OptimizerConfig(learning_rate=2.0, warmup_updates=10, decay="cosine")
    expected = [0, 1, 2, 1, 2 * 0.146447, 0, 0]
    np.testing.assert_allclose(rates(config, 110, [0, 5, 10, 60, 85, 110, 200]), expected, atol=1e-6)


def test_cosine_of_a_run_shorter_than_its_warm_up():
    config = OptimizerConfig(learning_rate=2.0, warmup_updates=10, decay="cosine")
    np.testing.assert_allclose(rates(config, 3, [0, 5, 10]), [0, 1, 2], atol=1e-6)


def test_the_schedule_drives_the_updates():
    params = {"head": {"kernel": jnp.zeros((1, 1))}}
    gradient = {"head": {"kernel": jnp.ones((1, 1))}}
    config = OptimizerConfig(learning_rate=1.0, warmup_updates=2, clip_norm=0.0)
    # Rates 0, 0.5, 1 of a constant gradient: 0, −0.5, −1.5.
    moved = [float(run(config, params, [gradient] * n)[0]["head"]["kernel"][0, 0]) for n in (1, 2, 3)]
    np.testing.assert_allclose(moved, [0, -0.5, -1.5], rtol=1e-4)
