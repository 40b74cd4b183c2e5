"""From graded groups to gradient steps: minibatches, advantages, packing, staleness; the step itself is recorded."""

import functools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.pytrees import Batch, TrainState, WeightedSum
from magistral_jax.records import Graded, MagistralError, Reward, Rollout, Verdict
from magistral_jax.train.config import BatchConfig, LossConfig
from magistral_jax.train.step import Metrics
from magistral_jax.train.update import update

VERSION = 7
STATE = TrainState({}, {}, jnp.zeros((), jnp.int32))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def graded(reward: float, num_completion: int = 3, versions: list[int] | None = None) -> Graded:
    rng = np.random.default_rng(int(1000 * reward) + num_completion)
    rollout = Rollout(
        request_id=0,
        prompt_ids=np.array([1, 2], np.int32),
        completion_ids=rng.integers(3, 9, num_completion).astype(np.int32),
        behavior_logprob=-rng.random(num_completion).astype(np.float32),
        weight_version=np.array(versions or [VERSION] * num_completion, np.int32),
        truncated=False,
    )
    return Graded(rollout, Reward(Verdict.WRONG, reward, 0.0, 0.0, 0.0, path="", seconds=0.0))


class Recorder:
    """A train step that keeps its batches and counts its updates; its metrics are sums over the batch's tokens."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.references: list[Any] = []

    def __call__(self, state: TrainState, batch: Batch, reference_params: Any) -> tuple[TrainState, Metrics]:
        self.batches.append(batch)
        self.references.append(reference_params)
        number = len(self.batches)
        weight = jnp.sum(batch.loss_mask).astype(jnp.float32)
        metrics = {"entropy": WeightedSum(number * weight, weight)}
        if number > 1:
            metrics["kl"] = WeightedSum(jnp.ones(()), jnp.ones(()))
        return TrainState(state.params, state.opt_state, state.num_updates + 1), metrics


def run(
    groups: list[list[Graded]], *, loss: LossConfig | None = None, reference: Any = None, **batch: int
) -> tuple[Recorder, TrainState, dict[str, float], np.ndarray]:
    recorder = Recorder()
    sizes = {"group_size": 2, "batch_size": 8, "row_tokens": 12, "rows_per_microbatch": 2} | batch
    result = update(
        recorder,
        STATE,
        groups,
        version=VERSION,
        batch=BatchConfig(**sizes),
        loss=loss or LossConfig(),
        reference_params=reference,
    )
    return recorder, *result


def sequences(batch: Batch) -> list[tuple[np.ndarray, ...]]:
    """(tokens, advantages, staleness, behaviour) of the trained tokens of each sequence, shortest first."""
    found = []
    for row in np.ndindex(batch.tokens.shape[:2]):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            trained = np.asarray((batch.segment_ids[row] == segment) & batch.loss_mask[row])
            fields = (batch.tokens, batch.advantage, batch.staleness, batch.behavior_logprob)
            found.append(tuple(np.asarray(field[row])[trained] for field in fields))
    return sorted(found, key=lambda parts: len(parts[0]))


GROUPS = [
    [graded(0.1, 1), graded(1.0, 2)],
    [graded(0.2, 3), graded(0.4, 4)],
    [graded(0.0, 5), graded(0.6, 6)],
    [graded(1.1, 7), graded(0.1, 8)],
]


def test_one_update_of_the_whole_batch():
    recorder, state, _, advantages = run(GROUPS)
    assert int(state.num_updates) == len(recorder.batches) == 1
    # Centred: ±0.45, ±0.1, ±0.3, ±0.5; their mean is 0, their variance (0.2025 + 0.01 + 0.09 + 0.25) / 4 = 0.138125.
    centred = np.array([[-0.45, 0.45], [-0.1, 0.1], [-0.3, 0.3], [0.5, -0.5]])
    close(advantages, centred / np.sqrt(0.138125))
    members = [member for group in GROUPS for member in group]
    for member, value, (tokens, advantage, staleness, behavior) in zip(
        members, advantages.ravel(), sequences(recorder.batches[0]), strict=True
    ):
        np.testing.assert_array_equal(tokens, member.rollout.completion_ids)
        close(advantage, value)
        np.testing.assert_array_equal(staleness, 0)
        np.testing.assert_array_equal(behavior, member.rollout.behavior_logprob)


def test_several_minibatches_are_updates_of_their_own():
    recorder, state, means, advantages = run(GROUPS, minibatch_size=4)
    assert int(state.num_updates) == len(recorder.batches) == 2
    lengths = [[len(s[0]) for s in sequences(batch)] for batch in recorder.batches]
    assert lengths == [[1, 2, 3, 4], [5, 6, 7, 8]]
    # Each is normalised by itself: (0.2025 + 0.01) / 2 = 0.10625 and (0.09 + 0.25) / 2 = 0.17.
    close(advantages[:2], np.array([[-0.45, 0.45], [-0.1, 0.1]]) / np.sqrt(0.10625))
    close(advantages[2:], np.array([[-0.3, 0.3], [0.5, -0.5]]) / np.sqrt(0.17))
    # Means are over all tokens of the batch: 10 of the first and 26 of the second, not over the two updates (1.5).
    assert means["entropy"] == pytest.approx((1 * 10 + 2 * 26) / 36)
    assert means["kl"] == pytest.approx(1.0)  # a metric that only one of them has


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [[-0.45, 0.45], [-0.1, 0.1], [-0.3, 0.3], [0.5, -0.5]]),
        ("group", [[-1, 1], [-1, 1], [-1, 1], [1, -1]]),
    ],
)
def test_advantage_modes(mode: Literal["none", "group"], expected: list[list[float]]):
    recorder, _, _, advantages = run(GROUPS, loss=LossConfig(advantage=mode))
    close(advantages, expected)
    close([float(s[1][0]) for s in sequences(recorder.batches[0])], np.ravel(expected))


def test_normalization_reaches_the_weights():
    by_token, by_sequence = (
        run(GROUPS, loss=LossConfig(normalization=mode))[0].batches[0] for mode in ("token", "sequence")
    )
    assert float(by_token.loss_weight.sum()) == 36
    assert float(by_sequence.loss_weight.sum()) == pytest.approx(8)
    np.testing.assert_array_equal(by_token.tokens, by_sequence.tokens)


def test_staleness_is_counted_token_by_token():
    groups = [[graded(0.0, 3, [4, 6, 7]), graded(1.0, 2, [5, 5])]]
    recorder, *_ = run(groups, batch_size=2)
    assert [s[2].tolist() for s in sequences(recorder.batches[0])] == [[2, 2], [3, 1, 0]]


def test_padding_is_what_used_rows_leave_empty():
    # 4 sequences of 5 tokens in rows of 12: two rows of 10. The microbatch of four rows has two more, never computed.
    groups = [[graded(0.0), graded(1.0)], [graded(0.3), graded(0.5)]]
    recorder, _, means, _ = run(groups, batch_size=4, rows_per_microbatch=4)
    assert recorder.batches[0].tokens.shape == (1, 4, 12)
    assert means["padding_share"] == pytest.approx(1 - 20 / 24)
    # Two minibatches: one row each, and the same share.
    assert run(groups, batch_size=4, minibatch_size=2)[2]["padding_share"] == pytest.approx(1 - 20 / 24)


def test_a_batch_without_differences_is_harmless():
    _, state, means, advantages = run([[graded(0.5), graded(0.5)]], batch_size=2)
    np.testing.assert_array_equal(advantages, 0.0)
    assert int(state.num_updates) == 1
    assert all(np.isfinite(value) for value in means.values())


def test_the_reference_is_handed_on():
    reference = {"w": jnp.ones(2)}
    recorder, *_ = run(GROUPS, reference=reference, minibatch_size=4)
    assert all(found is reference for found in recorder.references)
    assert run(GROUPS)[0].references == [None]


def test_a_sequence_longer_than_a_row_is_named():
    with pytest.raises(MagistralError, match=r"A sequence has 13 tokens, but batch\.row_tokens allows 12"):
        run([[graded(0.0, 11), graded(1.0)]], batch_size=2)
