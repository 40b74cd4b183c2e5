"""Advantages: the report's normalisation by hand, against a loop, its laws and its ablations."""

import random
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.schedule import machine
from magistral_jax.train.advantage import group_advantage, has_variance

Mode = Literal["minibatch", "group", "none"]
MODES: tuple[Mode, ...] = ("minibatch", "group", "none")
# What a rewarder gives: 0, 0.1 (format), 1.0, 1.1 (all), and length penalties in between.
REWARD = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.55, 0.9, 1.0, 1.1])
REWARDS = st.sampled_from([(1, 2), (2, 3), (4, 4)]).flatmap(
    lambda shape: st.lists(st.lists(REWARD, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
)


def advantage_of(rewards: Any, mode: Mode = "minibatch"):
    return np.asarray(group_advantage(jnp.asarray(rewards, jnp.float32), mode))


def loop_advantage(rewards: Any, mode: Mode):
    """Plain loop in float64."""
    centred = [[r - sum(group) / len(group) for r in group] for group in rewards]
    everything = [a for group in centred for a in group]
    out = []
    for group in centred:
        pool = {"minibatch": everything, "group": group, "none": group}[mode]
        mean = sum(pool) / len(pool)
        std = (sum((a - mean) ** 2 for a in pool) / len(pool)) ** 0.5
        if mode == "none":
            out.append(group)
        else:
            out.append([(a - mean) / std if std > 1e-6 else 0.0 for a in group])
    return np.array(out)


def test_golden_minibatch():
    # Centred: ±0.5 and ±0.2. Variance over the minibatch (0.25 + 0.25 + 0.04 + 0.04) / 4 = 0.145, std 0.380789.
    # Bugs: std of the raw rewards 0.409268 gives 1.22169; the n − 1 estimate 0.439697 gives 1.13715; per group 1.
    expected = [[1.313064, -1.313064], [0.525226, -0.525226]]
    np.testing.assert_allclose(advantage_of([[1.0, 0.0], [1.0, 0.6]]), expected, rtol=1e-5)


def test_golden_group():
    # Group 1: mean 1/3, std √(2/9) = 0.471405, so (2/3) / 0.471405 = 1.414214; group 2 is the same pattern, a tenth
    # in size, and is blown up to the same advantages: the difficulty bias that the report's mode avoids.
    expected = [[1.414214, -0.707107, -0.707107]] * 2
    np.testing.assert_allclose(advantage_of([[1.0, 0.0, 0.0], [0.1, 0.0, 0.0]], "group"), expected, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=30, deadline=None)
@given(rewards=REWARDS)
def test_equals_loop(mode: Mode, rewards: Any):
    np.testing.assert_allclose(advantage_of(rewards, mode), loop_advantage(rewards, mode), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=30, deadline=None)
@given(rewards=REWARDS, shift=st.sampled_from([-1.0, 0.5, 2.0]))
def test_shifting_the_rewards_of_a_group_changes_nothing(mode: Mode, rewards: Any, shift: float):
    shifted = [[r + shift for r in rewards[0]], *rewards[1:]]
    np.testing.assert_allclose(advantage_of(shifted, mode), advantage_of(rewards, mode), rtol=1e-3, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(rewards=REWARDS, order=st.randoms(use_true_random=False))
def test_follows_a_permutation_of_groups_and_members(rewards: Any, order: random.Random):
    rewards = np.array(rewards)
    groups = order.sample(range(len(rewards)), len(rewards))
    members = order.sample(range(rewards.shape[1]), rewards.shape[1])
    moved = advantage_of(rewards[groups][:, members])
    np.testing.assert_allclose(moved, advantage_of(rewards)[groups][:, members], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["minibatch", "group"])
def test_scale_of_rewards_does_not_matter(mode: Mode):
    rewards = np.array([[1.0, 0.0, 0.1], [0.9, 1.1, 0.0]])
    np.testing.assert_allclose(advantage_of(7 * rewards, mode), advantage_of(rewards, mode), rtol=1e-5)


def test_minibatch_mode_has_mean_0_and_std_1_over_sequences():
    result = advantage_of(np.random.default_rng(0).uniform(size=(8, 4)))
    assert abs(result.mean()) < 1e-6
    assert result.std() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_group_of_equal_rewards_contributes_nothing(mode: Mode):
    result = advantage_of([[0.7, 0.7, 0.7], [1.0, 0.0, 0.0]], mode)
    np.testing.assert_allclose(result[0], 0.0, atol=1e-6)
    assert result[1, 0] > 0.5


@pytest.mark.parametrize("mode", MODES)
def test_all_rewards_equal_gives_zeros_and_no_nan(mode: Mode):
    # 0.7 has no exact float32 mean of three: what is left must not be divided by its own tiny deviation.
    np.testing.assert_allclose(advantage_of([[0.7, 0.7, 0.7], [0.1, 0.1, 0.1]], mode), 0.0, atol=1e-6)


def test_ablation_of_the_advantage_mode_changes_scale_and_nothing_else():
    rewards = np.array([[1.0, 0.0, 0.0, 0.1], [1.1, 1.0, 1.0, 0.0], [0.1, 0.0, 0.1, 0.1]])
    results = {mode: advantage_of(rewards, mode) for mode in MODES}
    ratio = results["minibatch"] / results["none"]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)  # one factor for the whole minibatch
    per_group = results["group"] / results["none"]
    np.testing.assert_allclose(per_group, np.tile(per_group[:, :1], (1, 4)), rtol=1e-4)  # one factor a group
    assert per_group[2, 0] / per_group[0, 0] > 5  # and a large one for the group with hardly any spread
    np.testing.assert_allclose(results["none"], rewards - rewards.mean(1, keepdims=True), atol=1e-6)


def test_has_variance_golden():
    rewards = jnp.asarray([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [1.0, 0.0, 1.0]], jnp.float32)
    assert has_variance(rewards).tolist() == [False, True, True]


def run_machine(filter_zero_variance: bool, rewards_by_group: Sequence[tuple[float, float]]):
    """Grade the first groups of a fresh run; returns the final state and all actions."""
    rules = machine.Rules(
        group_size=2,
        batch_size=4,
        num_steps=1,
        num_async=2 * len(rewards_by_group),
        max_ready=4,
        max_staleness=1,
        checkpoint_every=0,
        filter_zero_variance=filter_zero_variance,
    )
    state, actions = machine.step(rules, machine.State(), machine.Started())
    for group, rewards in enumerate(rewards_by_group):
        for member, reward in enumerate(rewards):
            for event in (machine.Generated(2 * group + member), machine.Verified(2 * group + member, reward)):
                state, more = machine.step(rules, state, event)
                actions += more
    return state, actions


def test_ablation_of_the_zero_variance_filter_changes_which_groups_are_trained_and_nothing_else():
    rewards = [(1.0, 0.0), (0.1, 0.1), (0.0, 1.0)]
    filtered, with_filter = run_machine(True, rewards)
    kept, without = run_machine(False, rewards)
    assert filtered.training == (0, 2)
    assert filtered.counts["zero_variance"] == 2
    assert machine.Discard(1, "zero_variance") in with_filter
    assert kept.training == (0, 1)  # the equal group takes a place in the batch
    assert "zero_variance" not in kept.counts
    assert not any(isinstance(action, machine.Discard) for action in without)
    verified = lambda actions: [a for a in actions if isinstance(a, machine.Verify)]
    assert verified(with_filter) == verified(without)


def test_the_filter_and_has_variance_agree():
    for rewards in ((0.1, 0.1), (0.1, 0.2), (1.0, 0.0), (0.0, 0.0)):
        state, _ = run_machine(True, [rewards])
        is_kept = "zero_variance" not in state.counts
        assert is_kept == bool(has_variance(jnp.asarray([rewards], jnp.float32))[0])
