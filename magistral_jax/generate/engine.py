"""The device side of generation: pure functions from EngineState to EngineState.

    prefill (prompts to pages) → admit (slots start) → decode_block (K tokens a slot), again and again

A slot starts with the last token of its prompt still to be fed, so the first decode step yields its first sample and
nothing is sampled anywhere else. Shapes are fixed at start: weights, requests and stop ids are all arguments, so a
weight swap is a new first argument and never a recompile.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from magistral_jax.generate.sampling import most_probable, request_uniform, sample
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.pages import ONE_DEVICE, PagedCache, PageReader, Pages, init_pages
from magistral_jax.policy.transformer import forward, logits
from magistral_jax.pytrees import pytree_dataclass


@pytree_dataclass
class Slots:
    """What each slot is doing. `token` at `position` is the next to be fed; both belong to `request_id`."""

    token: Int[Array, " S"]
    position: Int[Array, " S"]
    last_position: Int[Array, " S"]  # a token sampled for this position ends the completion as truncated
    is_active: Bool[Array, " S"]
    request_id: UInt32[Array, " S"]
    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    top_k: Int[Array, " S"]


@pytree_dataclass
class EngineState:
    """The page pool, allocated once, and the slots."""

    layers: tuple[Pages, ...]
    slots: Slots


@pytree_dataclass
class Block:
    """What one decode block sampled in its rows; `is_sampled` is False after a slot has ended."""

    tokens: Int[Array, "N R"]
    logprob: Float[Array, "N R"]
    is_sampled: Bool[Array, "N R"]
    top_tokens: Int[Array, "N R A"]  # the most probable ones, whatever was sampled
    top_logprobs: Float[Array, "N R A"]


def init_state(
    config: ModelConfig,
    *,
    num_slots: int,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    reader: PageReader = ONE_DEVICE,
) -> EngineState:
    """An empty engine: the only place where the page pool is allocated.

    Args:
      config: Shape of the model.
      num_slots: Sequences decoded at one time.
      num_pages: Pages of the pool.
      page_size: Tokens of a page.
      dtype: Precision of the pages.
      reader: How the pages are read, and on which devices all of the engine stays.
    """
    pages = lambda: init_pages(num_pages, config.num_kv_heads, page_size, config.head_dim, dtype=dtype, reader=reader)
    integers = lambda: jnp.zeros(num_slots, jnp.int32)
    slots = Slots(
        token=integers(),
        position=integers(),
        last_position=integers(),
        is_active=jnp.zeros(num_slots, bool),
        request_id=jnp.zeros(num_slots, jnp.uint32),
        temperature=jnp.ones(num_slots),
        top_p=jnp.ones(num_slots),
        top_k=integers(),
    )
    if reader.mesh is not None:
        slots = jax.device_put(slots, NamedSharding(reader.mesh, P()))
    return EngineState(tuple(pages() for _ in range(config.num_layers)), slots)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def prefill(
    params: dict[str, Any],
    config: ModelConfig,
    state: EngineState,
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    page_table: Int[Array, "B W"],
) -> EngineState:
    """Write keys and values of `lengths[b]` tokens of each row to the row's pages, from position `starts[b]` on."""
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = starts[:, None] + offsets
    segment_ids = (offsets < lengths[:, None]).astype(jnp.int32)
    cache = PagedCache(state.layers, page_table)
    _, cache = forward(params, config, tokens, positions, segment_ids, cache, dtype=_dtype(params))
    assert cache is not None
    return EngineState(cache.layers, state.slots)


@partial(jax.jit, donate_argnames="state")
def admit(
    state: EngineState,
    arrivals: Slots,
    is_new: Bool[Array, " S"],
    source_page: Int[Array, " S"],
    target_page: Int[Array, " S"],
) -> EngineState:
    """Start the slots marked `is_new`, and give each its own copy of the prompt's last, partly filled page.

    A `target_page` beyond the pool means that there is nothing to copy.
    """
    copy = lambda pages: pages.at[target_page].set(pages.at[source_page].get(mode="clip"), mode="drop")
    choose = lambda new, old: jnp.where(is_new.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)
    slots = _everywhere(jax.tree.map(choose, arrivals, state.slots), state.layers)
    return EngineState(jax.tree.map(copy, state.layers), slots)


@jax.jit
def deactivate(slots: Slots, is_stopped: Bool[Array, " S"]) -> Slots:
    """Stop slots from outside (cancelled or preempted)."""
    return dataclasses.replace(slots, is_active=slots.is_active & ~is_stopped)


_Carry = tuple[Array, Slots, tuple[Pages, ...], Block]  # step, slots, pages, what was sampled


