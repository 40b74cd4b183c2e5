"""Log-probability and entropy of given tokens from hidden states, a chunk of logits at a time.

The [B, T, V] logits never exist, in the forward or in the backward pass: each chunk is recomputed for its gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import head_kernel


def token_logprob(
    params: dict[str, Any],
    config: ModelConfig,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = 256,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob of `tokens[t]` given its predecessors, and the entropy of that prediction, both in nats.

    Position t is predicted by `hidden[t - 1]`; position 0 has no predecessor in its row and holds a number of no
    meaning, as does the first token of each segment: mask them.

    Args:
      params: Parameters; only the output head is read.
      config: Shape of the model.
      hidden: Output of `forward`.
      tokens: Token ids, aligned with `hidden`.
      temperature: The logits are divided by it, as they were when sampling.
      chunk: Tokens whose logits exist at one time, over all rows; at least one of each row.
    """
    rows, length, width = hidden.shape
    kernel = head_kernel(params, config).astype(hidden.dtype)
    # Cut along the tokens, all rows in each chunk: rows may be sharded, and a loop over rows would gather them.
    columns = min(length, max(1, chunk // rows))
    pad = -length % columns
    states = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, columns, width)
    targets = jnp.pad(jnp.roll(tokens, -1, axis=1), ((0, 0), (0, pad))).reshape(rows, -1, columns)

    @jax.checkpoint
    def score(args: tuple[Array, Array]) -> tuple[Array, Array]:
        state, target = args[0].reshape(-1, width), args[1].reshape(-1)
        logit = jnp.einsum("nd,dv->nv", state, kernel, preferred_element_type=jnp.float32) / temperature
        normalizer = jax.nn.logsumexp(logit, axis=-1)
        logprob = jnp.take_along_axis(logit, target[:, None], axis=-1)[:, 0] - normalizer
        entropy = normalizer - jnp.sum(jnp.exp(logit - normalizer[:, None]) * logit, axis=-1)
        return logprob.reshape(rows, columns), entropy.reshape(rows, columns)

    logprob, entropy = jax.lax.map(score, (states.swapaxes(0, 1), targets.swapaxes(0, 1)))
    align = lambda x: jnp.roll(x.swapaxes(0, 1).reshape(rows, -1)[:, :length], 1, axis=1)
    return align(logprob), align(entropy)
