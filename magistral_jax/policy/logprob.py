"""Log-probability and entropy of given tokens from hidden states, a chunk of logits at a time.

The [B, T, V] logits never exist, in the forward or in the backward pass. The gradient is written out: it needs the
logits of a chunk and two numbers a token, so a chunk is computed again where there are several, and kept where there is
only one (at most `chunk` tokens of logits exist either way).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
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
    # Cut along the tokens, all rows in each chunk: rows may be sharded, and a loop over rows would gather them.
    columns = min(length, max(1, chunk // rows))
    pad = -length % columns
    states = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, columns, width).swapaxes(0, 1)
    targets = jnp.pad(jnp.roll(tokens, -1, axis=1), ((0, 0), (0, pad))).reshape(rows, -1, columns).swapaxes(0, 1)
    num_chunks = states.shape[0]
    scores: Any = _scores(  # a pair; the type of a custom_vjp is lost
        states.reshape(num_chunks, -1, width),
        head_kernel(params, config),
        targets.reshape(num_chunks, -1),
        temperature,
    )
    align = lambda x: x.reshape(num_chunks, rows, columns).swapaxes(0, 1).reshape(rows, -1)[:, :length]
    return jnp.roll(align(scores[0]), 1, axis=1), jnp.roll(align(scores[1]), 1, axis=1)


class _Token(NamedTuple):
    """What the gradient of one chunk reads: its inputs, and log Σ exp(logit) and entropy of each token."""

    state: Float[Array, "*C N D"]
    target: Int[Array, "*C N"]
    normalizer: Float[Array, "*C N"]
    entropy: Float[Array, "*C N"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(
    states: Float[Array, "C N D"], kernel: Float[Array, "D V"], targets: Int[Array, "C N"], temperature: float
) -> tuple[Float[Array, "C N"], Float[Array, "C N"]]:
    """Log-probs and entropies of C chunks of N tokens."""
    return _scores_and_kept(states, kernel, targets, temperature)[0]


def _scores_forward(states: Any, kernel: Any, targets: Any, temperature: float) -> tuple[Any, Any]:
    return _scores_and_kept(states.value, kernel.value, targets.value, temperature)


def _scores_and_kept(states: Array, kernel: Array, targets: Array, temperature: float) -> tuple[Any, Any]:
    if states.shape[0] == 1:
        logit, scores, token = _score(states[0], kernel, targets[0], temperature)
        scores, token, kept = jax.tree.map(lambda x: x[None], (scores, token, logit))
        return scores, (token, kernel, kept)
    scores, token = jax.lax.map(lambda x: _score(x[0], kernel, x[1], temperature)[1:], (states, targets))
    return scores, (token, kernel, None)


def _score(state: Array, kernel: Array, target: Array, temperature: float) -> tuple[Array, tuple[Array, Array], _Token]:
    logit = _logits(state, kernel, temperature)
    highest = logit.max(axis=-1)
    mass = jnp.exp(logit - highest[:, None])
    total = mass.sum(axis=-1)
    normalizer = jnp.log(total) + highest
    entropy = normalizer - (mass * logit).sum(axis=-1) / total
    logprob = jnp.take_along_axis(logit, target[:, None], axis=-1)[:, 0] - normalizer
    return logit, (logprob, entropy), _Token(state, target, normalizer, entropy)


def _scores_backward(temperature: float, saved: Any, cotangents: tuple[Any, Any]) -> tuple[Array, Array, None]:
    token, kernel, kept = saved
    # None where nobody asked for that gradient: mostly, entropy is but a metric.
    asked = [None if isinstance(x, SymbolicZero) else x for x in cotangents]

    def add(kernel_gradient: Array, chunk: Any) -> tuple[Array, Array]:
        token, cotangents, logit = chunk
        if logit is None:
            logit = _logits(token.state, kernel, temperature)
        change = _logit_gradient(logit, token, *cotangents) / temperature
        change = change.astype(token.state.dtype)
        state_gradient = jnp.einsum("nv,dv->nd", change, kernel.astype(change.dtype))
        part = jnp.einsum("nd,nv->dv", token.state, change, preferred_element_type=jnp.float32)
        return kernel_gradient + part, state_gradient

    # Summed in float32 whatever the precision of the computation: a bfloat16 sum over many chunks loses the small ones.
    kernel_gradient, state_gradient = jax.lax.scan(add, jnp.zeros(kernel.shape, jnp.float32), (token, asked, kept))
    return state_gradient, kernel_gradient.astype(kernel.dtype), None


def _logit_gradient(
    logit: Float[Array, "N V"],
    token: _Token,
    from_logprob: Float[Array, " N"] | None,
    from_entropy: Float[Array, " N"] | None,
) -> Float[Array, "N V"]:
    """∂ log pₜ / ∂ logit = 1ₜ − p;  ∂ H / ∂ logit = −p · (log p + H)."""
    logp = logit - token.normalizer[:, None]
    gradient = jnp.zeros_like(logit)
    if from_logprob is not None:
        is_target = jax.lax.broadcasted_iota(jnp.int32, logit.shape, 1) == token.target[:, None]
        gradient += jnp.where(is_target, from_logprob[:, None], 0.0) - jnp.exp(logp) * from_logprob[:, None]
    if from_entropy is not None:
        gradient -= jnp.exp(logp) * (logp + token.entropy[:, None]) * from_entropy[:, None]
    return gradient


def _logits(state: Float[Array, "N D"], kernel: Float[Array, "D V"], temperature: float) -> Float[Array, "N V"]:
    kernel = kernel.astype(state.dtype)
    return jnp.einsum("nd,dv->nv", state, kernel, preferred_element_type=jnp.float32) / temperature


_scores.defvjp(_scores_forward, _scores_backward, symbolic_zeros=True)
