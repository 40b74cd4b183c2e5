"""Drawing tokens: temperature, top-k and top-p as arrays, one uniform number a slot."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

_BLOCK = 64  # vocabulary entries of a block of the two-level inverse CDF


def request_uniform(
    key: PRNGKeyArray, request_id: UInt32[Array, " S"], position: Int[Array, " S"]
) -> Float[Array, " S"]:
    """A uniform number in [0, 1) that depends on (run seed, request, position) and on nothing else in the batch."""

    def one(request: Array, at: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, request), at))

    return jax.vmap(one)(request_id, position)


def sample(
    logits: Float[Array, "S V"],
    uniform: Float[Array, " S"],
    temperature: Float[Array, " S"],
    top_p: Float[Array, " S"],
    top_k: Int[Array, " S"],
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Draw one token a slot.

    Returns:
      Token ids, and their log-probs in nats under softmax(logits / temperature) *before* truncation by top-k and
      top-p: the quantity that the trainer computes again. A slot of temperature 0 takes the most probable token and
      reports its log-prob at temperature 1.
    """
    is_greedy = temperature == 0
    scaled = logits / jnp.where(is_greedy, 1.0, temperature)[:, None]
    highest = scaled.max(axis=-1, keepdims=True)
    mass = jnp.exp(scaled - highest)  # the one pass of exponentials: for the normalizer and for the draw
    normalizer = highest[:, 0] + jnp.log(mass.sum(axis=-1))
    needs_truncation = jnp.any((top_p < 1) | (top_k > 0))
    kept = jax.lax.cond(needs_truncation, _truncate, lambda mass, *_: mass, mass, scaled, top_p, top_k)
    drawn = _inverse_cdf(kept, uniform)
    most_probable = lambda: jnp.argmax(scaled, axis=-1).astype(jnp.int32)
    token = jnp.where(is_greedy, jax.lax.cond(jnp.any(is_greedy), most_probable, lambda: drawn), drawn)
    return token, jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0] - normalizer


def most_probable(
    logits: Float[Array, "S V"], temperature: Float[Array, " S"], count: int
) -> tuple[Int[Array, "S A"], Float[Array, "S A"]]:
    """The `count` most probable tokens of each slot, likeliest first, with log-probs as `sample` reports them."""
    scaled = logits / jnp.where(temperature == 0, 1.0, temperature)[:, None]
    highest, tokens = jax.lax.top_k(scaled, count)
    return tokens, highest - jax.nn.logsumexp(scaled, axis=-1, keepdims=True)


def _inverse_cdf(mass: Float[Array, "S V"], uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    # Sums over blocks first, then inside the one block drawn: 30 times cheaper on CPU than Gumbel noise for every
    # entry, and each slot needs a single random number.
    slots, vocab = mass.shape
    mass = jnp.pad(mass, ((0, 0), (0, -vocab % _BLOCK))).reshape(slots, -1, _BLOCK)
    block_mass = mass.sum(axis=-1)
    block_cdf = jnp.cumsum(block_mass, axis=-1)
    target = uniform * block_cdf[:, -1]
    block = _first_above(block_cdf, target, block_mass)
    before = jnp.take_along_axis(block_cdf - block_mass, block[:, None], axis=1)[:, 0]
    inner = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    token = block * _BLOCK + _first_above(jnp.cumsum(inner, axis=-1), target - before, inner)
    return jnp.minimum(token, vocab - 1)  # logits that are NaN must not name a padding entry


def _first_above(cdf: Float[Array, "S N"], target: Float[Array, " S"], mass: Float[Array, "S N"]) -> Int[Array, " S"]:
    # A parallel cumsum is not monotonic to the last bit, and rounding may put the target before the first entry or
    # behind the last: only entries that have any mass are looked at, so that an impossible one is never drawn.
    is_possible = mass > 0
    is_above = (cdf > target[:, None]) & is_possible
    last = mass.shape[-1] - 1 - jnp.argmax(jnp.flip(is_possible, axis=-1), axis=-1)
    return jnp.where(jnp.any(is_above, axis=-1), jnp.argmax(is_above, axis=-1), last).astype(jnp.int32)


def _truncate(
    mass: Float[Array, "S V"], scaled: Float[Array, "S V"], top_p: Float[Array, " S"], top_k: Int[Array, " S"]
) -> Float[Array, "S V"]:
    vocab = scaled.shape[-1]
    ordered = jnp.flip(jnp.sort(scaled, axis=-1), axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    # The smallest set whose mass reaches top_p: an entry stays where the mass before it is still below. A slot with
    # top_p 1 keeps everything, whatever the sum rounds to: it must not notice that a neighbour truncates.
    in_nucleus = (jnp.cumsum(probability, axis=-1) - probability < top_p[:, None]) | (top_p >= 1)[:, None]
    limit = jnp.where(top_k > 0, top_k, vocab)[:, None]
    count = jnp.maximum(jnp.sum(in_nucleus & (jnp.arange(vocab)[None] < limit), axis=-1), 1)
    threshold = jnp.take_along_axis(ordered, count[:, None] - 1, axis=-1)
    return jnp.where(scaled >= threshold, mass, 0.0)
