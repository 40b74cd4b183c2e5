"""The shapes of an engine are known at start, and after compiling them nothing else is ever compiled."""

import dataclasses
from typing import Any

import jax
import numpy as np


def test_every_shape_is_listed(tiny: Any):
    batcher = tiny.batcher(num_slots=20, max_new_tokens=90, prefill_rows=3, prefill_chunk=64)
    assert batcher.shapes() == [
        *[("prefill", 1, 32), ("prefill", 2, 32), ("prefill", 1, 64)],
        *[("decode", rows, 3) for rows in (10, 15, 20)],
    ]
    assert tiny.batcher(prefill_chunk=4).shapes()[0] == ("prefill", 1, 4)
    # No sequence of this engine is longer than 24 tokens, so the widest chunk is never met.
    assert max(width for _, _, width in tiny.batcher(prefill_chunk=512).shapes()) == 32


def test_after_the_warm_up_nothing_is_traced(tiny: Any):
    batcher = tiny.batcher(num_pages=10)
    reports: list[tuple[int, int]] = []
    batcher.warm_up(lambda done, total: reports.append((done, total)))
    total = len(batcher.shapes())
    assert reports == [(done, total) for done in range(total + 1)]
    assert batcher.num_running == batcher.num_sampled == batcher.num_prefilled == 0
    rng = np.random.default_rng(0)
    requests = [tiny.request(i, int(rng.integers(9, 13)), max_new_tokens=12) for i in range(30)]
    with jax.no_tracing():
        warm = tiny.finish(batcher, requests)
    assert batcher.num_preempted > 0  # the queue, the small batch and the way back were all met
    cold = tiny.finish(tiny.batcher(num_pages=10), requests)
    assert {i: r.completion_ids.tolist() for i, r in warm.items()} == {
        i: r.completion_ids.tolist() for i, r in cold.items()
    }


def test_a_random_id_is_what_a_sample_depends_on(tiny: Any):
    request = tiny.request(3, [4, 5, 6])
    named = dataclasses.replace(tiny.request(99, [4, 5, 6]), random_id=3)
    rollouts = tiny.finish(tiny.batcher(), [request, named])
    assert rollouts[3].completion_ids.tolist() == rollouts[99].completion_ids.tolist()
    other = tiny.finish(tiny.batcher(), [tiny.request(99, [4, 5, 6])])
    assert other[99].completion_ids.tolist() != rollouts[99].completion_ids.tolist()