@partial(jax.jit, static_argnames=("config", "num_steps", "num_top"), donate_argnames="state")
def decode_block(  # noqa: PLR0913 - what is data, what is static and what is donated must stand apart
    params: dict[str, Any],
    config: ModelConfig,
    state: EngineState,
    rows: Int[Array, " R"],
    page_table: Int[Array, "R W"],
    stop_ids: Int[Array, " N"],
    key: PRNGKeyArray,
    *,
    num_steps: int,
    num_top: int = 0,
) -> tuple[EngineState, Block]:
    """Sample up to `num_steps` tokens in every active slot; ends early when no slot is active.

    Args:
      params: Weights of the whole block.
      config: Shape of the model.
      state: Page pool and slots; donated.
      rows: The slots to decode, each once, the active ones among them. A block costs what its rows cost.
      page_table: Pages of each row, in order, as far as the block will write.
      stop_ids: Tokens that end a completion.
      key: Of the run.
      num_steps: Steps of a block.
      num_top: Most probable tokens to report in each place.

    Returns:
      The state after the block, and what was sampled, one column for each of `rows`.
    """
    slots = jax.tree.map(lambda leaf: leaf[rows], state.slots)
    num_rows = rows.shape[0]
    empty = Block(
        tokens=jnp.zeros((num_steps, num_rows), jnp.int32),
        logprob=jnp.zeros((num_steps, num_rows)),
        is_sampled=jnp.zeros((num_steps, num_rows), bool),
        top_tokens=jnp.zeros((num_steps, num_rows, num_top), jnp.int32),
        top_logprobs=jnp.zeros((num_steps, num_rows, num_top)),
    )

    def goes_on(carry: _Carry) -> Array:
        step, slots, _, _ = carry
        return (step < num_steps) & jnp.any(slots.is_active)

    def advance(carry: _Carry) -> _Carry:
        step, slots, layers, block = carry
        layers, scores = _next_scores(params, config, slots, PagedCache(layers, page_table))
        # The sample for position p + 1 is keyed by that position, whatever block or slot it is drawn in.
        uniform = request_uniform(key, slots.request_id, slots.position + 1)
        token, logprob = sample(scores, uniform, slots.temperature, slots.top_p, slots.top_k)
        top_tokens, top_logprobs = most_probable(scores, slots.temperature, num_top)
        position = slots.position + 1
        is_stop = jnp.any(token[:, None] == stop_ids[None, :], axis=-1)
        block = Block(
            tokens=block.tokens.at[step].set(token),
            logprob=block.logprob.at[step].set(logprob),
            is_sampled=block.is_sampled.at[step].set(slots.is_active),
            top_tokens=block.top_tokens.at[step].set(top_tokens),
            top_logprobs=block.top_logprobs.at[step].set(top_logprobs),
        )
        slots = dataclasses.replace(
            slots,
            token=jnp.where(slots.is_active, token, slots.token),
            position=jnp.where(slots.is_active, position, slots.position),
            is_active=slots.is_active & ~is_stop & (position < slots.last_position),
        )
        return step + 1, slots, layers, block

    _, slots, layers, block = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), slots, state.layers, empty))
    slots = jax.tree.map(lambda every, new: every.at[rows].set(new), state.slots, slots)
    slots, block = _everywhere((slots, block), layers)
    return EngineState(layers, slots), block


def _next_scores(
    params: dict[str, Any], config: ModelConfig, slots: Slots, cache: PagedCache
) -> tuple[tuple[Pages, ...], Float[Array, "R V"]]:
    hidden, cache_after = forward(
        params,
        config,
        slots.token[:, None],
        slots.position[:, None],
        slots.is_active[:, None].astype(jnp.int32),
        cache,
        dtype=_dtype(params),
    )
    assert cache_after is not None
    return cache_after.layers, _whole_vocabulary(logits(params, config, hidden[:, 0]), cache.layers)


def _whole_vocabulary(scores: Float[Array, "R V"], layers: tuple[Pages, ...]) -> Float[Array, "R V"]:
    # The head is split over the vocabulary, and the sampler needs sums over all of it: one gathering of the logits.
    # That they are split is said first, or the compiler would gather the head, which is far larger.
    mesh = layers[0].reader.mesh
    if mesh is not None and scores.shape[1] % mesh.size == 0:
        scores = jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, P(None, "tensor")))
    return _everywhere(scores, layers)


def _everywhere(tree: Any, layers: tuple[Pages, ...]) -> Any:
    """The same values whole on every device of the engine: what is not pages has to stay as it is from call to call."""
    mesh = layers[0].reader.mesh
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def _dtype(params: dict[str, Any]) -> jnp.dtype:
    # The generator computes in the precision in which its weights were published.
    return params["embed"]["embedding"].dtype
