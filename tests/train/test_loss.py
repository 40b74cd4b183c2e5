"""The objectives as functions of arrays: by hand, against a loop, their laws, masking, gradients, sharding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from jaxtyping import Array

from magistral_jax.train.loss import grpo_loss, kl_penalty, masked_sum, sft_loss

SHAPE = (3, 7)
loss = jax.jit(grpo_loss, static_argnames=("eps_low", "eps_high"))
grpo = functools.partial(loss, eps_low=0.2, eps_high=0.28)


def example(seed: int = 0, shape: tuple[int, int] = SHAPE) -> Any:
    """Log-probs of policy and behaviour, advantages and a mask; ratios between 0.5 and 2."""
    rng = np.random.default_rng(seed)
    behavior = rng.uniform(-4, -1, shape)
    policy = behavior + rng.uniform(-0.7, 0.7, shape)
    arrays = [jnp.asarray(x, jnp.float32) for x in (policy, behavior, rng.normal(size=shape))]
    return (*arrays, jnp.asarray(rng.random(shape) < 0.7))


def policy_gradient(policy: Array, behavior: Array, advantage: Array, mask: Array, **bounds: Any):
    bounds = {"eps_low": 0.2, "eps_high": 0.28} | bounds
    return np.asarray(jax.grad(lambda p: loss(p, behavior, advantage, mask, **bounds)[0].total)(policy))


def loop_loss(
    policy: np.ndarray,
    behavior: np.ndarray,
    advantage: np.ndarray,
    mask: np.ndarray,
    weight: np.ndarray,
    eps_low: float,
    eps_high: float,
):
    total = weights = clipped = log_ratio = count = 0.0
    for index in np.ndindex(mask.shape):
        if not mask[index]:
            continue
        ratio = np.exp(float(policy[index]) - float(behavior[index]))
        a, w = float(advantage[index]), float(weight[index])
        bounded = min(max(ratio, 1 - eps_low), 1 + eps_high)
        total -= w * min(ratio * a, bounded * a)
        weights += w
        count += 1
        clipped += (a > 0 and ratio > 1 + eps_high) or (a < 0 and ratio < 1 - eps_low)
        log_ratio += np.log(ratio)
    return total, weights, clipped, log_ratio, count


GOLDEN = (
    jnp.log(jnp.asarray([[1.5, 0.5, 1.0, 1.5, 9.0]])) - 1,  # ratios, the last one masked
    jnp.full((1, 5), -1.0),
    jnp.asarray([[1.0, -1.0, 2.0, -1.0, 9.0]]),
    jnp.asarray([[True, True, True, True, False]]),
)


def test_golden():
    # −min(1.5, 1.28) = −1.28;  −min(−0.5, −0.8) = 0.8;  −2;  −min(−1.5, −1.28) = 1.5: sum −0.98 over 4 tokens.
    # Bugs: symmetric clip −0.90; clipping without the minimum (last: 1.28) −1.20; the masked token read −12.5.
    result, metrics = grpo(*GOLDEN)
    assert float(result.total) == pytest.approx(-0.98, abs=1e-5)
    assert float(result.weight) == 4
    assert float(result.mean()) == pytest.approx(-0.245, abs=1e-5)
    # Only tokens whose gradient is cut off: the first two. Counting every ratio out of bounds gives 0.75.
    assert float(metrics["clip_fraction"].mean()) == pytest.approx(0.5)
    # (2 ln 1.5 + ln 0.5) / 4
    assert float(metrics["log_ratio"].mean()) == pytest.approx(0.029446, abs=1e-5)


def test_golden_gradient():
    # d/d policy of −r·A is −r·A where the ratio counts, 0 where it is cut off: 0, 0, −2, 1.5, and 0 where masked.
    np.testing.assert_allclose(policy_gradient(*GOLDEN), [[0, 0, -2, 1.5, 0]], atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_equals_loop(seed: int):
    arrays = example(seed)
    weight = jnp.asarray(np.random.default_rng(seed + 1).uniform(0.1, 2, SHAPE), jnp.float32)
    result, metrics = grpo(*arrays, loss_weight=weight)
    total, weights, clipped, log_ratio, count = loop_loss(
        *(np.asarray(x) for x in (*arrays, weight)), eps_low=0.2, eps_high=0.28
    )
    np.testing.assert_allclose(float(result.total), total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(float(result.weight), weights, rtol=1e-5)
    assert (float(metrics["clip_fraction"].total), float(metrics["clip_fraction"].weight)) == (clipped, count)
    np.testing.assert_allclose(float(metrics["log_ratio"].total), log_ratio, rtol=1e-4, atol=1e-5)


def test_policy_equal_to_behavior_gives_ratio_1_and_gradient_minus_advantage():
    policy, _, advantage, mask = example()
    result, metrics = grpo(policy, policy, advantage, mask)
    assert float(metrics["log_ratio"].total) == 0
    assert float(metrics["clip_fraction"].total) == 0
    expected = np.where(mask, advantage, 0)
    assert float(result.total) == pytest.approx(-expected.sum(), rel=1e-5)
    np.testing.assert_allclose(policy_gradient(policy, policy, advantage, mask), -expected, rtol=1e-6)


def test_zero_advantage_contributes_nothing():
    policy, behavior, advantage, mask = example()
    advantage = advantage.at[1].set(0)
    assert not policy_gradient(policy, behavior, advantage, mask)[1].any()
    without, _ = grpo(policy, behavior, advantage, mask.at[1].set(False))
    with_row, _ = grpo(policy, behavior, advantage, mask)
    assert float(with_row.total) == pytest.approx(float(without.total), rel=1e-6)
    assert float(with_row.weight) > float(without.weight)  # its tokens still count in the division


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nothing_at_masked_positions_is_read(poison: float):
    policy, behavior, advantage, mask = example()
    spoil = lambda x: jnp.where(mask, x, poison)
    spoiled = (spoil(policy), spoil(behavior), spoil(advantage))
    total = lambda p, b, a: grpo_loss(p, b, a, mask, eps_low=0.2, eps_high=0.28)[0].total
    # Not jitted: XLA itself turns x · mask into a selection, which would hide that such a product lets NaN through.
    value, gradient = jax.value_and_grad(total)(*spoiled)
    clean_value, clean_gradient = jax.value_and_grad(total)(policy, behavior, advantage)
    assert float(value) == float(clean_value)
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert not np.asarray(gradient)[~np.asarray(mask)].any()  # exactly 0, not NaN
    _, metrics = grpo_loss(*spoiled, mask, eps_low=0.2, eps_high=0.28)
    assert all(np.isfinite(jax.tree.leaves(metrics)))


def test_weights_at_masked_positions_do_not_count():
    policy, behavior, advantage, mask = example()
    weight = jnp.where(mask, 1.0, jnp.nan)
    assert float(grpo(policy, behavior, advantage, mask, loss_weight=weight)[0].weight) == float(mask.sum())


def test_a_batch_without_trained_tokens_is_0_and_finite():
    policy, behavior, advantage, _ = example()
    mask = jnp.zeros(SHAPE, bool)
    result, metrics = grpo(policy, behavior, advantage, mask)
    assert (float(result.total), float(result.weight), float(result.mean())) == (0, 0, 0)
    assert float(metrics["clip_fraction"].mean()) == 0
    assert not policy_gradient(policy, behavior, advantage, mask).any()


def test_rows_may_be_split_and_permuted():
    arrays = example(shape=(6, 7))
    whole = grpo(*arrays)
    for order in ([[0, 1, 2], [3, 4, 5]], [[5, 0], [1, 4], [3, 2]]):
        parts = [grpo(*(x[np.array(rows)] for x in arrays)) for rows in order]
        is_sum = lambda x: hasattr(x, "mean") and hasattr(x, "weight")
        total = functools.reduce(lambda a, b: jax.tree.map(lambda x, y: x + y, a, b, is_leaf=is_sum), parts)
        # Sums in another order: float32 rounding only.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), total, whole)


def test_gradients_are_those_of_finite_differences():
    policy, behavior, advantage, mask = example(seed=3)
    ratio = np.exp(np.asarray(policy - behavior))
    is_smooth = (abs(ratio - 0.8) > 0.02) & (abs(ratio - 1.28) > 0.02)  # away from the two kinks
    mask = mask & jnp.asarray(is_smooth)
    objectives = (
        lambda p: grpo(p, behavior, advantage, mask)[0].total,
        lambda p: kl_penalty(p, behavior, mask).sum(),
        lambda p: sft_loss(p, mask).total,
    )
    for objective in objectives:
        check_grads(jax.jit(objective), (policy,), order=1, atol=1e-2, rtol=1e-2)


def test_ablation_of_clip_higher_changes_rare_tokens_that_do_well_and_nothing_else():
    policy, behavior, advantage, mask = example(shape=(8, 32))
    higher = policy_gradient(policy, behavior, advantage, mask)
    symmetric = policy_gradient(policy, behavior, advantage, mask, eps_high=0.2)
    ratio = np.exp(np.asarray(policy - behavior))
    is_between = np.asarray(mask) & (np.asarray(advantage) > 0) & (ratio > 1.2) & (ratio < 1.28)
    assert is_between.sum() > 3
    np.testing.assert_array_equal(higher != symmetric, is_between)
    assert not symmetric[is_between].any()  # cut off by the symmetric clip
    assert (higher[is_between] < 0).all()  # reinforced by clip-higher


@pytest.mark.parametrize("bounds", [{"eps_low": -0.1}, {"eps_low": 1.0}, {"eps_high": -0.01}])
def test_bounds_out_of_range_are_refused(bounds: Any):
    with pytest.raises(ValueError, match="eps_low"):
        grpo_loss(*example(), **({"eps_low": 0.2, "eps_high": 0.28} | bounds))


def test_sharded_rows_equal_a_single_device():
    arrays = example(shape=(16, 7))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(same, grpo(*sharded), grpo(*arrays))
    same(policy_gradient(*sharded), policy_gradient(*arrays))


def test_other_values_of_the_same_shape_are_not_traced_again():
    first, second = example(0), example(1)
    grpo(*first)
    with jax.no_tracing():
        grpo(*second)


def test_sft_golden():
    # −(−1 − 3) over 2 tokens; the masked −2 is not read. Bug: a mean over all 3 positions gives 4/3.
    logprob = jnp.asarray([[-1.0, -2.0, -3.0]])
    mask = jnp.asarray([[True, False, True]])
    result = sft_loss(logprob, mask)
    assert (float(result.total), float(result.mean())) == (4.0, 2.0)
    gradient = jax.grad(lambda p: sft_loss(p, mask).total)(logprob.at[0, 1].set(jnp.nan))
    assert gradient.tolist() == [[-1, 0, -1]]


def test_kl_golden():
    # d = ref − policy = −0.5: e^−0.5 + 0.5 − 1 = 0.106531 (Bugs: KL of the other direction 0.148721; k₁ 0.5).
    policy, reference = jnp.asarray([[-1.0, -1.0, -1.0]]), jnp.asarray([[-1.5, -1.0, jnp.nan]])
    result = kl_penalty(policy, reference, jnp.asarray([[True, True, False]]))
    np.testing.assert_allclose(result, [[0.106531, 0, 0]], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_kl_is_never_negative_and_pulls_towards_the_reference(seed: int):
    policy, reference, _, mask = example(seed)
    penalty = kl_penalty(policy, reference, mask)
    assert (np.asarray(penalty) >= -1e-6).all()
    pull = np.asarray(jax.grad(lambda p: kl_penalty(p, reference, mask).sum())(policy))
    np.testing.assert_allclose(pull, np.where(mask, 1 - np.exp(reference - policy), 0), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_masked_sum_equals_loop(seed: int):
    values, _, _, mask = example(seed)
    result = masked_sum(jnp.where(mask, values, jnp.nan), mask)
    expected = [float(v) for v, m in zip(np.ravel(values), np.ravel(mask), strict=True) if m]
    assert float(result.total) == pytest.approx(sum(expected), rel=1e-4, abs=1e-4)
    assert float(result.weight) == len(expected)
