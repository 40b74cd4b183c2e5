"""One batch of graded groups becomes one or several gradient steps.

groups → advantages over each minibatch → packed Batch → train step
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from magistral_jax.pytrees import Batch, TrainState, WeightedSum
from magistral_jax.records import Graded
from magistral_jax.train.advantage import group_advantage
from magistral_jax.train.balance import ONE_RANK, Ranks, imbalance
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.config import BatchConfig, LossConfig
from magistral_jax.train.step import TrainStep


def update(
    train_step: TrainStep,
    state: TrainState,
    groups: Sequence[Sequence[Graded]],
    *,
    version: int,
    batch: BatchConfig,
    loss: LossConfig,
    reference_params: Any = None,
    ranks: Ranks = ONE_RANK,
) -> tuple[TrainState, dict[str, float], Float[np.ndarray, "N G"]]:
    """Train on a batch: n_batch / n_minibatch updates.

    Args:
      train_step: From `make_train_step`.
      state: Consumed.
      groups: n_batch / G groups of G completions.
      version: Of the weights in `state`, from which staleness is counted.
      batch: Sizes.
      loss: Advantage and normalisation modes.
      reference_params: For the KL ablation, else None.
      ranks: Who shares the rows of a microbatch.

    Returns:
      The new state, metrics (one division each, over all tokens of the batch; `padding_share` of the places in used
      rows; `imbalance`, the share of their time that ranks wait for each other), and the advantages.
    """
    groups_per_minibatch = (batch.minibatch_size or batch.batch_size) // batch.group_size
    sums: dict[str, WeightedSum] = {}
    advantages: list[np.ndarray] = []
    slots = tokens = 0
    waits: list[float] = []
    for start in range(0, len(groups), groups_per_minibatch):
        minibatch = groups[start : start + groups_per_minibatch]
        rewards = jnp.array([[graded.reward.total for graded in group] for group in minibatch], jnp.float32)
        advantage = np.asarray(group_advantage(rewards, loss.advantage))
        packed = collate(
            [
                _sequence(graded, float(value), version)
                for group, values in zip(minibatch, advantage, strict=True)
                for graded, value in zip(group, values, strict=True)
            ],
            row_tokens=batch.row_tokens,
            rows_per_microbatch=batch.rows_per_microbatch,
            normalization=loss.normalization,
            ranks=ranks,
        )
        state, metrics = train_step(state, packed, reference_params)
        sums = {name: sums[name] + value if name in sums else value for name, value in metrics.items()}
        advantages.append(advantage)
        is_row_used = np.asarray(packed.segment_ids > 0).any(axis=2)
        slots += int(is_row_used.sum()) * batch.row_tokens
        tokens += sum(graded.rollout.num_tokens for group in minibatch for graded in group)
        waits.append(imbalance(row_costs(packed, ranks), batch.rows_per_microbatch, ranks.count))
    means = {name: float(value.mean()) for name, value in sums.items()}
    means |= {"padding_share": 1 - tokens / slots, "imbalance": float(np.mean(waits))}
    return state, means, np.concatenate(advantages)


def row_costs(batch: Batch, ranks: Ranks) -> Float[np.ndarray, " R"]:
    """Work of each row of a batch, its microbatches one after the other, in tokens."""
    rows = np.asarray(batch.segment_ids).reshape(-1, batch.segment_ids.shape[-1])
    return np.array([ranks.cost(np.bincount(row)[1:].tolist()) for row in rows])


def _sequence(graded: Graded, advantage: float, version: int) -> TrainingSequence:
    rollout = graded.rollout
    return TrainingSequence(
        prompt_ids=rollout.prompt_ids,
        completion_ids=rollout.completion_ids,
        behavior_logprob=rollout.behavior_logprob,
        advantage=advantage,
        staleness=(version - rollout.weight_version).astype(np.int32),
    )
