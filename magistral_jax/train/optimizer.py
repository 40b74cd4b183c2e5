"""AdamW with global-norm clipping and a schedule, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.precision import stored_in


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant or a cosine to 0 at `num_updates`."""
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if config.warmup_updates else config.learning_rate,
            config.learning_rate,
            config.warmup_updates,
            max(num_updates, config.warmup_updates + 1),
        )
    return optax.linear_schedule(
        0.0 if config.warmup_updates else config.learning_rate, config.learning_rate, config.warmup_updates
    )


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformation:
    """The optimizer of a run of `num_updates` gradient steps. Only matrices decay, never norms and biases."""
    is_matrix = lambda path, _: path[-1].key in ("kernel", "embedding", "down", "up")
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate_schedule(config, num_updates),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(is_matrix, params),
        ),
    )
    if config.param_dtype == config.moment_dtype == "float32":
        return optimizer
    return stored_in(optimizer, jnp.dtype(config.moment_dtype))


def apply_gradients(
    optimizer: optax.GradientTransformation, params: Any, opt_state: Any, gradients: Any
) -> tuple[Any, Any, Float[Array, ""]]:
    """One update: new parameters, new optimizer state, and the gradient norm before clipping."""
    # optax mixes int counts with float decay rates, which strict promotion refuses; ours stays strict.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(gradients)
