"""The device side: paged prefill and decode against one full forward, stop ids as data, and slots kept apart."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.generate import engine
from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.logprob import token_logprob
from magistral_jax.policy.pages import ONE_DEVICE, PagedCache, PageReader
from magistral_jax.policy.sharding import generator_shardings, make_generator_mesh
from magistral_jax.policy.transformer import forward, init_params, logits, unstack
from magistral_jax.records import SamplingParams

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
    params: dict[str, Any],
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    slots: engine.Slots,
    reader: PageReader = ONE_DEVICE,
) -> engine.EngineState:
    """A pool with all prompts but their last tokens in it, and the slots started."""
    state = engine.init_state(
        config,
        num_slots=len(prompts),
        num_pages=len(prompts) * WIDTH,
        page_size=PAGE,
        dtype=jnp.dtype("float32"),
        reader=reader,
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


# --- several devices -------------------------------------------------------------------------------------------------

SPLIT = {"num_heads": 8, "num_kv_heads": 4, "vocab_size": 72}


def on_mesh(tiny: Any, num_devices: int) -> tuple[ModelConfig, Any, PageReader]:
    """A model, its weights on a mesh, and how pages are read there."""
    config = dataclasses.replace(tiny.model, **SPLIT)
    mesh = make_generator_mesh(num_devices, num_taken=1)
    return config, jax.device_put(tiny.params(1, config), generator_shardings(config, mesh)), PageReader("xla", mesh)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_an_engine_on_several_devices_samples_what_one_does(tiny: Any, num_devices: int):
    config, weights, reader = on_mesh(tiny, num_devices)
    prompts = random_prompts()
    slots = lambda: make_slots(prompts, active=[True, True, False, True])
    alone, expected = decode(
        tiny.params(1, config), config, start(tiny.params(1, config), config, prompts, slots()), NO_STOP, KEY
    )
    state = start(weights, config, prompts, slots(), reader)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    state, block = decode(weights, config, state, NO_STOP, KEY)
    np.testing.assert_array_equal(np.asarray(block.tokens), np.asarray(expected.tokens))
    np.testing.assert_allclose(np.asarray(block.logprob), np.asarray(expected.logprob), atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(state.layers[1].keys), np.asarray(alone.layers[1].keys), atol=TOLERANCE)
    # Everything lies as before, so the next block is the same program; and no device holds what is another's.
    jax.tree.map(
        lambda leaf, was: leaf.sharding.is_equivalent_to(was, leaf.ndim) or pytest.fail(str(leaf)), state, before
    )
    assert {shard.data.shape[1] for shard in state.layers[0].keys.addressable_shards} == {4 // num_devices}
    assert len(jax.tree.leaves(weights)[-1].sharding.device_set) == num_devices


def test_a_decode_step_on_a_mesh_sums_twice_a_layer_and_gathers_the_logits(tiny: Any):
    config, weights, reader = on_mesh(tiny, 4)
    state = engine.init_state(
        config, num_slots=4, num_pages=20, page_size=PAGE, dtype=jnp.dtype("float32"), reader=reader
    )
    rows = np.arange(4, dtype=np.int32)
    args = (weights, config, state, rows, own_pages(rows), NO_STOP, KEY)
    text = str(engine.decode_block.lower(*args, num_steps=2).compile().as_text())
    found = re.findall(
        r"= (\S+) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\(", text
    )
    # Embedding, attention and feed-forward of each layer; and [rows, vocabulary]. Left to the compiler alone, one layer
    # takes 17 gatherings and 33 permutations, and the head is gathered instead of the logits.
    assert collections.Counter(kind for _, kind in found) == {"all-reduce": 1 + 2 * config.num_layers, "all-gather": 1}
    assert next(shape for shape, kind in found if kind == "all-gather").startswith("f32[4,72]")


def test_a_batcher_on_a_mesh_makes_the_same_rollouts(tiny: Any):
    config, weights, reader = on_mesh(tiny, 2)
    requests = [tiny.request(i, length, prompt_seed=i // 2) for i, length in enumerate((3, 3, 9, 9, 5))]
    rollouts = []
    for params, mesh in ((tiny.params(1, config), None), (weights, reader.mesh)):
        batcher = ContinuousBatcher(config, dataclasses.replace(tiny.engine, num_pages=12), (0, 1), 0, mesh)
        batcher.set_weights(params, 0)
        rollouts.append(tiny.finish(batcher, requests))
    for request_id, rollout in rollouts[0].items():
        np.testing.assert_array_equal(rollouts[1][request_id].completion_ids, rollout.completion_ids)


# --- precision of the pages ------------------------------------------------------------------------------------------


# Log-prob, in nats, of given tokens against float32 pages: mean and largest gap; about twice what was measured.
@pytest.mark.parametrize(
    ("kv_dtype", "mean", "largest"), [("bfloat16", 0.01, 0.06), ("int8", 0.02, 0.1), ("float8_e4m3fn", 0.1, 0.6)]
)
def test_rounded_pages_shift_log_probs_within_bounds(tiny: Any, kv_dtype: str, mean: float, largest: float):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 70, (4, 16)), jnp.int32)
    positions = jnp.tile(jnp.arange(16)[None], (4, 1))

    @jax.jit
    def score(params: Any, layers: Any) -> jax.Array:
        cache = PagedCache(layers, own_pages(range(4)))
        hidden, _ = forward(params, tiny.model, tokens, positions, jnp.ones_like(tokens), cache)
        return token_logprob(params, tiny.model, hidden, tokens)[0][:, 1:]

    def logprob(name: str) -> np.ndarray:
        dtype = jnp.dtype(name)
        state = engine.init_state(tiny.model, num_slots=4, num_pages=4 * WIDTH, page_size=PAGE, dtype=dtype)
        return np.asarray(score(tiny.params(0), state.layers))

    gap = np.abs(logprob(kv_dtype) - logprob("float32"))
    assert 1e-5 < gap.mean() < mean
    assert gap.max() < largest


# --- long contexts ---------------------------------------------------------------------------------------------------


def test_a_context_of_40_000_tokens_end_to_end():
    # Chunked prefill, pages, decoding; and the trainer's forward pass over one row of that length.
    length, new = 40_000, 4
    model = ModelConfig(vocab_size=64, d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8)
    config = GenerationConfig(
        num_slots=1, page_size=128, max_prompt_tokens=length, max_new_tokens=new, prefill_rows=1, prefill_chunk=2048
    )
    params = init_params(model, jax.random.key(0))
    batcher = ContinuousBatcher(model, config, (), 0)
    batcher.set_weights(unstack(params, model), 0)
    prompt = np.random.default_rng(0).integers(0, 64, length).astype(np.int32)
    batcher.submit(GenerationRequest(0, prompt, SamplingParams(1.0, 1.0, 0, new)))
    rollouts = []
    while not rollouts:
        rollouts = batcher.step()

    @jax.jit
    def score(params: Any, tokens: Any) -> jax.Array:
        positions = jnp.arange(tokens.shape[1])[None]
        hidden, _ = forward(params, model, tokens, positions, jnp.ones_like(tokens))
        return token_logprob(params, model, hidden, tokens)[0]

    expected = score(params, jnp.asarray([[*prompt, *rollouts[0].completion_ids]], jnp.int32))[0, length:]
    np.testing.assert_allclose(rollouts[0].behavior_logprob, np.asarray(expected), atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 64], ids=["decode", "prefill"])
def test_memory_does_not_grow_with_the_page_table(tiny: Any, chunk: int):
    def temporary_bytes(width: int) -> int:
        make = lambda: engine.init_state(
            tiny.model, num_slots=8, num_pages=4096, page_size=16, dtype=jnp.dtype("float32")
        )
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)
        state, table = jax.eval_shape(make), shape(8, width)
        if chunk == 1:
            args = (tiny.params(0), tiny.model, state, shape(8), table, NO_STOP, KEY)
            lowered = engine.decode_block.lower(*args, num_steps=2)
        else:
            args = (tiny.params(0), tiny.model, state, shape(8, chunk), shape(8), shape(8), table)
            lowered = engine.prefill.lower(*args)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # 40,960 tokens a row instead of 1,024. Bug: gathering the row's pages takes 20 MB for the keys of one layer.
    assert temporary_bytes(2560) < temporary_bytes(64) + 2e5
