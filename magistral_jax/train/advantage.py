"""Advantages from rewards: centred in the group, scaled over the minibatch (report §2.1)."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_SMALLEST_STD = 1e-6  # below this a set of rewards counts as constant


def group_advantage(
    rewards: Float[Array, "N G"], normalization: Literal["minibatch", "group", "none"] = "minibatch"
) -> Float[Array, "N G"]:
    """Advantage of each completion of a minibatch of N groups of G.

        Ã = r − mean(group);   Â = (Ã − mean(Ã)) / std(Ã) over the minibatch

    Args:
      rewards: Total rewards, a group in each row.
      normalization: "minibatch" as in the report; "group" divides by each group's own standard deviation (GRPO);
        "none" only centres. The three are the ablation of Fig. 7.

    Returns:
      Advantages; all 0 where there is nothing to tell apart (never NaN).

    Source: Magistral (arXiv:2506.10910), §2.1, "normalizing advantages".
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if normalization == "none":
        return centred
    if normalization == "group":
        return _divide(centred, centred.std(axis=1, keepdims=True))
    return _divide(centred - centred.mean(), centred.std())


def has_variance(rewards: Float[Array, "N G"]) -> Bool[Array, " N"]:
    """Whether a group can teach anything; groups of equal rewards are dropped and the batch refilled.

    Source: Magistral (arXiv:2506.10910), §2.1, "eliminating non-diverse groups".
    """
    return rewards.max(axis=1) - rewards.min(axis=1) > _SMALLEST_STD


def _divide(centred: Float[Array, "N G"], std: Float[Array, "..."]) -> Float[Array, "N G"]:
    is_constant = std < _SMALLEST_STD
    return jnp.where(is_constant, 0.0, centred / jnp.where(is_constant, 1.0, std))
