"""The device side: paged prefill and decode against one full forward, stop ids as data, and slots kept apart."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.generate import engine
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import forward, logits

PAGE = 4
WIDTH = 5  # pages of a slot: 20 tokens
LENGTHS = [1, PAGE, PAGE + 1, 11]  # shortest, one page exactly, one token more, ragged
NUM_NEW = 8
# Float32 sums in another order (pages against rows); the largest difference seen is 5e-6.
TOLERANCE = 5e-5

VARIANTS = {
    "grouped queries": {},
    "the rest": {
        "sliding_window": 3,
        "num_kv_heads": 4,
        "tie_embeddings": True,
        "qkv_bias": True,
        "qk_norm": True,
    },
}


def own_pages(rows: Any) -> Any:
    """Slot i has pages i·W … i·W + W − 1."""
    return jnp.asarray(np.asarray(rows)[:, None] * WIDTH + np.arange(WIDTH), jnp.int32)


def make_slots(
    prompts: Sequence[np.ndarray],
    stop_at: int = NUM_NEW,
    active: Any = None,
    request_ids: tuple[int, ...] = (5, 6, 7, 8),
    top_k: int = 0,
) -> engine.Slots:
    """One slot a prompt."""
    count = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    full = lambda value, dtype: jnp.full(count, value, dtype)
    return engine.Slots(
        token=jnp.asarray([prompt[-1] for prompt in prompts], jnp.int32),
        position=jnp.asarray(lengths - 1),
        last_position=jnp.asarray(lengths - 1 + stop_at),
        is_active=jnp.ones(count, bool) if active is None else jnp.asarray(active),
        request_id=jnp.asarray(request_ids, jnp.uint32),
        temperature=full(1.0, jnp.float32),
        top_p=full(1.0, jnp.float32),
        top_k=full(top_k, jnp.int32),
    )


def start(
    params: dict[str, Any], config: ModelConfig, prompts: Sequence[np.ndarray], slots: engine.Slots
) -> engine.EngineState:
    """A pool with all prompts but their last tokens in it, and the slots started."""
    state = engine.init_state(
        config,
        num_slots=len(prompts),
        num_pages=len(prompts) * WIDTH,
        page_size=PAGE,
        dtype=jnp.dtype("float32"),
    )
    tokens = np.zeros((len(prompts), 16), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt) - 1] = prompt[:-1]
    lengths = jnp.asarray([len(prompt) - 1 for prompt in prompts], jnp.int32)
    starts, table = jnp.zeros_like(lengths), own_pages(range(len(prompts)))
    state = engine.prefill(params, config, state, jnp.asarray(tokens), starts, lengths, table)
    nowhere = jnp.full(len(prompts), len(prompts) * WIDTH, jnp.int32)
    return engine.admit(state, slots, slots.is_active, jnp.zeros_like(nowhere), nowhere)


def random_prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 70, length).astype(np.int32) for length in LENGTHS]


def decode(params: Any, config: ModelConfig, state: engine.EngineState, stop_ids: Any, key: Any, rows: Any = None):
    rows = np.arange(len(state.slots.token), dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    return engine.decode_block(params, config, state, rows, own_pages(rows), stop_ids, key, num_steps=NUM_NEW)


NO_STOP = jnp.asarray([-7], jnp.int32)  # no token has this id
KEY = jax.random.key(0)


@pytest.mark.parametrize("name", VARIANTS)
def test_paged_decoding_equals_one_full_forward(tiny: Any, name: str):
    config = dataclasses.replace(tiny.model, **VARIANTS[name])
    weights = tiny.params(1, config)
    prompts = random_prompts()
    state, block = decode(weights, config, start(weights, config, prompts, make_slots(prompts)), NO_STOP, KEY)
    assert np.asarray(block.is_sampled).all()
    assert not np.asarray(state.slots.is_active).any()

    sampled = np.asarray(block.tokens)
    tokens = np.zeros((len(prompts), 20), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt) + NUM_NEW] = [*prompt, *sampled[:, row]]
    positions = np.tile(np.arange(20, dtype=np.int32), (len(prompts), 1))

    @jax.jit
    def score(weights: dict[str, Any], tokens: Any, positions: Any) -> jax.Array:
        hidden, _ = forward(tiny.stack(weights), config, tokens, positions, jnp.ones_like(tokens))
        return jax.nn.log_softmax(logits(weights, config, hidden), axis=-1)

    logprob = np.asarray(score(weights, tokens, positions))
    for row, prompt in enumerate(prompts):
        at = np.arange(len(prompt), len(prompt) + NUM_NEW)
        expected = logprob[row, at - 1, tokens[row, at]]
        np.testing.assert_allclose(np.asarray(block.logprob)[:, row], expected, atol=TOLERANCE)


def test_two_sets_of_stop_ids_work_without_a_retrace(tiny: Any):
    prompts = random_prompts()
    slots = make_slots(prompts)
    _, free = decode(tiny.params(0), tiny.model, start(tiny.params(0), tiny.model, prompts, slots), NO_STOP, KEY)
    free_tokens = np.asarray(free.tokens)
    for stop in free_tokens[2, 0], free_tokens[4, 1]:
        stop_ids = jnp.asarray([stop], jnp.int32)
        state = start(tiny.params(0), tiny.model, prompts, make_slots(prompts))
        with jax.no_tracing():
            _, block = decode(tiny.params(0), tiny.model, state, stop_ids, KEY)
        for slot in range(len(prompts)):
            is_stop = free_tokens[:, slot] == stop
            num = int(is_stop.argmax()) + 1 if is_stop.any() else NUM_NEW
            # The stop token itself is sampled, nothing after it, and what comes before is unchanged.
            np.testing.assert_array_equal(np.asarray(block.is_sampled)[:, slot], np.arange(NUM_NEW) < num)
            np.testing.assert_array_equal(np.asarray(block.tokens)[:num, slot], free_tokens[:num, slot])


def test_inactive_slots_sample_nothing_write_nothing_and_keep_their_state(tiny: Any):
    prompts = random_prompts()
    active = np.array([True, False, True, False])
    slots = make_slots(prompts, active=active)
    state = start(tiny.params(0), tiny.model, prompts, slots)
    before = jax.tree.map(np.array, state)  # a copy: the state is donated
    after, block = decode(tiny.params(0), tiny.model, state, NO_STOP, KEY)
    np.testing.assert_array_equal(np.asarray(block.is_sampled), np.tile(active, (NUM_NEW, 1)))
    for old, new in zip(before.layers, after.layers, strict=True):
        for pages, now in ((old.keys, np.asarray(new.keys)), (old.values, np.asarray(new.values))):
            by_slot, now_by_slot = pages.reshape(4, WIDTH, -1), now.reshape(4, WIDTH, -1)
            np.testing.assert_array_equal(by_slot[~active], now_by_slot[~active])
            assert (by_slot[active] != now_by_slot[active]).any()
    np.testing.assert_array_equal(np.asarray(after.slots.token)[1], before.slots.token[1])
    np.testing.assert_array_equal(np.asarray(after.slots.position)[1], before.slots.position[1])


@pytest.mark.parametrize("rows", [[2, 0], [0, 2, 3], [3, 2, 1, 0]])
def test_a_block_of_some_rows_does_what_a_block_of_all_does(tiny: Any, rows: list[int]):
    prompts = random_prompts()
    slots = lambda: make_slots(prompts, active=np.array([True, False, True, False]))
    begin = lambda: start(tiny.params(0), tiny.model, prompts, slots())
    whole, block = decode(tiny.params(0), tiny.model, begin(), NO_STOP, KEY)
    state, columns = decode(tiny.params(0), tiny.model, begin(), NO_STOP, KEY, rows)
    is_sampled = np.asarray(columns.is_sampled)
    np.testing.assert_array_equal(is_sampled, np.asarray(block.is_sampled)[:, rows])
    np.testing.assert_array_equal(np.asarray(columns.tokens)[is_sampled], np.asarray(block.tokens)[:, rows][is_sampled])
    for mine, its in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(its), atol=TOLERANCE)


def test_stale_pages_beyond_a_sequence_are_not_read(tiny: Any):
    # Pages are handed on without being cleared. Whatever is left in them must not matter.
    prompts = random_prompts()
    _, clean = decode(
        tiny.params(0), tiny.model, start(tiny.params(0), tiny.model, prompts, make_slots(prompts)), NO_STOP, KEY
    )
    state = start(tiny.params(0), tiny.model, prompts, make_slots(prompts))
    position = np.arange(WIDTH * PAGE).reshape(1, WIDTH, 1, PAGE, 1)
    is_later = (position >= np.array(LENGTHS).reshape(4, 1, 1, 1, 1) - 1).reshape(4 * WIDTH, 1, PAGE, 1)
    dirty = jax.tree.map(lambda pages: jnp.where(is_later, 1e3, pages), state.layers)
    _, block = decode(tiny.params(0), tiny.model, engine.EngineState(dirty, state.slots), NO_STOP, KEY)
    np.testing.assert_array_equal(np.asarray(block.tokens), np.asarray(clean.tokens))
    np.testing.assert_array_equal(np.asarray(block.logprob), np.asarray(clean.logprob))


def test_the_limit_ends_a_slot_and_no_active_slot_ends_the_block(tiny: Any):
    prompts = random_prompts()
    state = start(tiny.params(0), tiny.model, prompts, make_slots(prompts, stop_at=3))
    state, block = decode(tiny.params(0), tiny.model, state, NO_STOP, KEY)
    np.testing.assert_array_equal(np.asarray(block.is_sampled).sum(axis=0), [3] * 4)
    np.testing.assert_array_equal(np.asarray(state.slots.position), np.array(LENGTHS) - 1 + 3)
    # The loop ended with the last slot: had it gone on, the later rows would hold some sampled token.
    assert (np.asarray(block.tokens)[3:] == 0).all()
    _, block = decode(tiny.params(0), tiny.model, state, NO_STOP, KEY)
    assert not np.asarray(block.is_sampled).any()


def test_admission_copies_the_partial_page_and_touches_old_slots_not_at_all(tiny: Any):
    state = engine.init_state(tiny.model, num_slots=4, num_pages=20, page_size=PAGE, dtype=jnp.dtype("float32"))
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda pages: jnp.asarray(rng.normal(size=pages.shape), jnp.float32), state.layers)
    prompts = random_prompts()
    old, new = make_slots(prompts), make_slots(prompts[::-1], request_ids=(15, 16, 17, 18), top_k=3)
    before = jax.tree.map(np.array, (random, old))
    is_new = jnp.asarray([False, True, False, True])
    source, target = jnp.asarray([0, 2, 0, 3], jnp.int32), jnp.asarray([20, 9, 20, 20], jnp.int32)
    after = engine.admit(engine.EngineState(random, old), new, is_new, source, target)
    for pages, now in zip(jax.tree.leaves(before[0]), jax.tree.leaves(after.layers), strict=True):
        expected = pages.copy()
        expected[9] = pages[2]
        np.testing.assert_array_equal(np.asarray(now), expected)
    for field in dataclasses.fields(engine.Slots):
        mixed = np.asarray(getattr(after.slots, field.name))
        np.testing.assert_array_equal(mixed[::2], getattr(before[1], field.name)[::2])
        np.testing.assert_array_equal(mixed[1::2], np.asarray(getattr(new, field.name))[1::2])


def test_deactivating_stops_only_the_slots_named(tiny: Any):
    slots = make_slots(random_prompts(), active=[True, True, False, False])
    stopped = engine.deactivate(slots, jnp.asarray([True, False, True, False]))
    assert np.asarray(stopped.is_active).tolist() == [False, True, False, False]
    np.testing.assert_array_equal(np.asarray(stopped.request_id), np.asarray(slots.request_id))


def test_the_page_pool_is_donated_from_call_to_call(tiny: Any):
    prompts = random_prompts()
    state = start(tiny.params(0), tiny.model, prompts, make_slots(prompts))
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.layers)}
    after, _ = decode(tiny.params(0), tiny.model, state, NO_STOP, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.layers))
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.layers)} == pointers
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
