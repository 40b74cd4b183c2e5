"""The training objectives as functions of arrays: GRPO with Magistral's changes, and supervised fine-tuning.

Each returns a sum with its weight. The caller divides once by the weight of the whole minibatch, so any split into
microbatches, any packing and any data-parallel width gives the same gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from magistral_jax.pytrees import WeightedSum


def grpo_loss(
    policy_logprob: Float[Array, "B T"],
    behavior_logprob: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    eps_low: float,
    eps_high: float,
    loss_weight: Float[Array, "B T"] | None = None,
) -> tuple[WeightedSum, dict[str, WeightedSum]]:
    """Clipped policy-gradient loss without KL term, summed over tokens.

        L = −Σₜ wₜ · min(rₜ·Aₜ, clip(rₜ, 1−ε_low, 1+ε_high)·Aₜ),   rₜ = exp(policyₜ − behaviorₜ)

    Args:
      policy_logprob: Nats, under the parameters being trained.
      behavior_logprob: Nats, under the weights that sampled each token, as the generator reported it.
      advantage: Constant within a completion.
      loss_mask: True on completion tokens, the stop token included. Values elsewhere are never read (NaN allowed).
      eps_low: Trust region below: 0 ≤ eps_low < 1.
      eps_high: Trust region above (clip-higher); equal to eps_low it is the symmetric clip of PPO.
      loss_weight: Share of each token; None weighs all tokens alike, the report's normalisation by Σ|oᵢ|.

    Returns:
      The loss, and the metrics `clip_fraction` (tokens whose gradient is cut off) and `log_ratio` (nats).

    Raises:
      ValueError: A bound out of range.

    Source: Magistral (arXiv:2506.10910), §2.1.
    """
    if not 0 <= eps_low < 1 or eps_high < 0:
        raise ValueError(f"expected 0 <= eps_low < 1 and eps_high >= 0, got {eps_low} and {eps_high}")
    weight = loss_mask.astype(jnp.float32) if loss_weight is None else loss_weight
    # Zeros go in before the arithmetic: a mask applied after it would let NaN through in the backward pass.
    log_ratio = jnp.where(loss_mask, policy_logprob, 0.0) - jnp.where(loss_mask, behavior_logprob, 0.0)
    advantage = jnp.where(loss_mask, advantage, 0.0)
    weight = jnp.where(loss_mask, weight, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - eps_low, 1 + eps_high)
    token_loss = -jnp.minimum(ratio * advantage, clipped * advantage)
    is_clipped = ((ratio > 1 + eps_high) & (advantage > 0)) | ((ratio < 1 - eps_low) & (advantage < 0))
    metrics = {
        "clip_fraction": masked_sum(is_clipped.astype(jnp.float32), loss_mask),
        "log_ratio": masked_sum(log_ratio, loss_mask),
    }
    return WeightedSum(jnp.sum(weight * token_loss), jnp.sum(weight)), metrics


def sft_loss(policy_logprob: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]) -> WeightedSum:
    """Negative log-likelihood of the trained tokens, in nats."""
    return masked_sum(-policy_logprob, loss_mask)


def kl_penalty(
    policy_logprob: Float[Array, "B T"], reference_logprob: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Per-token estimate of KL(policy ‖ reference) in nats, 0 where masked; an ablation only.

        k₃ = exp(ref − policy) − (ref − policy) − 1 ≥ 0

    Source: Shao et al., DeepSeekMath (arXiv:2402.03300), Eq. 4. Magistral (§2.1) removes it.
    """
    difference = jnp.where(loss_mask, reference_logprob, 0.0) - jnp.where(loss_mask, policy_logprob, 0.0)
    return jnp.exp(difference) - difference - 1


def masked_sum(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> WeightedSum:
    """Sum over True positions and their count; what stands at False positions is never read."""
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return jax.tree.map(lambda x: x.astype(jnp.float32), WeightedSum(total, jnp.sum(mask.astype(jnp.float32))))
