"""One gradient step: microbatches in, gradients summed, one division, one update.

    (TrainState, Batch) → (TrainState, metrics)

The only place that knows an objective needs a model: `train.loss` sees log-probs, not parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.logprob import token_logprob
from magistral_jax.policy.transformer import forward
from magistral_jax.pytrees import Batch, TrainState, WeightedSum
from magistral_jax.train.config import LossConfig
from magistral_jax.train.loss import grpo_loss, kl_penalty, masked_sum, sft_loss
from magistral_jax.train.optimizer import apply_gradients

Metrics = dict[str, WeightedSum]
# (log-probs, entropies, reference log-probs, one microbatch [B, T]) -> (loss, metrics)
Objective = Callable[[Array, Array, Array | None, Batch], tuple[WeightedSum, Metrics]]
TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around parameters, which a train step will consume (donate)."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def grpo_objective(config: LossConfig) -> Objective:
    """The report's loss, with the ablations that `config` switches on."""

    def objective(logprob: Array, entropy: Array, reference: Array | None, batch: Batch) -> tuple[WeightedSum, Metrics]:
        mask = batch.loss_mask
        loss, metrics = grpo_loss(
            logprob,
            batch.behavior_logprob,
            batch.advantage,
            mask,
            eps_low=config.eps_low,
            eps_high=config.eps_high,
            loss_weight=batch.loss_weight,
        )
        weighted = lambda x: jnp.sum(batch.loss_weight * jnp.where(mask, x, 0.0))
        total = loss.total - config.entropy_coef * weighted(entropy) if config.entropy_coef else loss.total
        if reference is not None:
            penalty = kl_penalty(logprob, reference, mask)
            total += config.kl_coef * weighted(penalty)
            metrics |= {"kl": masked_sum(penalty, mask)}
        # On tokens that the very weights being trained have sampled, engine and trainer must agree.
        is_fresh = mask & (batch.staleness == 0)
        gap = masked_sum(jnp.abs(logprob - batch.behavior_logprob), is_fresh)
        metrics |= {"entropy": masked_sum(entropy, mask), "logprob_gap": gap}
        return WeightedSum(total, loss.weight), metrics

    return objective


def sft_objective(logprob: Array, entropy: Array, reference: Array | None, batch: Batch) -> tuple[WeightedSum, Metrics]:
    """Likelihood of given completions."""
    del reference
    return sft_loss(logprob, batch.loss_mask), {"entropy": masked_sum(entropy, batch.loss_mask)}


def make_train_step(
    model: ModelConfig,
    policy: PolicyConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    temperature: float = 1.0,
) -> TrainStep:
    """A jitted `train_step(state, batch, reference_params)`, `reference_params` None unless there is a KL term.

    The state is donated. Metrics are sums with weights over the whole minibatch, plus `loss` and `grad_norm`.
    """

    def microbatch_loss(
        params: Any, batch: Batch, reference_params: Any, total_weight: Float[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[WeightedSum, Metrics]]:
        logprob, entropy = score(params, model, policy, batch, temperature=temperature)
        reference = None
        if reference_params is not None:
            reference, _ = score(reference_params, model, policy, batch, temperature=temperature)
            reference = jax.lax.stop_gradient(reference)
        loss, metrics = objective(logprob, entropy, reference, batch)
        return loss.total / total_weight, (loss, metrics)

    def train_step(state: TrainState, batch: Batch, reference_params: Any = None) -> tuple[TrainState, Metrics]:
        total_weight = jnp.maximum(jnp.sum(batch.loss_weight), 1e-9)
        gradient = jax.grad(microbatch_loss, has_aux=True)

        def accumulate(index: Array, sums: Any) -> Any:
            part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch)
            return jax.tree.map(jnp.add, sums, gradient(state.params, part, reference_params, total_weight))

        # Microbatches that only fill up the shape come last and are not computed: the trip count is a value.
        is_used = jnp.any(batch.segment_ids > 0, axis=(1, 2))
        num_used = jnp.max(jnp.where(is_used, jnp.arange(1, is_used.size + 1), 0))
        shapes = jax.eval_shape(lambda: gradient(state.params, _first(batch), reference_params, total_weight))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        gradients, (loss, metrics) = jax.lax.fori_loop(0, num_used, accumulate, zeros)
        params, opt_state, norm = apply_gradients(optimizer, state.params, state.opt_state, gradients)
        metrics |= {"loss": loss, "grad_norm": WeightedSum(norm, jnp.ones(()))}
        return TrainState(params, opt_state, state.num_updates + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def score(
    params: Any, model: ModelConfig, policy: PolicyConfig, batch: Batch, *, temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probs and entropies of one microbatch under `params`."""
    hidden, _ = forward(
        params,
        model,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        dtype=jnp.dtype(policy.dtype),
        remat=policy.remat,
    )
    return token_logprob(params, model, hidden, batch.tokens, temperature=temperature, chunk=policy.logprob_chunk)


def _first(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: x[0], batch)
