"""What a step looked like, as numbers by name, and what kept one from coming; in: graded groups."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from magistral_jax.records import Graded, Verdict

_PATIENCE = 4  # batches' worth of filtered groups before the first warning


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


class FilterWatch:
    """Notices when filtered groups follow each other and no batch comes together: the refill would go on for ever."""

    def __init__(self, groups_per_batch: int) -> None:
        self._first_limit = _PATIENCE * groups_per_batch
        self.reset()

    def reset(self) -> None:
        """A batch has come together."""
        self._limit = self._first_limit
        self._num_groups = self._num_correct = 0
        self._rewards: list[float] = []

    def add(self, group: Sequence[Graded]) -> str | None:
        """Count a filtered group; a warning where there are many since the last batch, and at twice as many again."""
        self._num_groups += 1
        self._rewards += [graded.reward.total for graded in group]
        self._num_correct += sum(graded.reward.verdict is Verdict.CORRECT for graded in group)
        if self._num_groups < self._limit:
            return None
        self._limit *= 2
        remedy = (
            "the problems may be too easy: take harder ones"
            if 2 * self._num_correct > len(self._rewards)
            else "a policy that is never rewarded cannot learn: fine-tune it first (`magistral-jax sft`), or take "
            "easier problems or another answer format"
        )
        return (
            f"{self._num_groups} groups in a row were filtered, since the rewards within each were equal (their mean "
            f"is {np.mean(self._rewards):.3f}), and no batch comes together; {remedy}."
        )
