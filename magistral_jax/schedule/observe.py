"""What a step looked like, as numbers by name: rewards, lengths, staleness. Pure; in: graded groups."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from magistral_jax.records import Graded, Verdict


def describe_rollouts(groups: Sequence[Sequence[Graded]], version: int) -> dict[str, float]:
    """Means over the sequences, or the tokens, of a batch.

    Args:
      groups: What is trained on.
      version: Of the weights being trained; `staleness` is the mean over tokens of how far behind it they were
        sampled, `swapped_token_share` the part of tokens sampled after their own completion saw a weight swap.
    """
    members = [graded for group in groups for graded in group]
    rewards = [graded.reward for graded in members]
    rollouts = [graded.rollout for graded in members]
    versions = np.concatenate([rollout.weight_version for rollout in rollouts])
    mean = lambda values: float(np.mean(values))
    return {
        "reward": mean([reward.total for reward in rewards]),
        "reward_format": mean([reward.format for reward in rewards]),
        "reward_correctness": mean([reward.correctness for reward in rewards]),
        "reward_length": mean([reward.length for reward in rewards]),
        "reward_language": mean([reward.language for reward in rewards]),
        "pass_rate": mean([reward.verdict is Verdict.CORRECT for reward in rewards]),
        "format_rate": mean([reward.verdict is not Verdict.BAD_FORMAT for reward in rewards]),
        "timeout_share": mean([reward.verdict is Verdict.TIMEOUT for reward in rewards]),
        "completion_length": mean([len(rollout.completion_ids) for rollout in rollouts]),
        "truncated_share": mean([rollout.truncated for rollout in rollouts]),
        "staleness": mean(version - versions),
        "staleness_max": float(np.max(version - versions)),
        "swapped_token_share": mean(np.concatenate([is_after_swap(rollout.weight_version) for rollout in rollouts])),
    }


def is_after_swap(versions: Int[np.ndarray, " N"]) -> np.ndarray:
    """True for the tokens that were sampled under other weights than their completion's first."""
    return versions != versions[:1]
