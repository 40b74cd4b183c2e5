"""One gradient step: microbatches in, gradients summed, one division, one update.

    (TrainState, Batch) → (TrainState, metrics)

The only place that knows an objective needs a model: `train.loss` sees log-probs, not parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from magistral_jax.policy.attention import choose_attention
from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.layout import TOKEN_AXES, Layout
from magistral_jax.policy.logprob import token_logprob
from magistral_jax.policy.lora import attach
from magistral_jax.policy.sharding import BATCH_SPEC, make_layout, state_shardings
from magistral_jax.policy.transformer import forward
from magistral_jax.pytrees import Batch, TrainState, WeightedSum, pytree_dataclass
from magistral_jax.train.config import LossConfig
from magistral_jax.train.loss import grpo_loss, kl_penalty, masked_sum, sft_loss
from magistral_jax.train.optimizer import apply_gradients

Metrics = dict[str, WeightedSum]
# (log-probs, entropies, reference log-probs, one microbatch [B, T]) -> (loss, metrics)
Objective = Callable[[Array, Array, Array | None, Batch], tuple[WeightedSum, Metrics]]
TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


@pytree_dataclass
class Fixed:
    """Parameters that a step reads and does not change."""

    frozen: Any
    """Those under the adapters that are trained; none where everything is."""
    reference: Any
    """Those of the policy that a KL term holds on to, or None."""


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around parameters, which a train step will consume (donate)."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def init_sharded(params: Any, model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state on a mesh around parameters that lie there already; they are consumed (donated)."""
    init = lambda params: init_state(params, optimizer)
    shardings = state_shardings(model, mesh, jax.eval_shape(init, params))
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


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
    mesh: Mesh | None = None,
    frozen: Any = None,
) -> TrainStep:
    """A jitted `train_step(state, batch, reference_params)`, `reference_params` None unless there is a KL term.

    With `frozen` parameters the state holds low-rank adapters for them (`policy.lora`), and nothing else is trained.

    The state is donated. Metrics are sums with weights over the whole minibatch, plus `loss` and `grad_norm`. On a mesh
    the state lies as `state_shardings` says and the batch as `shard_batch` places it; the result is the same to the
    rounding of sums.
    """

    def microbatch_loss(
        trained: Any, batch: Batch, fixed: Fixed, total_weight: Float[Array, ""], layout: Layout | None
    ) -> tuple[Float[Array, ""], tuple[WeightedSum, Metrics]]:
        params, reference_params = attach(fixed.frozen, trained, policy), fixed.reference
        logprob, entropy = score(params, model, policy, batch, temperature=temperature, layout=layout)
        reference = None
        if reference_params is not None:
            reference, _ = score(reference_params, model, policy, batch, temperature=temperature, layout=layout)
            reference = jax.lax.stop_gradient(reference)
        loss, metrics = objective(logprob, entropy, reference, batch)
        return loss.total / total_weight, (loss, metrics)

    def add_up(
        trained: Any,
        batch: Batch,
        fixed: Fixed,
        total_weight: Float[Array, ""],
        num_used: Int[Array, ""],
        layout: Layout | None = None,
    ) -> tuple[Any, tuple[WeightedSum, Metrics]]:
        """Gradients and sums over the first microbatches; on a mesh those of this device's tokens."""
        gradient = jax.grad(microbatch_loss, has_aux=True)

        def accumulate(index: Array, sums: Any) -> Any:
            part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch)
            new = gradient(trained, part, fixed, total_weight, layout)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, new)

        shapes = jax.eval_shape(lambda: gradient(trained, _first(batch), fixed, total_weight, layout))
        # Summed in float32 even where the parameters, and with them each part, are bfloat16.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
        gradients, sums = jax.lax.fori_loop(0, num_used, accumulate, zeros)
        return (
            (gradients, sums) if layout is None else (layout.sum_gradients(gradients), jax.lax.psum(sums, TOKEN_AXES))
        )

    def train_step(state: TrainState, batch: Batch, fixed: Fixed) -> tuple[TrainState, Metrics]:
        total_weight = jnp.maximum(jnp.sum(batch.loss_weight), 1e-9)
        # Microbatches that only fill up the shape come last and are not computed: the trip count is a value.
        is_used = jnp.any(batch.segment_ids > 0, axis=(1, 2))
        num_used = jnp.max(jnp.where(is_used, jnp.arange(1, is_used.size + 1), 0))
        args = (state.params, batch, fixed, total_weight, num_used)
        if mesh is None:
            gradients, (loss, metrics) = add_up(*args)
        else:
            layout = make_layout(model, mesh, fixed.frozen | state.params)
            place = lambda params: params and {name: layout.specs[name] for name in params}
            fixed_specs = Fixed(place(fixed.frozen), place(fixed.reference))
            split = jax.shard_map(
                functools.partial(add_up, layout=layout),
                mesh=mesh,
                in_specs=(place(state.params), BATCH_SPEC, fixed_specs, P(), P()),
                out_specs=(place(state.params), P()),
                axis_names=set(TOKEN_AXES),
                check_vma=False,
            )
            gradients, (loss, metrics) = split(*args)
        params, opt_state, norm = apply_gradients(optimizer, state.params, state.opt_state, gradients)
        metrics |= {"loss": loss, "grad_norm": WeightedSum(norm, jnp.ones(()))}
        state = TrainState(params, opt_state, state.num_updates + 1)
        if mesh is not None:  # as it came, so that the next step is the same program
            state = jax.lax.with_sharding_constraint(state, state_shardings(model, mesh, state))
            metrics = jax.lax.with_sharding_constraint(metrics, NamedSharding(mesh, P()))
        return state, metrics

    jitted = jax.jit(train_step, donate_argnums=0)
    return lambda state, batch, reference_params=None: jitted(state, batch, Fixed(frozen or {}, reference_params))


def score(
    params: Any,
    model: ModelConfig,
    policy: PolicyConfig,
    batch: Batch,
    *,
    temperature: float,
    layout: Layout | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probs and entropies of one microbatch under `params`; with a `layout`, of this device's part of it."""
    dtype = jnp.dtype(policy.dtype)
    hidden, _ = forward(
        params,
        model,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        dtype=dtype,
        remat=policy.remat,
        unroll=policy.unroll,
        layout=layout,
        attention=choose_attention(policy.attention, model, dtype=policy.dtype, platform=jax.default_backend()),
    )
    settings = {"temperature": temperature, "chunk": policy.logprob_chunk}
    if layout is None:
        return token_logprob(params, model, hidden, batch.tokens, **settings)
    name = "embed" if model.tie_embeddings else "head"
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params[name])
    head = {name: layout.gather(cast, layout.specs[name])}
    return layout.score(lambda h, t: token_logprob(head, model, h, t, **settings), hidden, batch.tokens)


def _first(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: x[0], batch)
